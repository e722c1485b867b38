"""Recipes: every shipped one is valid, and every fault is one line with file, line, value and what is allowed."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.main import DEMO
from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.recipes import BASELINE_RECIPE, Recipe, load_recipe, load_recipes, pick_recipes, recipe_of

GOOD = """name: try-20
description: a try
stages:
  - merge: {method: shortgpt, ratio: 0.20}
  - recover: {method: least-squares}
"""


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_shipped_recipes_are_valid_and_named_as_people_guess():
    recipes = load_recipes(PROJECT / "recipes")
    assert not recipes.left_out and all(r.description for r in recipes.values())
    canonical = recipes.keys() - recipes.studies
    assert {*DEMO, "gptq-w4", "sparsegpt-50"} <= canonical and 12 <= len(canonical) <= 15
    assert all((PROJECT / "recipes" / f"{name}.yaml").is_file() for name in canonical)


def test_no_recipe_changed_by_moving_into_a_matrix_file():
    """`digests.json` was written when each of these had a file of its own."""
    found = {}
    for name, recipe in load_recipes(PROJECT / "recipes").items():
        said = {k: v for k, v in recipe.describe().items() if k in ("calibration", "stages", "evaluate")}
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    assert found == json.loads((Path(__file__).parent / "digests.json").read_text())


def test_reads_a_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD))
    assert recipe.slug == "try_20" and recipe.merge.ratio == 0.2 and len(recipe.recoveries) == 1
    assert recipe.calibration.sequences == 128 and recipe.quantize is None


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("ratio: 0.20", "ratio: 1.5", 4, r"stages\.0\.merge\.ratio: 1\.5: .*less than 1"),
        ("ratio: 0.20", "ratio: 0", 4, "greater than 0"),
        ("ratio: 0.20", "ratoi: 0.20", 4, "unknown key; allowed: .*ratio"),
        ("shortgpt", "longgpt", 4, "'longgpt' is unknown; allowed: .*shortgpt"),
        ("merge:", "mrege:", 4, "unknown stage; allowed: merge"),
        ("name: try-20", "name: Try_20", 1, "lower-case words"),
        ("name: try-20", "name: baseline", 1, "baseline"),
        ("name: try-20", "name: try-20@16x256", 1, "lower-case words"),
        ("description: a try", "colour: red", 2, "unknown key; allowed: name"),
        ("description: a try", "calibration: {sequences: 0}", 2, "greater than or equal to 1"),
        ("description: a try", "calibration: {corpsu: x}", 2, "unknown key; allowed: corpus"),
        ("description: a try", "evaluate: {a: 1}", 2, "must be a task"),
        ("  - merge: {method: shortgpt, ratio: 0.20}\n", "", 4, "recover needs a merge stage"),
        ("stages:", "stages: []\nrest:", 4, "unknown key"),
        (", ratio: 0.20", "", 4, "exactly one of ratio"),
        ("{method: shortgpt", "{method: shortgpt", 0, None),
    ],
)
def test_faults_are_one_line_with_their_place(tmp_path, old, new, line, says):
    path = written(tmp_path, GOOD.replace(old, new))
    if says is None:
        load_recipe(path)
        return
    with pytest.raises(InputError, match=says) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    if "rest:" not in new and "recover needs" not in says:
        assert f"{path}:{line}:" in str(caught.value)


def test_stage_order(tmp_path):
    swapped = GOOD.replace("  - recover: {method: least-squares}\n", "") + "  - merge: {method: reverse, ratio: 0.2}\n"
    with pytest.raises(InputError, match="may come more than once"):
        load_recipe(written(tmp_path, swapped))


def test_not_yaml(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.yaml:1"):
        load_recipe(written(tmp_path, "name: a: b\n"))


def test_two_recipes_of_one_name(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    found = load_recipes(tmp_path)
    assert list(found) == ["try-20"] and list(found.left_out) == [tmp_path / "b.yaml"]
    assert "second recipe" in found.left_out[tmp_path / "b.yaml"] and "a.yaml" in found.left_out[tmp_path / "b.yaml"]


def test_unknown_recipe_suggests():
    recipes = load_recipes(PROJECT / "recipes")
    with pytest.raises(InputError, match="shortgpt-20"):
        pick_recipes(recipes, ["shortgtp-20"])


def test_check_against_a_model(stories, tmp_path):
    facts = Checkpoint(stories).stated_shape
    with pytest.raises(InputError, match=r"recipe try-20: ratio 0\.9"):
        load_recipe(written(tmp_path, GOOD.replace("0.20", "0.9"))).check(facts)
    short = GOOD.replace("description: a try", "calibration: {sequences: 2, length: 64}")
    with pytest.raises(InputError, match="fitting tokens and needs"):
        load_recipe(written(tmp_path, short)).check(facts)
    absent = GOOD.replace("description: a try", "calibration: {corpus: nowhere.txt}")
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        load_recipe(written(tmp_path, absent)).check(facts)


def test_another_calibration_is_another_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD))
    small = recipe.with_calibration(16, 256)
    assert small.name == "try-20@16x256" and (small.calibration.sequences, small.calibration.length) == (16, 256)
    assert (small.stages, small.calibration.seed) == (recipe.stages, recipe.calibration.seed)
    assert recipe.with_calibration(None, None) is recipe and recipe.with_calibration(128, 2048) is recipe
    assert recipe.with_calibration(16, None).name == "try-20@16x2048"
    assert small.with_calibration(None, 64).name == "try-20@16x64"
    assert BASELINE_RECIPE.with_calibration(16, 256) is BASELINE_RECIPE
    for sequences, length, says in [(0, None, "sequences: 0"), (None, 7, "length: 7"), (10**13, None, "sequences")]:
        with pytest.raises(InputError, match=f"recipe try-20: calibration.*{says}"):
            recipe.with_calibration(sequences, length)


def test_a_derived_name_is_a_partition_key(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD.replace("try-20", "a" * 63)))
    name = recipe.with_calibration(10**12, 10**12).name
    assert len(name) <= 100 and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]*", name)


def test_only_the_baseline_has_no_stages():
    assert BASELINE_RECIPE.name == "baseline" and BASELINE_RECIPE.stages == ()
    with pytest.raises(ValueError, match="only baseline has no stages"):
        Recipe("empty", "", BASELINE_RECIPE.calibration, ())


def test_a_description_reads_back():
    shipped = load_recipes(PROJECT / "recipes").values()
    for recipe in (*shipped, *(r.with_calibration(16, 256) for r in shipped), BASELINE_RECIPE):
        assert recipe_of(json.loads(json.dumps(recipe.as_run()))) == recipe == recipe_of(recipe.describe())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": None}, "recipe None: name: must be text"),
        ({"name": "Shout"}, "recipe Shout: name: .*lower-case words"),
        ({"name": "reverse-20@1x8"}, "recipe reverse-20@1x8: name: .*must be reverse-20@128x2048"),
        ({"name": "baseline"}, "recipe baseline: stages: must be an empty list"),
        ({"stages": []}, "recipe reverse-20: stages: must be a list with at least one"),
        ({"stages": [{"merge": {"method": "fold"}}]}, "recipe reverse-20: stages.0.merge.method: 'fold' is unknown"),
        ({"stages": [{"merge": {"method": "reverse", "deep": 1}}]}, "stages.0.merge.deep: unknown key"),
        ({"calibration": {"corpus": 3}}, "recipe reverse-20: calibration.corpus: 3"),
        ({"colour": "red"}, "recipe reverse-20: colour: unknown key"),
    ],
)
def test_a_description_that_is_not_known_here_names_the_recipe(changed, says):
    described = load_recipes(PROJECT / "recipes")["reverse-20"].describe()
    with pytest.raises(InputError, match=says):
        recipe_of({**described, **changed})
