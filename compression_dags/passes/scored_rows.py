"""Sequences set apart from a calibration set, and the next-token loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compression_dags.calibration.corpora import TokenBlocks

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.streaming import Batch, DecoderStream

#: Most logits held at a time (tokens × vocabulary); a row's are never split.
LOGITS_AT_ONCE = 2**28


def chosen_rows(blocks: TokenBlocks, rows: Sequence[int]) -> TokenBlocks:
    """Some sequences of a calibration set."""
    return TokenBlocks(blocks.ids[list(rows)], blocks.lengths[list(rows)], blocks.documents)


def even_rows(blocks: TokenBlocks, count: int) -> list[int]:
    """Indices of `count` sequences spread evenly over a calibration set; all of them if it has no more."""
    total = len(blocks.lengths)
    return [i * total // min(count, total) for i in range(min(count, total))]


def loss_sum(stream: DecoderStream, batch: Batch, hidden: Tensor) -> tuple[float, int]:
    """Sum of the next-token losses (nats) of a batch whose final hidden states are `hidden`, and their number."""
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100).to(hidden.device)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    step = max(1, LOGITS_AT_ONCE // (batch.ids.shape[1] * int(stream.checkpoint.text_config["vocab_size"])))
    for first in range(0, len(hidden), step):
        part = slice(first, first + step)
        rows = replace(batch, ids=batch.ids[part], mask=batch.mask[part])
        logits = stream.logits(rows, hidden[part])[:, :-1]
        for row, target in zip(logits, targets[part], strict=True):  # a row at a time: float32 logits are large
            loss = torch.nn.functional.cross_entropy(row.float(), target, reduction="sum", ignore_index=-100)
            total += loss.double()
    return float(total), int((targets >= 0).sum())


def kl_by_row(stream: DecoderStream, batch: Batch, dense: Tensor, hidden: Tensor) -> list[float]:
    """KL(base ‖ changed) of the next-token distributions, in nats, mean over the real tokens of each sequence.

    Args:
        dense, hidden: (b, T, d) final hidden states of the base model and of the changed one.
    """
    found = []
    for row in range(len(hidden)):  # a row at a time: float32 logits are large
        part = replace(batch, ids=batch.ids[row : row + 1], mask=batch.mask[row : row + 1])
        base, changed = (
            torch.log_softmax(stream.logits(part, states[row : row + 1])[0].float(), -1) for states in (dense, hidden)
        )
        each = (base.exp() * (base - changed)).sum(-1)
        real = batch.mask[row].to(each.device)
        found.append(float(each[real].double().mean()))
    return found


def stream_loss(stream: DecoderStream, blocks: TokenBlocks) -> float:
    """Mean next-token loss (nats) of a model on some sequences, layer by layer."""
    batches = stream.batches(blocks)
    with torch.inference_mode():
        for index in range(stream.num_layers):
            with stream.layer(index) as layer:
                for batch in batches:
                    batch.hidden = stream.apply(layer, index, batch)
        sums = [loss_sum(stream, batch, batch.hidden) for batch in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)
