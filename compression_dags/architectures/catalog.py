"""The families we know. Adding one is an entry here and a tiny random model in tests/models.py."""

from __future__ import annotations

from typing import Any

from compression_dags.architectures.decoder import LLAMA_GROUPS, Architecture, Experts, ProjectionGroup
from compression_dags.errors import InputError

_ATTENTION = LLAMA_GROUPS[:2]
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_QK_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

KNOWN: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2", layer_lists=("layer_types",), layer_boundaries=("max_window_layers",)),
        Architecture(
            "qwen3",
            norms=_QK_NORMS,
            head_norms=_HEAD_NORMS,
            layer_lists=("layer_types",),
            layer_boundaries=("max_window_layers",),
        ),
        Architecture(
            "gemma3_text",
            # RMSNorm multiplies by (1 + weight); both branches end in a norm, so no map writes the residual directly.
            norms=(*_QK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            input_norms=(("attention_input", "input_layernorm"), ("mlp_input", "pre_feedforward_layernorm")),
            branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            head_norms=_HEAD_NORMS,
            norm_offset=1.0,
            residual_writer=None,
            layer_lists=("layer_types",),
            stale_cadences=("sliding_window_pattern", "_sliding_window_pattern"),
        ),
        Architecture(
            "opt",
            stack="model.decoder",
            groups=(
                _ATTENTION[0],
                ProjectionGroup("attention_output", ("self_attn.out_proj",)),
                ProjectionGroup("mlp_input", ("fc1",)),
                ProjectionGroup("mlp_output", ("fc2",)),
            ),
            norms=("self_attn_layer_norm", "final_layer_norm"),
            input_norms=(("attention_input", "self_attn_layer_norm"), ("mlp_input", "final_layer_norm")),
            residual_writer="fc2",
        ),
        Architecture(
            "qwen3_moe",
            norms=_QK_NORMS,
            head_norms=_HEAD_NORMS,
            residual_writer=None,
            layer_lists=("layer_types",),
            layer_index_lists=("mlp_only_layers",),
            layer_boundaries=("max_window_layers",),
            experts=Experts("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        Architecture(
            "mixtral",
            groups=_ATTENTION,
            residual_writer=None,
            experts=Experts("block_sparse_moe", "w1", "w3", "w2"),
        ),
    )
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The description for a model's config.

    Raises:
        InputError: the family is unknown, or a variant whose residual stream this project does not describe.
    """
    model_type = config.get("model_type")
    if model_type not in KNOWN:
        raise InputError(f"architecture {model_type!r} is not known; known are: {', '.join(sorted(KNOWN))}")
    if model_type == "opt" and not config.get("do_layer_norm_before", True):
        raise InputError("OPT with do_layer_norm_before=false (post-norm residual) is not supported; opt-350m is one")
    return KNOWN[model_type]
