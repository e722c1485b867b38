"""The tensors of each form that two adjacent groups may take as one, from the inputs of their projections."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.depth.concat.merge import concatenate_members
from compression_dags.depth.concat.sensitivity import sensitivity, strongest_of_all
from compression_dags.depth.mka.groups import Group
from compression_dags.depth.mka.options import MKA
from compression_dags.depth.mka.reasons import DROPS
from compression_dags.depth.regression_mean import (
    Member,
    matching_channels,
    matching_groups,
    permuted,
    regression_mean,
)
from compression_dags.passes.variant_scoring import placed
from compression_dags.similarity.evidence import Evidence


class Student(Protocol):
    """What is read of the search: the groups as they stand, and the states at the entry of each."""

    options: MKA
    shape: ModelShape
    evidence: Evidence
    stream: DecoderStream
    batches: list[Batch]
    groups: list[Group]
    states: list[list[Tensor]]
    first_held: int

    def full(self, group: Group) -> dict[str, Tensor]: ...


class PairSums:
    """Inputs of every projection of two adjacent groups on the fitting tokens, and the tensors of each form."""

    def __init__(self, search: Student, position: int):
        self.search, self.shape = search, search.shape
        self.position = position
        self.a, self.b = search.groups[position], search.groups[position + 1]
        self._members: tuple[Member, Member] | None = None
        self.cross: dict[str, Tensor] = {}
        self.squares: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def tensors(self, form: str) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """All tensors of the merged layer before compensation, and the shares of the two groups."""
        if form in DROPS:
            group = self.a if form == "first" else self.b
            return self.search.full(group), ((1.0, 0.0) if form == "first" else (0.0, 1.0))
        a, b = self.members()
        if form == "concat":
            return self._concatenated(a, b)
        share = self._share()
        channels = matching_channels(a, b, self.cross["mlp_output"])
        groups = matching_groups(a, b, self.cross["attention_output"], self.shape)
        return regression_mean(a, permuted(b, channels, groups, self.shape), share, self.shape), (share, 1.0 - share)

    def _share(self) -> float:
        """λ of the first group: its part of the block influence of both (CoMe's prior)."""
        influence = self.search.evidence.block_influence
        first = float(np.maximum(influence[self.a.start : self.a.stop].sum(), 1e-12))
        second = float(np.maximum(influence[self.b.start : self.b.stop].sum(), 1e-12))
        return first / (first + second)

    def members(self) -> tuple[Member, Member]:
        if self._members is None:
            self._members = self._measure()
        return self._members

    def _measure(self) -> tuple[Member, Member]:
        search = self.search
        grams: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        with torch.inference_mode():
            for index, batch in enumerate(search.batches):
                count = max(0, min(len(batch.rows), search.first_held - batch.rows.start))
                if not count:
                    continue
                mask = batch.mask[:count].to(search.stream.device)
                inputs = []
                for side, group in enumerate((self.a, self.b)):
                    entry = search.states[self.position + side][index].to(search.stream.device)
                    seen = self._inputs(group, batch, entry)
                    inputs.append({k: x[:count][mask].float() for k, x in seen.items()})
                    for name, x in inputs[-1].items():
                        self.squares[side][name] = self.squares[side].get(name, 0) + x.square().sum(0)
                        if "mean" in search.options.forms:
                            grams[side][name] = grams[side].get(name, 0) + x.T @ x
                for name in ("attention_output", "mlp_output") if "mean" in search.options.forms else ():
                    self.cross[name] = self.cross.get(name, 0) + inputs[0][name].T @ inputs[1][name]
        device = search.stream.device
        first, second = (
            Member({k: t.to(device).float() for k, t in search.full(group).items()}, sums)
            for group, sums in zip((self.a, self.b), grams, strict=True)
        )
        return first, second

    def _inputs(self, group: Group, batch: Any, entry: Tensor) -> dict[str, Tensor]:
        """Projection group → its input (b, T, channels) when the group's layer runs on `entry`."""
        seen: dict[str, Tensor] = {}
        with placed(self.search.stream, group.piece) as module:
            hooks = []
            for projections in self.shape.architecture.groups:

                def keep(_: Any, args: tuple[Tensor, ...], name: str = projections.name) -> None:
                    seen[name] = args[0].reshape(*entry.shape[:2], -1)

                hooks.append(module.get_submodule(projections.projections[0]).register_forward_pre_hook(keep))
            self.search.stream.apply(module, group.start, batch, entry)
            for hook in hooks:
                hook.remove()
        return seen

    def _concatenated(self, a: Member, b: Member) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The most sensitive channels and key-value groups of both, ranked together."""
        shape, architecture = self.shape, self.shape.architecture
        (o,), (down,) = architecture.group("attention_output"), architecture.group("mlp_output")
        known = []
        for m, sums in zip((a, b), self.squares, strict=True):  # over the same tokens, so sums rank as means do
            weights = (m.tensors[f"{o}.weight"], m.tensors[f"{down}.weight"])
            known.append(sensitivity(weights, (sums["attention_output"], sums["mlp_output"]), "l2", shape))
        channels = [
            c.to(a.tensors[f"{down}.weight"].device)
            for c in strongest_of_all([k.channels for k in known], shape.intermediate)
        ]
        heads = [h.to(channels[0].device) for h in strongest_of_all([k.heads for k in known], shape.kv_heads)]
        share = len(channels[0]) / shape.intermediate
        made = concatenate_members([a.tensors, b.tensors], channels, heads, (share, 1.0 - share), shape)
        return made, (share, 1.0 - share)
