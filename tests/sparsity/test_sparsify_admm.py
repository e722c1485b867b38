"""The pruner that aims at the dense model: its sums against whole forwards, its gain over its own outputs."""

import itertools

import pytest
import torch
from concat_cases import random_blocks
from slow import by_default
from test_sparsify import inputs_of, planned, sparsify, stage

from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.sparsity.pruners.admm import ADMM


def residual_before(source, tensors, blocks, index, group):
    """(tokens, d) state that a writer of layer `index` adds to: what the norm before its branch reads."""
    norms = dict(source.architecture.input_norms)
    norm = norms["attention_input" if group == "attention_output" else "mlp_input"]
    return inputs_of(source, tensors, blocks, index, norm).float()


@pytest.mark.parametrize(
    ("target", "family"),
    by_default(
        ("dense", "gemma3_text"),
        ("residual", "llama"),
        ("residual", "opt"),
        of=itertools.product(["dense", "residual"], ["llama", "qwen3", "gemma3_text", "opt"]),
    ),
)
def test_sums_are_those_of_both_models(tiny_model, tmp_path, monkeypatch, family, target):
    source, blocks = Checkpoint(tiny_model(family)), random_blocks(rows=5, length=20, padded=True)
    problems = {}
    original = ADMM.prune

    def noted(self, problem):
        problems[problem.names] = problem
        return original(self, problem)

    monkeypatch.setattr(ADMM, "prune", noted)
    chosen = stage("admm", sparsity=0.5, target=target)
    found = sparsify(chosen, source, tmp_path / "out", blocks)
    prefix = source.architecture.layer_prefix(1)
    done = {n: t for n, t in found.tensors.items() if n.startswith(source.architecture.layer_prefix(0))}
    for group in source.architecture.groups:
        problem = next(p for names, p in problems.items() if names[0] == prefix + group.projections[0])
        ours = inputs_of(source, done, blocks, 1, group.projections[0]).float()
        theirs = inputs_of(source, {}, blocks, 1, group.projections[0]).float()
        close(problem.hessian.matrix, ours.T @ ours)
        close(problem.cross, theirs.T @ ours)
        assert (problem.drift is not None) == (
            target == "residual" and family != "gemma3_text" and group.name.endswith("output")
        )
        if problem.drift is not None:
            states = [residual_before(source, tensors, blocks, 1, group.name) for tensors in ({}, done)]
            close(problem.drift, (states[0] - states[1]).T @ ours)
        done |= {f"{n}.weight": found.tensors[f"{n}.weight"] for n in problem.names}
    assert check_reload(found.checkpoint.path, found.reference_logits(source))["gate"] == "passed"


def test_dense_statistics_are_refused_where_both_models_run(tiny_model, tmp_path):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks()
    with pytest.raises(InputError, match="propagate dense is for target own"):
        sparsify(stage("admm", sparsity=0.5, propagate="dense"), source, tmp_path / "out", blocks)
    alone = stage("admm", sparsity=0.5, propagate="dense", target="own")
    found = sparsify(alone, source, tmp_path / "own", blocks)
    assert {d.evidence["target"] for d in found.decisions} == {"own"}


def close(found, wanted):
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def states(checkpoint, blocks):
    stream = DecoderStream(checkpoint)
    batches = stream.batches(blocks)
    with torch.inference_mode():
        for index in range(stream.num_layers):
            with stream.layer(index) as layer:
                for batch in batches:
                    batch.hidden = stream.apply(layer, index, batch)
    return torch.cat([b.hidden for b in batches])


def test_aiming_at_the_residual_stream_ends_nearer_to_it(tiny_model, tmp_path):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks(rows=32, length=64)
    dense = states(source, blocks)
    error = {}
    for target in ("own", "residual"):
        chosen = stage("admm", sparsity=0.7, target=target)
        found = sparsify(chosen, source, tmp_path / target, blocks)
        error[target] = float((states(found.checkpoint, blocks) - dense).norm() / dense.norm())
    assert error["residual"] < 0.98 * error["own"], error


@pytest.mark.parametrize("asked", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_counts_and_the_same_bytes_twice(tiny_model, tmp_path, asked):
    source, blocks = Checkpoint(tiny_model("qwen2")), random_blocks()
    once, again = (sparsify(stage("admm", **asked), source, tmp_path / n, blocks) for n in "ab")
    for decision in once.decisions:
        weight = once.tensors[f"{decision.target}.weight"]
        zeros = int((weight == 0).sum())
        assert torch.equal(weight, again.tensors[f"{decision.target}.weight"])
        if "pattern" in asked:
            assert bool(((weight == 0).view(len(weight), -1, 4).sum(-1) >= 2).all())
        else:
            assert zeros >= int(0.6 * weight.numel() + 0.5) and zeros == decision.evidence["zeros"]


def test_both_models_resume(tiny_model, tmp_path):
    source, blocks = Checkpoint(tiny_model("llama")), random_blocks()
    chosen = stage("admm", sparsity=0.5)
    whole = sparsify(chosen, source, tmp_path / "whole", blocks)
    resume = ResumePoint(tmp_path / "state", {"x": 1}, every_seconds=0.0)

    def stop_after_two(items, *_):
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        sparsify(chosen, source, tmp_path / "a", blocks, resume=resume, progress=stop_after_two)
    resumed = sparsify(chosen, source, tmp_path / "b", blocks, resume=resume)
    assert set(whole.tensors) == set(resumed.tensors)
    assert all(torch.equal(whole.tensors[n], resumed.tensors[n]) for n in whole.tensors)
    assert planned(chosen, source).patterns
