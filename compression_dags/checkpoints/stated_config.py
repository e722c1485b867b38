"""What config files state: fields that steer loading are left out or refused, sizes are checked before use."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

from compression_dags.architectures import KNOWN
from compression_dags.checkpoints.headers import one_line
from compression_dags.errors import InputError

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_LARGEST = 2**31 - 1
#: Counts that a config states; each is a whole number from 1 on, or absent.
_COUNTS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "ffn_dim", "vocab_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts", "num_local_experts",
    "num_experts_per_tok", "word_embed_proj_dim", "sliding_window", "sliding_window_pattern", "pretraining_tp",
    "decoder_sparse_step",
)  # fmt: skip
_LEAST = {"max_position_embeddings": 2, "max_window_layers": 0}
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "do_layer_norm_before")
#: Zero would turn a layer of zeros into NaN; from 1 on the norm is no norm.
_EPSILON = re.compile(r"(^|_)eps(ilon)?$")
#: Fields that choose code, kernels, files or machines, or change what a forward pass returns. A model needs none.
_STEERING = re.compile(
    r"_?(attn|experts|attention)_implementation(_internal|_autoset)?|_flash_attn_2_enabled|use_flash_attn.*"
    r"|use_kernels|kernel_config|fusion_config|distributed_config|device_map|transformers_weights|gguf_file"
    r"|trust_remote_code|custom_generate|_?name_or_path|_commit_hash|_from_auto|_auto_class|model_name|attribute_map"
    r"|(base_model_)?(tp|pp|ep)_plan|num_labels|id2label|label2id|problem_type"
    r"|_?output_(attentions|hidden_states|router_logits)|torchscript|pruned_heads|sub_configs(_defaults)?"
    r"|extra_files|(vocab|merges|spm|tokenizer|added_tokens|special_tokens_map|chat_template)_file"
    r"|fast_tokenizer_files|local_files_only|is_local|cache_dir|revision|code_revision|subfolder|init_inputs"
)  # fmt: skip
_QUANTIZED = ("quantization_config", "compression_config")


def left_out(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the config without fields that steer loading, at any depth; their names, sorted)."""
    names: set[str] = set()

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        steering = {key for key, item in value.items() if _steers(key, item)}
        names.update(steering)
        return {key: clean(item) for key, item in value.items() if key not in steering}

    return clean(copy.deepcopy(config)), sorted(names)


def _steers(key: str, value: Any) -> bool:
    if key in ("return_dict", "use_return_dict"):
        return value is not True and value is not None
    return bool(value) and bool(_STEERING.fullmatch(key))


def without_attributes(config: dict[str, Any], config_class: Any) -> tuple[dict[str, Any], list[str]]:
    """(the config without keys that would replace methods or settings of transformers' class; their names, sorted).

    transformers sets every unknown key as an attribute of the config object, whatever stood there.
    """
    fields = set(getattr(config_class, "__dataclass_fields__", ()))
    kept = (
        fields
        | {"per_layer_config"}
        | {"model_type", "rope_scaling", "rope_theta", "torch_dtype", "dtype", "_sliding_window_pattern"}
    )
    odd = sorted(k for k in config if k not in kept and (hasattr(config_class, k) or k.startswith("_")))
    return {key: value for key, value in config.items() if key not in odd}, odd


def plain_floats(value: Any) -> Any:
    """The value with infinities as numbers: transformers writes them as objects, at any depth."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: plain_floats(item) for key, item in value.items()}
    return [plain_floats(item) for item in value] if isinstance(value, list) else value


def written_floats(value: Any) -> Any:
    """The value with numbers that JSON lacks as transformers writes them."""
    if isinstance(value, dict):
        return {key: written_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [written_floats(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def stock_config(raw: dict[str, Any], file: Path) -> Any:
    """transformers' config object, of the fields alone that describe a model.

    Raises:
        InputError: transformers knows no such `model_type`, or refuses the config.
    """
    # the code location loads this module without transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    family = raw.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise InputError(f"{file}: model_type {family!r} is no architecture that this version of transformers has")
    config_class: Any = CONFIG_MAPPING[family]
    stated, _ = without_attributes(left_out(raw)[0], config_class)
    try:
        return config_class.from_dict(plain_floats(stated))
    except Exception as error:  # transformers' validators raise many types
        raise InputError(f"{file} is refused by transformers: {one_line(error)}") from None


def check_code(config: dict[str, Any], file: Path) -> None:
    """Refuse a file that asks for code from outside, at any depth.

    Raises:
        InputError: naming the file.
    """
    if _holds(config, "auto_map"):
        raise InputError(f"{file} asks for remote code (auto_map); only stock architectures are imported")


def _holds(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_holds(item, key) for item in value.values())
    return isinstance(value, list) and any(_holds(item, key) for item in value)


def check_config(config: dict[str, Any], file: Path) -> None:
    """Refuse a model that is quantized already, and sizes that no model has, by the text of config.json alone.

    Raises:
        InputError: naming the field, its value and what is allowed.
    """
    for name in _QUANTIZED:
        if method := config.get(name):
            kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
            raise InputError(
                f"{file.parent} is quantized already ({str(kind)[:60]}); give the model in float32, float16 or bfloat16"
            )
    if config.get("per_layer_config") and _is_written(config):
        raise InputError(f"{file}: per_layer_config is set; only models with uniform layers are imported")
    for name in _COUNTS:
        _check_count(config, name, 1, file)
    for name, least in _LEAST.items():
        _check_count(config, name, least, file)
    for name in _FLAGS:
        if (value := config.get(name)) is not None and not isinstance(value, bool):
            raise _refusal(file, name, value, "allowed are true and false")
    for name in ("torch_dtype", "dtype"):
        if (value := config.get(name)) is not None and value not in _DTYPES:
            raise _refusal(file, name, value, f"allowed are {', '.join(_DTYPES)}")
    for name, value in config.items():
        if value is None and not _is_written(config):
            continue
        if _EPSILON.search(name) and not (isinstance(value, (int, float)) and _is_number(value) and 0 < value < 1):
            raise _refusal(file, name, value, "a number above 0 and below 1 is needed")
        if name == "rope_theta" and value is not None and not (_is_number(value) and value > 0):
            raise _refusal(file, name, value, "a number above 0 is needed")


def _is_written(config: dict[str, Any]) -> bool:
    """Whether somebody wrote down what layers of this family are."""
    return isinstance(family := config.get("model_type"), str) and family in KNOWN


def _check_count(config: dict[str, Any], name: str, least: int, file: Path) -> None:
    stated, written = config.get(name), _is_written(config)
    if stated is None and not (name == "num_hidden_layers" and written):
        return
    each: list[Any] = stated if isinstance(stated, list) and not written else [stated]  # one entry a layer
    for value in each:
        if type(value) is not int:
            raise _refusal(file, name, value, "not a count")
        if not least <= value <= _LARGEST:
            raise _refusal(file, name, value, f"a count from {least} to {_LARGEST} is needed")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _refusal(file: Path, name: str, value: Any, allowed: str) -> InputError:
    shown = repr(value)
    return InputError(f"{file}: {name} is {shown if len(shown) <= 60 else shown[:57] + '…'}, {allowed}")
