"""A decoder run layer by layer: the layer (and the next, prefetched) is on the device, the rest stays on disk.

Hidden states of the whole calibration set flow through one layer at a time, so a model needs device memory for two of
its layers only. A small model keeps its layers resident; the arithmetic is the same either way.

Every layer is called with the keyword arguments that the real model gave it (masks and rotary embeddings differ by
layer type). They are captured once by running the model with pass-through layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig

from compression_dags.architectures.tracing import auto_class
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.conversion import Conversion
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.kernels.fused_layer import fuse

#: Tokens in one forward of one layer; large enough to fill the device, small enough for its activations.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}


@dataclass
class Batch:
    """Some rows of the calibration set on their way through the decoder.

    Attributes:
        rows: indices of the rows, in order.
        ids: (b, T) int64 on the CPU.
        mask: (b, T) bool, False at padding.
        hidden: (b, T, hidden) state at the entry of the next layer.
        kwargs: for each layer, the keyword arguments the model calls it with.
    """

    rows: range
    ids: Tensor
    mask: Tensor
    hidden: Tensor
    kwargs: list[dict[str, Any]] = field(repr=False)

    def rows_from(self, first: int) -> Batch | None:
        """The part of the batch whose row index is at least `first`, or None."""
        skip = max(0, first - self.rows.start)
        if skip >= len(self.rows):
            return None
        kwargs = [{k: self._tail(k, v, skip) for k, v in layer.items()} for layer in self.kwargs]
        return Batch(self.rows[skip:], self.ids[skip:], self.mask[skip:], self.hidden[skip:], kwargs)

    def _tail(self, name: str, value: Any, skip: int) -> Any:
        rows = len(self.rows)
        each = value.shape[0] // rows if name == "alibi" and isinstance(value, Tensor) else 1  # rows times heads
        return _tail(value, skip * each, rows * each)

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())


def _tail(value: Any, skip: int, rows: int) -> Any:
    """Drop the first rows of a keyword argument that has one entry a row (a padding mask, positions)."""
    if isinstance(value, tuple):
        return tuple(_tail(v, skip, rows) for v in value)
    return value[skip:] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows > 1 else value


def output_of(result: Any) -> Tensor:
    """The hidden state of a layer's result: transformers 5 returns a tensor, older ones a tuple."""
    return result[0] if isinstance(result, (tuple, list)) else result


class DecoderStream:
    """One checkpoint's decoder, run layer by layer.

    Args:
        checkpoint: a dense (not quantized) checkpoint.
        device, dtype: where and in what to compute; float32 on the CPU, bfloat16 on a GPU.
        resident: keep all layers on the device. None decides by size: at most half of the device's free memory.
        batch_size: rows a forward; None fits `TOKENS_PER_BATCH`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        resident: bool | None = None,
        batch_size: int | None = None,
    ):
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self.resident = self._fits() if resident is None else resident
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="layer-prefetch")
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pending: dict[int, Future[dict[str, Tensor]]] = {}
        self._loaded: set[int] = set()
        self.shell = self._empty_shell()
        self._conversion = Conversion(self.shell)
        if self._copies:
            self.prefetch(0)  # while the tensors around the layers are loaded
        self._fill_shell()
        self.stack = self.shell.get_submodule(checkpoint.architecture.stack)
        self.layers: Any = self.shell.get_submodule(checkpoint.architecture.modules)

    @property
    def num_layers(self) -> int:
        return self.checkpoint.num_layers

    # -- building ---------------------------------------------------------------------------------------------------

    def _fits(self) -> bool:
        need = self.checkpoint.numel * self.dtype.itemsize
        if self.device.type == "cuda":
            return need < torch.cuda.mem_get_info(self.device)[0] / 2

        return need < psutil.virtual_memory().available / 2

    def _empty_shell(self) -> nn.Module:
        """The model on the meta device; buffers (rotary frequencies, position offsets) are built for real."""
        config = AutoConfig.from_pretrained(self.checkpoint.path)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            return auto_class(config).from_config(config, dtype=self.dtype)

    def _fill_shell(self) -> None:
        """Put everything but the decoder layers on the device; layers stay on the meta device."""
        shell: Any = self.shell
        outside = {name: self.checkpoint.tensor(name) for name in self.checkpoint.outside_layers()}
        state = {name: self._to_device(tensor) for name, tensor in self._conversion.converted(outside).items()}
        shell.load_state_dict(state, strict=False, assign=True)
        shell.tie_weights()
        for module in shell.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(self.device))
        if self.device.type == "cuda":
            fuse(shell)
        shell.eval().requires_grad_(False)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.to(self.device, non_blocking=True).to(self.dtype)
        return tensor.to(self.dtype)

    # -- layers -----------------------------------------------------------------------------------------------------

    def in_memory(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of layer `index` that tensors on disk make; both by their names within the layer.

        Raises:
            ValueError: tensors that make a part of a parameter only.
        """
        prefix = self.checkpoint.architecture.layer_prefix(index)
        found = self._conversion.converted({prefix + local: tensor for local, tensor in tensors.items()})
        path = f"{self.checkpoint.architecture.modules}.{index}."
        return {name.removeprefix(path): tensor for name, tensor in found.items()}

    def unknown(self, index: int, names: Iterable[str]) -> list[str]:
        """Those names on disk, within layer `index`, that go into no parameter."""
        prefix = self.checkpoint.architecture.layer_prefix(index)
        full = {prefix + local: local for local in names}
        known = self._conversion.in_memory(full)
        return [local for name, local in full.items() if name not in known]

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        tensors = self.in_memory(
            index, {k: self.checkpoint.tensor(name) for k, name in self.checkpoint.layer(index).items()}
        )
        if self._copies is None:
            return tensors
        with torch.cuda.stream(self._copies):  # beside the layer that is computed now
            moved = {k: self._to_device(t.pin_memory()) for k, t in tensors.items()}
        self._copies.synchronize()
        return moved

    def _here(self, tensor: Tensor) -> Tensor:
        """A prefetched tensor for the stream that computes: its memory must not be used again before that is done."""
        if self._copies is None:
            return self._to_device(tensor)
        tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def prefetch(self, index: int) -> None:
        """Start reading a layer from disk in the background; on a GPU it is copied there too."""
        if index < self.num_layers and index not in self._loaded and index not in self._pending:
            self._pending[index] = self._loader.submit(self._read_layer, index)

    @contextmanager
    def layer(self, index: int, prefetch: int | None = None) -> Iterator[nn.Module]:
        """Layer `index` on the device; `prefetch` names the layer wanted next (default: the following one)."""
        module = self.layers[index]
        if index not in self._loaded:
            self.prefetch(index)
            tensors = {k: self._here(t) for k, t in self._pending.pop(index).result().items()}
            module.load_state_dict(tensors, assign=True)
            module.requires_grad_(False)
            self._loaded.add(index)
        self.prefetch(index + 1 if prefetch is None else prefetch)
        try:
            yield module
        finally:
            if not self.resident:
                module.to("meta")
                self._loaded.discard(index)

    def release(self, indices: Iterable[int]) -> None:
        """Take layers off the device that will hardly be asked for again."""
        for index in self._loaded & set(indices):
            self.layers[index].to("meta")
            self._loaded.discard(index)

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    # -- running ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def batches(self, blocks: TokenBlocks) -> list[Batch]:
        """The calibration set at the entry of layer 0, with every layer's keyword arguments."""
        rows, length = blocks.ids.shape
        size = self.batch_size or max(1, TOKENS_PER_BATCH[self.device.type] // length)
        shared: dict[int, list[dict[str, Any]]] = {}
        found = []
        for start in range(0, rows, size):
            chosen = range(start, min(start + size, rows))
            ids = torch.from_numpy(blocks.ids[start : chosen.stop]).long()
            mask = torch.arange(length)[None, :] < torch.from_numpy(blocks.lengths[start : chosen.stop])[:, None]
            batch = Batch(chosen, ids, mask, *self.enter(ids, mask))
            if not batch.padded:  # the same for all unpadded batches of one size
                batch.kwargs = shared.setdefault(len(chosen), batch.kwargs)
            found.append(batch)
        return found

    @torch.inference_mode()
    def enter(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """State (b, T, hidden) at the entry of layer 0, and every layer's keyword arguments."""
        captured: list[tuple[Tensor, dict[str, Any]]] = []

        def pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            layer = self.layers[len(captured)]
            captured.append((hidden_states, {**dict(zip(positional(layer), args, strict=False)), **kwargs}))
            return self._as_returned(hidden_states)

        with replaced_layers(self.layers, pass_through):
            attention_mask = None if bool(mask.all()) else mask.long().to(self.device)
            self.stack(input_ids=ids.to(self.device), attention_mask=attention_mask, use_cache=False)
        return captured[0][0], [kwargs for _, kwargs in captured]

    def _as_returned(self, hidden: Tensor) -> Any:
        """An output in the form in which this family's layers return it."""
        count = self.checkpoint.architecture.returned
        return (hidden, *[None] * (count - 1)) if count else hidden

    def apply(self, module: nn.Module, index: int, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Output (b, T, hidden) of layer `index` on the batch's hidden states (or on `hidden`)."""
        return output_of(module(batch.hidden if hidden is None else hidden, **batch.kwargs[index]))

    @torch.inference_mode()
    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, by the model's own tail (final norm, projections, soft caps)."""
        return self._tail(self.shell, batch, hidden).logits

    @torch.inference_mode()
    def last_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Final hidden states after the model's final norm, as transformers returns them: (b, T, hidden)."""
        return self._tail(self.stack, batch, hidden).last_hidden_state

    def _tail(self, module: Any, batch: Batch, hidden: Tensor) -> Any:
        with replaced_layers(self.layers, lambda *args, **kwargs: self._as_returned(hidden)):
            mask = batch.mask.long().to(self.device) if batch.padded else None
            return module(input_ids=batch.ids.to(self.device), attention_mask=mask, use_cache=False)


def positional(layer: nn.Module) -> list[str]:
    """Names of a layer's arguments after its input, which some families give by place."""
    return list(inspect.signature(type(layer).forward).parameters)[2:]


@contextmanager
def replaced_layers(layers: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer does `forward` instead of its own: the model around the layers can then run without them."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
