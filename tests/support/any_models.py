"""Tiny random models of every decoder family that transformers has, made by one rule from default configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.support.any_families import FAMILIES, SKIPPED
from tests.support.models import WINDOW, _copy_tokenizer, _randomize

__all__ = ["FAMILIES", "SKIPPED", "VOCABULARY", "randomize_any", "tiny_any", "tiny_config"]
VOCABULARY = 512

#: (pattern of a field's whole name, value of a stack's config); the first match decides.
_RULES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|mm_vocab.*", 0),  # 0: the value stays
    (r"(?!image_|audio_).*vocab_size(_.*)?", VOCABULARY),
    (
        r"(model_max_length|max_position_embeddings|max_sequence_length|n_positions|n_ctx|max_seq_len|seq_length|context_length)",
        256,
    ),
    (r"original_max_position_embeddings", 128),
    (
        r"(num_hidden_layers|n_layers?|num_layers|num_layers_per_stack|num_blocks|depth|decoder_layers|encoder_layers)",
        -1,
    ),  # -1: the number of layers
    (r"(zero_expert_num)", 2),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|router_top_k)", 2),
    (r"(n_group|num_expert_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups|n_expert_groups|o_groups)", 1),
    (r"(.*expert.*|moe_|shared_).*(intermediate|ffn_hidden|ffn)_size", 32),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|dim_ff|dff|d_inner|ffn_hidden_size|feed_forward_size|mlp_dim", 96),
    (r"q_lora_rank", 24),
    (r"(.*lora_rank|.*lowrank|adapter_rank|laurel_rank|gated_norm_rank|.*_rank)", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim|index_rope_head_dim)", 8),
    (r"index_topk|index_block_size|index_topk_blocks", 16),
    (r"(index_n_heads|indexer_n_heads|indexer_kv_heads)", 2),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"(mamba_d_ssm)", 128),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"(swa_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|kv_n_heads|kv_heads)", 2),
    (r"(swa_)?(num_attention_heads|n_heads?|num_heads|attention_heads|(de|en)coder_attention_heads)", 4),
    (r"(.*_|)(head_dim|d_head|headdim|head_size)|kv_channels|d_kv", 16),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (r"(.*chunk_size|block_size|chunk_length)", 16),
    (
        r"(sliding_window|sliding_window_size|window_size|attention_window_size|local_attention|keep_window_size)",
        WINDOW,
    ),
    (
        r"(.*hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width|hidden_dim|embed_dim)",
        64,
    ),
    (r"vision_output_dim|projector_(in|out)put_dim|projection_dim", 64),
    (r"(hidden_size_per_layer_input|router_hidden_size)", 16),
)
#: Counts that mean "the layers below this index": one layer keeps both kinds in sight.
_BOUNDARIES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NOT_FIELDS = ("dtype", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id")
#: Values of fields that default to None.
_FILLED = {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ALTERNATING = ["full_attention", "sliding_attention"] * 2
_CONVOLUTION = ["conv", "full_attention"] * 2
#: By the `model_type` of a config or a sub-config. Layer lists here are those of four layers.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": {
            "full_attention": {**_ROPE, "mrope_section": [4, 2, 2]},
            "sliding_attention": {**_ROPE, "mrope_section": [4, 2, 2]},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "num_key_value_heads": 2},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "dots1": {
        "first_k_dense_replace": 1,
        "max_window_layers": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {"moe_layer_end_index": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"] * 2, 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": _CONVOLUTION, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": _CONVOLUTION},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
    "laguna": {
        "layer_types": _ALTERNATING,
        "sliding_window": WINDOW,
        "num_attention_heads_per_layer": [4, 8, 4, 8],
    },
    "mamba2": {"num_heads": 8},
    "mellum": {
        "layer_types": _ALTERNATING,
        "sliding_window": WINDOW,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "mistral_large4_text": {"kv_source_layers": [0, 1, 1, 3]},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 64,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
    },
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "max_window_layers": 4,
    },
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    **{
        name: {"rope_parameters": {"mrope_section": [4, 2, 2]}}
        for name in (
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
        )
    },
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "step3p5": {"sliding_window": WINDOW},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}


def tiny_config(model_type: str, layers: int = 4) -> Any:
    """The default config of `model_type` with every width, count and rank made small.

    Layers are chosen from the default model's layers, so that each kind of layer appears where there are enough.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind.from_dict(_shrunk(kind().to_dict(), layers))


def tiny_any(model_type: str, directory: Path, layers: int = 4, seed: int = 0) -> Path:
    """`directory`, now a stock checkpoint of a random model of `model_type` with the stories tokenizer."""
    import torch

    from compression_dags.architectures.tracing import auto_class

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(model_type, layers)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    randomize_any(model, seed)
    model.save_pretrained(directory)
    _copy_tokenizer(directory)
    return directory


def randomize_any(model: Any, seed: int) -> None:
    """Matrices ~ N(0, 0.08²); vectors, and router biases kept as buffers, move off their initial values."""
    import torch

    _randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.2)


def _shrunk(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """`config` with small numbers; sub-configs are shrunk in the same way, towers to two layers."""
    count = next((config[n] for n in _LAYER_COUNTS if isinstance(config.get(n), int)), None)
    count = count or len(config.get("layers_block_type") or ())
    chosen = _chosen_layers(config, count, layers) if count else []
    small = {n: v for n, v in config.items() if n not in _NOT_FIELDS and isinstance(n, str)}
    for name, value in list(small.items()):
        small[name] = _shrunk_value(name, value, layers, chosen, count)
    small.update({n: v for n, v in _FILLED.items() if n in small and small[n] is None})
    _fix_latent(config, small)
    _fix_tokens(small)
    _fix_sections(config, small)
    for name, value in _OVERRIDES.get(config.get("model_type", ""), {}).items():
        keeps = isinstance(value, dict) and isinstance(small.get(name), dict)
        small[name] = small[name] | value if keeps else _fitted(value, layers)
    return small


def _fitted(value: Any, layers: int) -> Any:
    """An override for four layers, fitted to another number of layers."""
    if not isinstance(value, list):
        return value
    if isinstance(value[0], list):
        return [[_fitted(value[0][0], layers), 1]]
    if isinstance(value[0], int) and len(value) < 4:
        return [i for i in range(layers) if i % 4 in value]
    return [value[i % len(value)] for i in range(layers)]


def _shrunk_value(name: str, value: Any, layers: int, chosen: list[int], count: int) -> Any:
    if name == "per_layer_config" and value:
        new = {}
        for j, i in enumerate(chosen):
            for key in (str(i), f"{i:02d}", i):
                if key in value:
                    new[str(j)] = {n: _shrunk_value(n, v, layers, chosen, count) for n, v in value[key].items()}
                    _fix_latent(value[key], new[str(j)])
        return new
    if isinstance(value, dict) and all(isinstance(n, str) for n in value):
        is_tower = name in ("vision_config", "audio_config", "vq_config", "qformer_config")
        return _shrunk(value, 2 if is_tower else layers)
    if isinstance(value, list) and count and len(value) == count and "token" not in name:
        if value == list(range(count)):
            return list(range(layers))
        return [_shrunk_value(name, value[i], layers, chosen, count) for i in chosen]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _BOUNDARIES:
        return min(value, 1)
    return _shrunk_number(name, value, layers)


def _chosen_layers(config: dict[str, Any], count: int, layers: int) -> list[int]:
    """Indices of `layers` layers of the default model that show as many kinds of layer as fit, in order."""
    lists = [v for n, v in sorted(config.items()) if isinstance(v, list) and len(v) == count and "token" not in n]
    special = {int(i) for i in config.get("per_layer_config") or {}}
    boundary = max((config.get(n) or 0 for n in _BOUNDARIES), default=0)
    kinds: dict[str, list[int]] = {}
    for i in range(count):
        kinds.setdefault(repr(([v[i] for v in lists], i in special, i < boundary)), []).append(i)
    chosen: list[int] = []
    if layers >= count:
        return [i % count for i in range(layers)]
    while len(chosen) < layers:
        for members in kinds.values():
            if members and len(chosen) < layers:
                chosen.append(members.pop(0))
    return sorted(chosen)


def _fix_latent(config: dict[str, Any], small: dict[str, Any]) -> None:
    """Latent attention has a key for each head; some families call the rotary part of a head `head_dim`."""
    if config.get("qk_nope_head_dim"):
        if "num_key_value_heads" in small:
            small["num_key_value_heads"] = small["num_attention_heads"]
        if config.get("head_dim", 0) == config.get("qk_rope_head_dim"):
            small["head_dim"] = small["qk_rope_head_dim"]


def _fix_tokens(config: dict[str, Any]) -> None:
    """Ids of special tokens move inside the small vocabulary; those of images and sounds to its end."""
    fixed = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    last = VOCABULARY
    for name, value in config.items():
        if name in fixed and value is not None:
            config[name] = fixed[name]
        elif re.search(r"_token_(id|index)$|^(boi|eoi|boa|eoa)_", name) and isinstance(value, int) and value >= 0:
            last -= 1
            config[name] = last


def _fix_sections(config: dict[str, Any], small: dict[str, Any]) -> None:
    """Sections of multimodal rotary positions shrink with the head."""
    for rope in (small.get("rope_parameters"), small.get("rope_scaling")):
        section = (rope or {}).get("mrope_section") if isinstance(rope, dict) else None
        if section:
            before = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            after = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
            total = sum(section) * after // before
            new = [n * after // before for n in section]
            new[0] += total - sum(new)
            rope["mrope_section"] = new


def _shrunk_number(name: str, value: int, layers: int) -> int:
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return {0: value, -1: layers}.get(small, min(value, small))
    return value
