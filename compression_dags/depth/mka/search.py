"""The search of `mka`: rounds of short list, closed-form candidates, and scores from the cached prefix."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.depth.mka.groups import Group, MergeCandidate
from compression_dags.depth.mka.options import MKA
from compression_dags.depth.mka.pair_sums import PairSums
from compression_dags.depth.mka.reasons import DROPS, why_kept, why_won
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError
from compression_dags.passes.ridge_sums import add_batch, token_weights
from compression_dags.passes.scored_rows import chosen_rows
from compression_dags.passes.variant_scoring import Edit, VariantScorer, as_is, placed
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.similarity.evidence import Evidence
from compression_dags.solvers.ridge import Sums, best_fit

UNITS = {
    "loss": "held-out next-token loss (nats)",
    "divergence": "held-out KL divergence from the base model (nats)",
}


def plan(options: MKA, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> tuple[MergePlan, list[Decision]]:
    """The plan of `mka`, a row for every merge, and one for every layer that is in none."""
    options.check(shape)
    sequences, length = map(int, probe.blocks.ids.shape)
    options.check_tokens(shape, sequences, length)
    fit, held = options.rows(sequences, length)
    return PairSearch(options, shape, evidence, probe, fit, held).run()


class PairSearch:
    """Holds the student's and the base model's states at every layer entry for the chosen tokens.

    Args:
        fit, held: calibration sequences that closed forms are fitted on, and that candidates are scored on.
    """

    def __init__(
        self, options: MKA, shape: ModelShape, evidence: Evidence, probe: ProbeContext, fit: list[int], held: list[int]
    ):
        self.options, self.shape, self.evidence, self.probe = options, shape, evidence, probe
        self.source, self.unit = probe.source, UNITS[options.score]
        self.stream = DecoderStream(probe.source, device=probe.device, dtype=probe.dtype)
        self.batches = self.stream.batches(chosen_rows(probe.blocks, [*fit, *held]))
        self.first_held = len(fit)
        self.scorer = VariantScorer(self.stream, chosen_rows(probe.blocks, held))
        self.goal: list[Tensor] | None = None
        self.groups = [Group(i, i + 1) for i in range(shape.layers)]
        self.parked = self._where_states_fit()
        self.states = [[b.hidden.to(self.parked) for b in self.batches]]
        self._advance(0)
        self.targets = list(self.states)  # entry of original layer i; one more for the exit of the last
        self.known: dict[tuple[int, int], list[MergeCandidate]] = {}

    def _where_states_fit(self) -> torch.device:
        """The device if the states of student and base model fill less than half of it, else the host."""
        device = self.stream.device
        if device.type == "cpu":
            return device
        each = sum(b.hidden.numel() * b.hidden.element_size() for b in self.batches)
        fits = 2 * (self.shape.layers + 1) * each < torch.cuda.mem_get_info(device)[0] / 2
        return device if fits else torch.device("cpu")

    def entry(self, position: int) -> list[Tensor]:
        """The student's states at the entry of group `position`, on the device, batch by batch."""
        return [h.to(self.stream.device) for h in self.states[position]]

    # -- the rounds --------------------------------------------------------------------------------------------------

    def run(self) -> tuple[MergePlan, list[Decision]]:
        count = self.options.removed(self.shape.layers)
        rows, loss = self._restore()
        for step in self.probe.progress(range(len(rows), count), "merge rounds"):
            candidates = self._candidates()
            losses = self._score(candidates)
            best = min(range(len(candidates)), key=lambda i: (losses[i], i))
            rows.append(self._decision(step, candidates, losses, best, loss))
            loss = losses[best]
            self._merge(candidates[best])
            if self.probe.resume:
                self.probe.resume.save_if_due(step + 1, lambda: self._state(rows, loss))  # noqa: B023
        self.stream.close()
        return self._plan(), [*rows, *self._kept(rows)]

    def _candidates(self) -> list[MergeCandidate]:
        found: list[MergeCandidate] = []
        for position in self._shortlist():
            pair = (self.groups[position].start, self.groups[position + 1].stop)
            if pair not in self.known:
                self.known[pair] = self._build(position)
            found += [replace(c, position=position) for c in self.known[pair]]
        if not found:
            raise InputError(
                "merge: mka finds no further pair of adjacent unprotected layers of one kind; lower the ratio"
            )
        return found

    def _shortlist(self) -> list[int]:
        """Positions p whose groups p, p+1 may become one: the most similar first, at most `shortlist`."""
        free = self.options.free_layers(self.shape.layers)
        allowed = [
            p
            for p, (a, b) in enumerate(zip(self.groups, self.groups[1:], strict=False))
            if a.start >= free.start
            and b.stop <= free.stop
            and len({self.shape.kind(i) for i in range(a.start, b.stop)}) == 1
        ]
        return sorted(allowed, key=lambda p: (self._distance(p), p))[: self.options.shortlist]

    def _distance(self, position: int) -> float:
        a, b = self.groups[position], self.groups[position + 1]
        if self.options.similarity == "angular":
            return float(self.evidence.angular[a.start, b.stop])
        return -float(self.evidence.similarity[self.options.similarity][a.stop - 1, b.stop - 1])

    def _score(self, candidates: list[MergeCandidate]) -> list[float]:
        edits = [Edit(c.position, c.position + 2, (c.group.piece,)) for c in candidates]
        return self._measure(edits)

    def _measure(self, edits: list[Edit]) -> list[float]:
        pieces = [g.piece for g in self.groups]
        if self.options.score == "loss":
            return self.scorer.losses(pieces, edits)
        if self.goal is None:
            self.goal = self.scorer.states(as_is(self.shape.layers))
        return self.scorer.measured(pieces, edits, lambda states: divergence(self.scorer, self.goal or [], states))

    def _merge(self, chosen: MergeCandidate) -> None:
        p = chosen.position
        self.groups[p : p + 2] = [chosen.group]
        # candidates that lie wholly below keep their inputs and their targets; the others' inputs change
        self.known = {pair: c for pair, c in self.known.items() if pair[1] <= chosen.group.start}
        self._advance(p)

    def _advance(self, position: int) -> None:
        """States at the entry of every group above `position`, and at the exit of the last."""
        self.states = self.states[: position + 1]
        with torch.inference_mode():
            for group in self.groups[position:]:
                with placed(self.stream, group.piece) as module:
                    entry = zip(self.batches, self.entry(-1), strict=True)
                    exits = [self.stream.apply(module, group.start, b, h) for b, h in entry]
                    self.states.append([h.to(self.parked) for h in exits])

    # -- candidates --------------------------------------------------------------------------------------------------

    def _build(self, position: int) -> list[MergeCandidate]:
        pair = PairSums(self, position)
        return [
            MergeCandidate(position, *self._compensated(position, form, *pair.tensors(form)))
            for form in self.options.forms
        ]

    def _compensated(
        self, position: int, form: str, tensors: dict[str, Tensor], shares: tuple[float, float]
    ) -> tuple[Group, dict[str, Any]]:
        """The merged layer with its output projection refitted to the base model's exit state."""
        a, b = self.groups[position], self.groups[position + 1]
        weights = (*(shares[0] * s for s in a.shares), *(shares[1] * s for s in b.shares))
        group = Group(a.start, b.stop, weights, form, self._changed(a.start, tensors))
        writer = self.shape.architecture.residual_writer
        note: dict[str, Any] = {"shares": list(shares)}
        if writer is None:
            return group, note
        fit, held, weight, bias = self._sums(position, group, writer)
        dtypes = (tensors[f"{writer}.weight"].dtype, tensors[f"{writer}.bias"].dtype if bias is not None else None)
        best = best_fit(fit, held, weight, bias, dtypes, ("fold", "refit"), self.options.alphas)
        note["held_out_error_before"] = held.error / held.target
        if best is None or best.held_after >= held.error:
            return group, note
        note |= {"held_out_error_after": best.held_after / held.target, "fit": best.form, "alpha": best.alpha}
        new = {f"{writer}.weight": best.weight.cpu()}
        new |= {f"{writer}.bias": best.bias.cpu()} if best.bias is not None else {}
        return replace(group, tensors=group.tensors | new), note

    def _sums(self, position: int, group: Group, writer: str) -> tuple[Sums, Sums, Tensor, Tensor | None]:
        target = self.targets[group.stop]
        with placed(self.stream, group.piece) as module, torch.inference_mode():
            linear: Any = module.get_submodule(writer)
            weight, bias = linear.weight.detach(), linear.bias.detach() if linear.bias is not None else None
            channels = weight.shape[1] + (bias is not None)
            both = (
                Sums.empty(channels, len(weight), weight.device),
                Sums.empty(channels, len(weight), weight.device),
            )
            seen: list[Tensor] = []
            hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for batch, entry, goal in zip(self.batches, self.entry(position), target, strict=True):
                exit_state = self.stream.apply(module, group.start, batch, entry)
                weights = token_weights(batch, self.options.sink_positions, self.options.sink_weight)
                goal = goal.to(exit_state.device)
                add_batch(both, batch, self.first_held, seen.pop(), exit_state, goal, weights, linear)
            hook.remove()
        return *both, weight, bias

    def full(self, group: Group) -> dict[str, Tensor]:
        """All tensors of a group's layer, in the stored dtype."""
        stored = {local: self.source.tensor(name) for local, name in self.source.layer(group.start).items()}
        return stored | group.tensors

    def _changed(self, slot: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, in the stored dtype, that are not those of original layer `slot`."""
        found = {}
        for local, name in self.source.layer(slot).items():
            stored = self.source.tensor(name)
            new = tensors[local].to(stored.dtype).cpu().contiguous()
            if not torch.equal(new, stored):
                found[local] = new
        return found

    # -- what is written down ----------------------------------------------------------------------------------------

    def _decision(
        self, step: int, candidates: list[MergeCandidate], losses: list[float], best: int, before: float | None
    ) -> Decision:
        chosen, form = candidates[best], candidates[best].group.form or ""
        a, b = self.groups[chosen.position], self.groups[chosen.position + 1]
        last, other = a.stop - 1, b.stop - 1
        evidence = {
            "pair": [[a.start, a.stop - 1], [b.start, b.stop - 1]],
            "form": form,
            "similarity": {
                "angular distance": float(self.evidence.angular[a.start, b.stop]),
                **{m: float(s[last, other]) for m, s in self.evidence.similarity.items() if m in {"npib", "cka"}},
            },
            "ranked_by": self.options.similarity,
            **chosen.note,
            "norm_ratio": self._norm_ratio(chosen.group),
            "tensors_changed": sorted(chosen.group.tensors),
            "loss_before": self._measure([Edit(0, 0)])[0] if before is None else before,
            "loss_after": losses[best],
            "candidates": {c.name: round(loss, 6) for c, loss in zip(candidates, losses, strict=True)},
            "layer_forwards": self.scorer.layer_forwards,
        }
        action = "drop" if form in DROPS else "concat" if form == "concat" else "merge"
        sources = list(range(a.start, b.stop))
        return Decision(
            "merge",
            self.options.method,
            step,
            f"layers {a.start}-{other}",
            action,
            sources,
            losses[best],
            self.unit,
            why_won(form, (range(a.start, a.stop), range(b.start, b.stop)), losses[best], evidence, self.options.score),
            evidence,
        )

    def _norm_ratio(self, group: Group) -> float:
        """‖projections of the new layer‖ / ‖those of the first of its layers‖, Frobenius."""
        names = [f"{p}.weight" for p in self.shape.architecture.projections()]
        old = {n: self.source.tensor(self.source.layer(group.start)[n]).float() for n in names}
        new = {n: group.tensors.get(n, old[n]).float() for n in names}
        squares = [sum(float(t.square().sum()) for t in x.values()) for x in (new, old)]
        return (squares[0] / squares[1]) ** 0.5

    def _kept(self, rounds: list[Decision]) -> list[Decision]:
        rows, step = [], len(rounds)
        for i in (g.start for g in self.groups if g.form is None):
            reason, evidence = why_kept(i, self.shape, self.options, rounds)
            target = f"layer {i}"
            rows.append(
                Decision("merge", self.options.method, step, target, "keep", [i], None, self.unit, reason, evidence)
            )
        return rows

    def _plan(self) -> MergePlan:
        layers = tuple(
            PlannedLayer(tuple(range(g.start, g.stop)), g.shares, "solved") if g.form else PlannedLayer((g.start,))
            for g in self.groups
        )
        tensors = {f"{p}.{name}": t for p, g in enumerate(self.groups) for name, t in g.tensors.items()}
        return MergePlan(self.options.method, self.shape.layers, layers, tensors)

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _state(self, rows: list[Decision], loss: float | None) -> dict[str, Tensor]:
        note = {
            "rows": [asdict(r) for r in rows],
            "loss": loss,
            "groups": [[g.start, g.stop, list(g.shares), g.form] for g in self.groups],
        }
        text = as_note(note)
        return {"note": text, **{f"{p}.{n}": t for p, g in enumerate(self.groups) for n, t in g.tensors.items()}}

    def _restore(self) -> tuple[list[Decision], float | None]:
        saved = self.probe.resume.load() if self.probe.resume else None
        if saved is None:
            return [], None
        _, tensors = saved
        note = from_note(tensors.pop("note"))
        held = MergePlan("held", self.shape.layers, (PlannedLayer((0,)),), tensors)
        self.groups = [
            Group(start, stop, tuple(shares), form, held.of_layer(p))
            for p, (start, stop, shares, form) in enumerate(note["groups"])
        ]
        self._advance(0)
        return [Decision.from_saved(row) for row in note["rows"]], note["loss"]


def divergence(scorer: VariantScorer, goal: list[Tensor], states: list[Tensor]) -> float:
    """Mean KL(base model ‖ student) of the next-token distributions, nats, from final hidden states of both."""
    total, count = torch.zeros((), dtype=torch.float64, device=states[0].device), 0
    for batch, ours, theirs in zip(scorer.batches, states, goal, strict=True):
        for row in range(len(ours)):  # a row at a time: float32 logits are large
            one = replace(batch, ids=batch.ids[row : row + 1], mask=batch.mask[row : row + 1])
            logits = [scorer.stream.logits(one, h[row : row + 1])[0].float().log_softmax(-1) for h in (theirs, ours)]
            each = torch.nn.functional.kl_div(logits[1], logits[0], reduction="none", log_target=True).sum(-1)
            mask = batch.mask[row].to(each.device)
            total += each[mask].double().sum()
            count += int(mask.sum())
    value = float(total) / count
    return value if value == value else float("inf")
