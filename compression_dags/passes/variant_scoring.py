"""Next-token loss of variants of a model that share most of their layers, from the states of the shared prefix.

SLEB, LaCo and CoMe-P score every candidate with a full forward. Here one pass over the layers serves all candidates of
a round: the unchanged model's states go along, a candidate leaves them where its edit begins, and runs alone from
there. Removing layer j costs L − j layer-forwards instead of L, and each layer's weights are loaded once a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import loss_sum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compression_dags.calibration.streaming import DecoderStream

V = TypeVar("V")
#: Share of the device's free memory that the candidates of one pass may take.
MEMORY_SHARE = {"cuda": 0.4, "cpu": 0.25}


@dataclass(frozen=True)
class Piece:
    """One layer of a student: the base model's layer `slot`, with some of its parameters replaced.

    `tensors` are by local name as on disk (`mlp.down_proj.weight`); empty for a layer as it is. A layer with experts
    takes all of the experts' tensors of one kind (down; gate and up) or none.
    """

    slot: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Edit:
    """Replace the student's layers [start, stop) by `pieces`; none of them simply drops the layers."""

    start: int
    stop: int
    pieces: Iterable[Piece] = ()


def as_is(count: int) -> list[Piece]:
    """The base model itself."""
    return [Piece(i) for i in range(count)]


def apply_edit(pieces: Sequence[Piece], edit: Edit) -> list[Piece]:
    return [*pieces[: edit.start], *edit.pieces, *pieces[edit.stop :]]


class VariantScorer:
    """Scores edits of a student on fixed calibration tokens.

    Args:
        stream: the base model.
        blocks: the tokens that are scored; every real token but the first of a sequence is predicted.

    Raises:
        InputError: no sequence has two tokens.
    """

    def __init__(self, stream: DecoderStream, blocks: TokenBlocks):
        if not (blocks.lengths > 1).any():
            raise InputError("scoring needs a calibration sequence of at least 2 tokens")
        self.stream = stream
        self.batches = stream.batches(blocks)
        self.layer_forwards = 0
        """Forwards of one layer over all scored tokens, so far."""

    def loss(self, pieces: Sequence[Piece]) -> float:
        """Mean next-token loss (nats) of the student as it stands."""
        return self.losses(pieces, [Edit(len(pieces), len(pieces))])[0]

    def losses(self, pieces: Sequence[Piece], edits: Sequence[Edit]) -> list[float]:
        """Mean next-token loss (nats) of the student under each edit alone; ∞ where it is not finite."""
        return self.measured(pieces, edits, self._loss)

    def states(self, pieces: Iterable[Piece]) -> list[Tensor]:
        """Hidden states after the student's last layer, before the final norm: (b, T, hidden) a batch."""
        with torch.inference_mode():
            return self._through([b.hidden for b in self.batches], pieces)

    def measured(self, pieces: Sequence[Piece], edits: Sequence[Edit], measure: Callable[[list[Tensor]], V]) -> list[V]:
        """`measure` of the final hidden states (as `states` gives them) of the student under each edit alone."""
        for edit in edits:
            if not 0 <= edit.start <= edit.stop <= len(pieces):
                raise ValueError(f"{edit} does not fit a student of {len(pieces)} layers")
        found: dict[int, V] = {}
        order = sorted(range(len(edits)), key=lambda i: edits[i].start)
        step = self._at_once()
        for begin in range(0, len(order), step):
            chosen = order[begin : begin + step]
            values = self._walk(pieces, [edits[i] for i in chosen], measure)
            for index, value in zip(chosen, values, strict=True):
                found[index] = value
        return [found[index] for index in range(len(edits))]

    def _at_once(self) -> int:
        """Candidates that fit in memory together."""
        device = self.stream.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        each = sum(b.hidden.numel() * b.hidden.element_size() for b in self.batches)
        return max(1, int(MEMORY_SHARE[device.type] * free / max(1, each)))

    def _walk(self, pieces: Sequence[Piece], edits: Sequence[Edit], measure: Callable[[list[Tensor]], V]) -> list[V]:
        """`edits` in order of their start. States of batch b: main[b] for the student, forks[e][b] for an edit."""
        main = [b.hidden for b in self.batches]
        forks: dict[int, list[Tensor]] = {}
        last_start = max(e.start for e in edits)
        with torch.inference_mode():
            for position in range(len(pieces) + 1):
                for index, edit in enumerate(edits):
                    if edit.start == position:
                        forks[index] = self._through(main, edit.pieces)
                if position == len(pieces):
                    break
                walking = [i for i in forks if edits[i].stop <= position]
                need_main = position < last_start
                if need_main or walking:
                    self._step(pieces[position], [main] * need_main + [forks[i] for i in walking])
            return [measure(forks.pop(index)) for index in range(len(edits))]

    def _through(self, states: list[Tensor], pieces: Iterable[Piece]) -> list[Tensor]:
        states = list(states)
        for piece in pieces:
            self._step(piece, [states])
        return states

    def _step(self, piece: Piece, students: list[list[Tensor]]) -> None:
        with placed(self.stream, piece) as module:
            for states in students:
                for b, batch in enumerate(self.batches):
                    states[b] = self.stream.apply(module, piece.slot, batch, states[b])
                self.layer_forwards += 1

    def _loss(self, states: list[Tensor]) -> float:
        sums = [loss_sum(self.stream, b, hidden) for b, hidden in zip(self.batches, states, strict=True)]
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        return loss if loss == loss and abs(loss) != float("inf") else float("inf")


@contextmanager
def placed(stream: DecoderStream, piece: Piece) -> Iterator[torch.nn.Module]:
    """The module of a piece on the device; the stream's own layer is as before afterwards.

    Raises:
        ValueError: the piece replaces a tensor that the layer does not have, or has in another shape.
    """
    with stream.layer(piece.slot) as module, ExitStack() as undo:
        for name, tensor in _in_memory(stream, piece).items():
            undo.callback(_swap(module, name, tensor, piece.slot))
        yield module


def _in_memory(stream: DecoderStream, piece: Piece) -> Mapping[str, Tensor]:
    """The piece's tensors as the module names them: experts are fused there."""
    if unknown := stream.unknown(piece.slot, piece.tensors):
        raise ValueError(f"layer {piece.slot} has no parameter {unknown[0]}")
    try:
        return stream.in_memory(piece.slot, piece.tensors)
    except ValueError as error:
        raise ValueError(f"a piece of layer {piece.slot} replaces some experts but not all: {error}") from None


def _swap(module: torch.nn.Module, name: str, tensor: Tensor, slot: int) -> Callable[[], None]:
    """Put `tensor` in the place of a parameter (never in place: the old one may be a view of the file)."""
    owner, _, leaf = name.rpartition(".")
    try:
        holder = module.get_submodule(owner)
        old = holder.get_parameter(leaf)
    except AttributeError:
        raise ValueError(f"layer {slot} has no parameter {name}") from None
    if old.shape != tensor.shape:
        raise ValueError(f"layer {slot}: {name} has shape {tuple(old.shape)}, the piece's {tuple(tensor.shape)}")
    setattr(holder, leaf, torch.nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False))
    return lambda: setattr(holder, leaf, old)
