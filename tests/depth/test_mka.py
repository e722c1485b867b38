"""MKA's published variants: what the released code writes, what it computes, and what the paper describes."""

import math

import numpy as np
import pytest
import torch

from compression_dags.calibration.corpora import Calibration, make_blocks, read_documents
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.methods.reverse import Reverse
from compression_dags.depth.mka.paper import MKAPaper
from compression_dags.depth.mka.released import MKACodeFixedWrite, MKAReleased, chained_shares, released_lambdas
from compression_dags.depth.plan import keep_only
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import read_decisions, write_decisions
from compression_dags.similarity.evidence import Evidence

EMPTY = np.empty(0)


def similarity(layers, seed=0):
    """A symmetric table in (0, 1) with 1 on the diagonal."""
    raw = np.random.default_rng(seed).uniform(0.2, 0.9, (layers, layers))
    return np.triu(raw, 1) + np.triu(raw, 1).T + np.eye(layers)


def evidence(layers, seed=0, **arrays):
    table = similarity(layers, seed)
    given = {
        "npib": table,
        "npib_low": table - 0.05,
        "npib_high": table + 0.05,
        "npib_released": 4 * similarity(layers, seed + 1),
        "npib_sigma": np.linspace(1, 2, layers),
        "npib_samples": np.array([512]),
        "npib_bins": np.array([4]),
        **arrays,
    }
    return Evidence(EMPTY, EMPTY, EMPTY, {k: v for k, v in given.items() if v is not None})


@pytest.fixture(scope="module")
def llama(tiny_model):
    return Checkpoint(tiny_model("llama", layers=6))


def longer(shape, layers):
    return type(shape)(shape.architecture, {**shape.config, "num_hidden_layers": layers})


# -- what the public code computes ----------------------------------------------------------------------------------


def test_lambdas_are_the_code_s():
    table = similarity(5)
    found = released_lambdas(table, 4, 3)
    for value, (i, j) in zip(found, [(3, 4), (2, 3), (1, 2)], strict=True):
        a, b = np.mean(table[i, :]), np.mean(table[j, :])
        ratio = a / (a + b)
        assert value == pytest.approx(np.exp(ratio) / (1 + np.exp(ratio)))
    assert all(0.5 < v < 1 / (1 + math.exp(-1)) for v in found)
    assert released_lambdas(np.ones((4, 4)), 3, 1) == [pytest.approx(0.622459, abs=1e-6)]


def test_shares_are_the_chain_written_out():
    """K steps of θ ← λ θ_i + (1 − λ) θ, done one after the other on numbers."""
    lambdas, theta = [0.62, 0.55, 0.7], np.array([3.0, -1.0, 4.0, 10.0])
    step = theta[3]
    for value, layer in zip(lambdas, (2, 1, 0), strict=True):
        step = value * theta[layer] + (1 - value) * step
    shares = chained_shares(lambdas)
    assert float(np.dot(shares, theta)) == pytest.approx(step) and sum(shares) == pytest.approx(1, abs=1e-15)
    constant = chained_shares([0.6225] * 4)
    assert constant == pytest.approx([*(0.6225 * 0.3775**j for j in range(4)), 0.3775**4])


# -- mka-released ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"layers": 2}, {"ratio": 0.5}, {"layers": 2, "protect_last": 1}])
def test_released_is_reverse_byte_for_byte(llama, tmp_path, options):
    from compression_dags.provenance.artifacts import content_digest, describe_files

    digests = set()
    for stage, name in ((MKAReleased(**options), "mka"), (Reverse(**options), "reverse")):
        plan, _ = stage.plan(llama.shape, evidence(6))
        (tmp_path / name).mkdir()
        plan.save(tmp_path / name)
        apply_plan(llama, plan, tmp_path / name / "checkpoint")
        digests.add(content_digest(describe_files(tmp_path / name)))
    assert len(digests) == 1


def test_released_ledger_holds_what_was_computed_for_nothing(llama):
    given = evidence(6)
    plan, rows = MKAReleased(layers=2).plan(llama.shape, given)
    table = given.similarity["npib_released"]
    assert plan.dropped == [4, 5] and [r.action for r in rows] == ["keep"] * 4 + ["drop"] * 2
    assert [rows[5].value, rows[4].value] == released_lambdas(table, 5, 2) and rows[0].value is None
    note = rows[4].evidence
    assert note["pair"] == [3, 4] and note["S"] == table[3, 4] and note["written"] is False
    assert note["row_means"] == pytest.approx([table[3].mean(), table[4].mean()]) and note["sigma"] == 8
    _, rows = MKAReleased(layers=2).plan(llama.shape, evidence(6, npib_released=None))
    assert all(r.value is None for r in rows)  # nothing is decided by it
    plan, rows = MKAReleased(layers=5, protect_first=0, protect_last=1).plan(llama.shape, given)
    assert plan.dropped == [0, 1, 2, 3, 4] and rows[0].value is None and rows[1].value is not None


# -- mka-code-fixed-write -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mixtral"])
def test_fixed_write_is_written(tiny_model, tmp_path, family):
    """Projections differ from every parent and so from either drop, by the closed form; the rest is the survivor's."""
    source = Checkpoint(tiny_model(family, layers=5))
    given = evidence(5)
    plan, _ = MKACodeFixedWrite(layers=2).plan(source.shape, given)
    assert [x.sources for x in plan.layers] == [(0,), (1,), (2, 3, 4)] and plan.layers[2].form == "projections"
    first, second = released_lambdas(given.similarity["npib_released"], 4, 2)
    shares = [second, (1 - second) * first, (1 - second) * (1 - first)]
    assert plan.layers[2].shares == pytest.approx(shares)
    written = apply_plan(source, plan, tmp_path / "out")
    check_reload(written.path, reference_logits(source, plan))
    projections = {f"{p}.weight" for p in source.architecture.projections()}
    for local, name in written.layer(2).items():
        parents = [source.tensor(source.layer(i)[local]) for i in (2, 3, 4)]
        if local in projections:
            assert not any(torch.equal(written.tensor(name), p) for p in parents)
            expected = sum(s * p.double() for s, p in zip(shares, parents, strict=True))
            torch.testing.assert_close(written.tensor(name).double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(written.tensor(name), parents[0])
    assert projections & set(written.layer(2))


def test_fixed_write_takes_the_last_pair_whatever_the_similarity(llama):
    table = np.full((6, 6), 0.1) + np.eye(6)
    table[1, 2] = table[2, 1] = 1.0  # by far the most similar
    plan, rows = MKACodeFixedWrite(layers=1).plan(llama.shape, evidence(6, npib_released=table))
    assert [x.sources for x in plan.layers][-1] == (4, 5)
    assert rows[5].evidence["pair"] == [4, 5] and rows[5].evidence["merge"] == 1 and rows[5].action == "merge"
    assert "self_attn.q_proj.weight" in rows[5].evidence["tensors"]["merged"]
    assert "input_layernorm" in rows[5].evidence["tensors"]["kept"]
    plan, _ = MKACodeFixedWrite(layers=1, protect_last=2).plan(llama.shape, evidence(6, npib_released=table))
    assert [x.sources for x in plan.layers] == [(0,), (1,), (2, 3), (4,), (5,)]


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ({"layers": 5}, {}, "merges 6 layers into one, but only 5 of 6 are free"),
        ({"layers": 2}, {"npib_released": None}, "holds no npib_released"),
        ({"layers": 2}, {"npib_released": np.ones((4, 4))}, "6 layers"),
    ],
)
def test_fixed_write_refuses(llama, options, given, says):
    with pytest.raises(InputError, match=says):
        MKACodeFixedWrite(**options).plan(llama.shape, evidence(6, **given))


# -- mka-paper ------------------------------------------------------------------------------------------------------


def chain(*neighbours):
    """A table with these similarities between neighbours and 0.01 elsewhere."""
    n = len(neighbours) + 1
    table = np.full((n, n), 0.01) + 0.99 * np.eye(n)
    for i, value in enumerate(neighbours):
        table[i, i + 1] = table[i + 1, i] = value
    return table


def test_paper_merges_the_most_similar_pair_behind_the_barrier(llama):
    table = chain(0.99, 0.98, 0.6, 0.7, 0.97)
    plan, rows = MKAPaper(layers=1).plan(llama.shape, evidence(6, npib=table))
    # 0-1 is before the barrier (⌈0.25 · 6⌉ = 2), 1-2 reaches over it, 4-5 is protected
    assert [x.sources for x in plan.layers] == [(0,), (1,), (2,), (3, 4), (5,)]
    assert plan.layers[3].shares == pytest.approx((0.7, 0.3)) and plan.layers[3].form == "sum"
    note = rows[4].evidence
    assert note["merge"] == 1 and note["pair"] == [[3], [4]] and note["S"] == note["lambda"] == pytest.approx(0.7)
    assert (note["estimator"], note["tokens"], note["bins"], note["sigma"]) == ("binned", 512, 4, pytest.approx(1.8))
    assert "merge" not in rows[3].evidence and rows[3].evidence["share"] == pytest.approx(0.7)
    open_ended, _ = MKAPaper(layers=1, barrier=0, protect_first=0).plan(llama.shape, evidence(6, npib=table))
    assert open_ended.layers[0].sources == (0, 1)


def test_paper_goes_on_with_merged_groups(llama):
    """Mean linkage, and nested shares: (α₂ α₁, α₂ (1 − α₁), 1 − α₂)."""
    table = chain(0.1, 0.2, 0.8, 0.5, 0.1)
    table[2, 4] = table[4, 2] = 0.3
    plan, rows = MKAPaper(layers=2).plan(llama.shape, evidence(6, npib=table))
    assert plan.layers[2].sources == (2, 3, 4)
    assert plan.layers[2].shares == pytest.approx((0.4 * 0.8, 0.4 * 0.2, 0.6))
    assert rows[4].evidence["S"] == pytest.approx(0.4) and rows[4].evidence["pair"] == [[2, 3], [4]]
    assert [rows[i].evidence["merge"] for i in (3, 4)] == [1, 2]


def test_paper_of_equal_pairs_takes_the_rear(llama):
    plan, _ = MKAPaper(layers=1).plan(llama.shape, evidence(6, npib=chain(0.5, 0.5, 0.5, 0.5, 0.5)))
    assert plan.layers[3].sources == (3, 4)


def test_paper_counts_the_pairs_it_cannot_tell_apart(llama):
    table = chain(0.2, 0.2, 0.60, 0.61, 0.1)
    wide = {"npib": table, "npib_low": table - 0.05, "npib_high": table + 0.05}
    _, rows = MKAPaper(layers=1).plan(llama.shape, evidence(6, **wide))
    assert rows[4].evidence["overlaps"] == 1
    sharp = {"npib": table, "npib_low": table - 0.001, "npib_high": table + 0.001}
    _, rows = MKAPaper(layers=1).plan(llama.shape, evidence(6, **sharp))
    assert rows[4].evidence["overlaps"] == 0 and rows[4].evidence["low"] == pytest.approx(0.609)


def test_paper_clips_what_is_no_share(llama):
    """The released estimator is unbounded; α = S would then extrapolate."""
    given = evidence(6, npib_ksg=chain(0.1, 0.1, 0.1, 1.7, 0.1))
    plan, rows = MKAPaper(layers=1, estimator="ksg").plan(llama.shape, given)
    assert plan.layers[3].shares == (1.0, 0.0) and rows[4].evidence["lambda"] == 1.0
    assert "overlaps" not in rows[4].evidence and rows[4].evidence["estimator"] == "ksg"
    with pytest.raises(InputError, match="holds no npib_gaussian_copula"):
        MKAPaper(layers=1, estimator="gaussian-copula").plan(llama.shape, evidence(6))


def test_paper_is_written_norms_too(llama, tmp_path):
    plan, rows = MKAPaper(layers=2).plan(llama.shape, evidence(6))
    written = apply_plan(llama, plan, tmp_path / "out")
    check_reload(written.path, reference_logits(llama, plan))
    (position,) = (p for p, x in enumerate(plan.layers) if len(x.sources) == max(len(y.sources) for y in plan.layers))
    layer = plan.layers[position]
    for local, name in written.layer(position).items():
        parents = [llama.tensor(llama.layer(i)[local]) for i in layer.sources]
        assert not any(torch.equal(written.tensor(name), p) for p in parents), local
        expected = sum(s * p.double() for s, p in zip(layer.shares, parents, strict=True))
        torch.testing.assert_close(written.tensor(name).double(), expected, rtol=1e-5, atol=1e-6)
    write_decisions(rows, tmp_path / "rows.parquet")
    assert len(read_decisions(tmp_path / "rows.parquet")) == 6


def test_paper_refuses_what_the_barrier_leaves_no_room_for(llama):
    shape = longer(llama.shape, 12)
    assert MKAPaper(layers=7).check(shape) is None  # layers 3 … 10 are free: seven pairs
    with pytest.raises(InputError, match=r"8 of 12 layers away: 8 are unprotected .*\(0.25\), 7 pairs"):
        MKAPaper(layers=8).check(shape)
    assert MKAPaper(layers=8, barrier=0).check(shape) is None


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_paper_reaches_any_ratio_its_check_allows(llama, ratio):
    for layers in (16, 30, 32):
        shape = longer(llama.shape, layers)
        stage = MKAPaper(ratio=ratio)
        stage.check(shape)
        plan, _ = stage.plan(shape, evidence(layers, seed=layers))
        assert len(plan.layers) == layers - stage.removed(layers)
        assert all(math.isclose(sum(x.shares), 1, abs_tol=1e-12) for x in plan.layers)


# -- kinds of layers ------------------------------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_layers_of_different_kinds_are_not_merged(tiny_model, family):
    shape = Checkpoint(tiny_model(family)).shape  # alternating
    for stage in (MKACodeFixedWrite(layers=1), MKAPaper(layers=1, barrier=0, protect_first=0, protect_last=0)):
        with pytest.raises(InputError, match="kind"):
            stage.check(shape)
    MKAReleased(layers=1).check(shape)  # a drop mixes nothing


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_layer_types_follow_the_survivor(tiny_model, tmp_path, family):
    """Five layers in runs; sliding windows are shorter than the reload probe, so a wrong type changes the logits."""
    types = [FULL, SLIDING, SLIDING, FULL, FULL]
    source = Checkpoint(tiny_model(family, layers=5, layer_types=types))
    given = evidence(5, npib=chain(0.9, 0.5, 0.99, 0.4))
    cases = (
        (MKAReleased(layers=2), [FULL, SLIDING, SLIDING]),
        (MKACodeFixedWrite(layers=1), [FULL, SLIDING, SLIDING, FULL]),
        (MKAPaper(layers=1, barrier=0, protect_last=0), [FULL, SLIDING, FULL, FULL]),  # 2-3 is closest, but mixed
    )
    for stage, expected in cases:
        stage.check(source.shape)
        plan, _ = stage.plan(source.shape, given)
        written = apply_plan(source, plan, tmp_path / stage.method)
        assert written.config["layer_types"] == expected, stage.method
        check_reload(written.path, reference_logits(source, plan))
    with pytest.raises(InputError, match="layers 2 to 4, of different kinds: 2 is sliding_attention/dense"):
        MKACodeFixedWrite(layers=2).check(source.shape)


# -- from tokens to a checkpoint ------------------------------------------------------------------------------------


def test_all_variants_from_one_calibration_pass(stories, tmp_path):
    from transformers import AutoTokenizer

    from compression_dags.calibration.activations import profile_activations
    from compression_dags.calibration.streaming import DecoderStream
    from compression_dags.similarity.evidence import read_evidence
    from compression_dags.similarity.tables import write_similarity

    source = Checkpoint(stories)
    request = Calibration(sequences=8, length=96, samples=256)
    blocks = make_blocks(read_documents("c4-sample"), AutoTokenizer.from_pretrained(stories), request, 512)
    for name in ("pass", "npib"):
        (tmp_path / name).mkdir()
    profile_activations(DecoderStream(source), blocks, samples=request.samples).save(tmp_path / "pass")
    write_similarity("npib", tmp_path / "pass", tmp_path / "npib")
    given = read_evidence({"npib": tmp_path / "npib"})
    logits = {}
    for stage in (MKAReleased(ratio=0.2), MKACodeFixedWrite(ratio=0.2), MKAPaper(ratio=0.2)):
        stage.check(source.shape)
        plan, rows = stage.plan(source.shape, given)
        assert len(rows) == 5 and len(plan.layers) == 4
        written = apply_plan(source, plan, tmp_path / stage.method)
        logits[stage.method] = reference_logits(source, plan)
        check_reload(written.path, logits[stage.method])
    drop_of_either = [reference_logits(source, keep_only("d", 5, [0, 1, 2, i])) for i in (3, 4)]
    assert torch.equal(logits["mka-released"], drop_of_either[0])
    for other in (*drop_of_either, logits["mka-paper"]):
        assert not torch.allclose(logits["mka-code-fixed-write"], other, rtol=1e-2, atol=1e-2)
