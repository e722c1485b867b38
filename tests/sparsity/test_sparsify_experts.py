"""Pruning mixtures of experts: counts, the pass against whole forwards, experts without tokens, allocators."""

import pytest
import torch
from concat_cases import random_blocks
from slow import by_default
from test_sparsify import planned, sparsify, stage

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.similarity.redundancy_tables import write_redundancy
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.sweep import Rows, prune_sweep
from compression_dags.sparsity.allocation import make_plan, mean_sparsity
from compression_dags.sparsity.allocators import ALLOCATORS
from compression_dags.sparsity.evidence import PruneProbe, stored_evidence
from compression_dags.sparsity.experts import SAW_NONE
from compression_dags.sparsity.masks import load_masks
from compression_dags.sparsity.pruning_pass import PruningPass
from compression_dags.sparsity.stage import all_matrices
from models import edit_weights, tiny

FAMILIES = ["mixtral", "qwen3_moe"]
every_family = pytest.mark.parametrize("family", FAMILIES)
#: A layer with experts in both families, after one that is pruned before it.
LAYER = 2


def names_of(source, layer, expert):
    prefix = source.architecture.layer_prefix(layer)
    return [prefix + local for local in source.architecture.experts.matrices(expert)]


def rows_of(decisions, name):
    return next(d for d in decisions if d.target == name).evidence


def replaced(stream, tensors, layer):
    """The tensors of a layer on disk, some of them replaced, as a module loads them."""
    source = stream.checkpoint
    local = {k: tensors.get(n, source.tensor(n)) for k, n in source.layer(layer).items()}
    return {k: t.float() for k, t in stream.in_memory(layer, local).items()}


def experts_input(source, tensors, blocks, layer):
    """Inputs (tokens, H) and routing (tokens, k) of a layer's experts: whole forwards with some tensors replaced."""
    stream, seen = DecoderStream(source, resident=False), []
    batches = stream.batches(blocks)
    for index in range(layer + 1):
        with torch.inference_mode(), stream.layer(index) as module:
            module.load_state_dict(replaced(stream, tensors, index), assign=True)
            if index == layer:
                module.get_submodule("mlp.experts").register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
            for batch in batches:
                batch.hidden = stream.apply(module, index, batch)
    masks = [b.mask.reshape(-1) for b in batches]
    x, routed = (torch.cat([s[i][m] for s, m in zip(seen, masks, strict=True)]) for i in range(2))
    return x, routed


def swept(weight, x):
    factor = inverse_factor(x.T @ x)
    return prune_sweep(weight, factor, [Rows(0, len(weight), Pattern.unstructured(0.5))]).weight


def whole_reference(source, x, layer, expert, down_reads_pruned):
    """Gate, up and down of one expert on inputs x, by the formula of the expert."""
    gate, up, down = (source.tensor(f"{n}.weight").float() for n in names_of(source, layer, expert))
    new_gate, new_up = swept(gate, x), swept(up, x)
    read_gate, read_up = (new_gate, new_up) if down_reads_pruned else (gate, up)
    inner = torch.nn.functional.silu(x @ read_gate.T) * (x @ read_up.T)
    return new_gate, new_up, swept(down, inner)


@every_family
@pytest.mark.parametrize("propagate", by_default("pruned", of=["pruned", "dense"]))
@pytest.mark.parametrize("tokens", ["routed", "all"])
def test_experts_are_what_whole_forwards_make_of_them(tiny_model, tmp_path, family, propagate, tokens):
    """Padded batches; the layers before and the layer's attention are pruned (propagate: pruned) or not."""
    source, blocks = Checkpoint(tiny_model(family)), random_blocks(rows=9, length=30, padded=True)
    chosen = stage("sparsegpt", sparsity=0.5, propagate=propagate, expert_tokens=tokens)
    found = sparsify(chosen, source, tmp_path / "out", blocks)
    first = [source.architecture.layer_prefix(i) for i in range(LAYER)]
    attention = source.architecture.layer_prefix(LAYER) + "self_attn."
    done = {n: t for n, t in found.tensors.items() if n.startswith((*first, attention))}
    x, routed = experts_input(source, done if propagate == "pruned" else {}, blocks, LAYER)
    for expert in range(4):
        rows = x[(routed == expert).any(1)] if tokens == "routed" else x
        wanted = whole_reference(source, rows, LAYER, expert, propagate == "pruned")
        for name, weight in zip(names_of(source, LAYER, expert), wanted, strict=True):
            ours = found.tensors[f"{name}.weight"].float()
            assert ((ours != 0) == (weight != 0)).float().mean() > 0.999, name
            assert float((ours - weight).norm() / weight.norm()) < 0.01, name
            evidence = rows_of(found.decisions, name)
            assert (evidence["expert_tokens"], evidence["tokens"]) == (tokens, len(rows))
    assert tokens == "all" or 0 < len(rows) < len(x)


@every_family
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("asked", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_counts_masks_and_reload(tiny_model, tmp_path, family, method, asked):
    source = Checkpoint(tiny_model(family, layers=2))
    found = sparsify(stage(method, **asked), source, tmp_path / "out", random_blocks())
    masks, of_experts = load_masks(tmp_path / "out"), 0
    for decision in found.decisions:
        weight = found.checkpoint.tensor(f"{decision.target}.weight")
        before = source.tensor(f"{decision.target}.weight")
        mask = torch.from_numpy(masks[decision.target])
        assert bool((weight[~mask] == 0).all()) and decision.evidence["zeros"] == int((weight == 0).sum())
        rows, columns = weight.shape
        if "pattern" in asked:
            assert bool((mask.view(rows, -1, 4).sum(-1) == 2).all())
        elif method == "wanda":
            assert bool(((~mask).sum(1) == int(columns * 0.6 + 1e-9)).all())
        else:
            assert int((~mask).sum()) == int(0.6 * weight.numel() + 0.5)
        if method != "sparsegpt":
            assert torch.equal(weight[mask], before[mask])  # kept weights bit for bit
        of_experts += ".experts." in decision.target
        stated = "expert_tokens" in decision.evidence
        assert stated == (".experts." in decision.target and method != "magnitude")
    assert of_experts == 12 * (2 if family == "mixtral" else 1)
    assert [d.target for d in found.decisions] == [m.name for m in all_matrices(source)]
    untouched = [n for n in source.tensors if n not in found.tensors]
    assert all(torch.equal(source.tensor(n), found.checkpoint.tensor(n)) for n in untouched)
    assert sum("gate.weight" in n for n in untouched) == of_experts // 12  # routers
    assert check_reload(found.checkpoint.path, found.reference_logits(source))["gate"] == "passed"


def test_half_precision_keeps_what_is_stored(tiny_model, tmp_path):
    """The fused parameters are float32 copies of a float16 file."""
    source = Checkpoint(tiny_model("mixtral", layers=2, dtype="float16"))
    found = sparsify(stage("wanda", sparsity=0.5), source, tmp_path / "out", random_blocks())
    for name in (n for e in range(4) for n in names_of(source, 1, e)):
        ours, before = found.tensors[f"{name}.weight"], source.tensor(f"{name}.weight")
        assert ours.dtype == torch.float16 and torch.equal(ours[ours != 0], before[ours != 0])


@every_family
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_takes_all(tmp_path, family, method):
    """The router reads one channel; the best two of 5, 4, 0, −4, −5 times it never include the middle one."""
    count = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}[family]
    directory = tiny(family, tmp_path / "model", layers=1, **{count: 5})

    def starve(tensors):
        router = next(t for n, t in tensors.items() if n.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight")))
        router.zero_()
        router[:, 0] = torch.tensor([5.0, 4.0, 0.0, -4.0, -5.0])

    edit_weights(directory, starve)
    source, blocks = Checkpoint(directory), random_blocks(rows=6, padded=True)
    found = sparsify(stage(method, sparsity=0.5), source, tmp_path / "out", blocks)
    attention = {n: t for n, t in found.tensors.items() if ".self_attn." in n}
    _, routed = experts_input(source, attention, blocks, 0)
    for expert in range(5):
        for name in names_of(source, 0, expert):
            evidence = rows_of(found.decisions, name)
            assert evidence["expert_tokens"] == ("routed" if expert != 2 else SAW_NONE)
            assert evidence["tokens"] == (len(routed) if expert == 2 else int((routed == expert).sum()))
            assert evidence["zeros"] == evidence["parameters"] // 2
    assert check_reload(found.checkpoint.path, found.reference_logits(source))["gate"] == "passed"


def test_a_pruner_that_follows_the_dense_model(tiny_model, tmp_path):
    """Attention follows it; experts are fitted to their own outputs on the pruned model's inputs."""
    source, blocks = Checkpoint(tiny_model("qwen3_moe", layers=2)), random_blocks(padded=True)
    followed = sparsify(stage("admm", sparsity=0.5, target="dense"), source, tmp_path / "a", blocks)
    for decision in followed.decisions:
        assert decision.evidence.get("target") == ("own" if ".experts." in decision.target else "dense")
    assert check_reload(followed.checkpoint.path, followed.reference_logits(source))["gate"] == "passed"
    alone = sparsify(stage("admm", sparsity=0.5, target="own"), source, tmp_path / "b", blocks)
    assert all(d.evidence["target"] == "own" for d in alone.decisions)


def test_a_killed_walk_goes_on_to_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    source, blocks = Checkpoint(tiny_model("mixtral")), random_blocks(padded=True)
    chosen = stage("sparsegpt", pattern="2:4")
    whole = sparsify(chosen, source, tmp_path / "whole", blocks)
    original = PruningPass._layer

    def dies(self, index, layer):
        if index == 2:
            raise KeyboardInterrupt
        original(self, index, layer)

    monkeypatch.setattr(PruningPass, "_layer", dies)
    monkeypatch.setattr(ResumePoint, "save_if_due", lambda self, step, state: self.save(step, state()))
    with pytest.raises(KeyboardInterrupt):
        sparsify(chosen, source, tmp_path / "a", blocks, resume=ResumePoint(tmp_path / "scratch", {"stage": "moe"}))
    calls = []
    monkeypatch.setattr(PruningPass, "_layer", lambda s, i, layer: (calls.append(i), original(s, i, layer)))
    again = sparsify(chosen, source, tmp_path / "b", blocks, resume=ResumePoint(tmp_path / "scratch", {"stage": "moe"}))
    assert calls == [2, 3]
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
    assert [d.evidence for d in whole.decisions] == [d.evidence for d in again.decisions]


def test_patterns_must_divide_the_widths_that_exist(tiny_model):
    check = {f: stage("wanda", pattern="16:32").check for f in FAMILIES}
    check["mixtral"](Checkpoint(tiny_model("mixtral")).shape)
    narrow = Checkpoint(tiny_model("qwen3_moe", layers=1, moe_intermediate_size=24, mlp_only_layers=[]))
    with pytest.raises(InputError, match="16:32 does not divide the experts' intermediate size 24"):
        check["qwen3_moe"](narrow.shape)
    dense_odd = {"intermediate_size": 100, "layers": 2}
    with pytest.raises(InputError, match="does not divide the intermediate size 100"):
        check["qwen3_moe"](Checkpoint(tiny_model("qwen3_moe", **dense_odd)).shape)
    check["qwen3_moe"](Checkpoint(tiny_model("qwen3_moe", **dense_odd, mlp_only_layers=[])).shape)
    with pytest.raises(InputError, match="experts' intermediate size 100"):
        check["mixtral"](Checkpoint(tiny_model("mixtral", layers=1, intermediate_size=100)).shape)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_model, tmp_path_factory):
    source, blocks = Checkpoint(tiny_model(request.param)), random_blocks(rows=8, length=40)
    folder, out = tmp_path_factory.mktemp("activations"), tmp_path_factory.mktemp("redundancy")
    profile_activations(DecoderStream(source), blocks, samples=200).save(folder)
    write_redundancy(folder, out)
    probe = PruneProbe(stage("wanda", sparsity=0.5), source, blocks, fit_rows=4, held_rows=2)
    return source, stored_evidence(source, folder, out), probe


@pytest.mark.parametrize("method", [name for name in ALLOCATORS if name != "given"])
def test_every_allocator_meets_the_target(case, method):
    source, evidence, probe = case
    matrices = all_matrices(source)
    options = {"points": 2, "refine": 0} if method == "ramp" else {}
    allocation = ALLOCATORS[method].model_validate({"method": method, **options})
    allocated = allocation.allocate(matrices, 0.5, evidence, probe)
    plan = make_plan(method, matrices, allocated, 0.5)
    shares = {n: p.sparsity for n, p in plan.patterns.items()}
    unit = max(sum(m.numel for m in matrices if m.layer == i) for i in range(source.num_layers))
    step = getattr(allocation, "granularity", 0) * unit / sum(m.numel for m in matrices)
    assert abs(mean_sparsity(matrices, shares) - 0.5) <= step + 1e-9 and len(shares) == len(matrices)
    assert any("down projections are not recorded" in n for n in allocated.notes) == (method in {"owl", "dlp"})
    if method == "als":  # the experts of a layer are one unit
        assert len({shares[n] for e in range(4) for n in names_of(source, LAYER, e)}) == 1


def test_als_features_that_experts_do_not_have_are_refused(case):
    source, evidence, probe = case
    for options in ({"feature": "out"}, {"feature": "gate", "level": "layer"}):
        allocation = ALLOCATORS["als"].model_validate({"method": "als", **options})
        with pytest.raises(InputError, match=r"no features|no table"):
            allocation.allocate(all_matrices(source), 0.5, evidence, probe)


def test_plans_name_every_expert(tiny_model):
    source = Checkpoint(tiny_model("mixtral", layers=2))
    names = list(planned(stage("magnitude", sparsity=0.5), source).patterns)
    assert len(names) == len(set(names)) == 2 * (4 + 12)
    assert names[:7] == [
        *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
        *(f"model.layers.0.block_sparse_moe.experts.0.{w}" for w in ("w1", "w3", "w2")),
    ]
