"""A whole model taken apart for training: states at chosen layer entries, one layer alone, logits in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compression_dags.calibration.streaming import output_of, positional, replaced_layers
from compression_dags.checkpoints.gate import load_stock
from compression_dags.checkpoints.reader import Checkpoint

if TYPE_CHECKING:
    from compression_dags.recovery.distillation.options import Distillation

#: Tokens whose logits exist at once, in float32, for the student and for the base model.
LOGIT_TOKENS = 2048


class WholeModel:
    """A stock model in memory, frozen, whose layers can be called one at a time.

    Windows are full, so a layer's keyword arguments depend on the batch's shape (b, T) alone and are captured once.

    Args:
        dtype: of the weights. On a GPU arithmetic is bfloat16 by autocast even where weights are float32.
    """

    def __init__(self, source: Checkpoint, device: str, dtype: str):
        self.device = torch.device(device)
        self.model = load_stock(source.path, device=device, dtype=dtype).requires_grad_(False)
        self.stack: Any = self.model.get_submodule(source.architecture.stack)
        self.layers: Any = self.model.get_submodule(source.architecture.modules)
        self.soft_cap = source.text_config.get("final_logit_softcapping")
        self._kwargs: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def enter(self, ids: Tensor) -> Tensor:
        """State (b, T, d) at the entry of layer 0."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            named = dict(zip(positional(self.layers[len(seen)]), args, strict=False))
            seen.append((hidden_states, {**named, **kwargs}))
            return hidden_states

        with replaced_layers(self.layers, pass_through), self.autocast():
            self.stack(input_ids=ids, use_cache=False)
        self._kwargs.setdefault(tuple(ids.shape), [kwargs for _, kwargs in seen])
        return seen[0][0]

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """Output (b, T, d) of one layer; its arguments are those captured by `enter` for this shape."""
        kwargs = self._arguments(hidden)[index]
        with self.autocast():
            return output_of(self.layers[index](hidden, **kwargs))

    def _arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        shape = tuple(hidden.shape[:2])
        if shape not in self._kwargs:
            self.enter(torch.zeros(shape, dtype=torch.long, device=hidden.device))
        return self._kwargs[shape]

    @torch.no_grad()
    def states(self, ids: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        """States (b, T, d) at the entries of the layers in `wanted` (L: the exit of the last); no layer above runs."""
        hidden, found = self.enter(ids), {}
        for index in range(max(wanted) + 1):
            if index in wanted:
                found[index] = hidden
            if index < max(wanted):
                hidden = self.layer(index, hidden)
        return found

    def state(self, ids: Tensor, position: int) -> Tensor:
        """State at the entry of layer `position`, without gradients."""
        return self.states(ids, {position})[position]

    def final(self, ids: Tensor, grad_from: int | None = None) -> Tensor:
        """State (b, T, d) after the final norm; gradients flow from layer `grad_from` on, where given."""
        with torch.no_grad():
            hidden = self.enter(ids)
            for index in range(len(self.layers) if grad_from is None else grad_from):
                hidden = self.layer(index, hidden)
        if grad_from is not None:
            for index in range(grad_from, len(self.layers)):
                hidden = self.layer(index, hidden)
        with replaced_layers(self.layers, lambda hidden_states, *args, **kwargs: hidden), self.autocast():
            return self.stack(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, final: Tensor) -> Tensor:
        """Logits in float32 of states after the final norm."""
        head: Any = self.model.get_output_embeddings()
        with self.autocast():
            logits = head(final.to(head.weight.dtype)).float()
        return torch.tanh(logits / self.soft_cap) * self.soft_cap if self.soft_cap else logits


class Student(WholeModel):
    """The model that is trained: float32 weights, addressed by their names in the checkpoint."""

    def __init__(self, source: Checkpoint, device: str):
        super().__init__(source, device, "float32")
        self.architecture = source.architecture
        self._stored = {
            name: source.tensor(name).dtype
            for name in source.tensors
            if self.architecture.split_name(name)[0] is not None
        }
        for parameter in self.named().values():  # loaded parameters may be views of the file
            parameter.data = parameter.data.clone()

    def prefix(self, position: int) -> str:
        return self.architecture.layer_prefix(position)

    def named(self, positions: Iterable[int] | None = None) -> dict[str, nn.Parameter]:
        """Parameters of some layers (default: all), by their names in the checkpoint."""
        return {
            self.prefix(p) + local: parameter
            for p in (range(len(self.layers)) if positions is None else positions)
            for local, parameter in self.layers[p].named_parameters()
        }

    def tensors(self, positions: Iterable[int]) -> dict[str, Tensor]:
        """Copies of the parameters of some layers."""
        return {name: p.detach().clone() for name, p in self.named(positions).items()}

    @torch.no_grad()
    def install(self, tensors: dict[str, Tensor]) -> None:
        named = self.named()
        for name, tensor in tensors.items():
            named[name].copy_(tensor)

    @torch.no_grad()
    def round(self, positions: Iterable[int]) -> None:
        """To the stored dtype and back: what is scored is what is written."""
        for name, parameter in self.named(positions).items():
            parameter.copy_(parameter.to(self._stored[name]))

    def stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they are written: in the stored dtype, on the CPU."""
        named = self.named()
        return {n: named[n].detach().to(self._stored[n]).cpu().contiguous() for n in sorted(names)}


def hidden_loss(ours: Tensor, goal: Tensor, options: Distillation) -> Tensor:
    """Distance of two states (b, T, d), mean over tokens.

    `mse` is ‖s − h‖² / ‖h‖², so that the first positions, whose norms are a hundred times the others', do not decide
    alone. `kl` is KL(softmax(h/τ) ‖ softmax(s/τ)) over the hidden channels, τ in units of the root mean square of h.
    """
    ours, goal = ours.float(), goal.float()
    if options.hidden_loss == "mse":
        return ((ours - goal).square().sum(-1) / goal.square().sum(-1).clamp_min(1e-12)).mean()
    scale = options.hidden_temperature * goal.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    p, q = (goal / scale).log_softmax(-1), (ours / scale).log_softmax(-1)
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def logit_divergence(
    student: WholeModel, ours: Tensor, teacher: WholeModel, goal: Tensor, temperature: float
) -> Tensor:
    """τ² · mean over tokens of KL(base model ‖ student), from final states (b, T, d).

    A few thousand tokens at a time, their logits recomputed in the backward pass: both logit tensors are never whole.
    """
    ours, goal = ours.flatten(0, 1), goal.flatten(0, 1)

    def piece(mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            p = (teacher.logits(theirs) / temperature).log_softmax(-1)
        q = (student.logits(mine) / temperature).log_softmax(-1)
        return nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    parts = [
        checkpoint(piece, mine, theirs, use_reentrant=False)
        for mine, theirs in zip(ours.split(LOGIT_TOKENS), goal.split(LOGIT_TOKENS), strict=True)
    ]
    total = sum(p for p in parts if isinstance(p, Tensor))
    assert isinstance(total, Tensor)
    return total * (temperature**2 / len(ours))


@torch.no_grad()
def next_token_loss(model: WholeModel, ids: Tensor) -> tuple[float, int]:
    """Sum of next-token losses (nats, float64) over windows (b, T), and how many there are."""
    final, targets = model.final(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for hidden, target in zip(final.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS), strict=True):
        total += nn.functional.cross_entropy(model.logits(hidden), target, reduction="sum").double()
    return float(total), len(targets)
