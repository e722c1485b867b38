"""Perplexity of a causal language model on a text, the way GPTQ, SparseGPT and Wanda report it.

Protocol: the text is tokenised once, without special tokens, and cut into consecutive windows of
w = min(`window`, the model's context) positions that do not overlap. A last partial window is dropped. Where the
tokenizer puts BOS before every text, each window is BOS and w - 1 text tokens, otherwise w text tokens. Either way
w - 1 tokens are predicted. Perplexity is exp of the mean over windows of the mean NLL of a window. With `max_windows`
below the number of windows there are, window i is number ⌊i·available / max_windows⌋: spread evenly, the same every
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from compression_dags.errors import InputError, IntegrityError
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    import pandas
    import torch

#: float32 logits of one chunk. cross_entropy makes one more copy of them, so the peak is twice this.
LOGIT_BYTES = 128 * 2**20
#: Positions in an automatic batch.
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class PerplexityResult:
    """Metrics, and what paired statistics need.

    Attributes:
        metrics: `perplexity@w`, `nll@w` (nats a token), `nll_stderr@w` (over windows; only with two or more of them),
            `windows`, `windows_available`, `tokens` (predicted), `bos` (0 or 1).
        window: index of each measured window in the whole text, (n,) int64.
        nll: mean NLL of each window, nats a token, (n,) float64.
        window_tokens: predicted tokens of a window.
    """

    metrics: dict[str, float]
    window: np.ndarray
    nll: np.ndarray
    window_tokens: int

    def frame(self) -> pandas.DataFrame:
        """A row a window: `window` int64, `nll` float64, `tokens` int64."""
        return pd.DataFrame({"window": self.window, "nll": self.nll, "tokens": np.int64(self.window_tokens)})


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def context_length(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Windows:
    """What is measured of a text.

    Attributes:
        ids: (n, window) int64, with BOS in front where the tokenizer adds one.
        index: (n,) int64, the windows' places in the text.
        available: how many whole windows the text has.
        bos: whether the tokenizer adds BOS.
    """

    ids: np.ndarray
    index: np.ndarray
    available: int
    bos: bool


def cut_windows(tokenizer: Any, text: str, window: int, max_windows: int | None = None) -> Windows:
    """The windows that are measured.

    Raises:
        InputError: the text has fewer tokens than one window.
    """
    bos = adds_bos(tokenizer)
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    body = window - bos
    available = len(ids) // body
    if available == 0:
        raise InputError(f"the text has {len(ids):,} tokens; one window needs {body:,}: lower `window` or add text")
    count = min(available, max_windows or available)
    index = np.arange(count, dtype=np.int64) * available // count
    rows = ids[: available * body].reshape(available, body)[index]
    if bos:
        rows = np.concatenate([np.full((count, 1), tokenizer.bos_token_id, dtype=np.int64), rows], axis=1)
    return Windows(rows, index, available, bos)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int,
    max_windows: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> PerplexityResult:
    """The perplexity of `text` by the protocol above. NLL in float32 on the model's logits, sums in float64.

    Args:
        model: a transformers causal LM, on `device` already; left in evaluation mode.
        window: positions; clipped to the model's context.
        max_windows: at most so many; with fewer in the text, all of them.
        batch_size: windows at a time; None chooses. The result does not depend on it.
        device: where the model's input goes; None is the model's own.

    Raises:
        InputError: the text is empty or shorter than one window.
        IntegrityError: the model gives a non-finite NLL.
    """
    if not text.strip():
        raise InputError("the text is empty: there is nothing to measure")
    width = min(window, context_length(model) or window)
    windows = cut_windows(tokenizer, text, width, max_windows)
    return perplexity_of(model, windows, batch_size=batch_size, device=device, progress=progress)


def perplexity_of(
    model: Any,
    windows: Windows,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> PerplexityResult:
    """`perplexity` of windows cut before, for many models with one tokenizer and context."""
    width = windows.ids.shape[1]
    device = torch.device(device if device is not None else model.device)
    size = batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // width)
    model.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(windows.ids)
        score = _scorer(model, ids[:1].to(device))
        starts = progress(range(0, len(ids), size), "perplexity", math.ceil(len(ids) / size))
        nll = np.concatenate([score(ids[start : start + size].to(device)).cpu().numpy() for start in starts])
    return _result(nll, windows.index, windows.available, width, windows.bos)


def _result(nll: np.ndarray, index: np.ndarray, available: int, width: int, bos: bool) -> PerplexityResult:
    if not np.isfinite(nll).all():
        bad = int(index[np.argmin(np.isfinite(nll))])
        raise IntegrityError(f"the model gives a non-finite NLL, first in window {bad}: it is broken or overflows")
    mean, count = float(nll.mean()), len(nll)
    metrics = {f"perplexity@{width}": float(np.exp(mean)), f"nll@{width}": mean}
    if count > 1:
        metrics[f"nll_stderr@{width}"] = float(nll.std(ddof=1) / math.sqrt(count))
    metrics |= {"windows": count, "windows_available": available, "tokens": count * (width - 1), "bos": int(bos)}
    return PerplexityResult(metrics, index, nll, width - 1)


def _scorer(model: Any, probe: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """ids (b, w) → mean NLL of each window (b,) float64, never holding all logits in float32.

    The head is applied chunk by chunk to the final hidden states, provided that this is all the model does to get its
    logits (Gemma 2 squashes them, Granite and Cohere scale them); otherwise the model's own logits are sliced.
    """
    short = probe[:, :16]
    head = model.get_output_embeddings()
    whole = model(short, use_cache=False).logits
    split = head(model.base_model(short, use_cache=False)[0]) if head and model.base_model is not model else None
    if head and split is not None and split.shape == whole.shape and _same(split, whole):
        return lambda ids: _chunked(model.base_model(ids, use_cache=False)[0], head, ids)
    return lambda ids: _chunked(model(ids, use_cache=False).logits, lambda logits: logits, ids)


def _same(split: torch.Tensor, whole: torch.Tensor) -> bool:
    """Equal but for rounding. Tight: squashing hardly moves small logits. A non-finite model may take either path."""
    difference = (split.float() - whole.float()).norm()
    return not bool(difference > 1e-4 * whole.float().norm())


def _chunked(states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    flat, target = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    vocabulary = head(flat[:1]).shape[-1]
    rows = max(1, LOGIT_BYTES // (4 * vocabulary))
    parts = [
        F.cross_entropy(head(part).float(), goal, reduction="none")
        for part, goal in zip(flat.split(rows), target.split(rows), strict=True)
    ]
    return torch.cat(parts).double().view(len(ids), -1).mean(dim=1)
