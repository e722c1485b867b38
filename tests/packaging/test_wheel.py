"""What a wheel and an sdist hold; the wheel at work in an empty directory: unpacked, and in a fresh environment."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from compression_dags.paths import PROJECT
from compression_dags.recipes import load_recipes, own_recipes, recipes_folder

CODE, SHIPPED = ("compression_dags", "assets", "resources"), ("recipes", "models", "data")
OTHER = ("dagster.yaml", "workspace.yaml")


def tracked() -> list[str]:
    """The project's files, by git where the tree is a clone, else all that lie in its folders."""
    done = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [name for name in done.stdout.splitlines() if (PROJECT / name).is_file()]
    folders = [path for name in (*CODE, *SHIPPED) for path in (PROJECT / name).rglob("*")]
    return [str(p.relative_to(PROJECT)) for p in folders if p.is_file() and "__pycache__" not in p.parts] + list(OTHER)


def contents(target: str) -> dict[str, str]:
    """Path in the archive → path in the tree, of a wheel or an sdist as it would be built now."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: install the dev extra")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    builder = {"wheel": WheelBuilder, "sdist": SdistBuilder}[target](str(PROJECT))
    return {f.distribution_path: f.path for f in builder.recurse_included_files()}


@pytest.fixture(scope="module")
def wheel() -> dict[str, str]:
    return contents("wheel")


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    for name, path in wheel.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return folder


def test_the_wheel_holds_the_code_and_everything_that_ships(wheel):
    names = tracked()
    code = {name for name in names if name.split("/")[0] in CODE}
    wanted = {name if name.startswith("compression_dags/") else f"compression_dags/{name}" for name in code}
    wanted |= {f"compression_dags/shipped/{name}" for name in names if name.split("/")[0] in SHIPPED or name in OTHER}
    assert "compression_dags/shipped/dagster.yaml" in wanted
    assert not wanted - set(wheel)
    strange = {name for name in wheel if not name.startswith("compression_dags/") or "__pycache__" in name}
    assert not strange


def test_the_sdist_holds_what_is_tracked():
    assert not set(tracked()) - set(contents("sdist"))


VERBS = """
import json, os
from click.testing import CliRunner
import compression_dags
from pathlib import Path
from compression_dags.cli.main import main
from compression_dags.resources.home import prepare_instance
from compression_dags.evaluation.tasks import PerplexityTask, load_tasks
from compression_dags.paths import PROJECT

def said(*words):
    done = CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)

found = {verb: said(verb) for verb in ("recipes", "methods", "models", "store")}
texts = [t for t in load_tasks(PROJECT / "recipes" / "evaluation.yaml").tasks.values() if t.kind == "perplexity"]
found |= {"code": compression_dags.__file__, "texts": [str(t.path) for t in texts]}
found["own"] = PerplexityTask(name="mine", file="mine.txt").read()
prepare_instance(Path(os.environ.get("COMPRESSION_DAGS_HOME") or ".compression_dags").absolute())
print(json.dumps(found | {"workspace": str(PROJECT / "workspace.yaml")}))
"""


def test_an_unpacked_wheel_works_in_an_empty_directory(site, tmp_path):
    (tmp_path / "mine.txt").write_text("once")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMPRESSION_DAGS")}
    command = [sys.executable, "-c", VERBS]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, shipped = json.loads(done.stdout), site / "compression_dags" / "shipped"
    assert Path(found["code"]) == site / "compression_dags" / "__init__.py"
    assert set(found["recipes"]) == set(load_recipes(PROJECT / "recipes")) and "merge: shortgpt" in found["methods"]
    assert found["models"]["stories260k"]["location"] == str(shipped / "models" / "stories260k")
    assert Path(found["workspace"]) == shipped / "workspace.yaml" and Path(found["workspace"]).is_file()
    made = tmp_path / ".compression_dags" / "dagster" / "dagster.yaml"
    assert found["store"] == {} and made.read_text() == (PROJECT / "dagster.yaml").read_text()
    assert len(found["texts"]) > 2 and all(Path(t).is_file() and t.startswith(str(shipped)) for t in found["texts"])
    assert found["own"] == "once"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `compression-dags` of a fresh environment, into which the built wheel was installed.

    Its dependencies are those of the environment that runs the tests; nothing is fetched.
    """
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: install the dev extra")
    folder = tmp_path_factory.mktemp("fresh")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    subprocess.run(install, check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # after what the wheel installed; an editable install beside the dependencies adds its path later still
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "compression-dags"


@pytest.mark.slow
def test_a_fresh_environment_with_the_wheel_runs_and_exports(installed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COMPRESSION_DAGS", "PYTHONPATH"))}
    environment |= {"HF_HUB_OFFLINE": "1"}

    def said(*words: str) -> str:
        done = subprocess.run(
            [installed, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    found = json.loads(said("run", "-m", "stories260k", "-r", "shortgpt-20-ls", "--json"))
    checkpoint = Path(found["recipes"]["shortgpt-20-ls"]["checkpoint"])
    assert checkpoint.is_relative_to(tmp_path / ".compression_dags")
    assert "shortgpt-20-ls" in said("leaderboard")
    said("export", "-m", "stories260k", "-r", "shortgpt-20-ls", "--to", "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    code = "import compression_dags; print(compression_dags.__file__)"
    done = subprocess.run([installed.with_name("python"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1])


def test_own_recipes_stand_beside_the_shipped_ones(tmp_path, monkeypatch):
    """So that what `plan` writes in any directory runs there, and nothing shipped is lost."""
    shipped = load_recipes(PROJECT / "recipes")
    monkeypatch.delenv("COMPRESSION_DAGS_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert recipes_folder() == PROJECT / "recipes" and own_recipes() == tmp_path / "recipes"
    own_recipes().mkdir()
    text = "name: {}\ndescription: mine\nstages: [{{quantize: {{method: rtn, scheme: W8A16}}}}]\n"
    (own_recipes() / "planned.yaml").write_text(text.format("planned"))
    (own_recipes() / "gptq-w4.yaml").write_text(text.format("gptq-w4"))
    found = load_recipes()
    assert set(found) == {*shipped, "planned"} and found["gptq-w4"].description == "mine"
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path / "recipes"))
    assert set(load_recipes()) == {"planned", "gptq-w4"}
    monkeypatch.delenv("COMPRESSION_DAGS_RECIPES")
    monkeypatch.chdir(PROJECT)
    assert set(load_recipes()) == set(shipped)
