"""Every benchmark that a CPU can run in seconds does so with `--tiny`; the others say in their docstring why not."""

import ast
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compression_dags.paths import PROJECT

FOLDER = PROJECT / "benchmarks"
#: Script → what it is given beside `--tiny`; `WORK` is a folder that does not exist yet.
TINY = {
    "architectures.py": (),
    "width_methods.py": (),
    "come_speed.py": ("--work", "WORK", "--device", "cpu", "--refit"),
    "depth_quality.py": (),
    "quantization_speed.py": ("--work", "WORK", "--device", "cpu", "--ours", "--repeats", "1"),
    "recipe_quality.py": (),
    "similarity_speed.py": (),
    "sparsity_quality.py": (),
    "sparsity_speed.py": ("--work", "WORK", "--device", "cpu", "--ours", "--repeats", "1"),
    "ui_start.py": ("--folder", "WORK"),
}
#: Modules that other scripts import.
MODULES = {"gpu_smoke_rows.py", "gpu_smoke_cases.py", "quality_rig.py", "random_llama.py", "speed_rig.py", "ui_rig.py"}


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script as `python benchmarks/SCRIPT WORDS` would, but in this process, which has imported torch."""

    def run(script: str, *words: str) -> None:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(FOLDER / script), run_name="__main__")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_it_runs(script: str, run_script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [str(tmp_path / "work") if word == "WORK" else word for word in TINY[script]]
    run_script(script, "--tiny", *words)
    printed = capsys.readouterr().out
    assert printed.strip() and '"failed"' not in printed


def test_the_plot_is_drawn_from_the_log(run_script: Callable[..., None], tmp_path: Path):
    drawn = tmp_path / "front.svg"
    run_script("plot_front.py", "--out", str(drawn))
    text = drawn.read_text(encoding="utf-8")
    assert drawn.stat().st_size < 60_000 and "6 layers cut" in text and "dense" in text


def test_the_others_say_why_not():
    others = {path.name for path in FOLDER.glob("*.py")} - TINY.keys() - MODULES - {"plot_front.py"}
    silent = {
        name
        for name in others
        if not any(
            word in (ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or "")
            for word in ("--tiny", "not a dependency of this project")
        )
    }
    assert not silent
