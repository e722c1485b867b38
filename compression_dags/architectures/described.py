"""Descriptions of discovered models: made from a trace and the names on disk, kept as JSON beside the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from compression_dags.architectures.config_rules import LayerFields
from compression_dags.architectures.decoder import Architecture, Discovered, Experts, LayerKind, ProjectionGroup
from compression_dags.errors import InputError

#: Sizes that methods ask for, by the names that most configs give them.
SIZES = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "moe_intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def architecture(
    found: Discovered, names: Mapping[str, str], rule: LayerFields, sizes: Mapping[str, int]
) -> Architecture:
    """The description that methods read.

    Args:
        names: parameter of one layer of each kind, and of those outside → its tensor on disk, where it is one whole
            tensor. Others are fused of several.
        rule: which config fields depend on the layers.
        sizes: see `SIZES`.

    Raises:
        InputError: the layers' tensors are not numbered on disk.
    """
    first = [found.kind_of.index(number) for number in range(len(found.kinds))]
    prefix = _prefix_on_disk(found, names, first)
    kinds, opaque = [], dict[str, None]()
    for kind, index in zip(found.kinds, first, strict=True):
        local = f"{found.layers}.{index}."
        usable = {p for p in _projections(kind) if names.get(f"{local}{p}.weight") == f"{prefix}.{index}.{p}.weight"}
        groups = tuple(_only(group, usable) for group in kind.groups if usable & set(group.projections))
        whole = {group.name for group in groups if group in kind.groups}
        folds = tuple((group, row) for group, row in kind.row_folds if group in whole and row in usable)
        sole = tuple(group for group in kind.sole if group in whole)
        kinds.append(replace(kind, groups=groups, sole=sole, row_folds=folds))
        opaque |= dict.fromkeys((*kind.odd, *kind.shared, *sorted(_projections(kind) - usable)))
    offsets = {offset for kind in kinds for offset in kind.norm_offsets}
    one_offset = len(offsets) <= 1
    last = {_last_writer(kind) for kind in kinds}
    return Architecture(
        model_type=found.model_type,
        stack=found.stack,
        groups=_union(kinds),
        norms=_once(kinds, "norms"),
        input_norms=tuple(dict.fromkeys(p for k in kinds for p in k.input_norms)) if one_offset else (),
        branch_norms=_once(kinds, "branch_norms"),
        head_norms=_once(kinds, "head_norms"),
        norm_offset=next(iter(offsets), 0.0),
        residual_writer=next(iter(last)) if len(last) == 1 else None,
        layer_list=prefix,
        module_list=found.layers,
        embedding_name=names.get(found.embedding, found.embedding),
        head_name=names.get(found.head, found.head),
        kinds=tuple(kinds),
        kind_of=found.kind_of,
        fields=rule,
        sizes=tuple(sorted(sizes.items())),
        returned=found.returned,
        opaque=tuple(opaque),
    )


def _prefix_on_disk(found: Discovered, names: Mapping[str, str], first: list[int]) -> str:
    prefixes = Counter[str]()
    for index in first:
        head = f"{found.layers}.{index}."
        for memory, disk in names.items():
            tail = f".{index}.{memory.removeprefix(head)}"
            if memory.startswith(head) and disk.endswith(tail):
                prefixes[disk.removesuffix(tail)] += 1
    for index in () if prefixes else first:  # other names within a layer: what stands before its number
        for disk in (d for memory, d in names.items() if memory.startswith(f"{found.layers}.{index}.")):
            prefixes[disk.partition(f".{index}.")[0]] += 1
    if not prefixes:
        raise InputError(f"{found.model_type}: the tensors of its layers are not numbered on disk as in memory")
    return prefixes.most_common(1)[0][0]


def _projections(kind: LayerKind) -> set[str]:
    return {projection for group in kind.groups for projection in group.projections}


def _only(group: ProjectionGroup, usable: set[str]) -> ProjectionGroup:
    return ProjectionGroup(group.name, tuple(p for p in group.projections if p in usable))


def _once(kinds: list[LayerKind], what: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for kind in kinds for name in getattr(kind, what)))


def _union(kinds: list[LayerKind]) -> tuple[ProjectionGroup, ...]:
    """Groups of all kinds; two of one name and other members go by their first members."""
    found: dict[tuple[str, ...], str] = {}
    for kind in kinds:
        for group in kind.groups:
            taken = group.name in found.values() and group.projections not in found
            found.setdefault(group.projections, group.projections[0] if taken else group.name)
    return tuple(ProjectionGroup(name, members) for members, name in found.items())


def _last_writer(kind: LayerKind) -> str | None:
    """The last matrix of the layer, if its output is added to the stream as it is."""
    outputs = kind.members("mlp_output")
    return outputs[0] if len(outputs) == 1 and kind.plain_writers.issuperset(outputs) and not kind.experts else None


def kinds_text(description: Architecture) -> str:
    """How many layers there are of each kind, in words: `3 of linear_attention, dense; 1 of full_attention, dense`."""
    counts = Counter(description.kind_of)
    named = {number: f"{kind.attention}, {kind.feed_forward}" for number, kind in enumerate(description.kinds)}
    return "; ".join(f"{counts[number]} of {name}" for number, name in named.items())


def to_json(description: Architecture) -> str:
    """The description as text, the same for equal descriptions."""
    return json.dumps(asdict(description), indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> Architecture:
    """The description that `to_json` wrote.

    Raises:
        InputError: it is none.
    """
    try:
        read = json.loads(text)
        experts, rule = read.pop("experts"), read.pop("fields")
        kinds = tuple(LayerKind(**{**_tuples(k), "groups": _groups(k["groups"])}) for k in read.pop("kinds"))
        groups = _groups(read.pop("groups"))
        return Architecture(
            **_tuples(read),
            groups=groups,
            kinds=kinds,
            experts=Experts(**experts) if experts else None,
            fields=LayerFields(**_tuples(rule)) if rule else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the description of the architecture cannot be read: {error}") from None


def _groups(read: Any) -> tuple[ProjectionGroup, ...]:
    return tuple(ProjectionGroup(group["name"], tuple(group["projections"])) for group in read)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth; the outermost object stays one."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
