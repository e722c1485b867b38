"""Per-channel factors moved from a projection's input into its weight, and folded into what makes the input.

W x = (W diag(s)) (x / s). The division is done for nothing by the tensor before: the norm's γ (and bias), or the rows
of the projection whose output it is: v for o through attention, up for down through the gate, fc1 for fc2 through ReLU.
SmoothQuant (Xiao et al., ICML 2023) and AWQ (Lin et al., MLSys 2024) differ in how they choose s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compression_dags.architectures.uniformity import unlike_llama

if TYPE_CHECKING:
    from compression_dags.architectures import ProjectionGroup
    from compression_dags.checkpoints.reader import Checkpoint

#: Group → the projection (in the order of preference) whose rows can be divided for it.
_BEFORE = {"attention_output": ("self_attn.v_proj",), "mlp_output": ("mlp.up_proj", "fc1")}


@dataclass(frozen=True)
class Fold:
    """Where the factors s of one input go.

    Attributes:
        prefix: of the layer, with a dot at the end.
        norm: local name of the norm whose output the input is; empty if `rows` is set.
        rows: local name of the projection whose rows are divided.
        shared: (heads, repeats, width): channels of the input that come from one row (grouped query attention).
    """

    source: Checkpoint
    prefix: str
    norm: str = ""
    rows: str = ""
    shared: tuple[int, int, int] | None = None

    def even(self, x: Tensor) -> Tensor:
        """A mean square (in,) made equal for channels that must share a factor."""
        return x if self.shared is None else self._spread(x.reshape(self.shared).mean(1, keepdim=True))

    def widest(self, x: Tensor) -> Tensor:
        """A peak (in,) likewise."""
        return x if self.shared is None else self._spread(x.reshape(self.shared).amax(1, keepdim=True))

    def _spread(self, one: Tensor) -> Tensor:
        assert self.shared is not None
        return one.expand(self.shared).reshape(-1)

    def exact(self, columns: Tensor) -> Tensor:
        """The factors that γ, rounded to its stored dtype, really divides by: no error is left in the fold.

        A channel whose γ would become 0, or is, keeps its scale.
        """
        if not self.norm:
            return columns
        gamma, divided = self._gammas(columns)
        ratio = gamma / divided
        return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))

    def divided_norm(self, exact: Tensor) -> dict[str, Tensor]:
        """The norm's tensors for factors of `exact`, in their stored dtype on the CPU."""
        name = f"{self.prefix}{self.norm}"
        divided = self._gammas(exact)[1]
        stored, offset = self.source.tensor(f"{name}.weight"), self.source.architecture.norm_offset
        same = (exact == 1).cpu()
        found = {f"{name}.weight": torch.where(same, stored, (divided - offset).cpu().to(stored.dtype))}
        if f"{name}.bias" in self.source.tensors:
            bias = self.source.tensor(f"{name}.bias")
            found[f"{name}.bias"] = (bias.float() / exact.cpu()).to(bias.dtype)
        return found

    def _gammas(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(d,) float32: what the norm multiplies by now, and after division by `columns` in the stored dtype."""
        stored, offset = self.source.tensor(f"{self.prefix}{self.norm}.weight"), self.source.architecture.norm_offset
        gamma = stored.to(columns.device).float() + offset
        return gamma, (gamma / columns - offset).to(stored.dtype).float() + offset

    def to_rows(self, columns: Tensor) -> Tensor:
        """s by row of the projection before: (rows,)."""
        return columns if self.shared is None else columns.reshape(self.shared)[:, 0].reshape(-1)

    def divided_bias(self, columns: Tensor) -> dict[str, Tensor]:
        name = f"{self.prefix}{self.rows}.bias"
        if name not in self.source.tensors:
            return {}
        bias = self.source.tensor(name)
        return {name: (bias.float() / self.to_rows(columns).cpu()).to(bias.dtype)}


def fold_of(source: Checkpoint, index: int, group: ProjectionGroup) -> Fold | None:
    """Where the factors of a group's input can go; None where nothing linear makes it."""
    architecture, shape = source.architecture, source.shape
    prefix = architecture.layer_prefix(index)
    if architecture.kinds:
        return _discovered_fold(source, index, group)
    norm = dict(architecture.input_norms).get(group.name)
    if norm:
        return Fold(source, prefix, norm=norm)
    rows = next((r for r in _BEFORE.get(group.name, ()) if f"{prefix}{r}.weight" in source.tensors), None)
    if rows is None or (rows == "fc1" and source.config.get("activation_function") != "relu"):
        return None
    shared = None
    if group.name == "attention_output":
        shared = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    return Fold(source, prefix, rows=rows, shared=shared)


def _discovered_fold(source: Checkpoint, index: int, group: ProjectionGroup) -> Fold | None:
    """The same for a discovered model, where the trace proves that nothing else of the layer changes."""
    architecture, shape = source.architecture, source.shape
    kind, prefix = architecture.kinds[architecture.kind_of[index]], architecture.layer_prefix(index)
    if group.name not in kind.sole:
        return None
    norm = dict(kind.input_norms).get(group.name)
    if norm is not None:
        known = (group.name, norm) in architecture.input_norms and f"{prefix}{norm}.weight" in source.tensors
        return Fold(source, prefix, norm=norm) if known else None
    rows = dict(kind.row_folds).get(group.name)
    if rows is None or unlike_llama(shape):
        return None
    if group.name != "attention_output":
        return Fold(source, prefix, rows=rows)
    return Fold(source, prefix, rows=rows, shared=(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim))
