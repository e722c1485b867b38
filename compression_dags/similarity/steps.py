"""`similarity_*`: how alike layers are, each measure a table and a picture from the one calibration pass."""

from __future__ import annotations

from compression_dags.similarity.evidence import VERSION
from compression_dags.similarity.redundancy import VERSION as REDUNDANCY_VERSION
from compression_dags.step import ANALYSIS, Kind, Step

#: Measure → what it is, for people.
MEASURES = {
    "block_influence": "1 − mean cosine between the input and the output of every layer (ShortGPT).",
    "angular": "Mean angle over π between the states at the entries of every two layers (Gromov et al.).",
    "npib": "Information that the outputs of every two layers share, on their diffusion manifolds, over the geometric "
    "mean of their entropies (MKA), by three estimators, with intervals over prompts and the merge tree.",
    "cka": "Debiased linear centred kernel alignment of the outputs of every two layers, with intervals over prompts "
    "and the merge tree.",
}
REDUNDANCY = "similarity_redundancy"
_READS = ANALYSIS[1:]
KINDS = (
    *(Kind(f"similarity_{name}", about, _READS, gpu=False) for name, about in MEASURES.items()),
    Kind(
        REDUNDANCY,
        "How much the inputs, outputs and gates of every two layers, and of every two modules, hold of each other "
        "(ALS): as printed, centred, and debiased.",
        _READS,
        gpu=False,
    ),
)


def similarity_steps() -> tuple[Step, ...]:
    """One step a measure of merging methods, and the redundancy that sparsity allocation reads."""
    worker = "compression_dags.similarity.workers"
    steps = [Step(f"similarity_{name}", VERSION, {}, _READS, f"{worker}:measure", name, gpu=False) for name in MEASURES]
    steps.append(Step(REDUNDANCY, REDUNDANCY_VERSION, {}, _READS, f"{worker}:redundancy", gpu=False))
    return tuple(steps)
