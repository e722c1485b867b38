"""A run of the real asset graph that computes nothing: what every step would ask the store for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from graph_runs import run

from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.recipes import Recipe
from compression_dags.resources.artifact_store import ArtifactStore, Produced

_REQUESTS: list[Request] = []


class DryStore(ArtifactStore):
    """Answers every request with a stub, whose digest is the request's fingerprint, and writes the request down."""

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        path = self.root / "stub"
        inputs = next((r.inputs for r in _REQUESTS if r.fingerprint == fingerprint), None)
        if inputs is None:
            return None
        return Artifact(kind, fingerprint, fingerprint, path, {"serving": "not looked at"}, inputs)

    def produce(self, request, build, run_id=""):
        _REQUESTS.append(request)
        found = self.find(request.kind, request.fingerprint)
        assert found
        return Produced(found, False, 0.0)


@dataclass
class Dry:
    """Requests by `<recipe>/<asset>`, as one run made them."""

    requests: dict[str, Request] = field(default_factory=dict)

    def fingerprints(self, *endings: str) -> dict[str, str]:
        """Asset → fingerprint, of assets with one of these endings (all, without any)."""
        return {k: r.fingerprint for k, r in self.requests.items() if not endings or k.endswith(endings)}


def dry_run(home: Path, recipes: dict[str, Recipe], tasks=("heldout_stories",), model="stories260k") -> Dry:
    """What `run` of these recipes asks for, leaderboard and ledger aside."""
    _REQUESTS.clear()
    stub = home / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "samples.json").write_text(json.dumps({"prompts": [], "texts": []}))
    (stub / "size.json").write_text(json.dumps({"layers": 5, "parameters": 1, "bytes": 2, "context": 512}))
    found = run(home, recipes, tasks, model, {"store": DryStore(home=str(home))}, summary=False)
    asked = {r.fingerprint: r for r in _REQUESTS}
    return Dry(
        {
            f"{name}/{asset}": asked[said["fingerprint"]]
            for name, assets in found.items()
            for asset, said in assets.items()
        }
    )
