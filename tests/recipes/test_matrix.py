"""Matrix files: what they expand to, and that every fault is one line with its place in the file."""

import pytest

from compression_dags.errors import InputError
from compression_dags.recipes import load_file, load_recipe, load_recipes, pick_recipes

GRID = """for:
  method: [shortgpt, angular]
  amount: [10, 43.75]
name: "{method}-cut"
description: "{amount} % by {method}"
calibration: {sequences: 8}
stages:
  - merge: {method: "{method}", ratio: "{amount}%"}
variants:
  "": []
  ls:
    - recover: {method: least-squares}
evaluate: ["{method}"]
"""


def written(folder, text, name="grid.yaml"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_every_combination_is_a_recipe(tmp_path):
    text = GRID.replace("{method}-cut", "{method}-{amount}").replace("43.75", "35")
    found = {r.name: r for r in load_file(written(tmp_path, text))}
    ways = [f"{m}-{a}" for m in ("shortgpt", "angular") for a in (10, 35)]
    assert list(found) == [name for way in ways for name in (way, f"{way}-ls")]
    recipe = found["angular-35-ls"]
    assert recipe.description == "35 % by angular, then least-squares (ls)" and recipe.evaluate == ("angular",)
    assert recipe.merge.ratio == 0.35 and recipe.calibration.sequences == 8 and len(recipe.recoveries) == 1
    assert found["angular-35"].description == "35 % by angular" and not found["angular-35"].recoveries


def test_numbers_stay_numbers_and_a_hundredth_is_exact(tmp_path):
    text = """for: {amount: [43.75], group: [32]}
name: x-{group}
stages:
  - merge: {method: reverse, ratio: "{amount}%"}
  - quantize: {method: rtn, scheme: "W4A16", group_size: "{group}"}
"""
    (recipe,) = load_file(written(tmp_path, text))
    assert recipe.merge.ratio == 0.4375 and recipe.quantize.options()["group_size"] == 32


def test_variants_alone_and_values_alone(tmp_path):
    quantize = "    - quantize: {{method: rtn, scheme: {}}}\n"
    text = "name: rtn\nvariants:\n  w8:\n" + quantize.format("W8A16") + "  w4:\n" + quantize.format("W4A16")
    assert [r.name for r in load_file(written(tmp_path, text))] == ["rtn-w8", "rtn-w4"]
    text = "for: {n: [4, 8]}\nname: 'rtn-w{n}'\nstages: [{quantize: {method: rtn, scheme: 'W{n}A16'}}]\n"
    assert [r.name for r in load_file(written(tmp_path, text))] == ["rtn-w4", "rtn-w8"]


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("", "", 4, "two recipes are named 'shortgpt-cut'; .*{method}, {amount}"),
        ("{method}-cut", "{methd}", 4, "'{methd}' is an unknown placeholder; allowed: {method}, {amount}"),
        ("{method}-cut", "{method.__class__}", 4, "unknown placeholder; allowed: {method}, {amount}"),
        ("{method}-cut", "{method!r}-{0}", 4, "unknown placeholder"),
        ("{method}-cut", "{method", 4, "braces are for placeholders"),
        ("{method}-cut", "{method}@{amount}", 4, "'shortgpt@10' must be lower-case words"),
        ("{method}-cut", "{method}-{amount}", 4, r"'shortgpt-43\.75' must be lower-case words"),
        ('"{method}-cut"', "3", 4, "name: 3 must be text"),
        ("description:", "descripton:", 5, "unknown key; allowed: .*for, variants"),
        ("10, 43.75", "10, 150", 8, r"stages\.0\.merge\.ratio: 1\.5: .*less than 1 \(in 'shortgpt-cut'\)"),
        ('"{amount}%"', '"{method}%"', 8, "a hundredth of 'shortgpt', which must be a number"),
        ('"{amount}%"', '"{amount}"', 8, r"ratio: 10: .*less than 1"),
        ('{method: "{method}",', '{"{method}": 1,', 8, "a placeholder may stand in a value, not in a key"),
        ("shortgpt, angular", "fold, angular", 8, "'fold' is unknown; allowed: reverse"),
        ("least-squares", "least-circles", 12, r"variants\.ls\.0\.recover\.method: 'least-circles' is unknown"),
        ("recover: {", "mend: {", 12, r"variants\.ls\.0\.mend: unknown stage"),
        ("- recover: {method: least-squares}", "recover", 11, "variants.ls: must be a list of stages"),
        ("  ls:", "  Ls:", 11, "an ending must be lower-case words"),
        ('  "": []\n', '  "": []\n  "": []\n', 11, "is given twice"),
        ("amount: [10, 43.75]", "amount: 10", 3, "must be a list of values"),
        ("amount: [10, 43.75]", "amount: []", 3, "must be a list of values"),
        ("10, 43.75", "10, true", 3, "True must be text or a number"),
        ("10, 43.75", "10, [1]", 3, r"\[1\] must be text or a number"),
        ("10, 43.75", "10, &a 20", 3, "anchors and aliases"),
        ("10, 43.75", f"10, {'x' * 201}", 3, "more than 200 characters"),
        ("  amount: [", "  Amount: [", 3, "must be a lower-case word"),
        ("10, 43.75", ", ".join(map(str, range(251))), 1, "expands to 1,004 recipes; at most 1,000"),
        ("{sequences: 8}", f"[{'1, ' * 60_000}]", 1, "parts; at most 200,000"),
        ("{amount} % by", "{method}" * 2000, 5, "has 16,009 characters; at most 10,000"),
        ("for:\n  method: [shortgpt, angular]\n  amount: [10, 43.75]", "for: 3", 1, "must map words to lists"),
    ],
)
def test_faults_are_one_line_with_their_place(tmp_path, old, new, line, says):
    path = written(tmp_path, GRID.replace(old, new) if old else GRID)
    with pytest.raises(InputError, match=says) as caught:
        load_file(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}:{line}: "), str(caught.value)


def test_a_bad_matrix_file_costs_itself(tmp_path):
    written(tmp_path, "name: good\nstages: [{merge: {method: reverse, ratio: 0.2}}]\n", "good.yaml")
    bad = written(tmp_path, GRID.replace("{method}-cut", "{method}-{amount}"))
    found = load_recipes(tmp_path)
    assert list(found) == ["good"] and list(found.left_out) == [bad]
    with pytest.raises(InputError, match=rf"'shortgpt-30-ls' is unknown\. Known: good\. Left out: {bad}:4: "):
        pick_recipes(found, ["shortgpt-30-ls"])
    with pytest.raises(InputError, match=r"'goood' is unknown; did you mean good\? Known: good$"):
        pick_recipes(found, ["goood"])


def test_a_file_of_one_recipe_is_no_matrix(tmp_path):
    with pytest.raises(InputError, match=r"grid\.yaml:1: for: unknown key"):
        load_recipe(written(tmp_path, GRID))
