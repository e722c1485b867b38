"""`scorecard`: size and scores of a compressed model, beside the uncompressed one's."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import dagster as dg

from compression_dags.assets.evaluation import SAMPLES, eval_key
from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import GRID, Place
from compression_dags.assets.publishing import publish
from compression_dags.errors import InputError
from compression_dags.evaluation.samples import WRITTEN
from compression_dags.evaluation.tasks import Task
from compression_dags.provenance.artifacts import Request
from compression_dags.recipes import BASELINE
from compression_dags.reports.scorecard import make_scorecard
from compression_dags.resources.artifact_store import ArtifactStore, Build
from compression_dags.step import BASE

SCORECARD = "scorecard"
#: 2: with samples. 3: scores and sizes from files that digests cover; names the weights it is about.
CARD_VERSION = "3"


def scorecards(tasks: Sequence[Task]) -> dg.AssetsDefinition:
    """The asset `scorecard`, over all tasks that there are."""

    @dg.asset(
        name=SCORECARD,
        partitions_def=GRID,
        group_name="results",
        kinds={"json"},
        code_version=CARD_VERSION,
        deps=[BASE, COMPRESSED, *(eval_key(task.name) for task in tasks), SAMPLES],
        description="Layers, parameters, bytes and every score, with the change against the uncompressed model; what "
        "both write.",
    )
    def scorecard(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
        here = Place.of(context)
        request, build = card_work(store, tasks, here)
        weights = store.recall(COMPRESSED, str(here))
        produced = store.produce(request, build, context.run_id)
        return publish(store, SCORECARD, str(here), produced, recipe=weights.recipe if weights else None)

    return scorecard


def card_work(store: ArtifactStore, tasks: Iterable[Task], here: Place) -> tuple[Request, Build]:
    """What determines the scorecard of a partition as the store is now, and what makes it.

    Raises:
        InputError: the compressed model is not in the store.
    """
    base, weights = store.recall(BASE, here.base_model), store.recall(COMPRESSED, str(here))
    if base is None or weights is None:
        raise InputError(f"{COMPRESSED} of {here} is not in the store; materialize it first")
    found = {task.name: store.recall(eval_key(task.name), str(here)) for task in tasks}
    # a task that was not selected may still hold the score of older weights: it does not count
    scores = {n: a for n, a in found.items() if a and a.inputs["weights"] == weights.digest}
    written = store.recall(SAMPLES, str(here))
    written = written if written and written.inputs["weights"] == weights.digest else None
    dense = None
    if here.recipe != BASELINE:
        dense = store.recall(SCORECARD, str(Place(here.base_model, BASELINE)))
    inputs = {"weights": weights.digest, "base_model": base.digest} | {n: a.digest for n, a in scores.items()}
    inputs |= {"baseline": dense.digest} if dense else {}
    inputs |= {"samples": written.digest} if written else {}
    about = {"kind": weights.kind, "fingerprint": weights.fingerprint}

    def build(work: Any) -> dict[str, Any]:
        baseline = json.loads((dense.path / "scorecard.json").read_text()) if dense else None
        samples = json.loads((written.path / WRITTEN).read_text()) if written else None
        metrics = {name: artifact.metrics for name, artifact in scores.items()}
        card = make_scorecard(here.recipe, weights.size, base.size, metrics, baseline, samples)
        card["weights"] = about
        (work.out / "scorecard.json").write_text(json.dumps(card, indent=1, sort_keys=True))
        return {"layers": card["layers"], "parameters": card["parameters"], "bytes": card["bytes"], **card["flat"]}

    return Request(SCORECARD, CARD_VERSION, {"family": here.recipe, "weights": about}, inputs), build
