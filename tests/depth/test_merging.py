"""Depth plans: what is removed, why, and that applying a plan gives the stock checkpoint of the planned model."""

import json

import numpy as np
import pytest
import torch

from compression_dags.checkpoints.gate import check_reload, load_stock, probe_ids
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits, removed_share
from compression_dags.depth.methods.angular import Angular
from compression_dags.depth.methods.reverse import Reverse
from compression_dags.depth.methods.shortgpt import ShortGPT
from compression_dags.depth.methods.weighted_sum import WeightedSum
from compression_dags.depth.plan import MergePlan, PlannedLayer, keep_only
from compression_dags.errors import InputError, IntegrityError
from compression_dags.similarity.evidence import Evidence
from models import FAMILIES


def evidence(layers, seed=0):
    rng = np.random.default_rng(seed)
    position = np.cumsum(np.r_[0, rng.uniform(0.02, 0.2, layers)])
    angular = np.abs(position[:, None] - position[None, :]) / position[-1]
    return Evidence(rng.uniform(0.01, 0.3, layers), angular, angular.copy())


@pytest.fixture(scope="module")
def llama(tiny_model):
    return Checkpoint(tiny_model("llama"))


def test_reverse_drops_the_tail(llama):
    plan, rows = Reverse(layers=2).plan(llama.shape, evidence(4))
    assert plan.dropped == [2, 3] and [r.action for r in rows] == ["keep", "keep", "drop", "drop"]
    plan, _ = Reverse(layers=2, protect_last=1).plan(llama.shape, evidence(4))
    assert plan.dropped == [1, 2]


def test_shortgpt_drops_the_least_influential_unprotected(llama):
    given = Evidence(np.array([0.01, 0.3, 0.2, 0.02]), np.empty(0), np.empty(0))
    plan, rows = ShortGPT(layers=1).plan(llama.shape, given)
    assert plan.dropped == [2]
    assert rows[2].value == pytest.approx(0.2) and rows[2].evidence["rank"] == 2
    plan, _ = ShortGPT(layers=2, protect_first=0, protect_last=0).plan(llama.shape, given)
    assert plan.dropped == [0, 3]


def test_angular_drops_the_closest_window(llama):
    distance = np.full((5, 5), 0.5)
    distance[1, 3] = 0.1
    last = np.full((5, 5), 0.5)
    last[2, 4] = 0.05  # forbidden: reaches the protected last layer
    given = Evidence(np.empty(0), distance, last)
    assert Angular(layers=2).plan(llama.shape, given)[0].dropped == [1, 2]
    open_ended = Angular(layers=2, tokens="last", protect_last=0)
    assert open_ended.plan(llama.shape, given)[0].dropped == [2, 3]


def test_weighted_sum_groups_are_optimal(tiny_model):
    """The dynamic programme finds the best of all partitions, compared with brute force."""
    import itertools

    shape = Checkpoint(tiny_model("llama")).shape
    shape = type(shape)(shape.architecture, {**shape.config, "num_hidden_layers": 9})
    for seed in range(3):
        given = evidence(9, seed)
        given.angular[:] = np.random.default_rng(seed).uniform(size=given.angular.shape)
        plan, _ = WeightedSum(layers=4).plan(shape, given)
        cost = sum(given.angular[x.sources[0], x.sources[-1] + 1] for x in plan.layers if len(x.sources) > 1)
        best = np.inf
        for cuts in itertools.combinations(range(1, 9), 4):
            edges = [0, *cuts, 9]
            groups = [range(a, b) for a, b in itertools.pairwise(edges)]
            if all(len(g) == 1 or (len(g) <= 4 and g.start >= 1 and g.stop <= 8) for g in groups):
                best = min(best, sum(given.angular[g.start, g.stop] for g in groups if len(g) > 1))
        assert cost == pytest.approx(best)
        assert all(sum(x.shares) == pytest.approx(1) for x in plan.layers)


def test_weighted_sum_never_mixes_kinds(tiny_model):
    shape = Checkpoint(tiny_model("qwen3_moe")).shape
    kinds = {shape.kind(i) for i in range(shape.layers)}
    assert len(kinds) > 1
    try:
        plan, _ = WeightedSum(layers=1, protect_first=0, protect_last=0).plan(shape, evidence(shape.layers))
    except InputError as error:
        assert "of one kind" in str(error)
        return
    assert all(len({shape.kind(i) for i in x.sources}) == 1 for x in plan.layers)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0.05}, "removes none"),
        ({"ratio": 0.9}, "only 2 are unprotected"),
        ({"layers": 4, "protect_first": 0, "protect_last": 0}, "removes 4 of 4"),
    ],
)
def test_impossible_ratios(llama, options, says):
    with pytest.raises(InputError, match=says):
        ShortGPT(**options).check(llama.shape)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.2, "layers": 1}, {"ratio": 0}, {"ratio": 1.0}, {"ratio": -1}])
def test_refused_targets(options):
    with pytest.raises(ValueError):
        ShortGPT(**options)


@pytest.mark.parametrize(("ratio", "layers", "removed"), [(0.2, 16, 3), (0.3, 32, 10), (0.1, 30, 3), (0.25, 10, 3)])
def test_rounding_is_nearest_ties_up(ratio, layers, removed):
    assert ShortGPT(ratio=ratio).removed(layers) == removed


def test_plan_round_trips_and_refuses_nonsense(tmp_path):
    plan = MergePlan("x", 5, (PlannedLayer((0,)), PlannedLayer((1, 3), (0.25, 0.75)), PlannedLayer((4,))))
    plan.save(tmp_path)
    again = MergePlan.load(tmp_path)
    assert (again.base_layers, again.layers, again.tensors) == (plan.base_layers, plan.layers, {})
    held = MergePlan("x", 3, (PlannedLayer((0, 1), (1.0, 0.0), "solved"), PlannedLayer((2,))), {"0.w": torch.ones(2)})
    held.save(tmp_path)
    again = MergePlan.load(tmp_path)
    assert again.layers == held.layers and torch.equal(again.of_layer(0)["w"], torch.ones(2)) and not again.of_layer(1)
    assert plan.dropped == [2] and plan.gaps() == [1] and plan.covered(1) == range(1, 4)
    for bad in ([0, 0], [2, 1], [0, 7], []):
        with pytest.raises(InputError):
            keep_only("x", 5, bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_checkpoint_is_stock(tiny_model, tmp_path, family):
    """Bit-equal logits after reload, in every family: sliding layers, q/k norms, dense layers among experts."""
    source = Checkpoint(tiny_model(family))
    plan = keep_only("test", source.num_layers, [0, 2, 3])
    written = apply_plan(source, plan, tmp_path / "out")
    report = check_reload(written.path, reference_logits(source, plan))
    assert report["relative_logit_error"] == 0.0
    assert written.num_layers == 3 and sorted(written.layer(2)) == sorted(source.layer(3))


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_weighted_sum_is_really_written(tiny_model, tmp_path, family):
    source = Checkpoint(tiny_model(family))
    plan = MergePlan("test", 4, (PlannedLayer((0,)), PlannedLayer((1, 2), (0.3, 0.7)), PlannedLayer((3,))))
    written = apply_plan(source, plan, tmp_path / "out")
    check_reload(written.path, reference_logits(source, plan))
    for local, name in written.layer(1).items():
        merged = written.tensor(name)
        a, b = source.tensor(source.layer(1)[local]), source.tensor(source.layer(2)[local])
        torch.testing.assert_close(merged, 0.3 * a + 0.7 * b)
        if merged.ndim == 2:  # differs from both parents, so from either drop
            assert not torch.equal(merged, a) and not torch.equal(merged, b)


def test_same_plan_same_bytes(llama, tmp_path):
    from compression_dags.provenance.artifacts import content_digest, describe_files

    plan = keep_only("test", 4, [0, 1, 3])
    digests = {content_digest(describe_files(apply_plan(llama, plan, tmp_path / n).path)) for n in "ab"}
    assert len(digests) == 1


def test_share_of_parameters(llama):
    share = removed_share(llama, keep_only("test", 4, [0, 3]))
    layer = sum(llama.tensors[n].numel for n in llama.layer(1).values())
    assert share["ratio_of_parameters"] == pytest.approx(2 * layer / llama.numel)


def test_gate_catches_wrong_weights_and_leftovers(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    plan = keep_only("test", 4, [0, 1, 3])
    wrong = apply_plan(llama, keep_only("test", 4, [0, 2, 3]), tmp_path / "wrong")
    with pytest.raises(IntegrityError, match="logits differ"):
        check_reload(wrong.path, reference_logits(llama, plan))
    config = json.loads((wrong.path / "config.json").read_text())
    (wrong.path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(IntegrityError, match="unexpected"):
        load_stock(wrong.path)
    tensors = load_file(wrong.path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, wrong.path / "model.safetensors", metadata={"format": "pt"})
    (wrong.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="missing"):
        load_stock(wrong.path)


def test_merged_model_differs_where_it_should(llama, tmp_path):
    """The probe is sensitive: dropping another layer changes the logits by far more than rounding."""
    ids = probe_ids(512, 128)
    logits = {}
    for kept in ([0, 1, 3], [0, 2, 3]):
        written = apply_plan(llama, keep_only("t", 4, kept), tmp_path / "".join(map(str, kept)))
        with torch.inference_mode():
            logits[tuple(kept)] = load_stock(written.path)(ids).logits
    a, b = logits.values()
    assert (a - b).norm() / a.norm() > 1e-2
