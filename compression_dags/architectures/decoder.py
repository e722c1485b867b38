"""One small description of a decoder stack, enough for every compression method here.

Nothing in this file imports torch: descriptions are read when definitions load and when a recipe is checked.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compression_dags.architectures.config_rules import LayerFields, remapped
from compression_dags.errors import InputError


@dataclass(frozen=True)
class ProjectionGroup:
    """Linear projections of one layer that read the same input (so they share one Hessian, one norm vector)."""

    name: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class Experts:
    """How a mixture-of-experts block is named on disk (one tensor an expert) and in memory (fused parameters)."""

    disk_block: str  # "mlp" or "block_sparse_moe"
    gate: str
    up: str
    down: str

    def matrices(self, expert: int) -> tuple[str, str, str]:
        """Gate, up and down of one expert as on disk, within the layer: `mlp.experts.7.gate_proj`, …"""
        prefix = f"{self.disk_block}.experts.{expert}."
        return prefix + self.gate, prefix + self.up, prefix + self.down


LLAMA_GROUPS = (
    ProjectionGroup("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ProjectionGroup("attention_output", ("self_attn.o_proj",)),
    ProjectionGroup("mlp_input", ("mlp.gate_proj", "mlp.up_proj")),
    ProjectionGroup("mlp_output", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer of a discovered model.

    Attributes:
        attention: the layer's type as the config says, `attention`, or the module that mixes the tokens.
        attends: whether it has a core of attention, whose cache counts the tokens.
        feed_forward: `dense` or `experts`.
        groups: matrices by common input, in the order in which the layer evaluates them; routers and experts aside.
        norms: modules whose weight multiplies each channel.
        input_norms: group → the norm whose output it reads.
        norm_offsets: what those norms add to their weights before they multiply.
        branch_norms: norms between a branch's last matrix and the residual stream.
        head_norms: norms between a matrix and the attention's core.
        writers: matrices whose output is added to the residual stream, times the constant in `factors`.
        routers: matrices that choose experts, or weigh a branch by one number.
        experts: parameters that hold a matrix an expert, (experts, …, …).
        odd: matrices that are no plain linear module, or are used outside of it or more than once.
        shared: parameters of other places that the layer uses.
        shapes: parameter of the layer → its shape.
        sole: groups whose input nothing else of the layer reads.
        row_folds: group → the matrix whose rows can take the factors of the group's input channels.
        before_experts: groups that the layer evaluates before its experts.
    """

    attention: str
    feed_forward: str
    groups: tuple[ProjectionGroup, ...] = ()
    norms: tuple[str, ...] = ()
    input_norms: tuple[tuple[str, str], ...] = ()
    norm_offsets: tuple[float, ...] = ()
    branch_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    attends: bool = True
    sole: tuple[str, ...] = ()
    row_folds: tuple[tuple[str, str], ...] = ()
    before_experts: tuple[str, ...] = ()

    @property
    def plain_writers(self) -> set[str]:
        """Matrices whose output is added to the residual stream as it is."""
        return {name for name, factor in zip(self.writers, self.factors, strict=True) if factor == 1.0}

    def members(self, group: str) -> tuple[str, ...]:
        """Matrices of the group `group`; none where the layer has no such group."""
        return next((g.projections for g in self.groups if g.name == group), ())

    def columns(self, projection: str) -> int:
        """Inputs of one of the matrices."""
        return dict(self.shapes)[f"{projection}.weight"][1]


@dataclass(frozen=True)
class Discovered:
    """What tracing found of a model; names are those in memory.

    Attributes:
        stack: module that loops over the layers.
        layers: the list of layers.
        embedding, head, final_norm: names of parameters; a tied head is the embedding.
        config_path: where the config that describes the layers lies inside the model's; empty but for wrappers.
        kinds: every kind of layer, in order of appearance.
        kind_of: for each layer, its place in `kinds`.
        returned: how many values a layer returns in a tuple; 0 where it returns its output as it is.
    """

    model_type: str
    stack: str
    layers: str
    embedding: str
    head: str
    final_norm: str
    config_path: tuple[str, ...]
    kinds: tuple[LayerKind, ...]
    kind_of: tuple[int, ...]
    returned: int = 0


@dataclass(frozen=True)
class Architecture:
    """A family of decoder-only models, described once.

    Attributes:
        model_type: the `model_type` of the family's config.
        stack: module path of the object that loops over the layers.
        groups: projections that share an input, in the order in which a layer evaluates them.
        norms: norm modules of a layer that carry a weight (γ).
        input_norms: group → the norm whose output it reads; γ of that norm folds into the group's columns.
        branch_norms: norms between a branch's last projection and the residual (Gemma 3); nothing folds through them.
        head_norms: norms over each head's query and key (Qwen3, Gemma 3), shared by all heads of a layer.
        norm_offset: what RMSNorm adds to its weight before multiplying (1 in Gemma).
        residual_writer: the linear map whose output is added to the residual stream unchanged at the end of a
            layer; closed-form recovery folds into it. None where a norm or a router stands between.
        layer_lists: config lists with one entry a layer.
        layer_index_lists: config lists of layer indices.
        layer_boundaries: config counts that mean "the layers below this index".
        experts: names of mixture-of-experts tensors, if the family has them.
        layer_list: path of the layer list in tensor names, where it is not `layers` of the stack.
        module_list: the same in modules, where it is another one.
        embedding_name, head_name: tensors on disk; a tied head is the embedding.
        kinds, kind_of: every kind of layer, and for each layer its place there; empty for written families.
        fields: which config fields depend on the layers; None for written families.
        sizes: the config's names of sizes → what a discovered model has.
        returned: how many values a layer returns in a tuple; 0 where it returns its output as it is.
        opaque: matrices of discovered models that only methods of whole layers may touch.
        needs_weights: why stock transformers cannot load linear modules without a plain weight; empty if it can.
    """

    model_type: str
    stack: str = "model"
    groups: tuple[ProjectionGroup, ...] = LLAMA_GROUPS
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    input_norms: tuple[tuple[str, str], ...] = (
        ("attention_input", "input_layernorm"),
        ("mlp_input", "post_attention_layernorm"),
    )
    branch_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    residual_writer: str | None = "mlp.down_proj"
    layer_lists: tuple[str, ...] = ()
    layer_index_lists: tuple[str, ...] = ()
    layer_boundaries: tuple[str, ...] = ()
    stale_cadences: tuple[str, ...] = field(default=())
    experts: Experts | None = None
    layer_list: str = ""
    module_list: str = ""
    embedding_name: str = ""
    head_name: str = "lm_head.weight"
    kinds: tuple[LayerKind, ...] = ()
    kind_of: tuple[int, ...] = ()
    fields: LayerFields | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    returned: int = 0
    opaque: tuple[str, ...] = ()
    needs_weights: str = ""

    @property
    def layers(self) -> str:
        """Path of the layer list in tensor names."""
        return self.layer_list or f"{self.stack}.layers"

    @property
    def modules(self) -> str:
        """Path of the layer list in modules."""
        return self.module_list or self.layers

    @property
    def embedding(self) -> str:
        """Name of the token embedding's tensor."""
        return self.embedding_name or f"{self.stack}.embed_tokens.weight"

    @property
    def has_experts(self) -> bool:
        """Whether some layer is a mixture of experts, however its experts are stored."""
        return self.experts is not None or any(kind.experts for kind in self.kinds)

    def groups_of(self, index: int) -> tuple[ProjectionGroup, ...]:
        """Groups of one layer, in the order in which it evaluates them; a written family may lack some of them."""
        return self.kinds[self.kind_of[index]].groups if self.kinds else self.groups

    def projections_of(self, index: int) -> tuple[str, ...]:
        return tuple(p for group in self.groups_of(index) for p in group.projections)

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def split_name(self, name: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` → (3, "mlp.up_proj.weight"); (None, name) for tensors of no layer."""
        match = re.match(rf"{re.escape(self.layers)}\.(\d+)\.(.+)$", name)
        return (int(match[1]), match[2]) if match else (None, name)

    def group(self, name: str) -> tuple[str, ...]:
        """Projections of the group `name` (`attention_output` → (`self_attn.o_proj`,))."""
        return next(g.projections for g in self.groups if g.name == name)

    @property
    def stream_writers(self) -> tuple[str, ...]:
        """Groups of a written family whose output is added to the residual stream as it is."""
        return () if self.branch_norms else ("attention_output", "mlp_output")

    def projections(self) -> tuple[str, ...]:
        return tuple(p for group in self.groups for p in group.projections)

    def is_sparse_layer(self, config: dict[str, Any], index: int) -> bool:
        """Whether layer `index` is a mixture of experts (Qwen3-MoE mixes both kinds)."""
        if self.kinds:
            return self.kinds[self.kind_of[index]].feed_forward == "experts"
        if self.experts is None:
            return False
        if index in (config.get("mlp_only_layers") or ()):
            return False
        experts = config.get("num_experts", config.get("num_local_experts", 0)) or 0
        return experts > 0 and (index + 1) % (config.get("decoder_sparse_step") or 1) == 0

    def layer_kind(self, config: dict[str, Any], index: int) -> tuple[str, str]:
        """(attention type, dense | experts). Only layers of one kind may be merged: no config can state a mixture."""
        if self.kinds:
            kind = self.kinds[self.kind_of[index]]
            alike = [k for k in self.kinds if (k.attention, k.feed_forward) == (kind.attention, kind.feed_forward)]
            number = f" {alike.index(kind) + 1}" if len(alike) > 1 else ""
            return kind.attention, kind.feed_forward + number
        types = config.get("layer_types")
        attention = types[index] if types else "attention"
        return attention, "experts" if self.is_sparse_layer(config, index) else "dense"

    def remap_config(self, config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
        """Config of the model whose layer j is (or is merged into) the original layer `kept[j]`.

        Raises:
            InputError: the config holds a per-layer field that this description does not know; silently keeping it
                would re-initialise or mis-type layers on reload (landscape.md §5).
        """
        if self.fields is not None:
            attending = [i for i, number in enumerate(self.kind_of) if self.kinds[number].attends]
            if attending and not set(attending) & set(kept):
                raise InputError(
                    f"layers {attending} are the only ones of {self.model_type} that attend; without one no text is "
                    "generated with a cache: keep one (protect_first, protect_last or fewer layers)"
                )
            return remapped(config, kept, self.fields)
        old_count = config["num_hidden_layers"]
        self._refuse_unknown_layer_fields(config, old_count)
        new = copy.deepcopy(config)
        new["num_hidden_layers"] = len(kept)
        for name in self.layer_lists:
            if config.get(name) is not None:
                new[name] = [config[name][i] for i in kept]
        for name in self.layer_boundaries:
            if config.get(name) is not None:
                new[name] = sum(i < config[name] for i in kept)
        if self.experts and (config.get("mlp_only_layers") is not None or config.get("decoder_sparse_step", 1) != 1):
            # A cadence stops being true after a drop, so the explicit list replaces it.
            new["decoder_sparse_step"] = 1
            new["mlp_only_layers"] = [j for j, i in enumerate(kept) if not self.is_sparse_layer(config, i)]
        for name in self.stale_cadences:
            new.pop(name, None)
        return new

    def shortened(self, kept: Sequence[int]) -> Architecture:
        """The description of the model whose layer j is (or is merged into) the layer `kept[j]`."""
        if not self.kinds:
            return self
        sizes = {**dict(self.sizes), "num_hidden_layers": len(kept)}
        return replace(self, kind_of=tuple(self.kind_of[i] for i in kept), sizes=tuple(sorted(sizes.items())))

    def _refuse_unknown_layer_fields(self, config: dict[str, Any], count: int) -> None:
        if config.get("per_layer_config"):
            raise InputError("config field per_layer_config is set; only models with uniform layers are supported")
        known = {*self.layer_lists, *self.layer_index_lists, "architectures", "eos_token_id"}
        for name, value in config.items():
            if isinstance(value, list) and len(value) == count and count > 1 and name not in known:
                raise InputError(
                    f"config field {name!r} has one entry a layer and is unknown for {self.model_type}; "
                    f"known per-layer fields: {', '.join((*self.layer_lists, *self.layer_index_lists)) or 'none'}"
                )


@dataclass(frozen=True)
class ModelShape:
    """What a planner needs to know of a model, without its weights.

    Attributes:
        tensors: name → what the headers say of it (`checkpoints.reader.TensorInfo`); empty where no file was read.
    """

    architecture: Architecture
    config: dict[str, Any]
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden // self.heads)

    @property
    def intermediate(self) -> int:
        """Channels between the MLP's input and output projections."""
        return int(self.config.get("intermediate_size") or self.config.get("ffn_dim") or self.hidden)

    @property
    def expert_intermediate(self) -> int:
        """Channels between an expert's input and output projections."""
        return int(self.config.get("moe_intermediate_size") or self.intermediate)

    def shortened(self, layers: int) -> ModelShape:
        """The shape once all but the first so many layers went; this shape where layers are of several kinds."""
        if layers == self.layers or len({self.kind(i) for i in range(self.layers)}) > 1:
            return self
        split = self.architecture.split_name
        kept = {n: t for n, t in self.tensors.items() if (index := split(n)[0]) is None or index < layers}
        if self.architecture.kinds:  # the config is that of the text alone, and nothing reads more of it than sizes
            few = self.architecture.shortened(range(layers))
            return ModelShape(few, {**self.config, "num_hidden_layers": layers}, kept)
        return ModelShape(self.architecture, self.architecture.remap_config(self.config, list(range(layers))), kept)

    def kind(self, index: int) -> tuple[str, str]:
        return self.architecture.layer_kind(self.config, index)
