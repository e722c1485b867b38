"""SmolLM2 out of a GGUF file: de-quantize, undo llama.cpp's row order, write a stock float16 Llama checkpoint.

The `gguf` package reads the tensors directly: transformers' own GGUF path takes a minute and keeps the model marked as
quantized, so that it cannot be saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from compression_dags.errors import InputError

#: Part of converted models' identity and cache name. Raise it when this module writes other bytes for the same file.
CONVERSION = "1"
NAME = "SmolLM2-135M-Instruct, Q4_1 de-quantized"
#: The model on the hub that was quantized.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # llama.cpp's token type of special tokens

_CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {NAME}

The weights of SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a 4-bit Q4_1 GGUF file holds them, de-quantized to
float16. They are not the original weights: every matrix lies on an asymmetric 4-bit grid in groups of 32 (the embedding
on an 8-bit grid), so a quantizer of that form lands back on its grid without loss. That setting must not be reported as
a result. The tokenizer is rebuilt from the file, with the original's rule that digits are split one by one.
"""


def convert_smollm2(gguf_file: Path, directory: Path) -> None:
    """Write the SmolLM2 (or any `llama`) GGUF as config, float16 safetensors and fast tokenizer.

    Args:
        gguf_file: byte-level BPE vocabulary; tensors of any type that `gguf.dequantize` knows.
        directory: created.

    Raises:
        InputError: not a GGUF file, another architecture or tokenizer, a tensor that is unknown, absent or does not
            fit float16.
    """
    # half a second, and the table of model sources needs this module's names alone
    import gguf  # noqa: PLC0415

    try:
        reader = gguf.GGUFReader(gguf_file)
    except (ValueError, IndexError, OSError) as error:
        raise InputError(f"{gguf_file} is not a whole GGUF file: {error}") from None
    metadata = _Metadata(reader, gguf_file)
    metadata.expect("general.architecture", "llama")
    metadata.expect("tokenizer.ggml.model", "gpt2")
    tensors = dict(_tensors(reader, metadata, gguf.dequantize))
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(directory / "model.safetensors", tensors)
    _write_json(directory / "config.json", _config(metadata, tied="lm_head.weight" not in tensors))
    _write_json(directory / "generation_config.json", _special_ids(metadata))
    _write_tokenizer(directory, metadata)
    (directory / "README.md").write_text(_CARD, encoding="utf-8")


class _Metadata:
    """Key-value pairs of a GGUF file."""

    def __init__(self, reader: Any, file: Path):
        self._fields, self._file = reader.fields, file

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise InputError(f"{self._file} lacks the metadata {key!r}")
        return self.get(key)

    def expect(self, key: str, value: str) -> None:
        if self[key] != value:
            raise InputError(f"{self._file}: {key} is {self[key]!r}; only {value!r} is converted")

    def number(self, key: str) -> float:
        """A float32 field as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self[key])))

    @property
    def heads(self) -> tuple[int, int]:
        heads = int(self["llama.attention.head_count"])
        return heads, int(self.get("llama.attention.head_count_kv", heads))


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (rotary pairs adjacent) to transformers' (halves apart).

    Args:
        weight: (heads · d, hidden).
        heads: number of query heads for q, of key/value heads for k.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tensors(
    reader: Any, metadata: _Metadata, dequantize: Callable[..., np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name → float16 array in transformers' names, shapes and row order."""
    heads, kv_heads = metadata.heads
    for tensor in reader.tensors:
        name = _rename(tensor.name)
        if name is None:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = unpermute(values, heads if ".attn_q." in tensor.name else kv_heads)
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(values, dtype=np.float16)
        if not np.isfinite(half).all():
            raise InputError(f"tensor {tensor.name} holds values that are not finite in float16")
        yield name, half


def _rename(name: str) -> str | None:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`; None for tables that transformers derives."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER and suffix == "weight":
        return f"{_OUTER[stem]}.weight"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER and suffix == "weight":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    if stem == "rope_freqs":
        return None
    raise InputError(f"GGUF tensor {name!r} has no counterpart in a stock Llama")


def _config(metadata: _Metadata, *, tied: bool) -> dict[str, Any]:
    heads, kv_heads = metadata.heads
    hidden = int(metadata["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float16",
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": metadata.number("llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        **_special_ids(metadata),
    }


def _special_ids(metadata: _Metadata) -> dict[str, int]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in keys.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def _write_tokenizer(directory: Path, metadata: _Metadata) -> None:
    """Byte-level BPE from the file's tokens and merges, digits one by one, no token added around a text."""
    # the code location loads this module, and neither transformers nor its tokenizers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    types = metadata.get("tokenizer.ggml.token_type", [])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = {**_special_ids(metadata), "unk_token_id": metadata.get("tokenizer.ggml.unknown_token_id")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(metadata["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **{name.removesuffix("_id"): tokens[i] for name, i in ids.items() if i is not None},
    ).save_pretrained(directory)


def _write_weights(file: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
