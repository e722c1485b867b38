"""`leaderboard` and `decision_ledger` of one base model, over all recipes that have been run on it."""

import json
from collections.abc import Sequence

import dagster as dg

from compression_dags.assets.base_models import base_model, base_models
from compression_dags.assets.publishing import picture, publish
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.resources.artifact_store import ArtifactStore

#: Of the leaderboard. 2: its report shows what the models write. 3: what the report says of the model is an option;
#: standard errors.
VERSION = "3"
#: 2: two recoveries of one recipe are two inputs; runs are looked up, not stored.
LEDGER_VERSION = "2"
ABOUT = ("architecture", "licence")


def build_leaderboard(scorecards: dict[str, dg.AssetKey], similarities: Sequence[dg.AssetKey]) -> dg.AssetsDefinition:
    """`scorecards`: recipe name → key, the baseline included. Recipes that were not run yet are left out."""

    @dg.asset(
        partitions_def=base_models,
        group_name="results",
        kinds={"pandas"},
        code_version=VERSION,
        ins={"base": dg.AssetIn(base_model.key)},
        deps=list(scorecards.values()),
        description="All recipes beside the uncompressed model: layers, parameters, bytes, scores, change.",
    )
    def leaderboard(context: dg.AssetExecutionContext, store: ArtifactStore, base: Artifact) -> dg.Output[Artifact]:
        here = context.partition_key
        found = {name: store.recall(key, here) for name, key in scorecards.items()}
        cards = {name: a for name, a in found.items() if a}
        maps = {key: a for key in similarities if (a := store.recall(key, here))}
        inputs = {name: a.digest for name, a in cards.items()}
        inputs |= {key.to_user_string(): a.digest for key, a in maps.items()} | {"base_model": base.digest}
        # what the report says of the model beyond its digest
        about = {name: base.facts.get(name) for name in ABOUT} | base.size

        def build(work):
            from compression_dags.reports.report import write_report
            from compression_dags.reports.scorecard import leaderboard_frame

            read = [json.loads((a.path / "scorecard.json").read_text()) | {"family": name} for name, a in cards.items()]
            frame = leaderboard_frame(read)
            frame.to_parquet(work.out / "leaderboard.parquet", index=False)
            plots = {key.to_user_string(): (a.path / "plot.png").read_bytes() for key, a in maps.items()}
            write_report(work.out, here, about, read, plots)
            return {"recipes": len(cards) - ("baseline" in cards)}

        def table(artifact: Artifact) -> dict:
            import pandas as pd

            frame = pd.read_parquet(artifact.path / "leaderboard.parquet")
            rows = [dg.TableRecord({k: _cell(v) for k, v in row.items()}) for row in frame.to_dict("records")]
            plot = artifact.path / "scores.png"
            shown = {"plot": picture(plot.read_bytes())} if plot.exists() else {}
            return {"leaderboard": dg.MetadataValue.table(rows), **shown} if rows else shown

        return publish(
            context, store, Request("leaderboard", VERSION, {"base_model": here, **about}, inputs), build, extra=table
        )

    return leaderboard


def build_decision_ledger(deciders: dict[str, list[dg.AssetKey]]) -> dg.AssetsDefinition:
    """`deciders`: recipe name → assets that decide something, in pipeline order."""

    @dg.asset(
        partitions_def=base_models,
        group_name="results",
        kinds={"parquet"},
        code_version=LEDGER_VERSION,
        deps=[key for keys in deciders.values() for key in keys],
        description="Every decision of every recipe on a base model, one row each, with its evidence.",
    )
    def decision_ledger(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.Output[Artifact]:
        here = context.partition_key
        found = {k: a for keys in deciders.values() for k in keys if (a := store.recall(k, here))}
        rows = [(recipe, found[k]) for recipe, keys in deciders.items() for k in keys if k in found]
        inputs = {key.to_user_string(): a.fingerprint for key, a in found.items()}

        def build(work):
            from compression_dags.provenance.decisions import join_ledger

            ledger = join_ledger(here, rows)
            ledger.to_parquet(work.out / "ledger.parquet", index=False)
            return {"rows": len(ledger), "recipes": ledger["recipe"].nunique()}

        return publish(context, store, Request("decision_ledger", LEDGER_VERSION, {"base_model": here}, inputs), build)

    return decision_ledger


def _cell(value):
    if value is None or value != value:
        return ""
    return value if isinstance(value, (int, str)) else round(float(value), 6)
