"""CoMe as released: an independent loop on the stock model gives the same tree and the same tensors."""

import numpy as np
import pytest
import torch
from concat_cases import checkpoint, every, members_of, one_thread, random_blocks  # noqa: F401 (a fixture)

from compression_dags.checkpoints.gate import load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import layer_tensors
from compression_dags.depth.concat import search as concat_search
from compression_dags.depth.concat.come_released import ComeReleased
from compression_dags.depth.concat.come_released_search import released_shares
from compression_dags.depth.concat.student_pass import AsReleased
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError
from compression_dags.similarity.evidence import Evidence
from models import tiny


def reference_come(path, blocks, removed):
    """CoMe's released loop in a few lines on the stock model: whole passes, last tokens, means, MHA only.

    Returns the tree and the final state dict of the layers.
    """
    model = load_stock(path)
    stack, ids = model.model, torch.from_numpy(blocks.ids).long()
    trees = list(range(len(stack.layers)))
    heads, width = model.config.num_attention_heads, model.config.intermediate_size

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(0, 1)

    for _ in range(removed):
        layers, sums = stack.layers, {}

        def watch(linear, key, sums=sums):
            def keep(_, args):
                sums[key] = args[0].abs().mean((0, 1)) * linear.weight.abs().sum(0)

            return linear.register_forward_pre_hook(keep)

        hooks = []
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = i
            hooks += [watch(layer.self_attn.o_proj, (i, "o")), watch(layer.mlp.down_proj, (i, "d"))]
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for hook in hooks:
            hook.remove()
        bi = [float((1 - cosine(states[i], states[i + 1])).sum()) for i in range(len(layers))]
        last = [s[:, -1] for s in states]
        sbi = [float((torch.arccos(cosine(last[i], last[i + 2])) / torch.pi).sum()) for i in range(len(layers) - 1)]
        a = int(np.argmin(sbi))
        share = bi[a] / (bi[a] + bi[a + 1])
        merged = {}
        pair = [layers[a].state_dict(), layers[a + 1].state_dict()]
        kept = {}
        for kind, total in (("d", width), ("o", heads)):
            number = [int(share * total), int((1 - share) * total)]
            number[0 if share >= 0.5 else 1] += total - sum(number)
            for side in (0, 1):
                score = sums[(a + side, kind)]
                score = score if kind == "d" else score.reshape(heads, -1).mean(1)
                kept[kind, side] = score.topk(number[side]).indices.sort().values
        for name in pair[0]:
            parts = []
            for side in (0, 1):
                tensor = pair[side][name]
                rows = kept["d", side]
                if "self_attn" in name:
                    size = model.config.head_dim
                    rows = (kept["o", side][:, None] * size + torch.arange(size)).flatten()
                if "norm" in name:
                    parts.append(tensor / 2)
                else:
                    parts.append(tensor[:, rows] if "o_proj" in name or "down_proj" in name else tensor[rows])
            axis = 1 if "o_proj" in name or "down_proj" in name else 0
            merged[name] = parts[0] + parts[1] if "norm" in name else torch.cat(parts, dim=axis)
        layers[a].load_state_dict(merged)
        del layers[a + 1]
        model.config.num_hidden_layers = len(layers)
        trees[a : a + 2] = [[trees[a], trees[a + 1]]]
    return trees, [layer.state_dict() for layer in stack.layers]


@pytest.mark.parametrize("seed", [0, 3])
def test_released_equals_an_independent_loop(tmp_path, seed):
    """MHA, five merges of eight layers, so that merged layers are merged again: the tree and every tensor."""
    path = tiny("llama", tmp_path / "m", layers=8, seed=seed, num_key_value_heads=4)
    source, blocks = Checkpoint(path), random_blocks(seed=seed)
    trees, layers = reference_come(path, blocks, 5)
    assert any(isinstance(x, list) and any(isinstance(y, list) for y in x) for x in trees)
    nothing = Evidence(np.empty(0), np.empty(0), np.empty(0))
    plan, rows = ComeReleased(layers=5).plan(source.shape, nothing, ProbeContext(source, blocks))
    found = []
    for row in rows:
        tree = row.evidence.get("tree", int(row.target.split()[1]))
        if tree not in found:
            found.append(tree)
    assert found == trees
    for position, (layer, expected) in enumerate(zip(plan.layers, layers, strict=True)):
        made = layer_tensors(source, plan, position)
        for local, name in source.layer(layer.slot).items():
            assert torch.equal(made.get(local, source.tensor(name)), expected[local]), (position, local)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_released_plans_equal_nested_merging(tiny_model, family):
    """Applied from the base weights, a plan of layers merged twice gives the tensors that the search had."""
    source = checkpoint(tiny_model, family, layers=8)
    probe = ProbeContext(source, random_blocks())
    nothing = Evidence(np.empty(0), np.empty(0), np.empty(0))
    seen = []
    search = concat_search.Search

    class Spy(search):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compression_dags.depth.concat.come_released_search.Search", Spy)
        plan, rows = ComeReleased(layers=5).plan(source.shape, nothing, probe)
    assert any(len(x.sources) > 2 for x in plan.layers) and any("queries" in k for k in plan.tensors)
    # merge step by step, whole layers at a time, with the selections that the ledger's steps imply
    steps = {s["step"]: s for r in rows if "merges" in r.evidence for s in r.evidence["merges"]}
    layers = [([i], dict(m)) for i, m in enumerate(members_of(source, *range(8)))]
    norms = {f"{n}.{k}" for n in source.architecture.norms for k in ("weight", "bias")}
    for step in (steps[i] for i in sorted(steps)):
        at = next(i for i, (span, _) in enumerate(layers) if span[0] == step["span"][0])
        (left, a), (right, b) = layers[at : at + 2]
        made = {}
        for name in a:
            if name in norms and not any(name.startswith(h) for h in source.architecture.head_norms):
                made[name] = (a[name] + b[name]) / 2
            elif name.endswith(("out_proj.bias", "fc2.bias", "q_norm.weight", "k_norm.weight")):
                made[name] = step["shares"][0] * a[name] + step["shares"][1] * b[name]
        layers[at : at + 2] = [([*left, *right], made)]
    for position, (span, averaged) in enumerate(layers):
        made = layer_tensors(source, plan, position)
        assert list(plan.covered(position)) == span
        for name, value in averaged.items():
            if made:
                torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-7)
        for name, tensor in seen[0].pieces[position].tensors.items():
            assert torch.equal(made[name], tensor)


def test_released_shares_and_their_floor():
    assert released_shares((1.0, 3.0), 1, 0.0, 2) == pytest.approx((0.25, 0.75))
    assert released_shares((1.0, 3.0), 2, 0.0, 5) == pytest.approx((0.1, 0.9))
    assert released_shares((4.0, 6.0), 1, 0.8, 2) == pytest.approx((0.2, 0.8))
    assert released_shares((4.0, 6.0), 1, 0.64, 3) == pytest.approx((0.2, 0.8))
    assert sum(released_shares((0.0, 0.0), 1, 0.9, 2)) == pytest.approx(1)


def test_half_precision_cosines_have_few_levels():
    x = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0))
    y = x + 0.1 * torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1))
    exact, half = AsReleased().cosine(x, y), AsReleased(torch.bfloat16).cosine(x, y)
    assert torch.equal(half, half.bfloat16().float()) and len(half.unique()) < len(exact.unique())
    torch.testing.assert_close(half, exact, rtol=0, atol=2e-2)
    huge = torch.full((1, 1, 64), 3e4)
    assert float(AsReleased(torch.float16).cosine(huge, huge)) == 0.5  # fp16 overflows: NaN, read as 0.5


def test_released_half_and_no_repeat(tiny_model):
    source = checkpoint(tiny_model, "llama", layers=8, dtype="bfloat16")
    probe, nothing = ProbeContext(source, random_blocks()), Evidence(np.empty(0), np.empty(0), np.empty(0))
    plan, rows = ComeReleased(layers=4, repeat=False, half=True).plan(source.shape, nothing, probe)
    assert all(len(x.sources) == 2 for x in plan.layers) and rows[0].evidence["cosines"] == "bfloat16"
    assert not any(k.split(".")[1] == "mixed" for k in plan.tensors)
    with pytest.raises(InputError, match=r"at most 4 can be merged away.*each merged once"):
        ComeReleased(layers=5, repeat=False).check(source.shape)
