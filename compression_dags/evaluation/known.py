"""Known dense perplexities of the shipped models: a guard against scoring with a broken model, tokenizer or text."""

from __future__ import annotations

from collections.abc import Mapping

from compression_dags.errors import IntegrityError

TOLERANCE = 0.10
#: (base model, task) → the metrics it had under `recipes/evaluation.yaml`, in float32 (SmolLM2 on a GPU, the others on
#: the CPU). `windows` tells whether a measurement is comparable at all: with another `max_windows` or text the value is
#: another one. A new model gets its line here once its value has been measured with this code on this split.
DENSE: dict[tuple[str, str], dict[str, float]] = {
    ("novella-13m", "heldout_novels"): {"perplexity@512": 27.343, "windows": 24, "windows_available": 784},
    ("novella-13m", "heldout_c4"): {"perplexity@512": 48.095, "windows": 24, "windows_available": 241},
    ("novella-13m", "heldout_stories"): {"perplexity@512": 11.012, "windows": 24, "windows_available": 79},
    ("stories260k", "heldout_stories"): {"perplexity@512": 4.984, "windows": 24, "windows_available": 140},
    # of the validation split; the 22.24 that others report is of the test split
    ("smollm2-135m", "wikitext2"): {"perplexity@2048": 22.748, "windows": 130, "windows_available": 130},
}


def check_dense(slug: str, task: str, metrics: Mapping[str, float]) -> bool:
    """Compare a base model's perplexity with the recorded one.

    Args:
        slug: of the base model.
        task: name in `recipes/evaluation.yaml`.
        metrics: of `perplexity`.

    Returns:
        Whether there was a comparable record.

    Raises:
        IntegrityError: the perplexity is further than 10 % from the record.
    """
    known = DENSE.get((slug, task), {})
    windows = {key: value for key, value in known.items() if key.startswith("windows")}
    names = [name for name in known if name.startswith("perplexity@") and name in metrics]
    if not names or any(metrics.get(key) != value for key, value in windows.items()):
        return False
    for name in names:
        if not abs(metrics[name] / known[name] - 1) <= TOLERANCE:
            raise IntegrityError(
                f"the dense {slug} has {name} {metrics[name]:.4g} on {task}; known is {known[name]:.4g} ± "
                f"{TOLERANCE:.0%}: its weights, tokenizer or text are not the shipped ones, or computing is broken here"
            )
    return True
