"""A run of the real asset graph that computes nothing: what every step would ask the store for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from compression_dags.definitions import Settings, build_graph, evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.recipes import Recipe
from compression_dags.resources.artifact_store import ArtifactStore, HandleIO, Produced

_REQUESTS: list[Request] = []


class DryStore(ArtifactStore):
    """Answers every request with a stub, whose digest is the request's fingerprint, and writes the request down."""

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        path = self.root / "stub"
        inputs = next((r.inputs for r in _REQUESTS if r.fingerprint == fingerprint), None)
        return None if inputs is None else Artifact(kind, fingerprint, fingerprint, path, inputs=inputs)

    def produce(self, request, build, run_id=""):
        _REQUESTS.append(request)
        found = self.find(request.kind, request.fingerprint)
        assert found
        return Produced(found, False, 0.0)


@dataclass
class Dry:
    """Requests by asset key, as one run made them."""

    requests: dict[str, Request] = field(default_factory=dict)

    def fingerprints(self, *endings: str) -> dict[str, str]:
        """Asset key → fingerprint, of keys with one of these endings (all, without any)."""
        return {k: r.fingerprint for k, r in self.requests.items() if not endings or k.endswith(endings)}


def dry_run(home: Path, recipes: dict[str, Recipe], tasks=("heldout_stories",), model="stories260k") -> Dry:
    """What `run` of these recipes asks for, leaderboard and ledger aside."""
    from compression_dags.assets.base_models import base_models
    from compression_dags.resources.model_hub import ModelHub

    _REQUESTS.clear()
    stub = home / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "plot.png").write_bytes(b"")
    (stub / "samples.json").write_text(json.dumps({"prompts": [], "texts": []}))
    (stub / "size.json").write_text(json.dumps({"layers": 5, "parameters": 1, "bytes": 2, "context": 512}))
    hub = ModelHub(home=str(home))
    source = hub.resolve(model)
    hub.register(source)
    book = evaluation_book(PROJECT / "recipes")
    graph = build_graph(recipes, book, Settings(home, device="cpu"), book.resolve(list(tasks)))
    store = DryStore(home=str(home))
    resources = {**graph.definitions.resources, "store": store, "io_manager": HandleIO(store=store)}
    definitions = dg.Definitions(assets=graph.definitions.assets, resources=resources, executor=dg.in_process_executor)
    keys = [k for k in graph.keys(list(recipes), list(tasks)) if k not in graph.SUMMARY]
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(base_models.name or "", [source.slug])
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key=source.slug,
            asset_selection=keys,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    found = {r.fingerprint: r for r in _REQUESTS}
    events = [e for e in result.all_events if e.is_step_materialization]
    return Dry({e.asset_key.to_user_string(): found[e.materialization.metadata["fingerprint"].value] for e in events})
