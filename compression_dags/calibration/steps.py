"""`calibration_tokens` and `calibration_activations`: the calibration set, and one pass of the base model over it."""

from __future__ import annotations

from compression_dags.calibration.corpora import Calibration, corpus_digest
from compression_dags.calibration.statistics import VERSION
from compression_dags.step import ANALYSIS, BASE, Kind, Step

_TOKENS, _ACTIVATIONS = ANALYSIS
KINDS = (
    Kind(_TOKENS, "The recipe's calibration set: exact counts of tokens, seeded.", (BASE,), gpu=False),
    Kind(
        _ACTIVATIONS,
        "One streamed pass over the calibration tokens: block influence, angular distances, hidden states of "
        "sampled tokens, channel norms of every projection input.",
        (BASE, _TOKENS),
    ),
)


def calibration_steps(calibration: Calibration) -> tuple[Step, ...]:
    """The steps that every method which reads calibration data shares."""
    # not the corpus: its content is an input, and where it lies is a fact of a machine
    packing = calibration.model_dump(mode="json", exclude={"samples", "corpus"})
    sampling = {"samples": calibration.samples, "seed": calibration.seed}
    worker = "compression_dags.calibration.workers"
    return (
        Step(
            _TOKENS,
            calibration.version,
            packing,
            (BASE,),
            f"{worker}:pack_tokens",
            calibration,
            gpu=False,
            data=lambda: {"corpus": corpus_digest(calibration.corpus)},
        ),
        Step(
            _ACTIVATIONS,
            VERSION,
            sampling,
            (BASE, _TOKENS),
            f"{worker}:profile",
            calibration,
        ),
    )
