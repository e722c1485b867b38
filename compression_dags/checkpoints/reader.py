"""A checkpoint directory, read lazily: headers first, tensors one at a time, no pickle anywhere."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from compression_dags.architectures import KNOWN, Architecture, ModelShape, architecture_of
from compression_dags.architectures.config_rules import merged, text_config
from compression_dags.architectures.described import from_json
from compression_dags.checkpoints.headers import TensorInfo, is_file, read_header, read_object
from compression_dags.checkpoints.stated_config import stock_config
from compression_dags.errors import InputError
from compression_dags.provenance.contents import without_machine_facts

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A directory with `config.json` and safetensors weights.

    Args:
        described: whether a description beside the directory may be read; not that of a stranger.

    Raises:
        InputError: no config, no safetensors, an index that names missing files or tensors, a truncated file.
    """

    def __init__(self, path: str | Path, *, described: bool = True):
        self.path, self.described = Path(path), described
        if not is_file(self.path / "config.json"):
            raise InputError(f"{self.path} is not a model directory: it has no config.json")
        self.raw_config = read_object(self.path / "config.json")

    @functools.cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """Tensor → file as the index states it; None without an index."""
        index = self.path / INDEX
        if not is_file(index):
            if os.path.lexists(index):
                raise InputError(f"{index} is not a file that can be read")
            return None
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise InputError(f"{index} has no weight_map from tensor names to files")
        # Before any file is opened: an index must not reach outside its directory.
        for file in sorted(set(listed.values())):
            if Path(file).name != file or "\0" in file:
                raise InputError(f"{index} names {file[:100]!r}; weight files must lie beside the index")
            if not file.endswith(".safetensors"):
                raise InputError(f"{index} names {file[:100]!r}; weight files are *.safetensors")
        return listed

    @functools.cached_property
    def files(self) -> list[str]:
        if self._weight_map is not None:
            return sorted(set(self._weight_map.values()))
        if is_file(self.path / SINGLE):
            return [SINGLE]
        others = sorted(p.name for p in self.path.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        found = f"; found {', '.join(others)}" if others else ""
        raise InputError(f"{self.path} holds no safetensors weights (only {SINGLE} or {INDEX} are read){found}")

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, by name, in file order."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            if not is_file(self.path / file):
                raise InputError(f"{self.path / INDEX} names {file}, which is missing")
            header = read_header(self.path / file)
            if twice := sorted(header.keys() & found.keys()):
                raise InputError(f"{self.path}: tensor {twice[0]} stands in {found[twice[0]].file} and in {file}")
            found.update(header)
        if (listed := self._weight_map) is not None:
            odd = sorted(listed.keys() ^ found.keys()) or [n for n, info in found.items() if listed[n] != info.file]
            if odd:
                raise InputError(f"{self.path / INDEX} and its files disagree about {', '.join(odd[:3])}")
        return found

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The description of the layers: of a written family, as kept beside the weights, or traced now.

        Raises:
            InputError: transformers has no such decoder, or it cannot be traced.
        """
        if not isinstance(family := self.raw_config.get("model_type"), str):
            raise InputError(f"{self.path / 'config.json'}: model_type is {family!r}, not a name")
        if family in KNOWN:
            return architecture_of(self.raw_config)
        if self.described and is_file(file := description_file(self.path)):
            with contextlib.suppress(InputError):  # written by another version: traced anew
                return from_json(file.read_text(encoding="utf-8"))
        # headers and stated configs are read without transformers
        from compression_dags.checkpoints.describing import described  # noqa: PLC0415

        return described(self._stated, self.config, {name: info.shape for name, info in self.tensors.items()})

    @functools.cached_property
    def _stated(self) -> Any:
        """transformers' config object; of a family that nobody wrote down, without what steers loading."""
        file = self.path / "config.json"
        if self.raw_config.get("model_type") not in KNOWN:
            return stock_config(self.raw_config, file)
        # headers and stated configs are read without transformers
        from transformers import AutoConfig  # noqa: PLC0415

        return AutoConfig.from_pretrained(self.path, local_files_only=True)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config with the defaults that transformers fills in (`layer_types`, `head_dim`, …)."""
        filled = self._stated.to_dict()
        if self.raw_config.get("model_type") not in KNOWN:
            return without_machine_facts(merged(filled, self.raw_config))
        return without_machine_facts({**filled, **{k: v for k, v in self.raw_config.items() if v is not None}})

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the layers, with sizes by the names that most configs give them."""
        architecture = self.architecture
        path = architecture.fields.path if architecture.fields else ()
        return {**text_config(self.config, path), **dict(architecture.sizes)}

    @property
    def shape(self) -> ModelShape:
        return ModelShape(self.architecture, self.text_config, self.tensors)

    @property
    def stated_shape(self) -> ModelShape:
        """The same from `config.json` as it stands, without importing transformers: enough for checks before a run."""
        architecture = self.architecture
        path = architecture.fields.path if architecture.fields else ()
        return ModelShape(
            architecture, {**text_config(self.raw_config, path), **dict(architecture.sizes)}, self.tensors
        )

    @property
    def num_layers(self) -> int:
        if self.raw_config.get("model_type") not in KNOWN:
            return len(self.architecture.kind_of)
        count = self.raw_config.get("num_hidden_layers")
        if type(count) is not int or count < 1:
            raise InputError(f"{self.path / 'config.json'}: num_hidden_layers is {str(count)[:60]}, not a count")
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files.

        Raises:
            InputError: one that the index names is missing.
        """
        try:
            return sum((self.path / file).stat().st_size for file in self.files)
        except OSError as error:
            missing = f"{error.filename} cannot be read: {error.strerror}"
            raise InputError(f"{missing}; {INDEX} names it" if self._weight_map else missing) from None

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
        return safe_open(self.path / file, framework="pt")


def description_file(path: Path) -> Path:
    """Where the description of a discovered model's layers lies: beside the checkpoint, which stays stock."""
    return path.with_name(f"{path.name}.architecture.json")
