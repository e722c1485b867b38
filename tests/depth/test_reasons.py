"""Every decision row of every method says why: one sentence that fits the action, with the numbers that decided."""

import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from concat_cases import checkpoint, evidence_of, one_thread, random_blocks  # noqa: F401 (a fixture)

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan
from compression_dags.depth.plan import keep_only
from compression_dags.depth.stage import ProbeContext
from compression_dags.planning.candidate_table import bank_decisions
from compression_dags.planning.candidates import Candidate, CandidateTable
from compression_dags.planning.mixed import plan_schemes
from compression_dags.provenance.artifacts import Artifact
from compression_dags.provenance.decisions import (
    COLUMNS,
    LEDGER_COLUMNS,
    Decision,
    join_ledger,
    read_decisions,
    write_decisions,
)
from compression_dags.provenance.wording import apart, layers_said, number, ordinal
from compression_dags.quantization.formats import Choice
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocators import ALLOCATORS
from compression_dags.sparsity.evidence import PruneProbe, fresh_evidence
from compression_dags.sparsity.stage import all_matrices

LAYERS = 7
VERBS = {
    "keep": ("kept", "protected"),
    "drop": ("dropped",),
    "merge": ("merged",),
    "concat": ("concatenated",),
    "prune": ("pruned",),
    "quantize": ("quantized",),
    "recover": ("recovered",),
    "reject": ("rejected",),
}
#: Options of a depth method beside how many layers go; a new method needs none here.
MERGE = {
    "planned": {"layers": None, "drop": [2], "fuse": [[4, 5]], "costs": {2: 0.0123, 4: 0.0234}},
    "mka": {"fit_tokens": 1024, "score_tokens": 256},
    "come-p": {"granularity": 4},
}
ALLOCATION = {"given": {"layers": dict.fromkeys(range(4), 0.5)}, "ramp": {"points": 2, "refine": 1}}


def sound(rows):
    """What holds for the rows of any method."""
    assert rows
    for row in rows:
        assert row.reason.startswith(VERBS[row.action]), (row.action, row.reason)
        assert "\n" not in row.reason and ". " not in row.reason and not row.reason.endswith(".")
        assert 4 < len(row.reason.split()) <= 40, row.reason
        assert not re.search(r"\b(None|nan|inf)\b", row.reason), row.reason
    return rows


def says(row, value):
    """Whether a number of the sentence is the value, to the digits that are given."""
    found = [float(x.replace(",", "")) for x in re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", row.reason)]
    return any(x == pytest.approx(value, rel=6e-3, abs=1e-12) for x in found)


@pytest.fixture(scope="module")
def case(tiny_model):
    source, blocks = checkpoint(tiny_model, "llama", layers=LAYERS, num_key_value_heads=4), random_blocks(rows=40)
    alike = np.random.default_rng(0).random((LAYERS, LAYERS))
    alike = (alike + alike.T) / 2
    names = dict.fromkeys(("npib", "cka", "npib_released"), alike)
    return source, blocks, replace(evidence_of(source, blocks), similarity=names)


@pytest.fixture(scope="module")
def small(tiny_model):
    return Checkpoint(tiny_model("llama")), random_blocks(rows=8)


@pytest.fixture(scope="module")
def cut(case, tmp_path_factory):
    source, _, _ = case
    plan = keep_only("t", LAYERS, [0, 1, 3, 4, 6])
    return plan, apply_plan(source, plan, tmp_path_factory.mktemp("cut") / "merged")


# -- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS["merge"])
def test_depth_methods(case, name):
    source, blocks, evidence = case
    stage = METHODS["merge"][name].model_validate({"method": name, "layers": 3, **MERGE.get(name, {})})
    _, rows = stage.plan(source.shape, evidence, ProbeContext(source, blocks))
    sound(rows)
    free = stage.free_layers(LAYERS)
    for row in rows:
        match = re.fullmatch(r"layer (\d+)", row.target)
        if match and int(match[1]) not in free:
            assert row.reason.startswith("protected: "), row.reason
        if row.action != "keep" and row.value is not None:
            assert says(row, row.value), (row.value, row.reason)
        if row.action == "merge":
            assert f"into layer {row.evidence['into']}" in row.reason or "mean" in row.reason
    told = {row.reason for row in rows}
    assert len(told) >= len({row.action for row in rows}) + bool(len(free) < LAYERS)
    changed = {row.reason for row in rows if row.action != "keep"}
    assert changed.isdisjoint({row.reason for row in rows if row.action == "keep"})


def test_a_protected_layer_of_least_influence_says_that_it_is_protected(case):
    source, _, evidence = case
    influence = np.array([0.5, 0.4, 0.3, 0.2, 0.25, 0.02, 0.01])
    stage = METHODS["merge"]["shortgpt"].model_validate({"method": "shortgpt", "layers": 2, "protect_last": 2})
    _, rows = stage.plan(source.shape, replace(evidence, block_influence=influence))
    assert rows[6].action == "keep" and rows[6].evidence["rank"] == 0
    assert rows[6].reason == (
        "protected: one of the last 2 layers (protect_last 2); its block influence 0.01 was not compared"
    )
    assert "0.2 is the lowest of the 4 unprotected layers" in rows[3].reason and rows[3].action == "drop"
    assert rows[2].reason.startswith("kept: block influence 0.3 is the 3rd lowest of the 4") and rows[2].value == 0.3
    even = replace(evidence, block_influence=np.full(LAYERS, 0.1))
    _, rows = stage.plan(source.shape, even)
    assert [r.action for r in rows[1:4]] == ["drop", "drop", "keep"] and "of equal ones the earlier" in rows[3].reason


def test_a_window_says_which_one_was_closer(case):
    source, _, evidence = case
    stage = METHODS["merge"]["angular"].model_validate({"method": "angular", "layers": 2})
    plan, rows = stage.plan(source.shape, evidence)
    first = plan.dropped[0]
    beside = rows[first - 1]
    near, gone = (float(x) for x in re.findall(r"0\.\d+", beside.reason))
    starts = [s for s in (first - 2, first - 1) if s >= 1]
    assert near == pytest.approx(min(evidence.angular[s, s + 2] for s in starts), rel=6e-3) and near > gone
    assert (
        gone == pytest.approx(evidence.angular[first, first + 2], rel=6e-3)
        and layers_said(plan.dropped) in beside.reason
    )


def test_laco_says_which_threshold_failed(case):
    source, blocks, evidence = case
    stage = METHODS["merge"]["laco"].model_validate({"method": "laco", "layers": 2})
    _, rows = stage.plan(source.shape, evidence, ProbeContext(source, blocks))
    refused = [r for r in rows if r.action == "keep" and "refused" in r.evidence and "not above" in r.reason]
    assert refused
    for row in refused:
        note = row.evidence["refused"]
        assert says(row, note["cosine"]) and says(row, note["threshold"]) and not note["cosine"] > note["threshold"]


# -- recovery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS["recover"])
def test_recoveries(case, cut, tmp_path, name):
    source, blocks, _ = case
    plan, merged = cut
    small = {"tokens": 2048, "length": 64, "batch_tokens": 128, "held_windows": 2, "checks": 1}
    options = small if name.startswith("distill") else {}
    stage = METHODS["recover"][name].model_validate({"method": name, **options})
    rows = sound(stage.recover(source, merged, plan, blocks, tmp_path / "out").decisions)
    for row in rows:
        keys = ["held_out_loss_before", "held_out_loss_after"]
        if name == "least-squares":
            keys = ["held_out_before", "held_out_after"]
        for value in (row.evidence[key] for key in keys):
            assert value is None or says(row, value), (value, row.reason)
    if name == "linear-patch":
        assert all(says(row, row.value) for row in rows)


def test_a_rejected_refit_names_what_rose(case, cut, tmp_path):
    source, _, _ = case
    plan, merged = cut
    stage = METHODS["recover"]["least-squares"].model_validate({"method": "least-squares", "form": "refit"})
    few = random_blocks(rows=60)  # random text: a refit of all weights learns what does not hold elsewhere
    for row in sound(stage.recover(source, merged, plan, few, tmp_path / "out").decisions):
        before, after = row.evidence["held_out_before"], row.evidence["held_out_after"]
        worse = "does not lower" in row.reason
        assert worse == (after >= before) and (row.action == "recover") == row.reason.startswith("recovered")


# -- sparsity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS["sparsify"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_pruners(small, tmp_path, name, target):
    source, blocks = small
    stage = METHODS["sparsify"][name].model_validate({"method": name, **target})
    plan, planned = stage.plan(source, fresh_evidence(source, stage.allocation, blocks))
    rows = stage.sparsify(source, plan, blocks, tmp_path / "out").decisions
    for row in sound([*planned, *rows]):
        assert says(row, row.value) and says(row, 0.5)
        assert "pattern" not in target or "2:4" in row.reason
    assert stage.rule in rows[0].reason


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators(small, name):
    source, blocks = small
    allocation = {"method": name, **ALLOCATION.get(name, {})}
    stage = METHODS["sparsify"]["magnitude"].model_validate(
        {"method": "magnitude", "sparsity": 0.5, "allocation": allocation}
    )
    evidence = fresh_evidence(source, stage.allocation, blocks)
    plan, rows = stage.plan(source, evidence, PruneProbe(stage, source, blocks, fit_rows=2, held_rows=2))
    for row in sound(rows):
        assert says(row, row.value) and row.value == plan.patterns[row.target].sparsity
    shares = {m.layer: plan.patterns[m.name].sparsity for m in all_matrices(source)}
    if len(set(shares.values())) > 1:
        assert len({row.reason for row in rows}) >= len(set(shares.values()))


# -- quantization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS["quantize"])
def test_quantizers(small, tmp_path, name):
    source, blocks = small
    odd = "model.layers.3.self_attn.o_proj"
    options = {"scheme": "W4A8", "group_size": 64, "ignore": ["lm_head", "re:.*layers.0.mlp.*"]}
    options["overrides"] = {odd: {"scheme": "W8A8"}}
    stage = METHODS["quantize"][name].model_validate({"method": name, **options})
    rows = {r.target: r for r in sound(stage.quantize(source, tmp_path / "out", blocks=blocks).decisions)}
    assert "override 'model.layers.3.self_attn.o_proj' names it" in rows[odd].reason and "W8A8" in rows[odd].reason
    assert "64 does not divide its 96 inputs" in rows["model.layers.3.mlp.down_proj"].reason
    assert "W4A8 in groups of 32" in rows["model.layers.3.mlp.down_proj"].reason
    assert "ignore names it ('re:.*layers.0.mlp.*')" in rows["model.layers.0.mlp.up_proj"].reason
    assert "the recipe's scheme" in rows["model.layers.3.self_attn.q_proj"].reason
    assert "embedding" in rows["model.embed_tokens"].reason and "'lm_head'" in rows["lm_head"].reason
    for row in rows.values():
        assert row.action == "keep" or row.evidence["scheme"] in row.reason


def test_mixed_schemes(small):
    source, blocks = small
    stage = METHODS["quantize"]["rtn"].model_validate(
        {"method": "rtn", "scheme": "W4A16", "group_size": 64, "bits": 6.0, "candidates": ["W8A16"]}
    )
    plan, rows = plan_schemes(stage, source, blocks)
    for row in sound(rows):
        assert says(row, row.value) and "6 bits" in row.reason
        assert (row.evidence["scheme"] or "kept") in row.reason
    stored = {plan.choices[f"model.layers.0.{p}"].group_size for p in ("mlp.down_proj", "mlp.up_proj")}
    assert stored == {64, 32} and "64 does not divide its 96 inputs" in " ".join(r.reason for r in rows)


def test_alternatives_say_what_beat_them():
    small, large = Choice("W4A16", 16), Choice("W8A16", None)
    made = [
        Candidate("quantize", 0, "mlp_input", small, 50, 100, 0.5, 0.01, 4, alive=False),
        Candidate("quantize", 0, "mlp_input", large, 50, 100, 0.1, 0.01, 12),
        Candidate("drop", 0, None, None, 0, 0, 0.2, 0.01, 12, layers=(0,)),
        Candidate("drop", 1, None, None, 0, 0, 0.9, 0.01, 4, alive=False, layers=(1,)),
        Candidate("drop", 0, None, None, 0, 0, 1.2, 0.01, 12, layers=(0, 1)),
        Candidate("merge", 0, None, None, 100, 100, 0.7, 0.01, 4, alive=False),
        Candidate("merge", 0, None, small, 50, 100, 1.3, 0.01, 4, alive=False),
        Candidate("sparsify", 1, None, None, 100, 50, math.inf, 0.01, 4, alive=False, share=0.5),
    ]
    rows = sound(bank_decisions(CandidateTable(2, ("mlp_input",), 0, 0, 100, tuple(made))))
    assert [r.action for r in rows] == ["keep" if a.alive else "reject" for a in made]
    assert all(r.value is None or says(r, r.value) for r in rows)
    assert "W8A16/row" in rows[0].reason and says(rows[0], 0.1)
    assert "1 other layer" in rows[3].reason and "dropping layer 0" in rows[5].reason and says(rows[5], 0.2)
    assert "merging layers 0 and 1 was given up" in rows[6].reason and "no finite loss" in rows[7].reason
    after = CandidateTable(2, ("mlp_input",), 0, 0, 100, tuple(made), recovered={"method": "least-squares"})
    assert "measured again after least-squares" in bank_decisions(after)[3].reason


# -- storing -----------------------------------------------------------------------------------------------------------


def decision(**more):
    return Decision(**{**asdict(Decision("merge", "m", 0, "layer 0", "keep", [0], 1.0, "u", "kept: so")), **more})


def test_rows_without_reasons_from_before_stay_readable(tmp_path):
    write_decisions([decision()], tmp_path / "decisions.parquet")
    now = read_decisions(tmp_path / "decisions.parquet")
    assert list(now.columns) == COLUMNS and COLUMNS.index("reason") == COLUMNS.index("unit") + 1
    assert now["reason"].tolist() == ["kept: so"]
    old = now.drop(columns="reason")
    old.to_parquet(tmp_path / "decisions.parquet", index=False)
    then = read_decisions(tmp_path / "decisions.parquet")
    assert list(then.columns) == COLUMNS and then["reason"].tolist() == [""]
    artifact = Artifact("merge_plan", "f", "d", tmp_path)
    ledger = join_ledger("m", [("r", artifact)])
    assert list(ledger.columns) == LEDGER_COLUMNS and ledger["reason"].tolist() == [""]
    with pytest.raises(TypeError, match="reason"):
        Decision("merge", "m", 0, "layer 0", "keep", [0], 1.0, "u")  # pyright: ignore[reportCallIssue]


def test_state_saved_before_there_were_reasons_is_taken_up():
    row = asdict(decision())
    assert Decision.from_saved(row) == decision()
    del row["reason"]
    assert Decision.from_saved(row) == decision(reason="")


def test_the_table_in_the_ui_shows_the_reason(tmp_path):
    from compression_dags.assets.publishing import TABLE_ROWS, decisions_table

    write_decisions([decision()] * (TABLE_ROWS + 1), tmp_path / "decisions.parquet")
    shown = decisions_table(Artifact("merge_plan", "f", "d", tmp_path))
    records = shown["decisions"].records
    assert len(records) == TABLE_ROWS and shown["decision_count"] == TABLE_ROWS + 1
    assert records[0].data["reason"] == "kept: so"


def test_wording():
    assert apart(0.12345, 0.12349) == ["0.12345", "0.12349"] and apart(3.0, 3.0) == ["3", "3"]
    assert number(float("inf")) == "infinite" and number(1234567) == "1,234,567" and number(0.5) == "0.5"
    assert [ordinal(n) for n in (1, 2, 3, 11, 13, 22, 112)] == ["1st", "2nd", "3rd", "11th", "13th", "22nd", "112th"]
    assert [layers_said(x) for x in ([3], [4, 3], range(3, 7), [1, 4, 6])] == [
        "layer 3",
        "layers 3 and 4",
        "layers 3 to 6",
        "layers 1, 4 and 6",
    ]
    assert number(float("nan")) == "not a number"
