"""What a config says once layers are dropped, found from the config's own shape and not from a list of families.

Nothing here imports torch or transformers. The rules guess from names, lengths and values, so a caller proves each
result on the model. `candidates` gives the guesses to try, the most plain one first.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compression_dags.errors import InputError

#: Names for the number of layers. A file may state two of them.
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
    "num_blocks",
)

#: What `to_dict()` adds and no model reads.
JUNK = ("_name_or_path", "id2label", "label2id", "_attn_implementation_autoset")

_NOT_LISTS = re.compile(r".*token.*|architectures|auto_map|mtp_.*|.*mrope.*|.*_limit|.*multipliers|torch_dtype|dtype")
_TYPE_LISTS = re.compile(r"layers?_(block_)?types?|layers_block_type|block_types|attention_layers")
_INDEX_LISTS = re.compile(r".*(layer|idx|indices|index|ids).*")
_BOUNDARIES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_LASTS = ("moe_layer_end_index",)
_TAILS = ("num_kv_shared_layers",)
_CYCLES = ("block_types",)
_POINTERS = re.compile(r".*source_layers?")
_DEPTH_SCALES = ("scale_depth",)
_NESTED = ("attention_types",)
_CADENCES = re.compile(
    r"_?sliding_window_pattern|full_attention_interval|decoder_sparse_step|interleave_moe_layer_step|layer_group_size"
    r"|no_rope_layer_interval|.*every_n(_layers)?|.*_layer_(interval|period|offset|freq|frequency)|.*_attn_every.*"
)
#: Words of a count that may mean a place in the stack; numbers of heads, experts, channels and tokens are none.
_PLACES = re.compile(r".*(layer|first|last|start|end|replace|dense|shared|boundary|until|from|below|above).*")
_NOT_PLACES = re.compile(r".*(head|expert|size|dim|rank|token|channel|window_size|nextn|mtp|group|eps|step|vocab).*")


@dataclass(frozen=True)
class LayerFields:
    """The fields of one config that depend on which layers there are.

    Attributes:
        count: name of the number of layers; empty where the config derives it from a list.
        lists: lists, or strings, with one entry a layer.
        index_lists: increasing lists of layer indices.
        index_dicts: dicts whose keys are layer indices.
        boundaries: counts that mean "the layers below this index".
        cadences: numbers that an explicit list replaces; they are left out.
        path: keys that lead to the text config within a wrapper's config.
        lasts: numbers that mean "the layers up to this index, with it".
        tails: counts that mean "the last so many layers".
        cycles: lists that repeat over the layers, or that hold pairs (list, times).
        periods: (period, offset) of the layers i with i % period == offset, where no explicit list exists.
        pointers: lists whose entry for a layer is the index of a layer that it reads.
        depth_scales: numbers that the model divides by the root of the number of layers.
    """

    count: str
    lists: tuple[str, ...] = ()
    index_lists: tuple[str, ...] = ()
    index_dicts: tuple[str, ...] = ()
    boundaries: tuple[str, ...] = ()
    cadences: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    lasts: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()
    cycles: tuple[str, ...] = ()
    periods: tuple[tuple[str, str], ...] = ()
    pointers: tuple[str, ...] = ()
    depth_scales: tuple[str, ...] = ()

    def names(self) -> frozenset[str]:
        """Every field that has a role."""
        alone = (self.lists, self.index_lists, self.index_dicts, self.boundaries, self.cadences, self.lasts)
        pairs = itertools.chain.from_iterable(self.periods)
        return frozenset(
            {self.count, *itertools.chain(*alone, self.tails, self.cycles, self.pointers, self.depth_scales, pairs)}
        )


def merged(full: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """What the config class says, with those fields of the file that it leaves out.

    The class wins: a file may state an empty list for what the class derives, as Llama 4 does with `no_rope_layers`.

    Args:
        full: `config.to_dict()`, which holds the lists that the class derives.
        stated: the content of `config.json`.
    """
    both = {n: merged(full[n], v) for n, v in stated.items() if isinstance(v, dict) and isinstance(full.get(n), dict)}
    # Tables by number are whole: a key that the class writes in another form would come twice.
    tables = {n: full[n] for n in both if n == "per_layer_config" or any(isinstance(k, int) for k in full[n])}
    return {**stated, **full, **both, **tables}


def text_config(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The part of `config` that describes the decoder."""
    for key in path:
        config = config[key]
    return config


def layer_count(config: dict[str, Any], fields: LayerFields) -> int:
    """The number of layers that `config` states.

    Raises:
        InputError: the config states none.
    """
    text = text_config(config, fields.path)
    if fields.count:
        if not _is_count(text.get(fields.count)):
            raise InputError(f"config field {fields.count!r} is no number of layers: {text.get(fields.count)!r}")
        return text[fields.count]
    derived = next((len(v) for n, v in text.items() if _TYPE_LISTS.fullmatch(n) and isinstance(v, list)), None)
    if derived is None:
        raise InputError("the config states no number of layers and no list with one entry a layer")
    return derived


def plain_fields(config: dict[str, Any], count: str, path: Sequence[str] = ()) -> LayerFields:
    """The roles that names, lengths and values of the fields suggest.

    Args:
        count: name of the number of layers; empty where the config derives it from a list.
        path: keys that lead to the text config within a wrapper's config.
    """
    fields = LayerFields(count, path=tuple(path))
    layers = layer_count(config, fields)
    text = text_config(config, path)
    lists, index_lists, index_dicts, pointers = [], [], [], []
    for name, value in text.items():
        if isinstance(value, list | tuple | str) and not _NOT_LISTS.fullmatch(name):
            if _POINTERS.fullmatch(name) and len(value) == layers:
                pointers.append(name)
            elif _are_indices(value, layers) and _INDEX_LISTS.fullmatch(name):
                index_lists.append(name)
            elif len(value) == layers and (not isinstance(value, str) or "pattern" in name):
                lists.append(name)
        elif isinstance(value, dict) and name not in JUNK and _has_layer_keys(value, layers):
            index_dicts.append(name)
    if "decoder_sparse_step" in text and "mlp_only_layers" in text and "mlp_only_layers" not in index_lists:
        index_lists.append("mlp_only_layers")
    explicit = bool(lists or index_lists)
    numbers = [n for n, v in text.items() if _is_count(v)]
    nested = tuple(n for n in _NESTED if isinstance(text.get(n), list))
    cadences = tuple(n for n in numbers if _CADENCES.fullmatch(n)) if explicit else ()
    starts = [n.removesuffix("_period") for n in numbers if n.endswith("_layer_period") and n not in cadences]
    return replace(
        fields,
        lists=tuple(lists),
        index_lists=tuple(index_lists),
        index_dicts=tuple(index_dicts),
        boundaries=tuple(n for n in _BOUNDARIES if n in numbers),
        cadences=cadences,
        lasts=tuple(n for n in _LASTS if n in numbers),
        tails=tuple(n for n in _TAILS if n in numbers),
        cycles=tuple(n for n in _CYCLES if isinstance(text.get(n), list) and n not in lists) + nested,
        periods=tuple((f"{n}_period", f"{n}_offset") for n in starts if f"{n}_offset" in numbers),
        pointers=tuple(pointers),
        depth_scales=tuple(n for n in _DEPTH_SCALES if isinstance(text.get(n), int | float)),
    )


def candidates(config: dict[str, Any], fields: LayerFields) -> Iterator[LayerFields]:
    """Guesses for the proof to try: `fields` itself, then with one further role, then with two.

    A number that may be a place in the stack is tried as a boundary, a tail and a last index. A list that fits two
    roles is tried in the other one. Cadences are also tried as they stand.
    """
    yield fields
    text, layers = text_config(config, fields.path), layer_count(config, fields)
    variants: list[tuple[str, dict[str, Any]]] = []
    for name in fields.index_lists:
        if len(text[name] or ()) == layers:
            others = tuple(n for n in fields.index_lists if n != name)
            variants.append((name, {"index_lists": others, "lists": (*fields.lists, name)}))
    if fields.cadences:
        variants.append(("cadences", {"cadences": ()}))
    taken = {*fields.names(), *COUNTS}
    for name, value in text.items():
        if name not in taken and _is_count(value) and 0 < value <= layers and _may_be_place(name):
            variants.extend((name, {role: (*getattr(fields, role), name)}) for role in ("boundaries", "tails", "lasts"))
    for _, change in variants:
        yield replace(fields, **change)
    for (first, one), (second, two) in itertools.combinations(variants, 2):
        if first != second:
            yield replace(fields, **{r: _both(fields, r, one, two) for r in {*one, *two}})


def remapped(config: dict[str, Any], kept: Sequence[int], rule: LayerFields) -> dict[str, Any]:
    """A copy of `config` for the model whose layer j is the layer `kept[j]`, without what `to_dict()` adds.

    Raises:
        InputError: no value of some field describes the kept layers.
    """
    layers = layer_count(config, rule)
    if not kept or not all(0 <= i < layers for i in kept):
        raise InputError(f"layers to keep must be some of 0 … {layers - 1}, got {list(kept)}")
    new = copy.deepcopy(config)
    text = text_config(new, rule.path)
    for part, name in itertools.product((new, text), JUNK):
        part.pop(name, None)
    _spell_out(text, rule, layers)
    for name in COUNTS:
        if name == rule.count or (text.get(name) == layers and name in text):
            text[name] = len(kept)
    for name in _stated(text, rule.lists):
        text[name] = _sliced(text[name], kept)
    for name in _stated(text, rule.cycles):
        text[name] = _unrolled(text[name], kept, layers)
    for name in _stated(text, rule.index_lists):
        text[name] = [j for j, i in enumerate(kept) if i in set(text[name])]
    for name in _stated(text, rule.index_dicts):
        text[name] = _rekeyed(text[name], kept)
    for name in _stated(text, rule.boundaries):
        text[name] = _prefix(name, [i < text[name] for i in kept])
    for name in _stated(text, rule.lasts):
        # A negative index counts from the end, so it stays true.
        text[name] = text[name] if text[name] < 0 else _prefix(name, [i <= text[name] for i in kept]) - 1
    for name in _stated(text, rule.tails):
        start = layers - text[name]
        text[name] = len(kept) - _prefix(name, [i < start for i in kept])
    for name in _stated(text, rule.pointers):
        text[name] = _redirected(name, text[name], kept)
    for name in _stated(text, rule.depth_scales):
        text[name] *= math.sqrt(len(kept) / layers)
    for period, offset in rule.periods:
        text[period], text[offset] = _solved(period, [i % text[period] == text[offset] for i in kept])
    for name in rule.cadences:
        text.pop(name, None)
    return new


def _spell_out(text: dict[str, Any], rule: LayerFields, layers: int) -> None:
    """The list of dense layers takes the place of a sparse step, which no other list of the config holds."""
    step = text.get("decoder_sparse_step")
    if "decoder_sparse_step" in rule.cadences and "mlp_only_layers" in rule.index_lists and step:
        dense = set(text.get("mlp_only_layers") or ())
        text["mlp_only_layers"] = [i for i in range(layers) if i in dense or (i + 1) % step]


def _stated(text: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [n for n in names if text.get(n) is not None]


def _sliced(entries: Any, kept: Sequence[int]) -> Any:
    return "".join(entries[i] for i in kept) if isinstance(entries, str) else [entries[i] for i in kept]


def _redirected(name: str, sources: list[int], kept: Sequence[int]) -> list[int]:
    """For each kept layer the new index of the layer that it reads."""
    place = {i: j for j, i in enumerate(kept)}
    if lost := sorted({sources[i] for i in kept} - place.keys()):
        raise InputError(f"config field {name!r}: kept layers read from layers {lost}, which go")
    return [place[sources[i]] for i in kept]


def _unrolled(entries: list[Any], kept: Sequence[int], layers: int) -> list[Any]:
    """One entry for each kept layer, written once; pairs (list, times) become one pair."""
    if of_pairs := all(isinstance(e, list | tuple) for e in entries):
        entries = [kind for kinds, times in entries for _ in range(times) for kind in kinds]
    once = [entries[i % len(entries)] for i in range(layers)]
    return [[_sliced(once, kept), 1]] if of_pairs else _sliced(once, kept)


def _rekeyed(entries: dict[Any, Any], kept: Sequence[int]) -> dict[Any, Any]:
    """The entries of the kept layers, with keys written as before: a number, or text of a fixed width."""
    by_layer = {int(key): value for key, value in entries.items()}
    sample = next(iter(entries), 0)
    width = len(sample) if isinstance(sample, str) and sample.startswith("0") else 0

    def key(j: int) -> Any:
        return f"{j:0{width}d}" if isinstance(sample, str) else j

    return {key(j): copy.deepcopy(by_layer[i]) for j, i in enumerate(kept) if i in by_layer}


def _prefix(name: str, members: list[bool]) -> int:
    """How many of the kept layers are members, which all come first."""
    count = sum(members)
    if not all(members[:count]):
        raise InputError(f"config field {name!r} means the first layers; the order of the kept layers mixes them")
    return count


def _solved(name: str, members: list[bool]) -> tuple[int, int]:
    """The least (period, offset) that is true of exactly the members."""
    layers = len(members)
    for period in range(1, layers + 1):
        for offset in range(period):
            if [j % period == offset for j in range(layers)] == members:
                return period, offset
    if not any(members):
        return layers + 1, layers
    raise InputError(f"config field {name!r} cannot describe the kept layers: they follow no period")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_indices(value: Any, layers: int) -> bool:
    """Whether `value` is an increasing list of layer indices, with at least one."""
    if not isinstance(value, list | tuple) or not value or not all(_is_count(v) for v in value):
        return False
    return value[0] >= 0 and value[-1] < layers and all(a < b for a, b in itertools.pairwise(value))


def _has_layer_keys(value: dict[Any, Any], layers: int) -> bool:
    return bool(value) and all(re.fullmatch(r"\d+", str(key)) and int(key) < layers for key in value)


def _may_be_place(name: str) -> bool:
    return bool(_PLACES.fullmatch(name)) and not _NOT_PLACES.fullmatch(name)


def _both(fields: LayerFields, role: str, one: dict[str, Any], two: dict[str, Any]) -> Any:
    """The value of `role` after two changes: additions of both, or what both leave."""
    before, values = getattr(fields, role), [change[role] for change in (one, two) if role in change]
    if len(values) == 1:
        return values[0]
    if all(len(v) > len(before) for v in values):
        return (*values[0], *(n for n in values[1] if n not in before))
    return tuple(n for n in values[0] if n in values[1])
