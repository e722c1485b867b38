"""One layer out of channels and heads of several: what it computes, what its plan holds, what is scored and chosen."""

import copy
import json

import numpy as np
import pytest
import torch
from concat_cases import DENSE, checkpoint, every, evidence_of, members_of, one_thread, random_blocks  # noqa: F401 (a fixture)

from compression_dags.architectures import KNOWN
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, layer_tensors, reference_logits
from compression_dags.depth.concat.layers import concatenated, whole
from compression_dags.depth.concat.merge import concatenate_members, tiled_queries
from compression_dags.depth.concat.sensitivity import (
    column_scores,
    counts,
    layer_sensitivity,
    strongest,
    strongest_of_all,
)
from compression_dags.depth.concat.student_pass import _few
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.depth.windows import cheapest_groups, fewest_groups, greedy_groups, joinable, most_removed
from compression_dags.errors import InputError, IntegrityError


def held(position, kept):
    """Plan tensors of one layer: source → (channels, heads)."""
    made = {}
    for source, (channels, heads) in kept.items():
        made[f"{position}.channels.{source}"] = torch.tensor(channels, dtype=torch.int32)
        made[f"{position}.heads.{source}"] = torch.tensor(heads, dtype=torch.int32)
    return made


def merge_plan(layers, a, kept, shares, form="concat"):
    """Layers a and a + 1 merged, the others kept."""
    planned = [PlannedLayer((i,)) for i in range(layers) if i != a + 1]
    planned[a] = PlannedLayer((a, a + 1), shares, form)
    return MergePlan("test", layers, tuple(planned), held(a, {a + i: k for i, k in enumerate(kept)}))


def some_channels(source, share=0.4, seed=0):
    total = source.shape.intermediate
    rng = np.random.default_rng(seed)
    first = round(share * total)
    return [np.sort(rng.choice(total, n, replace=False)).tolist() for n in (first, total - first)]


def layer_module(path, index, tensors, **changed):
    """A stock layer with given weights; `changed` attributes make room for other widths."""
    model = load_stock(path)
    layer = copy.deepcopy(model.get_submodule(KNOWN[model.config.model_type].stack).layers[index])
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    for name, value in changed.items():
        setattr(layer.self_attn, name, value)
    return layer


def run_layer(path, index, layer, hidden):
    """Output of a layer module on given states, with the arguments of layer `index`."""
    stream = DecoderStream(Checkpoint(path))
    (batch,) = stream.batches(random_blocks(len(hidden), hidden.shape[1]))
    with torch.inference_mode():
        return stream.apply(layer, index, batch, hidden)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("share", [(1.0, 0.0), (0.0, 1.0)], ids=["first", "second"])
def test_share_one_is_dropping_bit_for_bit(tiny_model, family, share):
    source = checkpoint(tiny_model, family, dtype="float16")
    shape = source.shape
    all_of_it, nothing = (every(shape.intermediate).tolist(), every(shape.kv_heads).tolist()), ([], [])
    plan = merge_plan(6, 2, [all_of_it if s else nothing for s in share], share)
    made = layer_tensors(source, plan, 2)
    (expected,) = members_of(source, 2 if share[0] else 3)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[k], expected[k]) and made[k].dtype == torch.float16 for k in expected)


@pytest.mark.parametrize("family", DENSE)
def test_a_search_turns_share_one_into_a_plain_drop(tiny_model, family):
    """What gives nothing is not in the plan at all, so the layer's bytes are the file's."""
    source = checkpoint(tiny_model, family)
    members = [whole(i, source.shape) for i in (2, 3)]
    empty, full = ({k: f(len(t)) for k, t in members[0].parts[0].kept.items()} for f in (lambda n: every(0), every))
    first = concatenated(members, [full, empty], (1.0, 0.0)).planned("concat")
    second = concatenated(members, [empty, full], (0.0, 1.0)).planned("concat")
    assert first == (PlannedLayer((2,)), {}) and second == (PlannedLayer((3,)), {})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt"])
def test_no_drop_at_doubled_width_is_the_parallel_sum(tiny_model, family):
    """x + f_a(x) + f_b(x), each branch with its own norm: folding loses nothing."""
    source = checkpoint(tiny_model, family)
    shape = source.shape
    both = [every(shape.intermediate)] * 2, [every(shape.kv_heads)] * 2
    doubled = concatenate_members(members_of(source, 2, 3), *both, (0.3, 0.7), shape)
    projection = f"{source.architecture.group('mlp_output')[0]}.weight"
    assert doubled[projection].shape[1] == 2 * shape.intermediate
    # attention alone and MLP alone, so that each branch's input is x
    attention = {f"{n}.{k}" for n in source.architecture.group("attention_output") for k in ("weight", "bias")}
    mlp = {f"{n}.{k}" for n in source.architecture.group("mlp_output") for k in ("weight", "bias")}
    hidden = torch.randn(3, 12, shape.hidden, generator=torch.Generator().manual_seed(1))
    for silent in (attention, mlp):
        outputs = []
        for tensors in (*members_of(source, 2, 3), doubled):
            quiet = {k: torch.zeros_like(t) if k in silent else t for k, t in tensors.items()}
            wide = tensors is doubled
            changed = {"num_heads": 2 * shape.heads, "embed_dim": 2 * shape.hidden} if wide and family == "opt" else {}
            layer = layer_module(source.path, 2, quiet, **changed)
            outputs.append(run_layer(source.path, 2, layer, hidden).double() - hidden.double())
        a, b, parallel = outputs
        assert float((parallel - a - b).norm() / (a + b).norm()) < 1e-6
        assert float((a - b).norm() / a.norm()) > 0.1


def test_folding_is_exact_where_averaging_is_not(tiny_model):
    """Relative error of the normed projections, over random inputs: γ folded, and γ averaged as released."""
    source = checkpoint(tiny_model, "llama")
    shape = source.shape
    channels = [torch.tensor(c, dtype=torch.int32) for c in some_channels(source)]
    heads = [torch.tensor([j], dtype=torch.int32) for j in (1, 0)]
    members = members_of(source, 2, 3)
    made = concatenate_members(members, channels, heads, (0.4, 0.6), shape)
    x = torch.randn(50, shape.hidden, generator=torch.Generator().manual_seed(0)).double()
    x = x / x.square().mean(-1, keepdim=True).sqrt()

    def through(tensors, norm):
        return (x * norm.double()) @ tensors["mlp.gate_proj.weight"].double().T

    gamma = "post_attention_layernorm.weight"
    true = torch.cat([through(m, m[gamma])[:, c.long()] for m, c in zip(members, channels, strict=True)], dim=1)
    mean = (members[0][gamma] + members[1][gamma]) / 2
    averaged = torch.cat([through(m, mean)[:, c.long()] for m, c in zip(members, channels, strict=True)], dim=1)
    assert float((through(made, made[gamma]) - true).norm() / true.norm()) < 1e-6
    assert float((averaged - true).norm() / true.norm()) > 0.05


def test_opposite_and_vanishing_gammas_do_not_blow_up(tiny_model, tmp_path):
    source = checkpoint(tiny_model, "gemma3_text")
    members = members_of(source, 2, 3)
    name = "input_layernorm.weight"  # multiplies by 1 + weight
    members[0][name][:4] = torch.tensor([0.5, -1.0, -1.0, 0.0])
    members[1][name][:4] = torch.tensor([-2.5, 1.0, -1.0, -2.0])  # 1.5 and −1.5, 0 and 2, 0 and 0, 1 and −1
    heads = [torch.tensor([0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)]
    both = [every(source.shape.intermediate), every(0)], heads
    made = concatenate_members(members, *both, (0.5, 0.5), source.shape)
    assert (1 + made[name][:4]).tolist() == [1.5, 1.0, 0.0, 1.0]
    rows = made["self_attn.k_proj.weight"] * (1 + made[name])
    for place, (member, head) in enumerate(((0, 0), (1, 1))):
        own = members[member]["self_attn.k_proj.weight"][16 * head : 16 * head + 16] * (1 + members[member][name])
        torch.testing.assert_close(rows[16 * place : 16 * place + 16], own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (14, 2), (16, 2)], ids=["1", "4", "7", "8"])
def test_query_heads_stay_with_their_kv_head(tiny_model, heads, kv_heads):
    """Query block i and KV head ⌊i/g⌋ of the merged layer have one origin; the tiled mask breaks that for g > 1."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    shape["hidden_size"] = 56 if heads == 14 else 64
    source = checkpoint(tiny_model, "llama", layers=4, **shape)
    shape, group = source.shape, heads // kv_heads
    members = members_of(source, 1, 2)
    for member, tensors in enumerate(members):  # every block carries its origin: layer, head
        for name, blocks in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads), ("o_proj", heads)):
            weight = tensors[f"self_attn.{name}.weight"]
            origin = torch.arange(blocks).repeat_interleave(8) + 100 * member
            tensors[f"self_attn.{name}.weight"] = (origin[None] if name == "o_proj" else origin[:, None]).expand(
                weight.shape
            ).float() + torch.zeros_like(weight)
        tensors["input_layernorm.weight"] = torch.ones_like(tensors["input_layernorm.weight"])
    kept = [torch.tensor(k, dtype=torch.int32) for k in ([kv_heads - 1], list(range(kv_heads - 1)))]
    half = [every(shape.intermediate), every(0)]
    made = concatenate_members(members, half, kept, (0.5, 0.5), shape)

    def origins(tensors):
        query = tensors["self_attn.q_proj.weight"][::8, 0].int()
        output = tensors["self_attn.o_proj.weight"][0, ::8].int()
        key, value = (tensors[f"self_attn.{n}.weight"][::8, 0].int() for n in ("k_proj", "v_proj"))
        assert torch.equal(query, output) and torch.equal(key, value)
        of_query = query // 100 * 100 + query % 100 // group
        return of_query, key.repeat_interleave(group)

    assert all(map(torch.equal, *zip(origins(made), strict=True)))
    released = [tiled_queries(k, shape) for k in kept]
    query = torch.cat([100 * m + q // group for m, q in enumerate(released)])
    key = torch.cat([100 * m + k for m, k in enumerate(kept)]).repeat_interleave(group)
    assert len(query) == heads and torch.equal(query, key) == (group == 1)


def test_biases_are_added_and_lossy_norms_are_weighted(tiny_model):
    source = checkpoint(tiny_model, "opt")
    plan = merge_plan(6, 2, [(c, h) for c, h in zip(some_channels(source), ([0], [1, 2, 3]), strict=True)], (0.4, 0.6))
    made, (a, b) = layer_tensors(source, plan, 2), members_of(source, 2, 3)
    for name in ("fc2.bias", "self_attn.out_proj.bias"):
        torch.testing.assert_close(made[name], a[name] + b[name])
    source = checkpoint(tiny_model, "gemma3_text")
    kept = [(c, h) for c, h in zip(some_channels(source), ([0, 1], []), strict=True)]
    made = layer_tensors(source, merge_plan(6, 2, kept, (0.4, 0.6)), 2)
    a, b = members_of(source, 2, 3)
    for name in ("self_attn.q_norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(made[name], a[name])  # the first member gives all heads
    name = "post_feedforward_layernorm.weight"
    torch.testing.assert_close(made[name], 0.4 * a[name] + 0.6 * b[name])


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("form", ["concat", "concat-released"])
def test_the_written_checkpoint_is_stock(tiny_model, tmp_path, family, form):
    source = checkpoint(tiny_model, family)
    heads = ([0], list(range(1, source.shape.kv_heads)))
    plan = merge_plan(6, 2, list(zip(some_channels(source), heads, strict=True)), (0.4, 0.6), form)
    written = apply_plan(source, plan, tmp_path / "out")
    assert check_reload(written.path, reference_logits(source, plan))["relative_logit_error"] == 0.0
    assert written.num_layers == 5
    if types := json.loads((written.path / "config.json").read_text()).get("layer_types"):
        assert len(types) == 5
    for local, name in written.layer(2).items():
        merged = written.tensor(name)
        if merged.ndim == 2:
            assert not any(torch.equal(merged, source.tensor(source.layer(i)[local])) for i in (2, 3))
    plan.save(tmp_path)
    again = layer_tensors(source, MergePlan.load(tmp_path), 2)
    assert all(torch.equal(t, written.tensor(written.layer(2)[k])) for k, t in again.items())


def test_forms_refuse(tiny_model):
    source = checkpoint(tiny_model, "llama")
    plan = merge_plan(6, 2, [([0], [0])], (0.5, 0.5))
    with pytest.raises(InputError, match=r"holds no channels\.3"):
        layer_tensors(source, plan, 2)
    experts = Checkpoint(tiny_model("qwen3_moe"))
    with pytest.raises(InputError, match="qwen3_moe is a mixture of experts"):
        layer_tensors(experts, merge_plan(4, 2, [([0], [0]), ([1], [1])], (0.5, 0.5)), 2)
    opt = checkpoint(tiny_model, "opt")
    members = [{k: t for k, t in m.items() if k != "fc1.bias"} for m in members_of(opt, 2, 3)]
    both = [every(4)] * 2, [every(2)] * 2
    with pytest.raises(InputError, match="final_layer_norm has a bias that cannot fold into fc1"):
        concatenate_members(members, *both, (0.5, 0.5), opt.shape)


# -- scores and windows ------------------------------------------------------------------------------------------------


def test_counts_and_rankings():
    assert counts((0.3, 0.7), 8) == [2, 6] and counts((0.1, 0.9), 8) == [0, 8]
    assert counts((0.5, 0.5), 3) == [2, 1] and counts((0.2, 0.2, 0.6), 10) == [2, 2, 6]
    assert counts((1.0, 0.0), 96) == [96, 0] and counts((0.29, 0.71), 100) == [29, 71]
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert strongest(scores, 2).tolist() == [1, 2] and strongest(torch.ones(4), 3).tolist() == [0, 1, 2]
    assert [k.tolist() for k in strongest_of_all([scores, torch.tensor([2.5, 0.0])], 3)] == [[1, 2], [0]]


def test_l2_is_the_error_of_dropping_one_channel():
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(200, 7, generator=generator), torch.randn(5, 7, generator=generator)
    for j in range(7):
        error = torch.outer(z[:, j], w[:, j]).square().sum(1).mean().sqrt()
        assert float(column_scores(w, z.square().mean(0).double(), "l2")[j]) == pytest.approx(float(error), rel=1e-5)
    l1 = column_scores(w, z.abs().mean(0).double(), "l1")
    torch.testing.assert_close(l1, (z.abs().mean(0) * w.abs().sum(0)).double())


def test_scores_from_the_cached_pass(tiny_model):
    source = checkpoint(tiny_model, "llama")
    evidence = evidence_of(source, random_blocks(padded=True))
    found = layer_sensitivity(source, evidence.statistics, 3, "l1")
    (tensors,) = members_of(source, 3)
    expected = torch.from_numpy(evidence.statistics["norms.layers.3.attention_output.mean_abs"])
    expected = expected * tensors["self_attn.o_proj.weight"].double().abs().sum(0)
    torch.testing.assert_close(found.heads, expected.reshape(2, 32).mean(1))
    assert found.channels.shape == (96,)
    with pytest.raises(InputError, match=r"hold no norms\.layers\.3"):
        layer_sensitivity(source, {}, 3, "l2")
    broken = evidence.statistics | {"norms.layers.3.mlp_output.mean_abs": np.full(96, np.nan)}
    with pytest.raises(IntegrityError, match="not finite"):
        layer_sensitivity(source, broken, 3, "l1")


def test_greedy_windows_never_strand(tiny_model):
    """Four mergeable layers, two merges in pairs: the closest pair is the middle one, which would leave no second."""
    shape = checkpoint(tiny_model, "llama", layers=6).shape
    may_join = joinable(shape, range(1, 5))
    assert may_join == [False, True, True, True, False]
    angular = np.full((7, 7), 0.5)
    angular[2, 4] = 0.1
    assert greedy_groups(6, 4, 2, may_join, angular) == [range(0, 1), range(1, 3), range(3, 5), range(5, 6)]
    assert greedy_groups(6, 5, 2, may_join, angular)[2] == range(2, 4)
    assert greedy_groups(6, 3, 2, may_join, angular) is None
    assert most_removed(shape, range(1, 5), 2) == 2 and most_removed(shape, range(1, 5), 3) == 2
    assert most_removed(shape, range(1, 5), 4) == 3
    assert fewest_groups([range(0, 1), range(1, 3), range(3, 5), range(5, 6)], may_join, 3) == 4
    assert cheapest_groups(6, 3, 2, lambda g: 0.0 if len(g) == 1 else 1.0) == [range(0, 2), range(2, 4), range(4, 6)]
    assert cheapest_groups(6, 2, 2, lambda g: 0.0) is None


def test_cached_depths():
    assert _few([7, 3, 5, 1], 9) == {1, 3, 5, 7}
    assert _few([7, 3, 5, 9, 1], 1) == {3} and _few([7, 3, 5, 9, 1], 2) == {3, 7}


def test_no_power_makes_all_shares_vanish():
    from compression_dags.depth.windows import influence_shares

    assert influence_shares([0.01, 0.02], 200.0) == pytest.approx((2.0**-200, 1.0))
    assert influence_shares([0.01, 0.03], 1.0) == pytest.approx((0.25, 0.75))
