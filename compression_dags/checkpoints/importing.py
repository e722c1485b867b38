"""The only door for base models: everything is checked, then copied; what comes out is a stock checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression_dags.architectures import ModelShape
from compression_dags.architectures.described import kinds_text, to_json
from compression_dags.checkpoints.copying import FilePlan, copy_weights, equal_bytes, stamp
from compression_dags.checkpoints.gate import quiet
from compression_dags.checkpoints.headers import is_file, one_line, read_object
from compression_dags.checkpoints.layout import (
    FLOATS,
    buffers,
    check_family,
    check_layers,
    check_shapes,
    embedding,
    tied,
)
from compression_dags.checkpoints.licence import read_licence
from compression_dags.checkpoints.model_files import (
    GENERATION,
    STATED,
    TOKENIZERS,
    check_entries,
    computed_files,
    describing_files,
)
from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint, description_file
from compression_dags.checkpoints.stated_config import (
    check_code,
    check_config,
    left_out,
    stock_config,
    without_attributes,
)
from compression_dags.checkpoints.stock_check import check_stock_load
from compression_dags.checkpoints.tokenizer_check import check_tokenizer
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import file_digest
from compression_dags.provenance.contents import computed_digest
from compression_dags.stage import Progress, silent

#: Tokens of a row for models that state no limit, such as state-space models.
UNSTATED_CONTEXT = 8192


@dataclass(frozen=True)
class ImportedModel:
    """A base model that passed every check.

    Attributes:
        path: the directory that now holds it.
        metadata: architecture, layers, parameters, bytes, hidden, vocab, context, dtype, revision, licence,
            tied_embeddings, files (name → sha256), notes, origin. JSON values; nothing in them depends on the slug.
        digests: name → sha256 of every file in `path`.
        computed: names of those files that computing depends on, sorted.
        stamps: name → what changes when the source's file does, of every source file that computing depends on.
    """

    path: Path
    metadata: dict[str, Any]
    digests: dict[str, str]
    computed: list[str]
    stamps: dict[str, list[int]]

    @property
    def identity(self) -> dict[str, str]:
        """Name → digest of the files that computing depends on, without facts of a machine."""
        return {name: computed_digest(self.path / name, self.digests[name]) for name in self.computed}


@dataclass(frozen=True)
class Plan:
    """What will be copied, known from headers and small files.

    Attributes:
        checkpoint: the source.
        rewritten: name → text of files that are not copied as they are.
        dropped: tensors that are left behind.
        notes: what is left out and why, one sentence each.
        stamps: see `ImportedModel`; taken before anything was read.
    """

    checkpoint: Checkpoint
    rewritten: dict[str, str]
    dropped: frozenset[str]
    notes: list[str] = field(default_factory=list)
    stamps: dict[str, list[int]] = field(default_factory=dict)


def import_checkpoint(
    source: Path,
    directory: Path,
    *,
    revision: str | None,
    origin: str,
    licence: str | None = None,
    progress: Progress = silent,
) -> ImportedModel:
    """The model of `source`, checked and copied into `directory`; its weights are read once.

    Args:
        source: a directory with config.json, safetensors weights and a tokenizer.
        directory: new; it is removed again when a check fails.
        revision: commit of the source, if it has one.
        origin: what the model is called in reports, such as a hub id.
        licence: overrides what README.md or a licence file states.

    Raises:
        InputError: naming the first thing that is wrong, its value and what is allowed.
        OSError: `directory` cannot be written.
    """
    plan = check_headers(source)
    directory.mkdir(parents=True)
    try:
        digests, notes = _copy(plan, directory, progress)
        if plan.checkpoint.architecture.kinds:
            description_file(directory).write_text(to_json(plan.checkpoint.architecture), encoding="utf-8")
        check_stock_load(Checkpoint(directory), source)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    found, ignored = (licence, None) if licence else read_licence(source)
    stated = {"revision": revision, "origin": origin, "licence": found, "notes": [*notes, *filter(None, [ignored])]}
    computed = sorted(plan.stamps.keys() & digests.keys())
    metadata = {**describe(Checkpoint(directory)), **stated, "files": digests}
    return ImportedModel(directory, metadata, digests, computed, plan.stamps)


def check_headers(source: Path) -> Plan:
    """What will be copied, after every check that needs no tensor: entries, configs, index, headers, names and shapes.

    Raises:
        InputError: see `import_checkpoint`.
    """
    check_entries(source)
    checkpoint = Checkpoint(source, described=False)
    rewritten, notes = _check_texts(checkpoint)
    _check_config(checkpoint, rewritten, notes)
    dropped = _dropped(checkpoint, notes)
    stamps = {path.name: stamp(path) for path in computed_files(checkpoint)}
    return Plan(checkpoint, rewritten, dropped, notes, stamps)


def stamps_of(source: Path) -> dict[str, list[int]]:
    """Name → stamp of the files that computing depends on, as `ImportedModel` has them; reads only small files.

    Raises:
        InputError: no model, or a file that its index names is missing.
    """
    try:
        return {path.name: stamp(path) for path in computed_files(Checkpoint(source))}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None


def import_files(checkpoint: Checkpoint) -> list[Path]:
    """What an import copies: config, weights, tokenizer, generation config, card, licence. No code, no pickles."""
    return sorted({*computed_files(checkpoint), *describing_files(checkpoint.path)})


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts that follow from config and headers alone."""
    config = checkpoint.text_config
    stored = Counter[str]()
    for info in checkpoint.tensors.values():
        stored[info.dtype] += info.nbytes
    kinds = {"kinds_of_layers": kinds_text(checkpoint.architecture)} if checkpoint.architecture.kinds else {}
    return {
        "architecture": checkpoint.architecture.model_type,
        **kinds,
        "layers": checkpoint.num_layers,
        "parameters": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "hidden": int(config["hidden_size"]),
        "vocab": int(config["vocab_size"]),
        "context": int(config.get("max_position_embeddings") or UNSTATED_CONTEXT),
        "dtype": FLOATS[stored.most_common(1)[0][0]],
        "tied_embeddings": tied(checkpoint)
        if checkpoint.architecture.kinds
        else bool(config.get("tie_word_embeddings", False)),
    }


def _check_texts(checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """(name → new text of the JSON files that hold more than a model needs, notes on what is left out)."""
    path, rewritten, notes = checkpoint.path, {}, []
    for name in ("config.json", *STATED):
        if not is_file(path / name):
            continue
        stated = read_object(path / name)
        if name in ("vocab.json", "added_tokens.json"):
            continue  # their keys are tokens
        check_code(stated, path / name)
        kept, names = left_out(stated)
        if kept != stated:
            rewritten[name] = _text(kept)
        if names:
            notes.append(_left_out(name, names))
    return rewritten, notes


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _left_out(name: str, fields: Iterable[str]) -> str:
    listed = ", ".join(field[:60] for field in fields)
    return f"{name}: left out {listed} (steers how a model is loaded, or names a machine's path)"


def _check_config(checkpoint: Checkpoint, rewritten: dict[str, str], notes: list[str]) -> None:
    """An architecture we know, whole weights of the shapes that config.json states."""
    path = checkpoint.path
    check_config(checkpoint.raw_config, path / "config.json")
    check_family(checkpoint)  # before the config is handed to transformers
    if is_file(path / SINGLE) and is_file(path / INDEX):
        raise InputError(f"{path} holds both {SINGLE} and {INDEX}, and loaders choose differently; remove one")
    if not any(is_file(path / name) for name in TOKENIZERS):
        # Checked by file: without one, transformers may build an empty tokenizer for the model's family.
        raise InputError(f"{path} has no tokenizer: one of {', '.join(TOKENIZERS)} must lie beside the weights")
    check_layers(checkpoint)  # reads the headers: every file whole, index and headers agree
    filled = _filled(checkpoint, rewritten, notes)
    if checkpoint.architecture.kinds:
        check_shapes(checkpoint, checkpoint.shape)
        return
    check_config(filled, path / "config.json")
    check_shapes(checkpoint, ModelShape(checkpoint.architecture, filled))


def _filled(checkpoint: Checkpoint, rewritten: dict[str, str], notes: list[str]) -> dict[str, Any]:
    """The config as it will be copied, with the defaults of transformers' class.

    Raises:
        InputError: transformers refuses it.
    """
    # the code location loads this module without transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    kept, _ = left_out(checkpoint.raw_config)
    stated, names = without_attributes(kept, CONFIG_MAPPING[checkpoint.raw_config["model_type"]])
    if names:
        rewritten["config.json"] = _text(stated)
        notes.append(_left_out("config.json", names))
    filled = stock_config(checkpoint.raw_config, checkpoint.path / "config.json").to_dict()
    return {**filled, **{k: v for k, v in stated.items() if v is not None}}


def _dropped(checkpoint: Checkpoint, notes: list[str]) -> frozenset[str]:
    """Tensors that are no weights of their own: tables of the code, a head that is the embedding.

    Raises:
        InputError: config.json and the weights disagree about the head.
    """
    dropped = buffers(checkpoint)
    if dropped:
        notes.append(f"{len(dropped)} stored buffers are left out, they are computed: {dropped[0]}, …")
    if checkpoint.architecture.kinds:
        return frozenset(dropped)  # what a discovered family's loader does with a head, it does with the copy's
    table, head = embedding(checkpoint), checkpoint.tensors.get("lm_head.weight")
    path, stated = checkpoint.path, "true" if tied(checkpoint) else "false"
    if tied(checkpoint) and head is not None:
        if not equal_bytes((path / table.file, table), (path / head.file, head)):
            raise InputError(
                f"{path}: lm_head.weight differs from the embedding, but tie_word_embeddings is {stated}; "
                "set it to false, or remove the head"
            )
        notes.append("lm_head.weight is left out: it equals the embedding, to which it is tied")
        dropped.append(head.name)
    if not tied(checkpoint) and head is None:
        raise InputError(
            f"{path}: there is no lm_head.weight, but tie_word_embeddings is {stated}; set it to true, or add the head"
        )
    if head is not None and head.shape != table.shape:
        raise InputError(f"{path}: lm_head.weight is {head.shape}, the embedding {table.shape}; they must agree")
    return frozenset(dropped)


def _copy(plan: Plan, directory: Path, progress: Progress) -> tuple[dict[str, str], list[str]]:
    """(name → sha256 of every file written, notes). Small files and the tokenizer come first: they fail cheaply."""
    source, weights = plan.checkpoint.path, set(plan.checkpoint.files)
    for path in import_files(plan.checkpoint):
        if path.name not in weights:
            _copy_small(path, directory / path.name, plan.rewritten.get(path.name))
    if plan.dropped and INDEX in {p.name for p in directory.iterdir()}:
        (directory / INDEX).write_text(_new_index(plan), encoding="utf-8")
    notes = [*plan.notes, *check_tokenizer(directory, source, embedding(plan.checkpoint).shape[0])]
    _check_generation(directory, source)
    tensors = plan.checkpoint.tensors
    copies = [
        FilePlan(source / file, frozenset(n for n in plan.dropped if tensors[n].file == file))
        for file in plan.checkpoint.files
        if any(info.file == file and info.name not in plan.dropped for info in tensors.values())
    ]
    hashed = copy_weights(copies, directory, progress)
    if any(stamp(source / name) != seen for name, seen in plan.stamps.items()):
        raise InputError(f"{source} changed while it was read; import it again when it is complete")
    small = {p.name: file_digest(p) for p in directory.iterdir() if p.name not in hashed}
    return dict(sorted({**hashed, **small}.items())), notes


def _copy_small(source: Path, target: Path, text: str | None) -> None:
    try:
        data = source.read_bytes() if text is None else text.encode()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}") from None
    target.write_bytes(data)


def _new_index(plan: Plan) -> str:
    kept = {name: info for name, info in plan.checkpoint.tensors.items() if name not in plan.dropped}
    total = sum(info.nbytes for info in kept.values())
    weight_map = {name: kept[name].file for name in sorted(kept)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _check_generation(directory: Path, source: Path) -> None:
    """transformers ignores a generation config that is no JSON, and fails late on one that is no generation config."""
    if not is_file(directory / GENERATION):
        return
    # the code location loads this module without transformers
    from transformers import GenerationConfig  # noqa: PLC0415

    try:
        with quiet():
            GenerationConfig.from_pretrained(directory).validate()
    except Exception as error:  # its validators raise many types
        raise InputError(f"{source / GENERATION} is refused by transformers: {one_line(error)}") from None
