"""Folders of recipes: what comes before what, and what the UI is shown."""

import json

import pytest
from click.testing import CliRunner

from compression_dags.cli.main import main
from compression_dags.paths import PROJECT
from compression_dags.recipes import load_recipes, shown_recipes

ONE = "name: {}\ndescription: {}\nstages: [{{quantize: {{method: rtn, scheme: W8A16}}}}]\n"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESSION_DAGS_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "studies").mkdir(parents=True)
    return tmp_path


def own(desk, name, says="mine", folder="recipes"):
    (desk / folder / f"{name}.yaml").write_text(ONE.format(name, says))


def test_own_recipes_and_studies_stand_beside_the_shipped(desk):
    shipped = load_recipes(PROJECT / "recipes")
    own(desk, "first")
    own(desk, "second", folder="recipes/studies")
    found = load_recipes()
    assert set(found) == {*shipped, "first", "second"} and found.studies == {*shipped.studies, "second"}
    assert set(shown_recipes()) == {*(shipped.keys() - shipped.studies), "first"}


def test_a_folder_comes_before_its_studies_and_the_own_before_the_shipped(desk):
    own(desk, "first")
    own(desk, "first", "of a study", folder="recipes/studies")
    own(desk, "gptq-w3")
    own(desk, "rtn-w8", "of a study", folder="recipes/studies")
    found = load_recipes()
    assert found["first"].description == found["gptq-w3"].description == "mine"
    assert found["rtn-w8"].description == "of a study"
    assert not found.studies & {"first", "gptq-w3", "rtn-w8"}
    assert found.files["first"] == desk / "recipes" / "first.yaml"


def test_a_named_folder_counts_alone_with_its_studies_and_is_shown_whole(desk, monkeypatch):
    own(desk, "first")
    own(desk, "second", folder="recipes/studies")
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(desk / "recipes"))
    assert set(load_recipes()) == set(shown_recipes()) == {"first", "second"} and load_recipes().studies == {"second"}
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(desk / "recipes" / "studies"))
    assert set(load_recipes()) == set(shown_recipes()) == {"second"} and not load_recipes().studies


def test_no_tasks_are_read_as_recipes(desk):
    for folder in ("recipes", "recipes/studies"):
        (desk / folder / "evaluation.yaml").write_text("tasks: {}\n")
    assert not load_recipes().left_out


def test_bad_studies_cost_themselves(desk):
    own(desk, "first")
    (desk / "recipes" / "studies").rmdir()
    (desk / "recipes" / "studies").write_text("")
    found = load_recipes(desk / "recipes")
    assert set(found) == {"first"} and "studies is a file" in found.left_out[desk / "recipes" / "studies"]


def test_the_verb_lists_studies_when_asked(desk):
    shipped = load_recipes(PROJECT / "recipes")

    def said(*words):
        done = CliRunner().invoke(main, ["recipes", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    names = [line.split()[0] for line in said().splitlines() if line and not line.startswith("and ")]
    assert set(names) == shipped.keys() - shipped.studies
    assert f"and {len(shipped.studies)} of studies; --all lists them" in said()
    everything = [line.split()[0] for line in said("--all").splitlines()]
    assert everything[: len(names)] == names and set(everything) == set(shipped)
    assert set(json.loads(said("--json"))) == set(shipped) == set(json.loads(said("--json", "--all")))
    (desk / "recipes" / "bad.yaml").write_text("")
    done = CliRunner().invoke(main, ["recipes"])
    assert done.exit_code == 2 and "left out: 1" in done.stdout
