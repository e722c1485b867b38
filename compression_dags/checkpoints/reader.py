"""A checkpoint directory, read lazily: headers first, tensors one at a time, no pickle anywhere."""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.architectures import Architecture, StackFacts, architecture_of
from compression_dags.checkpoints.contents import without_machine_facts
from compression_dags.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, known from the file's header alone."""

    name: str
    file: str
    dtype: str  # safetensors' name: F16, BF16, F32, I32, F8_E4M3, …
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file.

    Raises:
        InputError: the file is truncated or its header is not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise InputError(f"{path.name} is not a whole safetensors file: {size} bytes, header says {length}")
        try:
            header = json.loads(handle.read(length))
            infos = {n: _tensor_info(n, path.name, e) for n, e in header.items() if n != "__metadata__"}
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise InputError(f"{path.name} has an unreadable safetensors header: {error}") from None
    expected = 8 + length + sum(info.nbytes for info in infos.values())
    if expected != size:
        raise InputError(f"{path.name} is truncated or padded: {size} bytes on disk, {expected} by its header")
    return infos


def _tensor_info(name: str, file: str, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), end - start)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: it is not JSON, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


class Checkpoint:
    """A directory with `config.json` and safetensors weights.

    Raises:
        InputError: no config, no safetensors, an index that names missing files or tensors, a truncated file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise InputError(f"{self.path} is not a model directory: it has no config.json")
        self.raw_config = read_object(self.path / "config.json")

    @functools.cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """Tensor → file as the index states it; None without an index."""
        if not (self.path / INDEX).is_file():
            return None
        listed = read_object(self.path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise InputError(f"{self.path / INDEX} has no weight_map from tensor names to files")
        return listed

    @functools.cached_property
    def files(self) -> list[str]:
        if self._weight_map is not None:
            return sorted(set(self._weight_map.values()))
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        others = sorted(p.name for p in self.path.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        found = f"; found {', '.join(others)}" if others else ""
        raise InputError(f"{self.path} holds no safetensors weights (only {SINGLE} or {INDEX} are read){found}")

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, by name, in file order."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            if not (self.path / file).is_file():
                raise InputError(f"{self.path / INDEX} names {file}, which is missing")
            found.update(read_header(self.path / file))
        if self._weight_map is not None and (odd := sorted(self._weight_map.keys() ^ found.keys())):
            raise InputError(f"{self.path / INDEX} and its files disagree about {', '.join(odd[:3])}")
        return found

    @functools.cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.raw_config)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config with the defaults that transformers fills in (`layer_types`, `head_dim`, …)."""
        from transformers import AutoConfig

        filled = AutoConfig.from_pretrained(self.path).to_dict()
        return without_machine_facts({**filled, **{k: v for k, v in self.raw_config.items() if v is not None}})

    @property
    def facts(self) -> StackFacts:
        return StackFacts(self.architecture, self.config, self.tensors)

    @property
    def stated_facts(self) -> StackFacts:
        """The same from `config.json` as it stands, without importing transformers: enough for checks before a run."""
        return StackFacts(self.architecture, self.raw_config, self.tensors)

    @property
    def num_layers(self) -> int:
        return int(self.raw_config["num_hidden_layers"])

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.path / file).stat().st_size for file in self.files)

    @property
    def numel(self) -> int:
        """Stored parameters; a tied matrix counts once because it is stored once."""
        return sum(info.numel for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, on the CPU."""
        return self._open(self.tensors[name].file).get_tensor(name)

    def layer(self, index: int) -> dict[str, str]:
        """Local name → full name of the tensors of one layer."""
        prefix = self.architecture.layer_prefix(index)
        return {name[len(prefix) :]: name for name in self.tensors if name.startswith(prefix)}

    def outside_layers(self) -> list[str]:
        return [name for name in self.tensors if self.architecture.split_name(name)[0] is None]

    def companions(self) -> Iterator[Path]:
        """Files that travel with the weights: tokenizer, generation config, chat template, licence."""
        own = {"config.json", INDEX, "README.md", "compression.json", "manifest.json", "decisions.parquet"}
        for path in sorted(self.path.iterdir()):
            weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}
            if path.is_file() and path.name not in own and not weights and not path.name.startswith("."):
                yield path

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a checkpoint lives as long as its stage)
    def _open(self, file: str):
        from safetensors import safe_open

        return safe_open(self.path / file, framework="pt")
