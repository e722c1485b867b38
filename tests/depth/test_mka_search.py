"""`mka`: merged weights are really merged, each choice is the least loss among recorded candidates, plans reproduce."""

import itertools
import json

import numpy as np
import pytest
import torch
from slow import by_default
from transformers import AutoTokenizer

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.mka.options import MKA
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.regression_mean import (
    Member,
    matching_channels,
    matching_groups,
    permuted,
    regression_mean,
)
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.similarity.evidence import Evidence


def blocks_of(path, sequences=24, length=64):
    tokenizer = AutoTokenizer.from_pretrained(path)
    return make_blocks(read_documents("c4-sample"), tokenizer, Calibration(sequences=sequences, length=length), 256)


def evidence_of(source, blocks):
    found = profile_activations(DecoderStream(source), blocks)
    return Evidence(*(t.numpy() for t in (found.block_influence, found.angular, found.angular_last)))


def planned(source, blocks, evidence=None, **options):
    options = {"layers": 1, "fit_tokens": 1024, "score_tokens": 256, **options}
    evidence = evidence or evidence_of(source, blocks)
    return MKA(**options).plan(source.shape, evidence, ProbeContext(source, blocks))


@pytest.fixture(scope="module")
def story(stories):
    source = Checkpoint(stories)
    blocks = blocks_of(stories)
    return source, blocks, evidence_of(source, blocks)


@pytest.mark.parametrize(
    ("form", "family"),
    by_default(
        ("concat", "llama"),
        ("concat", "gemma3_text"),
        ("mean", "opt"),
        of=itertools.product(["concat", "mean"], ["llama", "qwen2", "qwen3", "gemma3_text", "opt"]),
    ),
)
def test_merged_weights_differ_from_both_parents_and_either_drop(tiny_model, tmp_path, family, form):
    source = Checkpoint(tiny_model(family, layers=5))
    kinds = [source.shape.kind(i) for i in range(5)]
    if not any(a == b for a, b in itertools.pairwise(kinds[1:4])):
        source = Checkpoint(tiny_model(family, layers=5, layer_types=["full_attention"] * 5))
    blocks = blocks_of(source.path)
    plan, rows = planned(source, blocks, forms=(form,))
    (merged,) = (p for p, x in enumerate(plan.layers) if len(x.sources) == 2)
    a, b = plan.layers[merged].sources
    assert rows[0].action == ("concat" if form == "concat" else "merge") and rows[0].sources == [a, b]
    written = apply_plan(source, plan, tmp_path / "out")
    mlp = (*source.architecture.group("mlp_input"), *source.architecture.group("mlp_output"))
    # with two KV groups the most sensitive two may be one layer's: its attention is kept whole then
    for projection in source.architecture.projections() if form == "mean" else mlp:
        new = written.tensor(written.layer(merged)[f"{projection}.weight"])
        for parent in (a, b):
            assert not torch.equal(new, source.tensor(source.layer(parent)[f"{projection}.weight"]))
    check_reload(written.path, reference_logits(source, plan))
    assert written.config["num_hidden_layers"] == 4


def test_the_choice_is_the_least_loss_and_the_loss_is_true(story, tmp_path):
    source, blocks, evidence = story
    plan, rows = planned(source, blocks, evidence, layers=2)
    rounds = [r for r in rows if r.action != "keep"]
    assert len(rounds) == 2 and len(plan.layers) == 3
    for row in rounds:
        candidates = row.evidence["candidates"]
        assert row.value == row.evidence["loss_after"] and round(row.value, 6) == min(candidates.values())
        assert row.evidence["loss_before"] is not None and 0 < row.evidence["norm_ratio"] < 10
    assert rounds[1].evidence["loss_before"] == rounds[0].evidence["loss_after"]
    # the last recorded loss is the written model's own, on the sequences that scored it
    written = apply_plan(source, plan, tmp_path / "out")
    ids = torch.from_numpy(blocks.ids[-4:]).long()
    with torch.inference_mode():
        logits = load_stock(written.path)(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(rounds[-1].value, rel=1e-5)


def test_similarity_short_lists(story):
    source, blocks, evidence = story
    _, rows = planned(source, blocks, evidence, shortlist=1, forms=("first",))
    nearest = min(range(1, 3), key=lambda i: evidence.angular[i, i + 2])
    assert rows[0].sources == [nearest, nearest + 1] and len(rows[0].evidence["candidates"]) == 1
    other = np.zeros((5, 5))
    other[2, 3] = 1.0
    named = Evidence(evidence.block_influence, evidence.angular, evidence.angular_last, {"cka": other, "npib": other})
    _, rows = planned(source, blocks, named, shortlist=1, similarity="cka", forms=("first",))
    assert rows[0].sources == [2, 3] and rows[0].evidence["similarity"]["cka"] == 1.0


def test_same_inputs_same_bytes_and_resume(story, tmp_path):
    source, blocks, evidence = story
    options = MKA(layers=2, fit_tokens=1024, score_tokens=256)
    whole, rows = options.plan(source.shape, evidence, ProbeContext(source, blocks))
    resume = ResumePoint(tmp_path / "p", {"x": 1}, every_seconds=0)

    class Stop(Exception):
        pass

    def stop_in_second_round(items, description, total=None):
        for i, item in enumerate(items):
            if i == 1:
                raise Stop
            yield item

    with pytest.raises(Stop):
        options.plan(source.shape, evidence, ProbeContext(source, blocks, resume=resume, progress=stop_in_second_round))
    again, rows_again = options.plan(source.shape, evidence, ProbeContext(source, blocks, resume=resume))
    for name, plan in (("whole", whole), ("again", again)):
        (tmp_path / name).mkdir()
        plan.save(tmp_path / name)
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    drop = "layer_forwards"  # a resumed run forwards less
    strip = [json.dumps({k: v for k, v in r.evidence.items() if k != drop}, sort_keys=True) for r in rows]
    assert strip == [json.dumps({k: v for k, v in r.evidence.items() if k != drop}, sort_keys=True) for r in rows_again]
    assert MergePlan.load(tmp_path / "whole").layers == whole.layers


def test_divergence_is_zero_for_the_model_itself(story):
    from compression_dags.depth.mka.search import divergence
    from compression_dags.passes.variant_scoring import VariantScorer, as_is

    source, blocks, _ = story
    scorer = VariantScorer(DecoderStream(source), TokenBlocks(blocks.ids[:2], blocks.lengths[:2], 1))
    goal = scorer.states(as_is(5))
    assert divergence(scorer, goal, goal) == pytest.approx(0, abs=1e-7)
    cut = scorer.states(as_is(5)[:4])
    with torch.inference_mode():
        p, q = (
            load_stock(source.path).lm_head(load_stock(source.path).model.norm(h[0])).log_softmax(-1)
            for h in (goal, cut)
        )
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert divergence(scorer, goal, cut) == pytest.approx(float(expected), rel=1e-4)


# -- the closed-form mean ----------------------------------------------------------------------------------------------


def member(source, layer, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: source.tensor(n).float() for k, n in source.layer(layer).items()}
    grams = {}
    for group in source.architecture.groups:
        width = tensors[f"{group.projections[0]}.weight"].shape[1]
        x = torch.randn(4 * width, width, generator=generator)
        grams[group.name] = x.T @ x
    return Member(tensors, grams)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "opt"])
def test_a_joint_permutation_changes_nothing_and_is_found_again(tiny_model, family):
    source = Checkpoint(tiny_model(family))
    shape = source.shape
    a = member(source, 1, 0)
    channels = torch.randperm(shape.intermediate, generator=torch.Generator().manual_seed(1))
    groups = torch.randperm(shape.kv_heads, generator=torch.Generator().manual_seed(2))
    b = permuted(a, channels, groups, shape)
    stream = DecoderStream(source)
    (batch,) = stream.batches(blocks_of(source.path, sequences=2, length=16))
    with stream.layer(1) as module, torch.inference_mode():
        before = stream.apply(module, 1, batch)
        module.load_state_dict(b.tensors, assign=True)
        assert torch.allclose(stream.apply(module, 1, batch), before, atol=1e-5)
    # matching b's channels to a's undoes the permutation
    cross = a.grams["mlp_output"][:, channels]
    assert torch.equal(channels[matching_channels(a, b, cross)], torch.arange(shape.intermediate))
    width = shape.heads // shape.kv_heads * shape.head_dim
    order = (groups[:, None] * width + torch.arange(width)).reshape(-1)
    found = matching_groups(a, b, a.grams["attention_output"][:, order], shape)
    assert torch.equal(groups[found], torch.arange(shape.kv_heads))


def test_mean_of_a_layer_with_itself_is_itself(tiny_model):
    source = Checkpoint(tiny_model("qwen2"))
    a, b = member(source, 1, 0), member(source, 1, 5)
    mean = regression_mean(a, b, 0.3, source.shape)
    for name, tensor in a.tensors.items():
        assert torch.allclose(mean[name], tensor, atol=1e-4), name


def test_mean_minimises_the_weighted_output_error(tiny_model):
    """Against numpy's least squares on explicit tokens, for a projection whose input is no norm's."""
    source = Checkpoint(tiny_model("llama"))
    a, b = member(source, 1, 0), member(source, 2, 1)
    name = "mlp.down_proj.weight"
    merged = regression_mean(a, b, 0.25, source.shape)[name].double()

    def error(w):
        parts = [(s, m.tensors[name].double(), m.grams["mlp_output"].double()) for s, m in ((0.25, a), (0.75, b))]
        return sum(s * float(((w - old) @ g * (w - old)).sum()) for s, old, g in parts)

    best = error(merged)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert error(merged + 0.01 * torch.randn(merged.shape, generator=generator).double()) > best
    for parent in (a, b):
        assert error(parent.tensors[name].double()) > best


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(tiny_model, story):
    source, blocks, evidence = story
    with pytest.raises(InputError, match="cannot merge experts"):
        MKA(layers=1).check(Checkpoint(tiny_model("mixtral")).shape)
    with pytest.raises(InputError, match="fitting tokens and needs 640"):
        planned(source, TokenBlocks(blocks.ids[:4], blocks.lengths[:4], 1), evidence)
    with pytest.raises(InputError, match="at least 2 calibration sequences"):
        planned(source, TokenBlocks(blocks.ids[:1], blocks.lengths[:1], 1), evidence)
    mixed = Checkpoint(tiny_model("gemma3_text"))  # sliding and full attention alternate: no pair is of one kind
    with pytest.raises(InputError, match="at most 0 can be merged away: groups of at most 4 adjacent"):
        planned(mixed, blocks_of(mixed.path))
