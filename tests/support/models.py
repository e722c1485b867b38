"""Tiny random models of every known family, saved as stock checkpoints with a tokenizer; ways to damage a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression_dags.checkpoints.importing import import_checkpoint
from compression_dags.checkpoints.reader import SINGLE
from compression_dags.errors import InputError

STORIES = Path(__file__).resolve().parents[2] / "models" / "stories260k"

#: One window that is shorter than the reload probe (48 tokens), so that a mistyped layer changes the logits.
WINDOW = 16
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 96}


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]


def _llama(layers: int):
    from transformers import LlamaConfig

    return LlamaConfig(**_LLAMA, num_hidden_layers=layers)


def _mistral(layers: int):
    from transformers import MistralConfig

    return MistralConfig(**_LLAMA, head_dim=16, num_hidden_layers=layers, sliding_window=WINDOW)


def _qwen2(layers: int):
    from transformers import Qwen2Config

    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": layers // 2}
    return Qwen2Config(**_LLAMA, **window, num_hidden_layers=layers, tie_word_embeddings=True)


def _qwen3(layers: int):
    from transformers import Qwen3Config

    window = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _alternating(layers)}
    return Qwen3Config(**_LLAMA, **window, head_dim=16, num_hidden_layers=layers)


def _gemma3_text(layers: int):
    from transformers import Gemma3TextConfig

    window = {"sliding_window": WINDOW, "layer_types": _alternating(layers)}
    return Gemma3TextConfig(**_LLAMA, **window, head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=layers)


def _opt(layers: int):
    from transformers import OPTConfig

    return OPTConfig(**_SHAPE, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=layers)


def _qwen3_moe(layers: int):
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    return Qwen3MoeConfig(**_LLAMA, **experts, head_dim=16, num_hidden_layers=layers)


def _mixtral(layers: int):
    from transformers import MixtralConfig

    return MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=layers)


_CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3_text,
    "opt": _opt,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}
FAMILIES = tuple(_CONFIGS)


def config_of(family: str, layers: int = 4) -> Any:
    """The config of `tiny`."""
    return _CONFIGS[family](layers)


def tiny(
    family: str, directory: Path, *, layers: int = 4, seed: int = 0, dtype: str = "float32", **config: Any
) -> Path:
    """Save a random model of `family` (hidden 64, vocabulary 512, context 256) and the stories tokenizer.

    Args:
        directory: created; becomes a stock checkpoint directory.
        dtype: stored dtype, such as "float32" or "float16".
        config: fields set on the family's config before the model is built.

    Returns:
        `directory`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    built = _CONFIGS[family](layers)
    for name, value in config.items():
        setattr(built, name, value)
    model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    _randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    _copy_tokenizer(directory)
    return directory


def _copy_tokenizer(directory: Path) -> None:
    shutil.copyfile(STORIES / "tokenizer.json", directory / "tokenizer.json")
    options = json.loads((STORIES / "tokenizer_config.json").read_text())
    # For qwen2, transformers takes its own tokenizer class whatever the file says; without this it adds a token.
    options["pad_token"] = options["unk_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(options))


def _randomize(model: Any, seed: int) -> None:
    """Matrices ~ N(0, 0.08²), vectors moved off their initial value, so that γ ≠ 1 and biases ≠ 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise, alpha=0.2)
            else:
                parameter.copy_(0.08 * noise)


def admit(source: Path, target: Path):
    return import_checkpoint(source, target, revision=None, origin="test")


def refuse(source: Path, match: str) -> None:
    """The import fails with this message and writes nothing."""
    target = source.parent / "refused"
    with pytest.raises(InputError, match=match):
        admit(source, target)
    assert not target.exists()


def edit_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(directory: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
