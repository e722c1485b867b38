"""Decoders that nobody wrote down: cut, pruned and rounded like a Llama, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from concat_cases import random_blocks
from slow import by_default

from compression_dags.checkpoints.gate import check_reload, load_stock, probe_of
from compression_dags.checkpoints.importing import import_checkpoint
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.errors import InputError
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocation import SparsityEvidence
from tests.support.any_models import tiny_any

#: Family → a word of the refusal of quantizers; empty where they work.
SOME = {
    "smollm3": "",  # dense
    "gemma2": "",  # norms before and after a branch
    "olmoe": "experts are fused",  # one tensor an expert on disk
    "dots1": "experts are fused",  # shared experts
    "qwen3_5_text": "",  # linear attention in most layers
    "bamba": "",  # Mamba in most layers
    "aya_vision": "names modules as both",  # a text model in a wrapper
    "gpt_bigcode": "reads a weight",  # one key and value head, fused with the queries
    "starcoder2": "",  # biases
    "olmo3": "",  # sliding and full attention
    "minicpm3": "",  # latent attention
    "phi": "",  # attention and MLP side by side
}
MORE = {
    "arcee": "", "bloom": "", "cohere2": "", "deepseek_v3": "experts are fused", "exaone4": "", "falcon_h1": "",
    "glm4": "", "gpt_neox": "", "granite": "", "lfm2": "", "mamba": "reads a weight",
    "nemotron": "", "olmo_hybrid": "while loading", "phi3": "", "stablelm": "",
}  # fmt: skip
EVERY = [*SOME.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in MORE.items())]


@pytest.mark.parametrize(("family", "refusal"), EVERY)
def test_a_decoder_is_cut_pruned_and_rounded(family, refusal, tmp_path):
    import_checkpoint(tiny_any(family, tmp_path / "source"), tmp_path / "base", revision=None, origin="test")
    base = Checkpoint(tmp_path / "base")
    assert len(base.architecture.kind_of) == 4
    _cut(base, tmp_path / "cut")
    _pruned(base, tmp_path / "sparse")
    for method in ("rtn", "gptq"):
        _rounded(base, method, refusal, tmp_path / method)


def _cut(base: Checkpoint, directory: Path) -> None:
    plan = MergePlan("test", 4, tuple(PlannedLayer((i,)) for i in (0, 2, 3)))
    apply_plan(base, plan, directory)
    check_reload(directory, reference_logits(base, plan))
    model, ids = load_stock(directory), torch.arange(5, 21)[None]
    model.generation_config.eos_token_id = None
    told = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    logits = (model.generate(ids, use_cache=c, output_logits=True, **told).logits for c in (True, False))
    with_cache, without = map(torch.stack, logits)
    assert torch.allclose(with_cache, without, atol=1e-4)


def _pruned(base: Checkpoint, directory: Path) -> None:
    stage = METHODS["sparsify"]["wanda"].model_validate({"method": "wanda", "sparsity": 0.5})
    stage.check(base.shape)
    plan, _ = stage.plan(base, SparsityEvidence(base.architecture))
    found = stage.sparsify(base, plan, random_blocks(rows=4, length=16), directory)
    check_reload(directory, found.reference_logits(base))
    pruned = {d.target for d in found.decisions if d.action == "prune"}
    assert pruned == set(plan.patterns) and found.metadata["sparsity"] == pytest.approx(0.5, abs=0.02)
    matrices = {n.removesuffix(".weight") for i in range(4) for n in base.layer(i).values()}
    flat = {n for n in matrices if f"{n}.weight" in base.tensors and len(base.tensors[f"{n}.weight"].shape) == 2}
    assert {d.target for d in found.decisions} >= flat  # what stays dense has a row that says why


def _rounded(base: Checkpoint, method: str, refusal: str, directory: Path) -> None:
    stage = METHODS["quantize"][method].model_validate({"method": method, "scheme": "W4A16", "group_size": 16})
    if refusal:
        with pytest.raises(InputError, match=refusal):
            stage.check(base.shape)
        return
    stage.check(base.shape)
    made = stage.quantize(base, directory, blocks=random_blocks(rows=4, length=16) if stage.reads_tokens else None)
    check_reload(directory, stage.reference_logits(base, rounding=made.rounding))


#: Family → methods that take it, of those that mix channels or train, and a word of what the others say.
TAKEN = {
    "smollm3": ({"mka", "come", "concat", "linear-patch", "distill-sp", "least-squares", "bits"}, ""),
    "olmoe": (set[str](), "experts|router"),
    "phi": ({"distill-sp", "least-squares"}, "phi: a layer .* has other matrices"),
    "bamba": ({"least-squares"}, "bamba: (a layer|its layers)"),
    "aya_vision": ({"least-squares"}, "larger model|as both|has other matrices"),
}


@pytest.mark.parametrize("family", by_default("smollm3", "bamba", of=list(TAKEN)))
def test_methods_that_mix_channels_take_it_or_say_why_not(family, tmp_path):
    shape = Checkpoint(tiny_any(family, tmp_path / "model")).shape
    taken, word = TAKEN[family]
    asked = {name: ("merge", {"layers": 1}) for name in ("mka", "come", "concat")}
    asked |= {name: ("recover", {}) for name in ("linear-patch", "distill-sp", "least-squares")}
    asked["bits"] = ("quantize", {"method": "gptq", "scheme": "W4A16", "group_size": 16, "bits": 4.5})
    for name, (stage, options) in asked.items():
        method = options.get("method", name)
        chosen = METHODS[stage][method].model_validate({"method": method, **options})
        if name in taken:
            chosen.check(shape)
        else:
            with pytest.raises(InputError, match=word):
                chosen.check(shape)


@pytest.mark.parametrize("family", by_default("gemma", of=["gemma", "starcoder2", "olmo2"]))
def test_factors_are_folded_where_nothing_else_changes(family, tmp_path):
    base = Checkpoint(tiny_any(family, tmp_path / "model"))
    options = {"method": "smoothquant", "scheme": "W8A8", "where": "all"}
    stage = METHODS["quantize"]["smoothquant"].model_validate(options)
    made = stage.quantize(base, tmp_path / "out", blocks=random_blocks(rows=8, length=32))
    model = load_stock(base.path)
    with torch.no_grad():
        dense = model(probe_of(model)).logits
    error = (stage.reference_logits(base, rounding=made.rounding) - dense).norm() / dense.norm()
    assert error < 0.06
    assert bool(made.rounding.changed) == (family != "olmo2")  # its norms stand behind the branches
