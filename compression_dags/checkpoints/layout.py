"""Names and shapes that a decoder's tensors must have by its config, compared with the headers alone."""

from __future__ import annotations

import re

from compression_dags.architectures import KNOWN, Architecture, ModelShape
from compression_dags.architectures.config_rules import COUNTS
from compression_dags.checkpoints.headers import TensorInfo
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError

#: Counts of layers, of towers too.
_LAYER_COUNTS = {*COUNTS, "depth", "encoder_layers", "num_encoder_layers"}
_EXPERT_COUNT = re.compile(r"(num|n|moe_num)(_\w+)?_experts")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Stored by older versions of the libraries, computed today: no weights.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.\w*(inv_freq|cos|sin|cos_cached|sin_cached)|masked_bias|(self_)?attn\.bias|position_ids"
    r"|decoder\.version)"
)
_TIED_BY_DEFAULT = {"gemma3_text", "opt"}


def buffers(checkpoint: Checkpoint) -> list[str]:
    """Names of stored tensors that are tables of the code, such as `rotary_emb.inv_freq`, not weights."""
    return [name for name in checkpoint.tensors if _BUFFERS.fullmatch(name)]


def embedding(checkpoint: Checkpoint) -> TensorInfo:
    """The token embedding, (vocabulary, width).

    Raises:
        InputError: there is none, or it is no matrix.
    """
    name = checkpoint.architecture.embedding
    if (info := checkpoint.tensors.get(name)) is None:
        raise InputError(f"{checkpoint.path} has no tensor {name}")
    if len(info.shape) != 2:
        raise InputError(f"{info.file}: tensor {name} has shape {info.shape}, two axes are needed")
    return info


def check_family(checkpoint: Checkpoint) -> None:
    """The family is written down, or a decoder of transformers whose layers the weights hold too.

    Raises:
        InputError: the family is unknown, or the config counts more layers than the weights number.
    """
    # the code location loads this module without transformers
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    raw = checkpoint.raw_config
    if not isinstance(family := raw.get("model_type"), str):
        raise InputError(f"{checkpoint.path / 'config.json'}: model_type is {family!r}, not a name")
    if family in KNOWN:
        _ = checkpoint.architecture  # refuses variants
        return
    if family not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}:
        raise InputError(f"architecture {family!r} is no decoder that this version of transformers has")
    _check_counts(checkpoint)


def _check_counts(checkpoint: Checkpoint) -> None:
    """Layers and experts, also of a wrapper's parts, are no more than the weights can hold: a trace makes modules."""
    numbered = [int(part) for name in checkpoint.tensors for part in name.split(".") if part.isdecimal()]
    layers = 1 + max(numbered, default=-1)
    widest = max((size for info in checkpoint.tensors.values() for size in info.shape), default=0)
    configs = [checkpoint.raw_config]
    while configs:
        config = configs.pop()
        configs += [value for value in config.values() if isinstance(value, dict)]
        for name, stated in config.items():
            most = layers if name in _LAYER_COUNTS else max(layers, widest) if _EXPERT_COUNT.fullmatch(name) else None
            if most is not None and type(stated) is int and stated > most:
                raise InputError(
                    f"{checkpoint.path}: config.json counts {stated} ({name}), the weights have room for {most}"
                )


def check_layers(checkpoint: Checkpoint) -> None:
    """As many layers in the tensors as config.json counts, before anything of that size is made.

    Raises:
        InputError: stating both counts.
    """
    architecture, wanted = checkpoint.architecture, checkpoint.num_layers
    found = {i for i in (architecture.split_name(name)[0] for name in checkpoint.tensors) if i is not None}
    if len(found) != wanted or max(found) != wanted - 1:
        where = f", numbered up to {max(found)}" if found else f" under {architecture.layers}"
        counted = f"config.json counts {wanted} layers, the weights hold {len(found)}{where}"
        raise InputError(f"{checkpoint.path}: {counted}")


def check_shapes(checkpoint: Checkpoint, shape: ModelShape) -> None:
    """Every projection, norm and expert of every layer is there, in float, with the shape that the config gives it.

    Raises:
        InputError: naming the first tensor that differs.
    """
    path, architecture = checkpoint.path, checkpoint.architecture
    rows, named = embedding(checkpoint).shape[0], shape.config["vocab_size"]
    if rows != named and not (architecture.kinds and rows > named):
        raise InputError(f"{path}: the embedding has {rows} rows, config.json says vocab_size {named}")
    layers = layer_tensors(checkpoint)
    first: dict[tuple[str, ...], tuple[int, dict[str, tuple[int, ...]]]] = {}
    for index in range(shape.layers):
        local, kind = layers[index], architecture.layer_kind(shape.config, index)
        kind = kind if architecture.kinds else kind[1:]  # of a written family, attention types have equal tensors
        # of a discovered family the stock loader knows the shapes
        wanted = {} if architecture.kinds else _expected(architecture, shape, index, count=len(local))
        for name, size in wanted.items():
            if name not in local:
                raise InputError(f"{path}: layer {index} lacks {name}, which {architecture.model_type} needs")
            if local[name].shape != size:
                raise InputError(f"{path}: layer {index}: {name} is {local[name].shape}, config.json makes it {size}")
        shapes = {name: info.shape for name, info in local.items() if not _BUFFERS.fullmatch(info.name)}
        other, before = first.setdefault(kind, (index, shapes))
        if odd := sorted(n for n in shapes.keys() | before.keys() if shapes.get(n) != before.get(n)):
            raise InputError(f"{path}: layers {other} and {index} are of one kind and differ in {odd[0]}")
    skipped = set(buffers(checkpoint))
    for info in checkpoint.tensors.values():
        if info.dtype not in FLOATS and info.name not in skipped:
            allowed = "float32, float16 and bfloat16 are allowed"
            raise InputError(f"{info.file}: tensor {info.name} is stored as {info.dtype}; {allowed}")
        if not info.numel and info.name not in skipped:
            raise InputError(f"{info.file}: tensor {info.name} is empty, its shape is {info.shape}")


def layer_tensors(checkpoint: Checkpoint) -> dict[int, dict[str, TensorInfo]]:
    """Layer → local name → tensor, in one pass over the headers."""
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        index, local = checkpoint.architecture.split_name(name)
        if index is not None:
            found.setdefault(index, {})[local] = info
    return found


def _expected(architecture: Architecture, shape: ModelShape, index: int, count: int) -> dict[str, tuple[int, ...]]:
    """Local name → shape of the weights of one layer. `count` is how many tensors it has: it bounds the experts."""
    sparse = architecture.is_sparse_layer(shape.config, index)
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "out_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner), "fc1": (inner, hidden), "fc2": (hidden, inner),
    }  # fmt: skip
    wanted: dict[str, tuple[int, ...]] = {}
    for projection in architecture.projections():
        if not (sparse and projection.startswith("mlp.")):
            wanted[f"{projection}.weight"] = shapes[projection.rpartition(".")[2]]
    for norm in architecture.norms:
        wanted[f"{norm}.weight"] = (shape.head_dim if norm in architecture.head_norms else hidden,)
    if sparse and (experts := architecture.experts):
        number = int(shape.config.get("num_experts") or shape.config.get("num_local_experts") or 0)
        wanted[f"{experts.disk_block}.gate.weight"] = (number, hidden)
        for expert in range(min(number, count + 1)):
            gate, up, down = experts.matrices(expert)
            wide, narrow = (shape.expert_intermediate, hidden), (hidden, shape.expert_intermediate)
            wanted |= {f"{gate}.weight": wide, f"{up}.weight": wide, f"{down}.weight": narrow}
    return wanted


def tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding, as config.json says or, where it does not, as the family's default is."""
    if checkpoint.architecture.kinds:
        return checkpoint.architecture.head_name == checkpoint.architecture.embedding
    stated = checkpoint.raw_config.get("tie_word_embeddings")
    return checkpoint.architecture.model_type in _TIED_BY_DEFAULT if stated is None else bool(stated)
