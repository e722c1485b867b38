"""What a pruning pass leaves: weights in host memory, packed masks, rows of the ledger, the written checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compression_dags.architectures import Architecture
from compression_dags.checkpoints.conversion import Conversion
from compression_dags.checkpoints.gate import PROBE_TOKENS, load_stock, probe_ids
from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint
from compression_dags.passes.host_copies import HostCopies
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.provenance.wording import apart
from compression_dags.sparsity.allocation import UNSTRUCTURED, SparsityPlan
from compression_dags.sparsity.experts import SAW_NONE
from compression_dags.sparsity.fitness import why_dense
from compression_dags.sparsity.masks import check_pattern, mask_digest, pack_mask, save_masks
from compression_dags.sparsity.pruner import Pruned
from compression_dags.sparsity.stage import SparsifyStage

if TYPE_CHECKING:
    from compression_dags.checkpoints.reader import Checkpoint


@dataclass(frozen=True)
class Sparsified:
    """The pruned checkpoint, why, and what to report; `tensors` are those that changed, in the stored dtype."""

    checkpoint: Checkpoint
    decisions: list[Decision]
    metadata: dict[str, float | int | str]
    tensors: dict[str, Tensor] = field(repr=False)

    def reference_logits(self, source: Checkpoint, *, device: str = "cpu", dtype: str = "float32") -> Any:
        """Logits (2, T, vocabulary) float32 on the gate's probe of the source with these tensors in place."""
        model = load_stock(source.path, device=device, dtype=dtype)
        parameters = dict(model.named_parameters())
        ids = probe_ids(
            source.text_config["vocab_size"], source.text_config.get("max_position_embeddings", PROBE_TOKENS)
        )
        with torch.inference_mode():
            for name, tensor in self._in_memory(source.architecture, Conversion(model)):
                parameters[name].data = tensor.to(device, parameters[name].dtype)
            return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()

    def _in_memory(self, architecture: Architecture, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
        """The tensors by the names of a loaded model's parameters, which fuses experts; one layer at a time."""
        layers: dict[int | None, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            layers.setdefault(architecture.split_name(name)[0], {})[name] = tensor
        for tensors in layers.values():
            yield from conversion.converted(tensors).items()


class Results:
    """Collects the matrices of one pass."""

    def __init__(self, stage: SparsifyStage, source: Checkpoint, plan: SparsityPlan):
        self.method, self.rule, self.source, self.plan = stage.method, stage.rule, source, plan
        self.tensors: dict[str, Tensor] = {}
        self.packed: dict[str, np.ndarray] = {}
        self.decisions: list[Decision] = []
        self._copies = HostCopies()

    def add(self, index: int, name: str, pruned: Pruned, tokens: int) -> None:
        """
        Raises:
            IntegrityError: the mask does not have the pattern that was asked for.
        """
        pattern = self.plan.patterns[name]
        check_pattern(name, pruned.mask, pattern)
        zeros, numel = int((pruned.weight == 0).sum()), pruned.weight.numel()
        evidence = {
            "requested": pattern.sparsity,
            "zeros": zeros,
            "parameters": numel,
            "pattern": self.plan.pattern if pattern.m is None else f"{pattern.m - (pattern.zeros or 0)}:{pattern.m}",
            "tokens": tokens,
            **pruned.evidence,
        }
        step, share = len(self.decisions), zeros / numel
        unit, reason = "share of zeros", self._reason(share, pattern.sparsity, evidence)
        row = Decision("sparsify", self.method, step, name, "prune", [index], share, unit, reason, evidence)
        self.decisions.append(row)
        made = [pruned.weight, pack_mask(pruned.mask)]
        self._copies.take(made, lambda found: self._land(name, found[0], found[1], evidence))

    def _reason(self, share: float, asked: float, evidence: dict[str, Any]) -> str:
        """Why so many weights are zero, and which."""
        got, wanted = apart(share, asked)
        pattern = "" if evidence["pattern"] == UNSTRUCTURED else f" as {evidence['pattern']}"
        plan = f"the plan asks for {wanted}{pattern}" if share else f"the plan asks for none ({wanted})"
        aim = f" towards the {evidence['target']} output" if "target" in evidence else ""
        unseen = (
            "; no token was routed to the expert, so all count" if evidence.get("expert_tokens") == SAW_NONE else ""
        )
        return f"pruned by {got}: {plan}, and zeros are {self.rule}{aim}{unseen}"

    def _land(self, name: str, weight: Tensor, packed: Tensor, evidence: dict[str, Any]) -> None:
        self.tensors[f"{name}.weight"] = weight
        self.packed[name] = packed.numpy()
        evidence["mask_sha256"] = mask_digest(self.packed[name])

    def settle(self) -> None:
        """Wait until everything is in host memory."""
        self._copies.settle()

    def write(self, directory: Path) -> Sparsified:
        """The checkpoint with its masks, see `masks.MASKS`."""

        def planned(name: str) -> PlannedTensor:
            if name not in self.tensors:
                return unchanged(self.source, name)
            info = self.source.tensors[name]
            return PlannedTensor(info.dtype, info.shape, lambda: self.tensors[name])

        self._copies.close()
        names = {name: planned(name) for name in self.source.tensors}
        written = write_checkpoint(directory, self.source, self.source.config, names)
        columns = {name: self.source.tensors[f"{name}.weight"].shape[1] for name in self.packed}
        save_masks(self.packed, columns, directory)
        return Sparsified(written, [*self.decisions, *self._kept()], self.metadata(), self.tensors)

    def _kept(self) -> list[Decision]:
        """Rows of the matrices of a discovered model's layers that no plan may name, and so stay dense."""
        architecture, rows = self.source.architecture, list[Decision]()
        for name, info in self.source.tensors.items() if architecture.kinds else ():
            layer, local = architecture.split_name(name)
            if layer is None or len(info.shape) != 2 or name in self.tensors:
                continue
            reason = f"kept: {why_dense(architecture, layer, local.removesuffix('.weight'))}"
            target, step = name.removesuffix(".weight"), len(self.decisions) + len(rows)
            evidence = {"parameters": info.numel}
            rows.append(
                Decision(
                    "sparsify", self.method, step, target, "keep", [layer], 0.0, "share of zeros", reason, evidence
                )
            )
        return rows

    def metadata(self) -> dict[str, float | int | str]:
        zeros = sum(d.evidence["zeros"] for d in self.decisions)
        numel = sum(d.evidence["parameters"] for d in self.decisions)
        errors = [d.evidence["output_error"] for d in self.decisions if "output_error" in d.evidence]
        more = {"mean_output_error": sum(errors) / len(errors)} if errors else {}
        return {"sparsity": zeros / numel, "zeros": zeros, "pruned_matrices": len(self.decisions), **more}

    def state(self) -> dict[str, Tensor]:
        """For a resumable loop."""
        self.settle()  # it completes the decisions
        return {
            "decisions": as_note([asdict(d) for d in self.decisions]),
            **{f"tensor.{k}": v for k, v in self.tensors.items()},
            **{f"mask.{k}": torch.from_numpy(v) for k, v in self.packed.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.decisions = [Decision.from_saved(row) for row in from_note(state["decisions"])]
        self.tensors = {k.removeprefix("tensor."): v for k, v in state.items() if k.startswith("tensor.")}
        self.packed = {k.removeprefix("mask."): v.numpy() for k, v in state.items() if k.startswith("mask.")}
