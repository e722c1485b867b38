"""The reload gate: a checkpoint is released only if stock transformers loads it whole and computes the same logits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.errors import IntegrityError

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 48
#: Largest allowed ‖reloaded − in-memory‖ / ‖in-memory‖ of the logits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}


def probe_ids(vocab_size: int, context: int) -> torch.Tensor:
    """Two short sequences of token ids, the same for every run, (2, ≤48) int64."""
    # the code location loads this module, and neither torch nor transformers
    import torch  # noqa: PLC0415

    length = min(PROBE_TOKENS, context)
    ids = (torch.arange(2 * length, dtype=torch.int64) * 7919 + 11) % vocab_size
    return ids.reshape(2, length)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports and bars of transformers and compressed-tensors; what matters is raised as an error."""
    # the code location loads this module, and neither torch nor transformers
    from transformers.utils import logging  # noqa: PLC0415

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def load_stock(directory: Path, *, device: str = "cpu", dtype: str = "float32"):
    """`AutoModelForCausalLM.from_pretrained`, refusing any missing, unexpected or re-initialised tensor.

    Raises:
        IntegrityError: naming the first tensors that do not fit.
    """
    # the code location loads this module, and neither torch nor transformers
    from transformers import AutoConfig  # noqa: PLC0415

    # it imports both
    from compression_dags.architectures.tracing import auto_class  # noqa: PLC0415

    # Straight to the device: weights that transformers 5.17 dequantizes while loading do not follow a later `.to`.
    where = {} if device == "cpu" else {"device_map": {"": device}}
    with quiet():
        stock = auto_class(AutoConfig.from_pretrained(directory, local_files_only=True))
        loaded: Any = stock.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, local_files_only=True, **where
        )
    model, info = loaded
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        text = "; ".join(f"{kind}: {', '.join(names[:3])} ({len(names)})" for kind, names in problems.items())
        raise IntegrityError(f"{directory} does not load cleanly in stock transformers: {text}")
    model = model.eval()
    if getattr(model.config, "quantization_config", None) is not None:
        with quiet():  # compressed-tensors unpacks all weights at the first forward
            model(probe_ids(_vocabulary(model), 2).to(device))
    return model


def probe_of(model: Any) -> torch.Tensor:
    """The probe for a loaded model, whose text may be a part of it."""
    return probe_ids(_vocabulary(model), _context(model))


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PROBE_TOKENS


def check_finite_logits(model: Any, directory: Path, rows: int) -> None:
    """The probe's logits are finite and have one entry for each of `rows` tokens.

    A model in float16 that overflows is tried again in bfloat16, which has float32's range.

    Raises:
        IntegrityError: they are not, or the forward pass fails.
    """
    # the code location loads this module, and neither torch nor transformers
    import torch  # noqa: PLC0415

    ids = probe_ids(min(rows, _vocabulary(model)), _context(model))
    for dtype in (None, torch.bfloat16):
        try:
            with torch.inference_mode(), quiet():
                logits = (model if dtype is None else model.to(dtype))(ids).logits
        except Exception as error:  # whatever a layer raises at its first call
            raise IntegrityError(f"{directory} does not compute: {type(error).__name__}: {error}") from None
        if tuple(logits.shape) != (*ids.shape, rows):
            raise IntegrityError(f"{directory} computes logits of shape {tuple(logits.shape)} for {rows} tokens")
        if torch.isfinite(logits).all():
            return
        if model.dtype != torch.float16:
            break
    raise IntegrityError(
        f"{directory} computes logits that are not finite: a value of config.json or a weight is wrong"
    )


def check_causal(model: Any, directory: Path) -> None:
    """The last token of the probe changes no logits before it: the model reads from left to right.

    Raises:
        IntegrityError: it does.
    """
    # the code location loads this module, and neither torch nor transformers
    import torch  # noqa: PLC0415

    ids = probe_of(model)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % _vocabulary(model)
    with torch.inference_mode(), quiet():
        before, after = (model(x).logits[:, :-1].float() for x in (ids, other))
    if not torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max())):
        raise IntegrityError(f"{directory} reads later tokens too; only decoders that read from left to right are used")


def check_reload(
    directory: Path, reference: torch.Tensor, *, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """What stock transformers measure of `directory`: its logits on the probe against the in-memory `reference`.

    Args:
        reference: logits (2, T, vocabulary) of the model as it was in memory. They come from the stage's inputs and
            its plan, never from the written files.

    Returns:
        What goes into the artifact's metadata: the error, the tolerance, dtype and device.

    Raises:
        IntegrityError: the checkpoint does not load cleanly, gives non-finite logits, or other logits.
    """
    # the code location loads this module, and neither torch nor transformers
    import torch  # noqa: PLC0415

    model = load_stock(directory, device=device, dtype=dtype)
    ids = probe_of(model)
    with torch.inference_mode():
        logits = model(ids.to(device)).logits.float().cpu()
    reference = reference.float().cpu()
    if not torch.isfinite(logits).all():
        raise IntegrityError(f"{directory} computes non-finite logits after reload")
    error = float((logits - reference).norm() / reference.norm())
    # On the CPU float32 is equal; a GPU may sum in another order when the same layers run by another path.
    tolerance = 0.0 if (device, dtype) == ("cpu", "float32") else TOLERANCE[dtype]
    if not error <= tolerance:
        raise IntegrityError(f"{directory}: reloaded logits differ by {error:.3g} (relative), allowed {tolerance:g}")
    return {"gate": "passed", "relative_logit_error": error, "tolerance": tolerance, "dtype": dtype, "device": device}
