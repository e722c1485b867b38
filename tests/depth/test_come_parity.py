"""`come-released` against a plain loop over stock models that are rebuilt after every merge, tiled mask included."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from compression_dags.architectures import KNOWN, ModelShape
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, layer_tensors, reference_logits
from compression_dags.depth.concat.come_released import ComeReleased
from compression_dags.depth.concat.merge import tiled_queries
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError
from compression_dags.similarity.evidence import Evidence

NOTHING = Evidence(np.empty(0), np.empty(0), np.empty(0))
FULL: dict[str, Any] = {"use_sliding_window": False, "layer_types": ["full_attention"] * 7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa": ("llama", {"num_attention_heads": 16, "head_dim": 8, "num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "qwen2, biases": ("qwen2", {**FULL, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen3, head norms": ("qwen3", {**FULL, "num_attention_heads": 8, "num_key_value_heads": 4}),
}
ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
COLUMNS = {"o_proj", "down_proj"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(rows=5, length=24, seed=0):
    ids = np.random.default_rng(seed).integers(3, 512, (rows, length)).astype(np.int32)
    return TokenBlocks(ids, np.full(rows, length, dtype=np.int32), rows)


def stage(**options):
    return ComeReleased.model_validate(options)


def planned(path, **options):
    source = Checkpoint(path)
    return source, *stage(**options).plan(source.shape, NOTHING, ProbeContext(source, tokens()))


def all_steps(rows):
    """What the ledger notes of every merge, in order."""
    steps = {s["step"]: s for r in rows for s in r.evidence.get("merges", [])}
    return [steps[i] for i in sorted(steps)]


# -- the loop, written out ---------------------------------------------------------------------------------------------


def measured(model, ids):
    """BI (sum over tokens), SBI (sum over last tokens), and |activation| means at both output projections."""
    layers, means, hooks = model.model.layers, {}, []
    for i, layer in enumerate(layers):
        for kind, linear in (("heads", layer.self_attn.o_proj), ("channels", layer.mlp.down_proj)):

            def note(_, args, key=(i, kind)):
                means[key] = args[0].double().abs().mean((0, 1))

            hooks.append(linear.register_forward_pre_hook(note))
    states = [s.double() for s in model(ids, output_hidden_states=True, use_cache=False).hidden_states]
    for hook in hooks:
        hook.remove()
    assert len(states) == len(layers) + 1

    def cosine(a, b):
        value = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        return torch.where(value.isnan(), 0.5, value).clamp(0, 1)

    bi = [float((1 - cosine(states[i], states[i + 1])).sum()) for i in range(len(layers))]
    angles = [torch.arccos(cosine(states[i][:, -1], states[i + 2][:, -1])) for i in range(len(layers) - 1)]
    return bi, [float(a.sum()) / np.pi for a in angles], means


def shares_of(bi, leaves, power, min_max):
    powers = [b**power for b in bi]
    shares = [p / sum(powers) for p in powers]
    floor, big = min_max ** (1 / (leaves - 1)), int(np.argmax(shares))
    if shares[big] < floor:
        shares[big], shares[1 - big] = floor, 1 - floor
    return shares


def numbers_of(shares, total):
    big = int(np.argmax(shares))
    found = [int(s * total) for s in shares]
    found[big] = total - found[1 - big]
    return found


def masks_of(model, at, means, numbers):
    """Kept channels and KV heads of both members, as lists of booleans."""
    masks = [{}, {}]
    for kind, number in numbers.items():
        for side in (0, 1):
            layer = model.model.layers[at + side]
            linear = layer.self_attn.o_proj if kind == "heads" else layer.mlp.down_proj
            score = means[at + side, kind] * linear.weight.double().abs().sum(0)
            score = score.reshape(sum(number), -1).mean(1).tolist()
            kept = sorted(range(len(score)), key=lambda i: -score[i])[: number[side]]
            masks[side][kind] = [i in kept for i in range(len(score))]
    return masks


def merged_state(pair, masks, shares, config):
    """One layer's state dict from two."""
    group = config.num_attention_heads // config.num_key_value_heads
    width = pair[0]["self_attn.k_proj.weight"].shape[0] // config.num_key_value_heads

    def rows(name, side):
        if "mlp" in name:
            return torch.tensor(masks[side]["channels"])
        mask = torch.tensor(masks[side]["heads"])
        tiled = mask.repeat(group) if "q_proj" in name or "o_proj" in name else mask  # the released mistake
        return tiled.repeat_interleave(width)

    new = {}
    for name, a in pair[0].items():
        module, kind = name.split(".")[-2:]
        b = pair[1][name]
        if module in COLUMNS and kind == "weight":
            new[name] = torch.cat([a[:, rows(name, 0)], b[:, rows(name, 1)]], dim=1)
        elif module in ROWS:
            new[name] = torch.cat([a[rows(name, 0)], b[rows(name, 1)]])
        elif module in COLUMNS or module in {"q_norm", "k_norm"}:
            new[name] = shares[0] * a + shares[1] * b
        else:
            assert module in {"input_layernorm", "post_attention_layernorm"}
            new[name] = (a + b) / 2
        assert new[name].shape == a.shape
    return new


def rebuilt(model, layers):
    """A stock model with these layers' states, and everything else of `model`."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]
    new = type(model)(config).eval()
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    state |= {f"model.layers.{i}.{k}": v for i, layer in enumerate(layers) for k, v in layer.items()}
    new.load_state_dict(state)
    return new


@torch.no_grad()
def loop(path, blocks, removed, power=1, min_max=0.0):
    """The released code's whole loop: what each merge was, the final layers' states, and their trees."""
    model: Any = load_stock(path)
    merges = []
    trees: list[Any] = list(range(len(model.model.layers)))
    ids = torch.from_numpy(blocks.ids).long()
    for _ in range(removed):
        bi, sbi, means = measured(model, ids)
        at = int(np.argmin(sbi))
        tree = trees[at : at + 2]
        shares = shares_of(bi[at : at + 2], str(tree).count(",") + 1, power, min_max)
        sizes = {"channels": model.config.intermediate_size, "heads": model.config.num_key_value_heads}
        numbers = {kind: numbers_of(shares, total) for kind, total in sizes.items()}
        masks = masks_of(model, at, means, numbers)
        states = [layer.state_dict() for layer in model.model.layers]
        states[at : at + 2] = [merged_state(states[at : at + 2], masks, shares, model.config)]
        merges.append({"tree": tree, "sbi": sbi[at], "bi": bi[at : at + 2], "shares": shares, **numbers})
        trees[at : at + 2] = [tree]
        model = rebuilt(model, states)
    return merges, [layer.state_dict() for layer in model.model.layers], trees


def assert_same(source, plan, rows, blocks, merges, layers, trees):
    """Every choice, and every tensor: copied ones bit for bit, averaged ones to rounding."""
    steps = all_steps(rows)
    assert len(steps) == len(merges)
    for found, expected in zip(steps, merges, strict=True):
        assert found["tree"] == expected["tree"]
        assert found["shares"] == pytest.approx(expected["shares"], rel=1e-4)
        assert found["channels"] == expected["channels"] and found["heads"] == expected["heads"]
        assert found["distance"] * len(blocks.lengths) == pytest.approx(expected["sbi"], rel=1e-4)
        assert np.array(found["influence"]) * blocks.tokens == pytest.approx(expected["bi"], rel=1e-4)
    by_layer = [r.evidence.get("tree", i) for i, r in enumerate(rows)]
    assert [by_layer[layer.slot] for layer in plan.layers] == trees
    for position, (layer, expected) in enumerate(zip(plan.layers, layers, strict=True)):
        made = layer_tensors(source, plan, position)
        assert set(expected) == set(source.layer(layer.slot))
        for local, name in source.layer(layer.slot).items():
            tensor = made[local] if local in made else source.tensor(name)
            if local.split(".")[-2] in ROWS | COLUMNS:
                assert torch.equal(tensor, expected[local]), (position, local)
            else:
                torch.testing.assert_close(tensor, expected[local], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop_over_rebuilt_models(tiny_model, name):
    family, config = MODELS[name]
    path = tiny_model(family, layers=7, **config)
    source, plan, rows = planned(path, layers=4)
    assert_same(source, plan, rows, tokens(), *loop(path, tokens(), 4))
    assert max(len(layer.sources) for layer in plan.layers) > 2  # some merged layer was merged again


@pytest.mark.parametrize(("power", "min_max"), [(3, 0.0), (1, 0.7), (2, 0.9)])
def test_power_and_floor(tiny_model, power, min_max):
    path = tiny_model("llama", layers=7, **MODELS["gqa"][1])
    source, plan, rows = planned(path, layers=3, power=power, min_max=min_max)
    assert_same(source, plan, rows, tokens(), *loop(path, tokens(), 3, power, min_max))


def test_a_trained_model(stories):
    source, plan, rows = planned(stories, layers=2)
    assert_same(source, plan, rows, tokens(), *loop(stories, tokens(), 2))


# -- the released defects ----------------------------------------------------------------------------------------------


def origins(source, plan, position):
    """For each query head of a merged layer: the (layer, KV head) it read, and the (layer, KV head) it reads now.

    Found from the bytes alone: random heads are all different.
    """
    shape, made = source.shape, layer_tensors(source, plan, position)
    group = shape.heads // shape.kv_heads

    def heads(tensor):
        return tensor.reshape(-1, shape.head_dim, shape.hidden)

    def home(block, projection):
        found = [
            (s, at)
            for s in plan.layers[position].sources
            for at, own in enumerate(heads(source.tensor(source.layer(s)[f"self_attn.{projection}.weight"])))
            if torch.equal(own, block)
        ]
        assert len(found) == 1
        return found[0]

    reads = [home(block, "k_proj") for block in heads(made["self_attn.k_proj.weight"])]
    queries = [home(block, "q_proj") for block in heads(made["self_attn.q_proj.weight"])]
    return [(s, q // group) for s, q in queries], [reads[at // group] for at in range(shape.heads)]


def share_equal(pairs):
    return float(np.mean([a == b for a, b in zip(*pairs, strict=True)]))


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_the_tiled_mask_parts_queries_from_their_keys(tiny_model, group):
    config = {"num_attention_heads": 4 * group, "num_key_value_heads": 4, "head_dim": 4, "hidden_size": 16 * group}
    source, plan, rows = planned(tiny_model("llama", layers=5, **config), layers=1)
    (position,) = [p for p, layer in enumerate(plan.layers) if not layer.kept]
    (step,) = all_steps(rows)
    assert min(step["heads"]) > 0  # both give some: otherwise nothing is scrambled
    share = share_equal(origins(source, plan, position))
    assert step["query_heads_on_their_kv_head"] == pytest.approx(share)
    assert share == 1.0 if group == 1 else share < 1.0


def test_the_damage_is_recorded_for_layers_merged_again(tiny_model):
    path = tiny_model("llama", layers=7, **MODELS["gqa"][1])
    source, plan, rows = planned(path, layers=4)
    position = max(range(len(plan.layers)), key=lambda p: len(plan.layers[p].sources))
    assert len(plan.layers[position].sources) > 2
    last = rows[plan.layers[position].slot].evidence["merges"][-1]
    assert last["query_heads_on_their_kv_head"] == pytest.approx(share_equal(origins(source, plan, position)))


@pytest.mark.parametrize(("heads", "kv_heads", "figure"), [(32, 8, 0.36), (28, 4, 0.46), (64, 8, 0.33)])
def test_the_published_shapes_lose_what_the_specification_counts(heads, kv_heads, figure):
    """Share of query heads on their own KV head, random kept sets of equal size: Llama-3-8B, Qwen2.5-7B, Llama-70B."""
    shape = ModelShape(KNOWN["llama"], {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    group, rng, found = heads // kv_heads, np.random.default_rng(0), []
    for _ in range(400):
        kept = [torch.from_numpy(np.sort(rng.choice(kv_heads, kv_heads // 2, replace=False))) for _ in range(2)]
        reads = [(side, int(h)) for side in (0, 1) for h in kept[side]]
        wanted = [(side, int(q) // group) for side in (0, 1) for q in tiled_queries(kept[side], shape)]
        found.append(np.mean([pair == reads[at // group] for at, pair in enumerate(wanted)]))
    assert np.mean(found) == pytest.approx(figure, abs=0.03)


def test_norms_are_averaged_even_at_share_zero(tiny_model):
    """So the released search does not contain plain dropping."""
    path = tiny_model("llama", layers=5, **MODELS["gqa"][1])
    source, plan, rows = planned(path, layers=1, power=60)  # the share of the smaller BI vanishes
    (position,) = [p for p, layer in enumerate(plan.layers) if not layer.kept]
    (step,) = all_steps(rows)
    assert min(step["channels"]) == 0 and min(step["heads"]) == 0
    whole = plan.layers[position].sources[int(np.argmax(step["channels"]))]
    made, names = layer_tensors(source, plan, position), source.layer(whole)
    for name in ("mlp.down_proj.weight", "self_attn.q_proj.weight"):
        assert torch.equal(made[name], source.tensor(names[name]))
    assert not torch.allclose(made["input_layernorm.weight"], source.tensor(names["input_layernorm.weight"]))


# -- as a stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("half", [False, True])
def test_gate_and_the_same_bytes_from_a_stored_plan(tiny_model, tmp_path, family, half):
    source, plan, rows = planned(tiny_model(family, layers=6, dtype="float16"), layers=3, half=half)
    written = apply_plan(source, plan, tmp_path / "now")
    check_reload(written.path, reference_logits(source, plan))
    (tmp_path / "stored").mkdir()
    plan.save(tmp_path / "stored")
    again = apply_plan(source, MergePlan.load(tmp_path / "stored"), tmp_path / "later")
    files = sorted(p.name for p in written.path.iterdir())
    assert files == sorted(p.name for p in again.path.iterdir())
    for file in files:
        assert (written.path / file).read_bytes() == (again.path / file).read_bytes(), file
    assert {r.evidence["cosines"] for r in rows} == {"float16" if half else "float32"}
    json.dumps([r.evidence for r in rows])


def test_no_layer_is_merged_twice_without_repeat(tiny_model):
    path = tiny_model("llama", layers=7, **MODELS["mha"][1])
    _, again, _ = planned(path, layers=3)
    _, once, rows = planned(path, layers=3, repeat=False)
    assert max(len(x.sources) for x in once.layers) == 2 < max(len(x.sources) for x in again.layers)
    assert {r.action for r in rows} == {"concat", "keep"}


def test_nothing_is_protected_unless_asked(tiny_model):
    path = tiny_model("llama", layers=7, **MODELS["mha"][1])
    assert (stage(layers=1).protect_first, stage(layers=1).protect_last) == (0, 0)
    _, plan, _ = planned(path, layers=2, protect_first=2, protect_last=2)
    assert [x.sources for x in plan.layers] == [(0,), (1,), (2, 3, 4), (5,), (6,)]
    with pytest.raises(InputError, match=r"remove 2 of 7 layers.*each merged once"):
        stage(layers=2, protect_first=2, protect_last=2, repeat=False).check(Checkpoint(path).shape)


def test_refusals(tiny_model):
    with pytest.raises(InputError, match="come-released needs dense layers: mixtral"):
        stage(layers=1).check(Checkpoint(tiny_model("mixtral")).shape)
    with pytest.raises(InputError, match="at most 0 can be merged away: adjacent unprotected layers of one kind"):
        stage(layers=1).check(Checkpoint(tiny_model("qwen3")).shape)  # sliding and full in turn
    with pytest.raises(InputError, match="1 KV head"):
        stage(layers=1).check(Checkpoint(tiny_model("llama", num_key_value_heads=1)).shape)
    for bad in ({"min_max": 1.0}, {"min_max": -0.1}, {"power": -1}, {"ratio": 0.2}, {"wrong": 1}):
        with pytest.raises(ValueError):
            stage(**{"layers": 1, **bad})
