"""One layer's story: its number is followed through the merge, and what stands in for it is named."""

import pytest

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.plan import MergePlan, PlannedLayer, keep_only
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import DECISIONS, Artifact
from compression_dags.provenance.decisions import Decision, read_decisions, write_decisions
from compression_dags.reports.story import decided_names, story, story_text, subject_of


def stored(folder, kind, method, rows, plan=None):
    """An artifact with rows (target, action, reason, value) as a step leaves them."""
    folder.mkdir()
    decisions = [
        Decision("s", method, i, target, action, [], value, "unit", reason)
        for i, (target, action, reason, value) in enumerate(rows)
    ]
    write_decisions(decisions, folder / DECISIONS)
    if plan:
        plan.save(folder)
    return Artifact(kind, f"fingerprint of {kind}", "d", folder)


@pytest.fixture
def base(stories):
    return Checkpoint(stories)


@pytest.fixture
def steps(tmp_path):
    """Five layers; layer 2 goes, 3 and 4 stay; then a patch, a refit, a pruning and a quantization of the four left."""
    plan = keep_only("m", 5, [0, 1, 3, 4])
    merge = [(f"layer {i}", "drop" if i == 2 else "keep", f"why {i}", 0.1 * i) for i in range(5)]
    quantize = [
        (f"model.layers.{i}.{p}", "quantize", f"scheme of {i}", 0.01)
        for i in range(4)
        for p in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    plan_rows = [
        (f"layer {i} {g}", "quantize", f"bits of {i}", 0.01) for i in range(4) for g in ("mlp_output", "mlp_input")
    ]
    return [
        ("merge_plan", stored(tmp_path / "a", "merge_plan", "shortgpt", merge, plan)),
        ("merged_weights", Artifact("merged_weights", "f", "d", tmp_path)),
        (
            "recovered_weights",
            stored(
                tmp_path / "b", "recovered_weights", "linear-patch", [("model.layers.1", "recover", "patched", 1.1)]
            ),
        ),
        (
            "recovered_weights_2",
            stored(
                tmp_path / "c",
                "recovered_weights",
                "least-squares",
                [("model.layers.1.mlp.down_proj", "recover", "refitted", 0.5)],
            ),
        ),
        ("quantization_plan", stored(tmp_path / "d", "quantization_plan", "rtn", plan_rows)),
        (
            "quantized_weights",
            stored(tmp_path / "e", "quantized_weights", "rtn", [*quantize, ("lm_head", "keep", "tied", None)]),
        ),
    ]


def told(text, base, steps):
    return story(subject_of(text, base, "m", decided_names(steps)), base, steps)


def reasons(found):
    return {c.step: [d.reason for d in c.decisions] for c in found.stages}


def test_later_steps_are_read_under_the_new_number(base, steps):
    found = told("3", base, steps)
    assert (found.fate, found.new_layer, found.stand_in) == ("kept", 2, 2)
    assert reasons(found) == {
        "merge_plan": ["why 3"],
        "recovered_weights": ["patched"],  # the patch behind layer 1 rescaled it
        "recovered_weights_2": [],
        "quantization_plan": ["bits of 2"],
        "quantized_weights": ["scheme of 2"],
    }
    last = found.stages[-1]
    assert last.layer == 2 and found.stages[0].layer == 3
    assert last.decisions[0].targets == [
        f"model.layers.2.{p}" for p in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    text = story_text(found, "m", "r")
    assert "layer 3 of m in r: kept, new layer 2" in text
    assert "3 matrices, self_attn.q_proj, k_proj and mlp.down_proj: scheme of 2" in text


def test_of_a_dropped_layer_it_says_what_stands_in(base, steps):
    found = told("layer 2", base, steps)
    assert (found.fate, found.new_layer, found.stand_in) == ("dropped", None, 1)
    assert reasons(found) == {
        "merge_plan": ["why 2"],
        "recovered_weights": ["patched"],
        "recovered_weights_2": ["refitted"],
        "quantization_plan": [],
        "quantized_weights": [],
    }
    text = story_text(found, "m", "r")
    assert "it is gone; new layer 1 (was layer 1) stands for layers 1 and 2" in text
    assert "quantization_plan (rtn), quantized_weights (rtn)\n    nothing of it is left" in text
    beside = told("1", base, steps)
    assert "also stands for the removed layer 2" in beside.stages[0].note and reasons(beside)["recovered_weights_2"]


def test_of_a_merged_layer_it_follows_the_merge(base, tmp_path):
    plan = MergePlan(
        "m", 5, (PlannedLayer((0,)), PlannedLayer((1, 2), (0.25, 0.75)), PlannedLayer((3, 4), (1.0, 0.0), "solved"))
    )
    rows = [
        ("layers 1-2", "merge", "near", 1.0),
        ("layers 3-4", "drop", "4 for 3", 1.0),
        ("layer 0", "keep", "protected", None),
    ]
    steps = [("merge_plan", stored(tmp_path / "a", "merge_plan", "mka", rows, plan)), ("sparse_weights", None)]
    one, gone = told("1", base, steps), told("4", base, steps)
    assert (one.fate, one.new_layer) == ("merged", 1) and reasons(one)["merge_plan"] == ["near"]
    assert "new layer 1, which is made of layers 1 and 2" in one.stages[0].note
    assert (gone.fate, gone.new_layer, gone.stand_in) == ("dropped", None, 2) and reasons(gone)["merge_plan"] == [
        "4 for 3"
    ]
    assert "new layer 2 (was layer 3) stands for layers 3 and 4" in gone.stages[0].note
    assert told("3", base, steps).fate == "kept"
    assert not one.stages[1].run and "not run yet" in story_text(one, "m", "r")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp"]
)
def test_a_module_is_followed_alone(base, steps, name):
    found = told(name, base, steps)
    assert found.module == name.removeprefix("model.layers.1.").removesuffix(".weight")
    assert [d.targets for d in found.stages[-1].decisions] == [["model.layers.1.mlp.down_proj"]]
    groups = [t for d in found.stages[-2].decisions for t in d.targets]
    assert groups == ["layer 1 mlp_output"] + ["layer 1 mlp_input"] * name.endswith("mlp")
    assert reasons(found)["recovered_weights_2"] == ["refitted"]
    query = told("model.layers.1.self_attn.q_proj", base, steps)
    assert reasons(query)["recovered_weights_2"] == [] and reasons(query)["quantization_plan"] == []


def test_a_head_without_a_tensor_of_its_own_is_known(base, steps):
    found = told("lm_head", base, steps)
    assert found.layer is None and reasons(found)["quantized_weights"] == ["tied"]
    assert "lm_head: tied" in story_text(found, "m", "r")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "layers 0 to 4"),
        ("-1", "layer -1 is out of range"),
        ("model.layers.9.mlp.down_proj", "layer 9 is out of range: m has layers 0 to 4"),
        ("model.layers.1.mlp.no_proj", "model.layers.0.mlp.down_proj"),
        ("lm_head", "model.embed_tokens"),
        ("", "unknown in m"),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_what_it_has(base, text, says):
    with pytest.raises(InputError) as caught:
        subject_of(text, base, "m")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_rows_stored_before_reasons_are_told_by_their_numbers(base, steps):
    path = steps[0][1].path / DECISIONS
    read_decisions(path).drop(columns="reason").to_parquet(path, index=False)
    found = told("2", base, steps)
    assert reasons(found)["merge_plan"] == [""]
    assert "drop, unit 0.2 (stored before reasons were recorded)" in story_text(found, "m", "r")
