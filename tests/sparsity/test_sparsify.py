"""Pruning a whole model: counts, the staged pass against whole-layer passes, masks, refusals, resumption."""

import numpy as np
import pytest
import torch
from concat_cases import random_blocks
from pydantic import ValidationError
from slow import by_default

from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.passes.lockstep import LockstepForward
from compression_dags.provenance.resume import ResumePoint
from compression_dags.registry import METHODS
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.sweep import Rows, prune_sweep
from compression_dags.sparsity.allocation import SparsityEvidence, SparsityPlan
from compression_dags.sparsity.masks import (
    BESIDE,
    MASKS,
    load_masks,
    mask_of_matrix,
    mask_of_rows,
    pack_mask,
    save_masks,
    settle_masks,
    unpack_mask,
)
from compression_dags.sparsity.pruning_pass import PruningPass

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "opt"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def stage(method, **options):
    return METHODS["sparsify"][method].model_validate({"method": method, **options})


def planned(chosen, source):
    return chosen.plan(source, SparsityEvidence(source.architecture))[0]


def sparsify(chosen, source, folder, blocks=None, plan=None, **more):
    return chosen.sparsify(source, plan or planned(chosen, source), blocks, folder, **more)


def inputs_of(source, tensors, blocks, index, module):
    """Inputs (tokens, d) of one module: whole forwards of every layer, with some tensors replaced."""
    stream = DecoderStream(source, resident=False)
    batches, seen = stream.batches(blocks), []
    for position in range(index + 1):
        with torch.inference_mode(), stream.layer(position) as layer:
            prefix = source.architecture.layer_prefix(position)
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    local = name.removeprefix(prefix).rsplit(".", 1)[0]
                    layer.get_submodule(local).weight = torch.nn.Parameter(tensor.float(), requires_grad=False)
            hook = layer.get_submodule(module).register_forward_pre_hook(
                lambda _, args: seen.append(args[0]) if position == index else None  # noqa: B023
            )
            for batch in batches:
                batch.hidden = stream.apply(layer, position, batch)
            hook.remove()
    masks = [b.mask.reshape(-1) for b in batches]
    return torch.cat([x.reshape(-1, x.shape[-1])[m] for x, m in zip(seen, masks, strict=True)])


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_the_staged_pass_is_true_sequential(tiny_model, tmp_path, family, padded):
    """Every matrix of layer 1 is what the inputs of a whole forward of the model, pruned so far, make of it."""
    source, blocks = Checkpoint(tiny_model(family)), random_blocks(rows=9, length=30, padded=padded)
    found = sparsify(stage("sparsegpt", sparsity=0.5), source, tmp_path / "out", blocks)
    prefix = source.architecture.layer_prefix(1)
    done = {n: t for n, t in found.tensors.items() if n.startswith(source.architecture.layer_prefix(0))}
    for group in source.architecture.groups:
        present = [p for p in group.projections if f"{prefix}{p}.weight" in found.tensors]
        if not present:
            continue
        x = inputs_of(source, done, blocks, 1, present[0]).float()
        factor = inverse_factor(x.T @ x)
        for local in present:
            weight = source.tensor(f"{prefix}{local}.weight").float()
            wanted = prune_sweep(weight, factor, [Rows(0, len(weight), Pattern.unstructured(0.5))])
            ours = found.tensors[f"{prefix}{local}.weight"].float()
            assert ((ours != 0) == wanted.mask).float().mean() > 0.995, local
            assert torch.allclose(ours, wanted.weight, atol=2e-2 * float(weight.abs().max())), local
            done[f"{prefix}{local}.weight"] = found.tensors[f"{prefix}{local}.weight"]


def test_batches_do_not_matter(tiny_model, tmp_path, monkeypatch):
    source, blocks = Checkpoint(tiny_model("qwen3")), random_blocks(rows=8, length=24, padded=True)
    chosen = stage("wanda", sparsity=0.5)
    one = sparsify(chosen, source, tmp_path / "a", blocks)
    monkeypatch.setitem(
        __import__("compression_dags.calibration.streaming").calibration.streaming.TOKENS_PER_BATCH, "cpu", 24
    )
    each = sparsify(chosen, source, tmp_path / "b", blocks)
    same = [float((one.tensors[n] == each.tensors[n]).float().mean()) for n in one.tensors]
    assert min(same) > 0.995 and len(same) == len(planned(chosen, source).patterns)


@pytest.mark.parametrize("family", by_default("llama", "gemma3_text", "opt", of=FAMILIES))
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("asked", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_counts_masks_and_reload(tiny_model, tmp_path, family, method, asked):
    source, blocks = Checkpoint(tiny_model(family)), random_blocks()
    found = sparsify(stage(method, **asked), source, tmp_path / "out", blocks)
    masks = load_masks(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
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
    untouched = [n for n in source.tensors if n not in found.tensors]
    assert all(torch.equal(source.tensor(n), found.checkpoint.tensor(n)) for n in untouched) and untouched
    assert check_reload(found.checkpoint.path, found.reference_logits(source))["gate"] == "passed"


def test_wanda_is_its_formula(tiny_model, tmp_path):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks(rows=6, padded=True)
    chosen = stage("wanda", sparsity=0.5, propagate="dense")
    found = sparsify(chosen, source, tmp_path / "out", blocks)
    x = inputs_of(source, {}, blocks, 2, "mlp.down_proj").double().numpy()
    weight = source.tensor("model.layers.2.mlp.down_proj.weight").double().numpy()
    score = np.abs(weight) * np.sqrt((x**2).mean(0))
    order = np.argsort(score, axis=1, kind="stable")[:, : weight.shape[1] // 2]
    wanted = weight.copy()
    np.put_along_axis(wanted, order, 0, axis=1)
    assert np.array_equal(found.tensors["model.layers.2.mlp.down_proj.weight"].double().numpy(), wanted)


def test_mixed_groups(tiny_model, tmp_path):
    source = Checkpoint(tiny_model("llama"))
    base = planned(stage("wanda", pattern="2:4"), source)
    patterns = {n: Pattern.n_of_m(1 + i % 3, 4) for i, n in enumerate(base.patterns)}
    plan = SparsityPlan("by hand", 0.5, "2:4", patterns)
    found = sparsify(stage("sparsegpt", pattern="2:4"), source, tmp_path / "out", random_blocks(), plan)
    masks = load_masks(tmp_path / "out")
    for name, pattern in patterns.items():
        kept = masks[name].reshape(len(masks[name]), -1, 4).sum(-1)
        assert (kept == 4 - pattern.zeros).all(), name
    assert {d.evidence["pattern"] for d in found.decisions} == {"1:4", "2:4", "3:4"}


def test_a_killed_walk_goes_on_to_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks(padded=True)
    chosen = stage("sparsegpt", sparsity=0.5)
    whole = sparsify(chosen, source, tmp_path / "whole", blocks)
    settings = {"stage": "sparsegpt"}
    original = PruningPass._layer

    def dies(self, index, layer):
        if index == 2:
            raise KeyboardInterrupt
        original(self, index, layer)

    monkeypatch.setattr(PruningPass, "_layer", dies)
    monkeypatch.setattr(ResumePoint, "save_if_due", lambda self, step, state: self.save(step, state()))
    with pytest.raises(KeyboardInterrupt):
        sparsify(chosen, source, tmp_path / "a", blocks, resume=ResumePoint(tmp_path / "scratch", settings))
    calls = []
    monkeypatch.setattr(PruningPass, "_layer", lambda s, i, layer: (calls.append(i), original(s, i, layer)))
    again = sparsify(chosen, source, tmp_path / "b", blocks, resume=ResumePoint(tmp_path / "scratch", settings))
    assert calls[0] == 2
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
    assert [d.evidence for d in whole.decisions] == [d.evidence for d in again.decisions]


def test_dead_inputs_and_activations_that_overflow(tiny_model, tmp_path, monkeypatch):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks()
    original = DecoderStream.batches

    def poisoned(self, chosen):
        found = original(self, chosen)
        found[0].hidden = found[0].hidden.clone()
        found[0].hidden[0, 0, 0] = float("nan")
        return found

    monkeypatch.setattr(DecoderStream, "batches", poisoned)
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(IntegrityError, match="activations are not finite"):
            sparsify(stage(method, sparsity=0.5), source, tmp_path / method, blocks)


def test_refusals(tiny_model, tmp_path):
    source = Checkpoint(tiny_model("llama"))
    with pytest.raises(ValidationError, match="give either sparsity"):
        stage("wanda")
    with pytest.raises(ValidationError, match="give either sparsity"):
        stage("wanda", sparsity=0.5, pattern="2:4")
    with pytest.raises(ValidationError, match="less than 1"):
        stage("wanda", sparsity=1.0)
    with pytest.raises(ValidationError, match="keeps every weight"):
        stage("wanda", pattern="4:4")
    with pytest.raises(InputError, match="pattern 3:7 does not divide the hidden size"):
        stage("wanda", pattern="3:7").check(source.shape)
    with pytest.raises(InputError, match="block 6 is not a multiple of the 4"):
        stage("sparsegpt", pattern="2:4", block=6).check(source.shape)
    with pytest.raises(InputError, match="needs calibration tokens"):
        sparsify(stage("wanda", sparsity=0.5), source, tmp_path / "x")
    other = planned(stage("magnitude", sparsity=0.5), Checkpoint(tiny_model("qwen3")))
    small = SparsityPlan("by hand", 0.5, "unstructured", dict(list(other.patterns.items())[:-1]))
    with pytest.raises(InputError, match="plan is for another model: 1 matrices differ"):
        sparsify(stage("magnitude", sparsity=0.5), Checkpoint(tiny_model("qwen3")), tmp_path / "y", plan=small)


def test_masks_count_exactly_with_ties():
    score = torch.zeros(4, 10)
    assert int((~mask_of_matrix(score, Pattern.unstructured(0.33))).sum()) == 13
    assert ((~mask_of_rows(score, Pattern.unstructured(0.35))).sum(1) == 3).all()
    assert mask_of_rows(score, Pattern.unstructured(0.5))[0].tolist() == [False] * 5 + [True] * 5
    mask = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    assert np.array_equal(unpack_mask(pack_mask(mask).numpy(), 13), mask.numpy())


def test_a_failure_in_a_batch_ends_all_threads():
    first, second = torch.nn.Identity(), torch.nn.Identity()

    def forward(i):
        x = second(first(torch.full((1,), float(i))))
        if i == 1:
            raise ValueError("batch 1 broke")
        return x

    order = []
    run = LockstepForward(
        3, forward, [(first,), (second,)], lambda s, b, x: order.append((s, b)), lambda s: order.append(s)
    )
    with pytest.raises(ValueError, match="batch 1 broke"):
        run.run()
    assert order == [(0, 0), (0, 1), (0, 2), 0, (1, 0), (1, 1), (1, 2), 1]
    import threading

    assert threading.active_count() == 1 or not any(t.name.endswith("(_work)") for t in threading.enumerate())
    with pytest.raises(IntegrityError, match="was expected"):
        LockstepForward(1, lambda i: first(torch.zeros(1)), [(second,)], lambda *_: None, lambda _: None).run()


def test_the_card_says_that_zeros_save_nothing():
    from compression_dags.reports.model_card import _on_zeros

    text = " ".join(_on_zeros(0.5))
    assert "50.00%" in text and "neither smaller nor faster" in text and "sparsity/masks.safetensors" in text
    assert _on_zeros(None) == []


def test_equal_masks_are_equal_bytes(tmp_path):
    packed = {f"model.layers.{i}.mlp.up_proj": np.full((2, 3), i, np.uint8) for i in range(12)}
    columns = dict.fromkeys(packed, 24)
    first = save_masks(packed, columns, tmp_path / "a").read_bytes()
    backwards = {name: packed[name] for name in reversed(packed)}, dict.fromkeys(reversed(columns), 24)
    assert all(save_masks(*backwards, tmp_path / "b").read_bytes() == first for _ in range(8))


def test_masks_of_older_artifacts_are_read_and_moved(tmp_path):
    from safetensors.numpy import save_file

    packed = {"a": np.array([[0b10100000]], np.uint8), "b": np.array([[255]], np.uint8)}
    save_file(packed, tmp_path / BESIDE, metadata={"a": "3", "b": "8"})
    wanted = {"a": [[True, False, True]], "b": [[True] * 8]}
    assert {name: mask.tolist() for name, mask in load_masks(tmp_path).items()} == wanted
    assert settle_masks(tmp_path) and not (tmp_path / BESIDE).exists() and (tmp_path / MASKS).is_file()
    assert {name: mask.tolist() for name, mask in load_masks(tmp_path).items()} == wanted
    assert not settle_masks(tmp_path / "none")
