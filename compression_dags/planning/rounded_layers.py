"""Weights of one layer at a scheme, as candidates are measured: rounded to nearest, or by GPTQ on the base's inputs.

A calibrated quantizer takes most from where rounding to nearest loses most, so that costs measured with the one do not
rank candidates for the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compression_dags.passes.input_sums import InputSums
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.gptq_sweep import sweep_group
from compression_dags.solvers.rounding import round_to_nearest

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.calibration.streaming import DecoderStream
    from compression_dags.quantization.formats import Choice


class RoundedLayers:
    """Rounds groups of projections of the base model's layers.

    Layers are best asked for in ascending order: with `gptq` a pass of the base model goes along, and starts again for
    a lower layer. It holds the states of `blocks` before one layer, and that layer's Hessians.
    """

    def __init__(self, stream: DecoderStream, blocks: TokenBlocks, rounding: Literal["rtn", "gptq"]):
        self.stream, self.rounding = stream, rounding
        self._next, self._sums = 0, dict[str, InputSums]()
        self._batches = stream.batches(blocks) if rounding == "gptq" else []
        self._states: list[Tensor] = []

    def group(self, layer: int, group: str | None, choice: Choice) -> dict[str, Tensor]:
        """Ŵ of one group of a layer, or of all: local name of the tensor → (out, in)."""
        source, found = self.stream.checkpoint, dict[str, Tensor]()
        names = source.layer(layer)
        for own in source.architecture.groups:
            if group not in (None, own.name):
                continue
            weights = {p: source.tensor(names[f"{p}.weight"]).to(self.stream.device) for p in own.projections}
            found |= {f"{p}.weight": w for p, w in self._rounded(layer, own.name, weights, choice).items()}
        return found

    def _rounded(self, layer: int, group: str, weights: dict[str, Tensor], choice: Choice) -> dict[str, Tensor]:
        fitted = choice.fitted(next(iter(weights.values())).shape[1])
        if fitted is None:
            return weights
        if self.rounding == "rtn":
            return {p: round_to_nearest(w, fitted.grid()).dequantize() for p, w in weights.items()}
        stage = GPTQ.model_validate({"scheme": fitted.scheme, "target": "own"})
        swept = sweep_group(stage, weights, self._seen(layer)[group], fitted, f"layer {layer} {group}")
        return {p: rounded.dequantize() for p, (rounded, _) in swept.found.items()}

    def _seen(self, layer: int) -> dict[str, InputSums]:
        """Hessians of the inputs of each group of a layer."""
        if layer < self._next - 1 or not self._states:
            self._next, self._states = 0, [b.hidden for b in self._batches]
        while self._next <= layer:
            with torch.inference_mode(), self.stream.layer(self._next) as module:
                self._step(module, self._next)
            self._next += 1
        return self._sums

    def _step(self, module: nn.Module, layer: int) -> None:
        modules: dict[str, Any] = dict(module.named_modules())
        first = {g.name: modules[g.projections[0]] for g in self.stream.checkpoint.architecture.groups}
        self._sums = {n: InputSums("hessian", m.weight.shape[1], self.stream.device) for n, m in first.items()}
        for number, batch in enumerate(self._batches):
            mask = batch.mask.to(self.stream.device) if batch.padded else None

            def seen(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
                self._sums[name].add(x, mask)

            hooks = [m.register_forward_pre_hook(lambda _, a, n=n: seen(n, a[0])) for n, m in first.items()]
            self._states[number] = self.stream.apply(module, layer, batch, self._states[number])
            for hook in hooks:
                hook.remove()
