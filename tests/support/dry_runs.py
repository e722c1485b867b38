"""A run of the real asset graph that computes nothing: what every step would ask the store for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from compression_dags.assets.base_models import import_base_model
from compression_dags.assets.partitions import Place
from compression_dags.assets.recipe import register
from compression_dags.assets.selection import selection
from compression_dags.definitions import Settings, build
from compression_dags.evaluation.tasks import evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, Recipe
from compression_dags.resources.artifact_store import ArtifactStore, Produced
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE

_REQUESTS: list[Request] = []


class DryStore(ArtifactStore):
    """Answers every request with a stub, whose digest is the request's fingerprint, and writes the request down."""

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        inputs = next((r.inputs for r in _REQUESTS if r.fingerprint == fingerprint), None)
        stub = {"path": self.root / "stub", "facts": {"serving": "a stub"}}
        return None if inputs is None else Artifact(kind, fingerprint, fingerprint, **stub, inputs=inputs)

    def produce(self, request, build, run_id=""):
        _REQUESTS.append(request)
        found = self.find(request.kind, request.fingerprint)
        assert found
        return Produced(found, False, 0.0)


@dataclass
class Dry:
    """Requests by `<recipe>/<asset>`, `base_model` alone, as one run made them."""

    requests: dict[str, Request] = field(default_factory=dict)

    def fingerprints(self, *endings: str) -> dict[str, str]:
        """Key → fingerprint, of keys with one of these endings (all, without any)."""
        return {k: r.fingerprint for k, r in self.requests.items() if not endings or k.endswith(endings)}


def dry_run(home: Path, recipes: Mapping[str, Recipe], tasks=("heldout_stories",), model="stories260k") -> Dry:
    """What `run` of these recipes asks for, leaderboard and ledger aside."""
    _REQUESTS.clear()
    stub = home / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "plot.png").write_bytes(b"")
    (stub / "samples.json").write_text(json.dumps({"prompts": [], "texts": []}))
    (stub / "size.json").write_text(json.dumps({"layers": 5, "parameters": 1, "bytes": 2, "context": 512}))
    hub, store, settings = ModelHub(home=str(home)), DryStore(home=str(home)), Settings(home, device="cpu")
    slug = hub.resolve(model).slug
    asked = evaluation_book(PROJECT / "recipes").resolve(list(tasks))
    graph = build(asked, settings)
    definitions = dg.Definitions(
        assets=graph.assets, resources={**settings.resources(), "store": store}, executor=dg.in_process_executor
    )
    found: dict[str, str] = {BASE: import_base_model(store, hub, hub.resolve(model)).artifact.fingerprint}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_model", [slug])
        register(instance, store, {BASELINE: BASELINE_RECIPE, **recipes})
        for recipe in (BASELINE_RECIPE, *recipes.values()):
            result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance,
                partition_key=Place(slug, recipe.name).key,
                asset_selection=[dg.AssetKey(name) for name in selection(recipe, [task.name for task in asked])],
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
            for event in (e for e in result.all_events if e.is_step_materialization):
                key = f"{recipe.name}/{event.asset_key.to_user_string()}"
                found[key] = event.materialization.metadata["fingerprint"].value
    requests = {request.fingerprint: request for request in _REQUESTS}
    return Dry({key: requests[fingerprint] for key, fingerprint in found.items()})
