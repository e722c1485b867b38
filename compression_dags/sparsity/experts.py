"""The experts of one layer, pruned one after another.

transformers 5 holds a layer's experts as two fused parameters; on disk, in plans and in the ledger every expert has
matrices of its own. Weights are read by their names on disk, and what goes on with the forward is written into the
fused parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compression_dags.errors import InputError
from compression_dags.passes.input_sums import InputSums

if TYPE_CHECKING:
    from compression_dags.sparsity.pruning_pass import PruningPass

#: The module, within a layer, that holds the fused experts of every family.
FUSED = "mlp.experts"
#: What is stated of an expert that no calibration token was routed to.
SAW_NONE = "all (saw none)"


class ExpertBlock:
    """Prunes the experts of one layer.

    Gate and up of an expert share one input: the tokens routed to it, or all of the layer (`stage.expert_tokens`). Down
    reads what gate and up make of the same tokens. An expert that saw no token is calibrated on all of them, and its
    rows of the ledger say so. One expert is pruned at a time, so that memory holds the Hessian of one.

    An expert is pruned towards the outputs of its own weights on these tokens, also by a pruner that follows the dense
    model: that one routes other tokens to it, so there is no dense output to compare with.

    Args:
        module: with `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I) and `act_fn`.
    """

    def __init__(self, pruning: PruningPass, index: int, module: Any):
        self.pruning, self.index, self.module = pruning, index, module
        #: (tokens, H) inputs and (tokens, k) expert numbers of every batch, without padding
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._replaced: set[str] = set()

    def seen(self, mask: Tensor | None, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Take a batch's arguments of the experts: (tokens, H), (tokens, k), (tokens, k); `mask` (b, T) is False at
        padding. Names are those of transformers, which may pass them by keyword."""
        rows, routed = (
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
        )
        if mask is not None:
            rows, routed = rows[mask.reshape(-1)], routed[mask.reshape(-1)]
        self._batches.append((rows, routed))

    def change(self, go_on: bool) -> None:
        """Prune every expert; with `go_on` its down reads what the pruned gate and up make, and the module computes
        with pruned weights from here on.

        Raises:
            IntegrityError: activations or Hessians that cannot be used.
        """
        if self._batches and self.pruning.source.architecture.kinds:
            self._check_form()
        for expert in range(len(self.module.gate_up_proj)):
            self._prune(expert, go_on)
        self._batches.clear()

    def _check_form(self) -> None:
        """Compare the module's output for one token with what its experts give as they are computed here.

        Raises:
            InputError: experts of a discovered model compute something else.
        """
        rows, routed = (part[:1] for part in self._batches[0])
        weights = torch.full(routed.shape, 1 / routed.shape[-1], dtype=rows.dtype, device=rows.device)
        found = self.module.forward(rows, routed, weights).float()  # not by a call, whose hook would wait
        ours = torch.zeros_like(found)
        for expert in routed[0].tolist():
            inner = self._inner(self.module.gate_up_proj[expert], rows)
            ours += functional.linear(inner, self.module.down_proj[expert]).float() / routed.shape[-1]
        if not torch.allclose(found, ours, rtol=2e-2, atol=2e-2 * float(found.abs().max())):
            raise InputError(
                f"sparsify: experts of {self.pruning.source.architecture.model_type} are not down(act(gate) · up); "
                "use magnitude, or drop layers instead (shortgpt, sleb)"
            )

    def _prune(self, expert: int, go_on: bool) -> None:
        architecture, label = self.pruning.source.architecture, f"layer {self.index} expert {expert}"
        assert architecture.experts is not None
        prefix = architecture.layer_prefix(self.index)
        names = [prefix + local for local in architecture.experts.matrices(expert)]
        gate_up, down = self.module.gate_up_proj[expert], self.module.down_proj[expert]
        rows, stated = self._tokens_of(expert)
        routed = stated.get("expert_tokens") == "routed"
        seen = self._sums(gate_up.shape[1], rows) if routed else self._of_all
        held = dict(zip(names[:2], gate_up.chunk(2), strict=True))
        found = self.pruning.prune_matrices(self.index, held, seen, f"{label} input", **stated)
        if go_on:
            gate_up = self._write("gate_up_proj", expert, torch.cat([p.weight for p in found]))
        inner = self._sums(down.shape[1], (self._inner(gate_up, x) for x in rows))
        (last,) = self.pruning.prune_matrices(self.index, {names[2]: down}, inner, f"{label} output", **stated)
        if go_on:
            self._write("down_proj", expert, last.weight)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _tokens_of(self, expert: int) -> tuple[list[Tensor], dict[str, str]]:
        """(tokens, H) inputs by batch, and what the ledger states of them; nothing for a pruner without tokens."""
        if not self._batches:
            return [], {}
        everything = [rows for rows, _ in self._batches]
        if self.pruning.stage.expert_tokens == "all":
            return everything, {"expert_tokens": "all"}
        rows = [rows[(routed == expert).any(1)] for rows, routed in self._batches]
        if not any(map(len, rows)):
            return everything, {"expert_tokens": SAW_NONE}
        return rows, {"expert_tokens": "routed"}

    def _inner(self, gate_up: Tensor, x: Tensor) -> Tensor:
        """(2I, H), (tokens, H) → (tokens, I): what an expert's down reads, as the module computes it."""
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    # -- statistics -------------------------------------------------------------------------------------------------

    @cached_property
    def _of_all(self) -> InputSums | None:
        """Of every token of the layer: the same for all experts that are calibrated on all. Pruners only read it."""
        return self._sums(self.module.gate_up_proj.shape[2], (rows for rows, _ in self._batches))

    def _sums(self, channels: int, rows: Iterable[Tensor]) -> InputSums | None:
        if not self._batches:
            return None
        sums = InputSums(self.pruning.stage.statistic, channels, self.pruning.stream.device)
        for x in rows:
            sums.add(x, None)
        return sums

    # -- weights ----------------------------------------------------------------------------------------------------

    def _write(self, name: str, expert: int, weight: Tensor) -> Tensor:
        """Put (rows, d) in the place of an expert's part of a fused parameter; return it in the dtype of that."""
        old = getattr(self.module, name)
        if name not in self._replaced:  # the loaded one may be a view of the file
            old = nn.Parameter(old.detach().clone(), requires_grad=False)
            setattr(self.module, name, old)
            self._replaced.add(name)
        return old.data[expert].copy_(weight)
