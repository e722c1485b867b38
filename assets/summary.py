"""`leaderboard` and `decision_ledger` of one base model, over all recipes that have been run on it."""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS, Place
from compression_dags.assets.publishing import picture, publish
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.provenance.decisions import join_ledger
from compression_dags.recipes import BASELINE, recipe_of
from compression_dags.recipes.kinds import DECIDERS
from compression_dags.reports.html import write_report
from compression_dags.reports.scorecard import changes, leaderboard_frame
from compression_dags.resources.artifact_store import ArtifactStore, Build
from compression_dags.step import BASE, SIMILARITIES

LEADERBOARD, LEDGER = "leaderboard", "decision_ledger"
#: 2: its report shows what the models write. 3: what the report says of the model is an option; standard errors.
#: 4: changes are against the baseline's card as it is now.
VERSION = "4"
#: 2: two recoveries of one recipe are two inputs; runs are looked up, not stored.
LEDGER_VERSION = "2"
ABOUT = ("architecture", "licence")


@dg.asset(
    name=LEADERBOARD,
    partitions_def=BASE_MODELS,
    group_name="results",
    kinds={"pandas"},
    code_version=VERSION,
    deps=[BASE, SCORECARD],
    description="All recipes that were run, beside the uncompressed model: layers, parameters, bytes, scores, change.",
)
def leaderboard(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
    here = context.partition_key
    produced = store.produce(*_leaderboard_work(store, here), context.run_id)
    return publish(store, LEADERBOARD, here, produced, extra=_table(produced.artifact))


@dg.asset(
    name=LEDGER,
    partitions_def=BASE_MODELS,
    group_name="results",
    kinds={"parquet"},
    code_version=LEDGER_VERSION,
    deps=list(DECIDERS),
    description="Every decision of every recipe on a base model, one row each, with its evidence.",
)
def decision_ledger(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
    here = context.partition_key
    return publish(store, LEDGER, here, store.produce(*_ledger_work(store, here), context.run_id))


def summary_requests(store: ArtifactStore, base_model: str) -> dict[str, Request]:
    """Asset → what determines it as the store is now, of both assets.

    Raises:
        InputError: the base model is not in the store.
    """
    return {LEADERBOARD: _leaderboard_work(store, base_model)[0], LEDGER: _ledger_work(store, base_model)[0]}


def _leaderboard_work(store: ArtifactStore, here: str) -> tuple[Request, Build]:
    """What determines the leaderboard now, and what makes it."""
    base = store.recall(BASE, here)
    if base is None:
        raise InputError(f"{BASE} of {here} is not in the store; materialize it first")
    cards = dict(_made(store, here, SCORECARD))
    maps = _similarities(store, here)
    inputs = {name: a.digest for name, a in cards.items()} | {label: a.digest for label, a in maps.items()}
    # what the report says of the model beyond its digest
    about = {name: base.metadata.get(name) for name in ABOUT} | base.size

    def build(work: Any) -> dict[str, Any]:
        read = [json.loads((a.path / "scorecard.json").read_text()) | {"family": name} for name, a in cards.items()]
        dense = next((card["scores"] for card in read if card["family"] == BASELINE), {})
        for card in read:
            card["change"] = {} if card["family"] == BASELINE else changes(card["scores"], dense)
        frame = leaderboard_frame(read)
        frame.to_parquet(work.out / "leaderboard.parquet", index=False)
        plots = {label: (a.path / "plot.png").read_bytes() for label, a in maps.items()}
        write_report(work.out, here, about, read, plots)
        return {"recipes": len(cards) - (BASELINE in cards)}

    options = {"base_model": here, **about}
    return Request(LEADERBOARD, VERSION, options, {**inputs, "base_model": base.digest}), build


def _ledger_work(store: ArtifactStore, here: str) -> tuple[Request, Build]:
    """What determines the ledger now, and what makes it."""
    by_asset = {asset: dict(_made(store, here, asset)) for asset in DECIDERS}
    recipes = sorted({recipe for made in by_asset.values() for recipe in made})
    rows = [(r, asset, by_asset[asset][r]) for r in recipes for asset in DECIDERS if r in by_asset[asset]]
    inputs = {f"{recipe.replace('-', '_')}/{asset}": artifact.fingerprint for recipe, asset, artifact in rows}

    def build(work: Any) -> dict[str, Any]:
        ledger = join_ledger(here, [(recipe, artifact) for recipe, _, artifact in rows])
        ledger.to_parquet(work.out / "ledger.parquet", index=False)
        return {"rows": len(ledger), "recipes": ledger["recipe"].nunique()}

    return Request(LEDGER, LEDGER_VERSION, {"base_model": here}, inputs), build


def _made(store: ArtifactStore, base_model: str, asset: str) -> Iterator[tuple[str, Artifact]]:
    """Recipe and artifact of every recipe of which an asset was made, for its present form or the one run last."""
    for recipe in store.recipes_of(base_model, asset):
        if found := store.recall(asset, str(Place(base_model, recipe))):
            yield recipe, found


def _similarities(store: ArtifactStore, base_model: str) -> dict[str, Artifact]:
    """`<calibration>/<similarity>` → artifact, each set of calibration options once."""
    found: dict[str, Artifact] = {}
    for asset in SIMILARITIES:
        for _, artifact in _made(store, base_model, asset):
            label = recipe_of(artifact.recipe).calibration.slug if artifact.recipe else ""
            found.setdefault(f"{label}/{asset}", artifact)
    return found


def _table(artifact: Artifact) -> dict[str, Any]:
    # the command line starts without pandas, which takes half a second
    import pandas as pd  # noqa: PLC0415

    frame = pd.read_parquet(artifact.path / "leaderboard.parquet")
    rows = [dg.TableRecord({k: _cell(v) for k, v in row.items()}) for row in frame.to_dict("records")]
    plot = artifact.path / "scores.png"
    shown = {"plot": picture(plot.read_bytes())} if plot.exists() else {}
    return {"leaderboard": dg.MetadataValue.table(rows), **shown} if rows else shown


def _cell(value: Any) -> Any:
    if value is None or value != value:
        return ""
    return value if isinstance(value, (int, str)) else round(float(value), 6)
