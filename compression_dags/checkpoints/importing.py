"""The only door for base models: everything is checked, then copied; what comes out is a stock checkpoint."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint, read_object
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.artifacts import file_digest
from compression_dags.stages import Track, silent

if TYPE_CHECKING:
    import torch

#: Weights above this are not loaded whole; headers, values and tokenizer are checked at any size.
STOCK_LOAD_LIMIT = 8 * 10**9
_TINY = 64 * 10**6
#: One of them must lie beside the weights.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_COMPANIONS = {".json", ".jinja", ".model", ".txt"}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)", re.IGNORECASE)


@dataclass(frozen=True)
class ImportedModel:
    """A base model that passed every check.

    Attributes:
        path: the directory that now holds it.
        facts: architecture, layers, parameters, bytes, hidden, vocab, context, dtype, revision, licence,
            tied_embeddings, files (name → sha256), origin. JSON values; nothing in them depends on the slug.
    """

    path: Path
    facts: dict[str, Any]


def import_checkpoint(
    source: Path,
    directory: Path,
    *,
    revision: str | None,
    origin: str,
    licence: str | None = None,
    track: Track = silent,
) -> ImportedModel:
    """Check the model in `source`, then copy it into `directory`, weights as they are.

    Args:
        source: a directory with config.json, safetensors weights and a tokenizer.
        directory: created; nothing is written there unless every check passes.
        revision: commit of the source, if it has one.
        origin: what the model is called in reports, such as a hub id.
        licence: overrides what README.md or a licence file states.

    Raises:
        InputError: naming the first thing that is wrong, its value and what is allowed.
    """
    checkpoint = Checkpoint(source)
    validate(checkpoint, track)
    files = import_files(checkpoint)
    directory.mkdir(parents=True, exist_ok=True)
    for path in track(files, "copying the base model", len(files)):
        shutil.copyfile(path, directory / path.name)
    digests = {path.name: file_digest(directory / path.name) for path in files}
    stated = {"revision": revision, "origin": origin, "licence": licence or stated_licence(source)}
    return ImportedModel(directory, {**describe(Checkpoint(directory)), **stated, "files": digests})


def validate(checkpoint: Checkpoint, track: Track = silent) -> None:
    """Every check, cheapest first; reads all weights once and writes nothing.

    Raises:
        InputError: see `import_checkpoint`.
    """
    _check_config(checkpoint)
    _check_layers(checkpoint)
    _check_tokenizer(checkpoint)
    _check_finite(checkpoint, track)
    _check_stock_load(checkpoint)


def import_files(checkpoint: Checkpoint) -> list[Path]:
    """What an import copies: config, weights, tokenizer, generation config, card, licence. No code, no pickles."""
    index = [INDEX] if (checkpoint.path / INDEX).is_file() else []
    card = ["README.md"] if (checkpoint.path / "README.md").is_file() else []
    named = [checkpoint.path / name for name in ("config.json", *checkpoint.files, *index, *card)]
    others = [p for p in checkpoint.companions() if p.suffix in _COMPANIONS or _LEGAL.match(p.name)]
    return sorted({*named, *others})


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts that follow from config and headers alone."""
    config = checkpoint.config
    stored = Counter[str]()
    for info in checkpoint.tensors.values():
        stored[info.dtype] += info.nbytes
    dtype = stored.most_common(1)[0][0]
    return {
        "architecture": checkpoint.architecture.model_type,
        "layers": checkpoint.num_layers,
        "parameters": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "hidden": int(config["hidden_size"]),
        "vocab": int(config["vocab_size"]),
        "context": int(config["max_position_embeddings"]),
        "dtype": _DTYPES.get(dtype, dtype.lower()),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def stated_licence(source: Path) -> str | None:
    """`license:` of README.md's front matter, else the name of a licence file, else None."""
    import yaml

    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        fields = None
    if isinstance(fields, dict):
        named = fields.get("license_name") if fields.get("license") == "other" else None
        if stated := named or fields.get("license"):
            return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    return next((p.name for p in sorted(source.iterdir()) if p.is_file() and _LEGAL.match(p.name)), None)


def _check_config(checkpoint: Checkpoint) -> None:
    """An architecture we know, whole weights, no remote code, not quantized before."""
    config, path = checkpoint.raw_config, checkpoint.path
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file() and read_object(path / name).get("auto_map"):
            raise InputError(f"{path / name} asks for remote code (auto_map); only stock architectures are imported")
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise InputError(f"{path} is quantized already ({kind}); give the model in float32, float16 or bfloat16")
    _ = checkpoint.architecture  # refuses unknown families before the config is handed to transformers
    if not isinstance(config.get("num_hidden_layers"), int):
        raise InputError(
            f"{path / 'config.json'}: num_hidden_layers is {config.get('num_hidden_layers')!r}, not a count"
        )
    if (path / SINGLE).is_file() and (path / INDEX).is_file():
        raise InputError(f"{path} holds both {SINGLE} and {INDEX}, and loaders choose differently; remove one")
    # Before any file is opened: an index must not reach outside its directory.
    outside = [file for file in checkpoint.files if Path(file).name != file]
    if outside:
        raise InputError(f"{path / INDEX} names {outside[0]!r}; weight files must lie beside the index")
    _ = checkpoint.tensors  # every file whole, index and headers agree
    try:
        _ = checkpoint.config
    except Exception as error:  # transformers' validators raise many types
        raise InputError(f"{path / 'config.json'} is refused by transformers: {_first_line(error)}") from None


def _check_layers(checkpoint: Checkpoint) -> None:
    """As many layers in the tensors as in the config, each with its projections, norms or experts."""
    architecture, config = checkpoint.architecture, checkpoint.config
    found = {i for i in (architecture.split_name(name)[0] for name in checkpoint.tensors) if i is not None}
    if found != set(range(checkpoint.num_layers)):
        where = f", numbered up to {max(found)}" if found else f" under {architecture.layers}"
        counted = f"config.json counts {checkpoint.num_layers} layers, the weights hold {len(found)}{where}"
        raise InputError(f"{checkpoint.path}: {counted}")
    for index in range(checkpoint.num_layers):
        local = checkpoint.layer(index)
        sparse = architecture.is_sparse_layer(config, index)
        wanted = [p for p in architecture.projections() if not (sparse and p.startswith("mlp."))]
        needed = [f"{name}.weight" for name in (*wanted, *architecture.norms)]
        if sparse and (experts := architecture.experts):
            needed += [f"{experts.disk_block}.experts.0.{name}.weight" for name in (experts.gate, experts.down)]
        if missing := [name for name in needed if name not in local]:
            raise InputError(
                f"{checkpoint.path}: layer {index} lacks {missing[0]}, which {architecture.model_type} needs"
            )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """A fast tokenizer loads, and it is this model's: its ids fit the embedding and nearly fill it."""
    from transformers import AutoTokenizer

    path, vocab = checkpoint.path, int(checkpoint.config["vocab_size"])
    # Checked by file: without one, transformers may build an empty tokenizer for the model's family.
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{path} has no tokenizer: one of {', '.join(TOKENIZERS)} must lie beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the tokenizer in {path} does not load: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {path} is a slow one ({type(tokenizer).__name__}); tokenizer.json is needed"
        )
    rows = _embedding_rows(checkpoint)
    if rows != vocab:
        raise InputError(f"{path}: the embedding has {rows} rows, config.json says vocab_size {vocab}")
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"{path}: the tokenizer's highest id is {highest}, the embedding has {rows} rows; not its own?"
        )
    if len(tokenizer) < 0.9 * rows:
        raise InputError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens for {rows} embedding rows (below 90 %); not its own?"
        )


def _embedding_rows(checkpoint: Checkpoint) -> int:
    name = f"{checkpoint.architecture.stack}.embed_tokens.weight"
    if name not in checkpoint.tensors:
        raise InputError(f"{checkpoint.path} has no tensor {name}")
    return checkpoint.tensors[name].shape[0]


def _check_finite(checkpoint: Checkpoint, track: Track) -> None:
    """No NaN, no Inf, in any floating tensor; reads one tensor at a time."""
    for name, info in track(checkpoint.tensors.items(), "checking tensors", len(checkpoint.tensors)):
        if not info.dtype.startswith(("F", "BF")):
            continue
        try:
            tensor = checkpoint.tensor(name)
        except Exception as error:  # SafetensorError: header and contents disagree
            raise InputError(f"{info.file}: tensor {name} cannot be read: {_first_line(error)}") from None
        if bad := _count_non_finite(tensor):
            raise InputError(f"{info.file}: tensor {name} holds {bad} non-finite values (NaN or Inf) of {info.numel}")


def _count_non_finite(tensor: torch.Tensor) -> int:
    import torch

    if tensor.element_size() == 1:  # float8 has no isfinite kernel
        tensor = tensor.to(torch.float32)
    finite = torch.isfinite(tensor)
    return 0 if bool(finite.all()) else int((~finite).sum())


def _check_stock_load(checkpoint: Checkpoint) -> None:
    """Stock transformers loads it with nothing missing, unexpected or of another shape."""
    from compression_dags.checkpoints.gate import load_stock

    if checkpoint.nbytes > STOCK_LOAD_LIMIT:
        return
    try:
        load_stock(checkpoint.path, dtype="float32" if checkpoint.nbytes <= _TINY else "auto")
    except IntegrityError as error:
        raise InputError(str(error)) from None
    except Exception as error:  # shape mismatches are RuntimeErrors, bad fields have types of their own
        raise InputError(f"{checkpoint.path} does not load in stock transformers: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
