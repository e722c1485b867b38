"""The decision ledger: one row for every choice that shaped a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compression_dags.provenance.artifacts import Artifact

if TYPE_CHECKING:
    import pandas as pd

Action = Literal["keep", "drop", "merge", "concat", "prune", "quantize", "recover", "reject"]
COLUMNS = ["stage", "method", "step", "target", "action", "sources", "value", "unit", "reason", "evidence"]
#: Which run decided is not among them: the store knows it by the fingerprint, and equal decisions are equal bytes.
LEDGER_COLUMNS = ["base_model", "recipe", *COLUMNS, "fingerprint"]


@dataclass(frozen=True)
class Decision:
    """One choice.

    Attributes:
        stage: merge, recover, sparsify or quantize.
        step: order in which the method decided.
        target: the layer or tensor decided upon, by its name in the model before the stage.
        sources: original layer indices that end up in the target.
        value, unit: the number that decided (block influence, angular distance, relative error, …).
        reason: one sentence that by itself says why this action for this target, with the numbers that decided.
        evidence: scores, alternatives considered, shares, held-out error before and after.
    """

    stage: str
    method: str
    step: int
    target: str
    action: Action
    sources: list[int]
    value: float | None
    unit: str
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_saved(cls, row: dict[str, Any]) -> Decision:
        """A row of a resumable step's state; one that was saved before reasons were recorded has an empty one."""
        return cls(**{"reason": "", **row})


def write_decisions(decisions: Sequence[Decision], path: Path) -> None:
    """Write rows as parquet; `evidence` becomes JSON text.

    What depends on who asked (base model, recipe, run) is not in the file: an artifact is shared by every recipe with
    the same inputs. `decision_ledger` joins those columns on.
    """
    # methods make decisions without pandas, which takes half a second
    import pandas as pd  # noqa: PLC0415

    rows = [{**asdict(d), "evidence": json.dumps(d.evidence, sort_keys=True)} for d in decisions]
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"step": "int64", "value": "float64"})
    frame.to_parquet(path, index=False)


def read_decisions(path: Path) -> pd.DataFrame:
    """Stored rows, of one artifact or of a ledger; `reason` is empty where they were stored before there was one."""
    # methods make decisions without pandas, which takes half a second
    import pandas as pd  # noqa: PLC0415

    frame = pd.read_parquet(path)
    if "reason" not in frame:
        frame.insert(list(frame.columns).index("unit") + 1, "reason", "")
    return frame


def join_ledger(base_model: str, artifacts: list[tuple[str, Artifact]]) -> pd.DataFrame:
    """The ledger of one base model: the decisions of (recipe, artifact) pairs with what identifies them.

    Returns:
        Columns `LEDGER_COLUMNS`, in recipe and pipeline order.
    """
    # methods make decisions without pandas, which takes half a second
    import pandas as pd  # noqa: PLC0415

    frames = []
    for recipe, artifact in artifacts:
        if artifact.decisions:
            rows = read_decisions(artifact.decisions)
            identity = {"base_model": base_model, "recipe": recipe}
            frames.append(rows.assign(**identity, fingerprint=artifact.fingerprint)[LEDGER_COLUMNS])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=LEDGER_COLUMNS)
