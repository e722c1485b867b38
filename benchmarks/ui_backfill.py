"""A backfill of one evaluation over base models × recipes, launched as the UI does, finished by the daemon.

    python benchmarks/ui_backfill.py --folder /tmp/backfill

Makes a home with three base models and six recipes in a new folder, runs them all, opens the UI (`compression-dags ui`)
on it, and sends the mutation that the UI's button sends, through the guard. Then waits until GraphQL says that every
partition is materialized, and that one `summarise` run a base model has updated its leaderboard. Prints one JSON line.

There is no --tiny: it starts the UI, its daemon and 18 runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ui_rig import PROJECT, opened, until

MODELS = ("stories-a", "stories-b", "stories-c")
SIZES = "calibration: {sequences: 8, length: 64, samples: 64}\nevaluate: [heldout_stories]\n"
RECIPES = {
    "reverse-20": "merge: {method: reverse, ratio: 0.2}",
    "reverse-40": "merge: {method: reverse, ratio: 0.4}",
    "shortgpt-20": "merge: {method: shortgpt, ratio: 0.2}",
    "shortgpt-40": "merge: {method: shortgpt, ratio: 0.4}",
    "rtn-w8": "quantize: {method: rtn, scheme: W8A16}",
    "rtn-w4": "quantize: {method: rtn, scheme: W4A16, group_size: 32}",
}
TASK = "eval_heldout_c4"  # the recipes are scored by another task: nothing of it is stored
LAUNCH = """mutation Launch($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
STATUS = """query($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status numPartitions } } }"""
STATS = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  partitionStats { numMaterialized numFailed numMaterializing numPartitions } } } }"""
RUNS = """{ runsOrError(filter: {pipelineName: "summarise"}) { ... on Runs {
  results { status tags { key value } } } } }"""
SEEN = """query($key: AssetKeyInput!, $p: [String!]) { assetOrError(assetKey: $key) { ... on Asset {
  assetMaterializations(partitions: $p) { runId timestamp } } } }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made; must not be there")
    parser.add_argument("--patience", type=float, default=900, help="seconds until the backfill must be finished")
    options = parser.parse_args()
    folder = options.folder.absolute()
    environment = prepared(folder)
    with opened(folder / "home", environment) as ui:
        ask = ui.ask
        before = {model: ask(SEEN, key={"path": ["leaderboard"]}, p=[model]) for model in MODELS}
        start = time.monotonic()
        places = [f"{model}|{recipe}" for model in MODELS for recipe in RECIPES]
        params = {"assetSelection": [{"path": [TASK]}], "partitionNames": places, "tags": []}
        said = ask(LAUNCH, params=params)["launchPartitionBackfill"]
        assert said["__typename"] == "LaunchBackfillSuccess", said

        def finished() -> bool:
            status = ask(STATUS, id=said["backfillId"])["partitionBackfillOrError"]["status"]
            assert not status.startswith(("FAIL", "CANCEL")), status
            return status == "COMPLETED_SUCCESS"

        until(finished, options.patience, "the backfill")
        seconds = time.monotonic() - start
        stats = ask(STATS, key={"path": [TASK]})["assetNodeOrError"]["partitionStats"]
        assert (stats["numMaterialized"], stats["numFailed"]) == (len(places), 0), stats

        def summarised() -> list[str]:
            tags = [{t["key"]: t["value"] for t in run["tags"]} | run for run in summaries(ask)]
            return sorted(run["dagster/partition"] for run in tags if run["status"] == "SUCCESS")

        until(lambda: set(summarised()) >= set(MODELS), options.patience, "the leaderboards")
        time.sleep(60)  # a summary too many would come now
        assert summarised() == sorted(MODELS) and len(summaries(ask)) == len(MODELS), summaries(ask)
        after = {model: ask(SEEN, key={"path": ["leaderboard"]}, p=[model]) for model in MODELS}
        assert all(count(after[model]) == count(before[model]) + 1 for model in MODELS)
    print(json.dumps({"partitions": len(places), "ui_ready": ui.ready, "backfill": round(seconds, 1), "summaries": 3}))


def prepared(folder: Path) -> dict[str, str]:
    """The environment of the project's commands, once every recipe was run on every base model."""
    recipes = folder / "recipes"
    recipes.mkdir(parents=True)
    for name, stage in RECIPES.items():
        (recipes / f"{name}.yaml").write_text(f"name: {name}\n{SIZES}stages: [{stage}]\n")
    shutil.copyfile(PROJECT / "recipes" / "evaluation.yaml", recipes / "evaluation.yaml")
    environment = {**os.environ, "COMPRESSION_DAGS_RECIPES": str(recipes), "HF_HUB_OFFLINE": "1"}
    for name in MODELS:
        source = folder / "models" / name
        shutil.copytree(PROJECT / "models" / "stories260k", source)
        wanted = [word for recipe in RECIPES for word in ("-r", recipe)]
        command = ["run", "-m", str(source), "--name", name, *wanted, "--home", str(folder / "home")]
        subprocess.run(
            [sys.executable, "-m", "compression_dags.cli", *command], check=True, env=environment, cwd=PROJECT
        )
    return environment


def summaries(ask: Callable[..., Any]) -> list[dict[str, Any]]:
    return ask(RUNS)["runsOrError"]["results"]


def count(seen: dict[str, Any]) -> int:
    return len(seen["assetOrError"]["assetMaterializations"])


if __name__ == "__main__":
    main()
