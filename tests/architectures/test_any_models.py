"""Tiny models of any family: all families have an answer, and a few are built as stock checkpoints."""

from __future__ import annotations

import pytest

from compression_dags.architectures.tracing import auto_class
from tests.support.any_models import FAMILIES, SKIPPED, VOCABULARY, tiny_any, tiny_config


def test_every_family_of_transformers_is_built_or_skipped_with_a_reason():
    from transformers.models.auto import modeling_auto as auto

    known = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert not set(FAMILIES) & set(SKIPPED)
    assert known == {*FAMILIES, *SKIPPED}
    assert all(reason.endswith(".") for reason in SKIPPED.values())


@pytest.mark.parametrize("layers", [3, 4, 6])
@pytest.mark.parametrize("model_type", ["gpt_neo", "lfm2", "nemotron_h", "qwen2", "zamba2"])
def test_layer_lists_have_the_asked_length(model_type, layers):
    config = tiny_config(model_type, layers)
    assert config.num_hidden_layers == layers
    lists = ("layer_types", "layers_block_type", "attention_layers")
    assert {len(v) for n in lists if (v := getattr(config, n, None))} <= {layers}


#: One of each structure: uniform, mixed attention, latent attention with experts, state space, wrapper, other names.
#: benchmarks/architectures.py goes over all.
SOME = ("llama", "gemma3", "deepseek_v3", "jamba", "gpt2")


@pytest.mark.parametrize("model_type", SOME)
def test_a_tiny_model_is_a_stock_checkpoint(model_type, tmp_path):
    import torch

    directory = tiny_any(model_type, tmp_path / "model")
    model, info = auto_class(tiny_config(model_type)).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.randint(3, 200, (2, 48), generator=torch.Generator().manual_seed(5))
    changed = torch.cat([ids[:, :40], torch.full((2, 8), 7)], dim=1)
    with torch.no_grad():
        logits, other = (model.eval()(input_ids=i, use_cache=False).logits for i in (ids, changed))
    assert logits.shape == (2, 48, VOCABULARY)
    assert torch.isfinite(logits).all()
    assert (logits[:, :40] - other[:, :40]).abs().max() < 1e-4
