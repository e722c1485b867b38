"""One pass of the calibration tokens through a student that changes layer by layer, from a state that still holds.

The released code runs the whole model anew after every merge and keeps every layer's activations at once. Here a pass
starts at a cached state below the first changed layer, and only sums stay: cosines and angles of neighbouring states,
and one statistic a channel of the inputs of both output projections, all accumulated on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.depth.concat.sensitivity import Score, Sensitivity, sensitivity
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import IntegrityError
from compression_dags.passes.variant_scoring import Piece, placed

#: Share of the device's free memory that cached states may take.
CACHE_SHARE = {"cuda": 1 / 16, "cpu": 1 / 4}
#: Tokens in one forward on a GPU: half of the calibration pass's, as two sets of hidden states are held here.
TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class Measured:
    """What a pass says about the student's layer at one position.

    Attributes:
        influence: BI, mean over tokens of 1 − cos between its input and output.
        distance: SBI of the layer before and this one: mean angle over π between the input of the former and the
            output of the latter. None where the pass began at this layer.
        sensitivity: of its channels and KV groups.
    """

    influence: float
    distance: float | None
    sensitivity: Sensitivity


class AllTokens:
    """Influence and distance over all real tokens; the last layer's output is taken before the final norm."""

    after_norm = False

    def influence(self, entry: Tensor, leave: Tensor, mask: Tensor) -> Tensor:
        """Sum over the real tokens of 1 − cos, float64; entry and leave (b, T, d), mask (b, T)."""
        return torch.where(mask, 1.0 - self.cosine(entry, leave), 0.0).sum(dtype=torch.float64)

    def distance(self, entry: Tensor, leave: Tensor, mask: Tensor) -> Tensor:
        """Sum of the angles over π between states as `seen` gives them, float64."""
        angle = torch.arccos(self.cosine(entry, leave).clamp(-1, 1)) / torch.pi
        return torch.where(mask, angle, 0.0).sum(dtype=torch.float64)

    def seen(self, states: Tensor, mask: Tensor) -> Tensor:
        """The part of the states (b, T, d) that `distance` is about."""
        return states

    def cosine(self, entry: Tensor, leave: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(entry.float(), leave.float(), dim=-1)

    def weight(self, mask: Tensor) -> Tensor:
        """Number of states that `distance` sums over."""
        return mask.sum(dtype=torch.float64)


class AsReleased(AllTokens):
    """As CoMe's released code: distances from the last token of each sequence alone, states after the final norm,
    cosines clipped to [0, 1], NaN as 0.5.

    Args:
        dtype: of the cosines; the checkpoint's in the released code, whatever it loses there.
    """

    after_norm = True

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def cosine(self, entry: Tensor, leave: Tensor) -> Tensor:
        a, b = entry.to(self.dtype), leave.to(self.dtype)
        # products and sums in float32, rounded where the released code's matrix product and norms are
        dot = (a.float() * b.float()).sum(-1).to(self.dtype)
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).to(self.dtype) for x in (a, b)]
        return (dot / (norms[0] * norms[1])).nan_to_num(nan=0.5).clamp(0, 1).float()

    def seen(self, states: Tensor, mask: Tensor) -> Tensor:
        rows = torch.arange(len(mask), device=states.device)
        return states[rows, mask.sum(1) - 1][:, None]

    def distance(self, entry: Tensor, leave: Tensor, mask: Tensor) -> Tensor:
        return super().distance(entry, leave, torch.ones_like(mask[:, :1]))

    def weight(self, mask: Tensor) -> Tensor:
        return torch.tensor(float(len(mask)), dtype=torch.float64, device=mask.device)


class StudentPass:
    """Passes over all calibration tokens of a probe.

    Args:
        score: which statistic of the channels is summed.
        rule: which tokens count, and how.
        batch_size: rows in a forward; by default what `TOKENS_PER_BATCH` allows.
    """

    def __init__(self, probe: ProbeContext, score: Score, rule: AllTokens, batch_size: int | None = None):
        if batch_size is None and probe.device.startswith("cuda"):
            batch_size = max(1, TOKENS_PER_BATCH // probe.blocks.ids.shape[1])
        self.probe, self.rule = probe, rule
        self.score: Score = score
        self.source = probe.source
        self.stream = DecoderStream(probe.source, device=probe.device, dtype=probe.dtype, batch_size=batch_size)
        self.batches = self.stream.batches(probe.blocks)
        self.masks = [b.mask.to(self.stream.device) for b in self.batches]
        self.room = self._room()
        for batch in self.batches:  # states of depth 0 cost an embedding look-up: they are made again when needed
            batch.hidden = torch.empty(0)
        self.cached: dict[int, list[Tensor]] = {}
        self.layer_forwards = 0
        """Forwards of one layer over all calibration tokens, so far."""

    def _room(self) -> int:
        """How many depths' states may be cached; one at least."""
        device = self.stream.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        each = sum(b.hidden.numel() * b.hidden.element_size() for b in self.batches)
        return max(1, int(CACHE_SHARE[device.type] * free / max(1, each)))

    def changed(self, position: int, pieces: Sequence[Piece]) -> None:
        """The student's layer at `position` is another one: forget what lies behind its entry, and unused weights."""
        self.cached = {depth: states for depth, states in self.cached.items() if depth <= position}
        used = {piece.slot for piece in pieces}
        self.stream.release(set(range(self.stream.num_layers)) - used)  # a merged-away layer would stay on the device

    def measure(self, pieces: Sequence[Piece], start: int, likely: Sequence[int]) -> dict[int, Measured]:
        """Run the student from the nearest cached state at or below depth `start` to its end.

        Args:
            likely: depths at which later passes may start, the likeliest first: their states are cached as far as
                memory allows.

        Returns:
            Position → what was measured there.
        """
        begin = max((depth for depth in self.cached if depth <= start), default=0)
        wanted = _few(likely, self.room)
        self.cached = {depth: states for depth, states in self.cached.items() if depth in wanted or depth == begin}
        with torch.inference_mode():
            states = list(self.cached[begin]) if begin in self.cached else self._entry()
            if begin not in wanted:
                self.cached.pop(begin, None)
            before: list[Tensor] | None = None
            found = {}
            for position in range(begin, len(pieces)):
                if position in wanted and position:
                    self.cached[position] = list(states)
                last = position + 1 == len(pieces)
                found[position], before = self._layer(pieces[position], states, before, last)
        return found

    def _entry(self) -> list[Tensor]:
        return [self.stream.enter(batch.ids, batch.mask)[0] for batch in self.batches]

    def _layer(
        self, piece: Piece, states: list[Tensor], before: list[Tensor] | None, last: bool
    ) -> tuple[Measured, list[Tensor]]:
        """Advance `states` by one layer; also return what the distance of the next pair starts from."""
        device = self.stream.device
        influence, distance, weight = torch.zeros(3, dtype=torch.float64, device=device)
        entries: list[Tensor] = []
        with placed(self.stream, piece) as module, self._statistics(module) as sums:
            for b, (batch, mask) in enumerate(zip(self.batches, self.masks, strict=True)):
                sums.enter(batch, mask)
                output = self.stream.apply(module, piece.slot, batch, states[b])
                leave = self.stream.last_states(batch, output) if last and self.rule.after_norm else output
                influence = influence + self.rule.influence(states[b], leave, mask)
                entries.append(self.rule.seen(states[b], mask))
                if before is not None:
                    distance = distance + self.rule.distance(before[b], self.rule.seen(leave, mask), mask)
                    weight = weight + self.rule.weight(mask)
                    before[b] = entries[-1]  # the older state is not needed any more
                states[b] = output
            found = sums.sensitivity(module)
        self.layer_forwards += 1
        influence = float(influence) / self.probe.blocks.tokens
        mean = None if before is None else float(distance) / float(weight)
        if influence != influence or (mean is not None and mean != mean):
            raise IntegrityError(f"layer {piece.slot} of {self.source.path.name} gives non-finite hidden states")
        return Measured(influence, mean, found), entries

    @contextmanager
    def _statistics(self, module: nn.Module) -> Iterator[_Sums]:
        sums = _Sums(self, module)
        try:
            yield sums
        finally:
            sums.close()


class _Sums:
    """Hooks on a layer's two output projections that sum one statistic of every input channel, in float64."""

    GROUPS = ("attention_output", "mlp_output")

    def __init__(self, student: StudentPass, module: nn.Module):
        self.student = student
        architecture = student.source.architecture
        self.projections = [module.get_submodule(architecture.group(name)[0]) for name in self.GROUPS]
        self.sums: list[Tensor | None] = [None, None]
        self.order = 1 if student.score == "l1" else 2
        self.handles = [p.register_forward_pre_hook(self._hook(i)) for i, p in enumerate(self.projections)]

    def enter(self, batch: Batch, mask: Tensor) -> None:
        self.mask, self.padded = mask, batch.padded

    def _hook(self, index: int):
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(*self.mask.shape, -1)
            if self.padded:
                x = x * self.mask[..., None]
            # one read of x, no copy in float32; per sequence, so that the batch size does not matter
            norm = torch.linalg.vector_norm(x, ord=self.order, dim=1, dtype=torch.float32).double()
            each = (norm if self.order == 1 else norm.square()).sum(0)
            known = self.sums[index]
            self.sums[index] = each if known is None else known + each

        return add

    def sensitivity(self, module: nn.Module) -> Sensitivity:
        tokens = self.student.probe.blocks.tokens
        attention, mlp = (s / tokens for s in self.sums if s is not None)
        weights = [p.get_parameter("weight") for p in self.projections]
        return sensitivity((weights[0], weights[1]), (attention, mlp), self.student.score, self.student.source.shape)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _few(likely: Sequence[int], room: int) -> set[int]:
    """At most `room` depths: the lowest of the likeliest (so that no pass starts from nothing), then the likeliest."""
    if room >= len(likely):
        return set(likely)
    lowest = min(likely[: room + 2])
    return {lowest, *[depth for depth in likely if depth != lowest][: room - 1]}
