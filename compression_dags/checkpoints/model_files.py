"""Which files of a directory are a model: what computing depends on, what only describes it, and what is refused."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from compression_dags.checkpoints.headers import is_file
from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint
from compression_dags.errors import InputError

#: One of them must lie beside the weights.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: Files from which a tokenizer and its chat template are built.
TOKENIZER_FILES = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
GENERATION = "generation_config.json"
#: JSON files that are read here before transformers reads them; tokenizer.json is left to the tokenizers library.
STATED = (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
          "vocab.json")  # fmt: skip
_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[\w.-]{0,60}", re.IGNORECASE)
_TEXTS = {"", ".md", ".txt", ".rst"}
_TEXT_LIMIT = 10_000_000
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def computed_files(checkpoint: Checkpoint) -> list[Path]:
    """What computing depends on: config, generation config, weights, index, tokenizer and chat template; sorted."""
    path = checkpoint.path
    named = ["config.json", *checkpoint.files, *(n for n in (INDEX, GENERATION, *TOKENIZER_FILES) if is_file(path / n))]
    return sorted({path / name for name in named})


def describing_files(path: Path) -> list[Path]:
    """README.md and licence texts, sorted; a file above 10 MB is none."""
    names = [entry.name for entry in _entries(path) if entry.name == "README.md" or is_legal(entry.name)]
    return [p for p in sorted(path / name for name in names) if is_file(p) and p.stat().st_size <= _TEXT_LIMIT]


def is_legal(name: str) -> bool:
    return bool(_LEGAL.fullmatch(name)) and Path(name).suffix.lower() in _TEXTS


def check_entries(path: Path) -> None:
    """Refuse what must not be read: links that leave the directory, pipes and devices, adapters.

    Hidden entries are never read, so they are not looked at. The links of a hub cache to its own blobs are allowed.

    Raises:
        InputError: naming the entry.
    """
    known = {"config.json", INDEX, SINGLE, "README.md", GENERATION, *TOKENIZER_FILES}
    for entry in _entries(path):
        if entry.name in _ADAPTERS:
            raise InputError(f"{path} is, or holds, an adapter ({entry.name}); merge it into its base model first")
        if entry.is_symlink():
            _check_link(path, entry.name)
        mode = _mode(path / entry.name)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path / entry.name} is a pipe, socket or device, not a file")
        if entry.name in known and not stat.S_ISREG(mode):
            raise InputError(f"{path / entry.name} is a directory, not a file")


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_link(directory: Path, name: str) -> None:
    link = directory / name
    try:
        target = Path(os.path.realpath(link, strict=True))
    except OSError as error:
        raise InputError(f"{link} is a link that leads nowhere ({error.strerror or error})") from None
    home = Path(os.path.realpath(directory))
    if target.is_relative_to(home) or (target.is_file() and _is_blob(home, target)):
        return
    raise InputError(f"{link} is a link to {target}, outside the model's directory; put the file itself there")


def _is_blob(snapshot: Path, target: Path) -> bool:
    """Whether `target` is a blob of the hub cache that `snapshot` belongs to.

    Layout: `<cache>/models--org--name/{snapshots/<commit>,blobs/<hash>}`, or a blob shared by all repositories of the
    cache, `<cache>/blobs/<2 hex>/<64 hex>`.
    """
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if target.parent == repository / "blobs":
        return bool(re.fullmatch(r"[0-9a-f]{40,64}", target.name))
    shared = repository.parent / "blobs"
    return target.parent == shared / target.name[:2] and bool(re.fullmatch(r"[0-9a-f]{64}", target.name))
