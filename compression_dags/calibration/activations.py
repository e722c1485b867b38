"""One streamed pass over the calibration tokens, and the sufficient statistics it leaves.

* block influence of layer l (ShortGPT, Men et al. 2024): BI_l = 1 − E_t[cos(h_l,t, h_{l+1},t)], over all real tokens;
* hidden states h_0 … h_L of sampled tokens, before the final norm (transformers' last hidden state is after it);
* the same of the first tokens of sequence 0, which is all that MKA's released similarity reads;
* angular distance of every window (Gromov et al. 2024): d(a, b) = E_t[arccos cos(h_a,t, h_b,t)] / π, over the sampled
  tokens and, apart, over the last token of each sequence as in the paper;
* per-channel mean square and mean absolute value of the input of every group of projections;
* how alike the inputs, and the outputs, of every two modules are (`grams.py`), on some of the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.module_features import ModuleAlignment, ModuleFeatures, input_modules
from compression_dags.calibration.statistics import HIDDEN_STATES, STATISTICS
from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.errors import IntegrityError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.stage import Progress, silent

#: Leading tokens of sequence 0 whose states are kept.
FIRST_TOKENS = 128


@dataclass(frozen=True)
class Activations:
    """Statistics of one model on one calibration set. L layers, N sequences, n sampled tokens, d hidden size.

    Attributes:
        block_influence: (L,) float64 in [0, 2].
        block_influence_stderr: (L,) float64, standard error over sequences.
        angular: (L+1, L+1) float64 in [0, 1], entry (a, b) between the states at the entries of layers a and b.
        angular_last: the same over the last token of each sequence.
        hidden: (L+1, n, d) sampled states, in the compute dtype.
        sampled: (n, 2) int64: sequence and position of each sampled token.
        first_tokens: (L+1, min(128, T), d) states of the first of the T real tokens of sequence 0, likewise.
        norms: `layers.3.mlp_input.mean_square` → (channels,) float64; likewise `mean_abs`. `experts_input` is what all
            experts of a layer read.
        tokens: real tokens seen.
        modules: alignment of module inputs and outputs.
    """

    block_influence: Tensor
    block_influence_stderr: Tensor
    angular: Tensor
    angular_last: Tensor
    hidden: Tensor
    sampled: Tensor
    first_tokens: Tensor
    norms: dict[str, Tensor]
    tokens: int
    modules: ModuleAlignment = field(default_factory=ModuleAlignment)

    def save(self, directory: Path) -> None:
        statistics = {
            "block_influence": self.block_influence,
            "block_influence_stderr": self.block_influence_stderr,
            "angular": self.angular,
            "angular_last": self.angular_last,
            **{f"norms.{k}": v for k, v in self.norms.items()},
        }
        save_file(statistics, directory / STATISTICS, metadata={"tokens": str(self.tokens)})
        states = {"hidden": self.hidden, "sampled": self.sampled, "first_tokens": self.first_tokens}
        save_file(states, directory / HIDDEN_STATES)
        self.modules.save(directory)


def sample_tokens(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(n, 2) sequence and position of n tokens drawn without replacement from all real ones, in reading order."""
    total = int(lengths.sum())
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    ends = np.cumsum(lengths)
    sequence = np.searchsorted(ends, chosen, side="right")
    return np.stack([sequence, chosen - (ends - lengths)[sequence]], axis=1).astype(np.int64)


@torch.inference_mode()
def profile_activations(
    stream: DecoderStream,
    blocks: TokenBlocks,
    *,
    samples: int = 2048,
    seed: int = 0,
    resume: ResumePoint | None = None,
    progress: Progress = silent,
) -> Activations:
    """Statistics of every layer, from one run of the calibration set through the model.

    Sums are taken per sequence and added in float64 in sequence order: they depend on neither batch size nor padding.

    Raises:
        IntegrityError: a layer gave a non-finite value on a real token.
    """
    accumulators = _Accumulators(stream, blocks, sample_tokens(blocks.lengths, samples, seed))
    batches = stream.batches(blocks)
    first = accumulators.restore(resume, batches) if resume else 0
    if first == 0:
        accumulators.record_states(0, batches)
    for index in progress(range(first, stream.num_layers), "calibration pass (layers)"):
        with stream.layer(index) as layer:
            hooks = accumulators.watch(layer, index)
            for batch in batches:
                accumulators.enter(batch)
                output = stream.apply(layer, index, batch)
                accumulators.step(batch, output)
                batch.hidden = output
            for hook in hooks:
                hook.remove()
        accumulators.leave(index)
        accumulators.record_states(index + 1, batches)
        if resume:
            resume.save_if_due(index + 1, lambda: accumulators.state(batches))
    return accumulators.finish()


class _Accumulators:
    def __init__(self, stream: DecoderStream, blocks: TokenBlocks, sampled: np.ndarray):
        count, rows = stream.num_layers, len(blocks.lengths)
        hidden = stream.checkpoint.shape.hidden
        self.stream, self.blocks = stream, blocks
        self.lengths = torch.from_numpy(blocks.lengths).double()
        self.sampled = torch.from_numpy(sampled)
        self.cosine = torch.zeros(count, rows, dtype=torch.float64)
        self.hidden = torch.zeros(count + 1, len(sampled), hidden, dtype=stream.dtype)
        self.last = torch.zeros(count + 1, rows, hidden, dtype=stream.dtype)
        leading = min(FIRST_TOKENS, int(blocks.lengths[0]))
        self.first_tokens = torch.zeros(count + 1, leading, hidden, dtype=stream.dtype)
        self.norms: dict[str, Tensor] = {}
        self.features = ModuleFeatures(stream, self.sampled)
        self._mask, self._padded = torch.empty(0), False
        # sums of the current layer stay on the device: one transfer a layer, not several a batch
        self._sums: dict[str, Tensor] = {}
        self._cosines: list[Tensor] = []

    # hooks see only the layer's input, so the current batch's mask is left here for them
    def enter(self, batch: Batch) -> None:
        self._mask, self._padded = batch.mask.to(self.stream.device), batch.padded
        self.features.enter(batch)

    def watch(self, layer: torch.nn.Module, index: int) -> list[torch.utils.hooks.RemovableHandle]:
        inputs = input_modules(self.stream, layer).items()
        norms = [module.register_forward_pre_hook(self._norms_of(index, group)) for group, module in inputs]
        return norms + self.features.watch(layer, index)

    def _norms_of(self, index: int, group: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(*self._mask.shape, -1)
            if self._padded:
                x = x * self._mask[..., None]
            # one read of x for each norm, no float32 copy: (b, channels) over ≤ T tokens, then float64 across sequences
            norms = (torch.linalg.vector_norm(x, ord=p, dim=1, dtype=torch.float32).double() for p in (2, 1))
            for name, sums in zip(("mean_square", "mean_abs"), norms, strict=True):
                total = (sums.square() if name == "mean_square" else sums).sum(0)
                key = f"layers.{index}.{group}.{name}"
                self._sums[key] = self._sums[key] + total if key in self._sums else total

        return hook

    def step(self, batch: Batch, output: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(batch.hidden.float(), output.float(), dim=-1).double()
        self._cosines.append(torch.where(self._mask, cosine, 0.0).sum(1))

    def leave(self, index: int) -> None:
        """Take the finished layer's sums off the device, in the order of the batches."""
        sums = torch.cat(self._cosines).cpu()
        if not torch.isfinite(sums).all():
            raise IntegrityError(f"layer {index} of {self.stream.checkpoint.path.name} gives non-finite hidden states")
        self.cosine[index] = sums
        self.norms |= {key: total.cpu() / self.lengths.sum() for key, total in self._sums.items()}
        self._sums, self._cosines = {}, []
        self.features.leave()

    def record_states(self, index: int, batches: list[Batch]) -> None:
        for batch in batches:
            chosen = (self.sampled[:, 0] >= batch.rows.start) & (self.sampled[:, 0] < batch.rows.stop)
            rows = (self.sampled[chosen, 0] - batch.rows.start).to(batch.hidden.device)
            self.hidden[index, chosen] = batch.hidden[rows, self.sampled[chosen, 1].to(rows.device)].cpu()
            here = torch.arange(len(batch.rows), device=rows.device)
            ends = torch.from_numpy(self.blocks.lengths[batch.rows.start : batch.rows.stop]).long() - 1
            self.last[index, batch.rows.start : batch.rows.stop] = batch.hidden[here, ends.to(rows.device)].cpu()
            if batch.rows.start == 0:
                self.first_tokens[index] = batch.hidden[0, : self.first_tokens.shape[1]].cpu()

    def state(self, batches: list[Batch]) -> dict[str, Tensor]:
        states = {"sampled_hidden": self.hidden, "first_tokens": self.first_tokens, "last": self.last}
        norms = {f"norms.{k}": v for k, v in self.norms.items()}
        entry = torch.cat([b.hidden.cpu() for b in batches])
        return {"cosine": self.cosine, **states, **norms, **self.features.state(), "entry": entry}

    def restore(self, resume: ResumePoint, batches: list[Batch]) -> int:
        saved = resume.load()
        if saved is None:
            return 0
        step, tensors = saved
        self.cosine, self.hidden, self.last = tensors["cosine"], tensors["sampled_hidden"], tensors["last"]
        self.first_tokens = tensors["first_tokens"]
        self.norms = {k.removeprefix("norms."): t for k, t in tensors.items() if k.startswith("norms.")}
        self.features.restore(tensors)
        for batch in batches:
            batch.hidden = tensors["entry"][batch.rows.start : batch.rows.stop].to(self.stream.device)
        return step

    def finish(self) -> Activations:
        per_sequence = 1.0 - self.cosine / self.lengths
        rows = per_sequence.shape[1]
        spread = per_sequence.std(dim=1) / rows**0.5 if rows > 1 else torch.zeros(len(per_sequence)).double()
        influence = 1.0 - self.cosine.sum(1) / self.lengths.sum()
        return Activations(
            influence,
            spread,
            angular_distances(self.hidden, self.stream.device),
            angular_distances(self.last, self.stream.device),
            self.hidden,
            self.sampled,
            self.first_tokens,
            self.norms,
            int(self.lengths.sum()),
            self.features.finish(),
        )


def angular_distances(hidden: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Mean angle over π between the states of every two depths: (L+1, n, d) → (L+1, L+1) float64.

    Computed in float64: neighbouring layers differ by angles near the resolution of a float32 cosine.
    """
    depths, count, _ = hidden.shape
    total = torch.zeros(depths, depths, dtype=torch.float64)
    for start in range(0, count, 512):
        x = hidden[:, start : start + 512].to(device).double().transpose(0, 1)
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        total += torch.arccos((x @ x.transpose(1, 2)).clamp(-1, 1)).sum(0).cpu()
    return (total / (count * np.pi)).fill_diagonal_(0.0)
