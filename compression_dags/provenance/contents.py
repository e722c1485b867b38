"""Which files of a checkpoint directory decide what it computes, and their digests without facts of a machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

_NAMED = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
}
_SUFFIXES = {".safetensors", ".model", ".tiktoken"}
_TEMPLATES = "additional_chat_templates"
#: Files in which libraries leave notes about the machine or program that saved them.
_NOTED = {"config.json", "generation_config.json", "tokenizer_config.json"}
MACHINE_FACTS = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")


def computes(name: str) -> bool:
    """Whether a file decides what the model computes: weights, config, tokenizer, generation config, chat template.

    Args:
        name: path relative to the checkpoint directory. Model cards, licences and notes of any other name are not.
    """
    path = PurePosixPath(name)
    return path.name in _NAMED or path.suffix in _SUFFIXES or path.parent.name == _TEMPLATES


def without_machine_facts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config without where it was loaded from and which library version wrote it."""
    return {key: value for key, value in fields.items() if key not in MACHINE_FACTS}


def computed_digest(path: Path, sha256: str) -> str:
    """The file's sha256, or for a config that of its fields without machine facts, in canonical form.

    Args:
        sha256: of the bytes as they are.
    """
    if path.name not in _NOTED:
        return sha256
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return sha256
    if not isinstance(fields, dict):
        return sha256
    return hashlib.sha256(json.dumps(without_machine_facts(fields), sort_keys=True).encode()).hexdigest()
