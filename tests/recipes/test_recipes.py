"""Recipes: every shipped one is valid, and every fault is one line with file, line, value and what is allowed."""

import pytest

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.recipes import load_recipe, load_recipes, pick_recipes

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
    assert {"reverse-20", "shortgpt-20", "shortgpt-20-ls", "rtn-w4"} <= recipes.keys()
    assert all((PROJECT / "recipes" / f"{name}.yaml").is_file() for name in recipes)
    assert all(r.description for r in recipes.values())


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
    shape = Checkpoint(stories).stated_shape
    with pytest.raises(InputError, match=r"recipe try-20: ratio 0\.9"):
        load_recipe(written(tmp_path, GOOD.replace("0.20", "0.9"))).check(shape)
    short = GOOD.replace("description: a try", "calibration: {sequences: 2, length: 64}")
    with pytest.raises(InputError, match="fitting tokens and needs"):
        load_recipe(written(tmp_path, short)).check(shape)
    absent = GOOD.replace("description: a try", "calibration: {corpus: nowhere.txt}")
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        load_recipe(written(tmp_path, absent)).check(shape)
