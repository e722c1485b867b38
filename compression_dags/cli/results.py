"""The CLI's reading verbs: leaderboard and decisions. They read the artifact store and compute nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from compression_dags.assets.summary import LEADERBOARD, LEDGER
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import read_decisions
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub


def known_slug(home: Path, model: str) -> str:
    """The slug of a model that this home knows.

    Raises:
        InputError: listing the known ones.
    """
    hub = ModelHub(home=str(home))
    known = hub.registered()
    if model in known:
        return model
    slug = hub.resolve(model).slug
    if slug not in known:
        raise InputError(f"model {model!r} is not in {home}; known: {', '.join(sorted(known)) or 'none'}")
    return slug


def leaderboards(home: Path, model: str | None) -> dict[str, pd.DataFrame]:
    """Slug → leaderboard of every model that has one."""
    store = ArtifactStore(home=str(home))
    slugs = [known_slug(home, model)] if model else sorted(ModelHub(home=str(home)).registered())
    found = {slug: store.recall(LEADERBOARD, slug) for slug in slugs}
    return {slug: pd.read_parquet(a.path / "leaderboard.parquet") for slug, a in found.items() if a}


def leaderboard_text(tables: dict[str, pd.DataFrame]) -> str:
    if not tables:
        return "nothing was run yet: compression-dags run -m MODEL -r RECIPE"
    return "\n\n".join(f"{slug}\n{_board(table)}" for slug, table in tables.items())


def _board(table: pd.DataFrame) -> str:
    """A leaderboard, and below it what recipes say otherwise now than when they were run."""
    from compression_dags.reports.scorecard import frame_text

    changed = table.pop("recipe_changed").dropna()
    notes = [f"{table['family'][i]} was run with another form of its recipe: {why}" for i, why in changed.items()]
    return "\n".join([frame_text(table), *notes])


def ledger(home: Path, model: str, recipe: str | None, stage: str | None) -> pd.DataFrame:
    """Decision rows of a model, of one recipe or stage if asked.

    Raises:
        InputError: unknown model, recipe or stage, or nothing run yet.
    """
    slug = known_slug(home, model)
    store = ArtifactStore(home=str(home))
    found = store.recall(LEDGER, slug)
    if found is None:
        raise InputError(f"no recipe was run on {slug} yet")
    frame = read_decisions(found.path / "ledger.parquet")
    runs = {f: store.run_of(f) for f in frame["fingerprint"].unique()}
    frame["run_id"] = [runs[f] for f in frame["fingerprint"]]
    for column, value in (("recipe", recipe), ("stage", stage)):
        if value is not None:
            allowed = sorted(set(frame[column]))
            if value not in allowed:
                raise InputError(f"{column} {value!r} has no decisions for {slug}; there are: {', '.join(allowed)}")
            frame = frame.loc[frame[column] == value]
    return frame


def ledger_text(frame: pd.DataFrame) -> str:
    """Rows as a table; the reason comes last, whole, and evidence is left to `--json`."""
    columns = ["recipe", "stage", "method", "target", "action", "value"]
    shown = frame.loc[:, columns].assign(value=[f"{v:.5g}" if pd.notna(v) else "" for v in frame["value"]])
    rows = [columns, *shown.astype(str).to_numpy().tolist()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    reasons = ["reason", *(r or "(stored before reasons were recorded)" for r in frame["reason"])]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{line}  {reason}" for line, reason in zip(lines, reasons, strict=True))
