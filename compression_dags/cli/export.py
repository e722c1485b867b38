"""`compression-dags export`: what was run, described as it was run, as a directory for the world outside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import Place
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.checkpoints.exporting import copy_checkpoint, new_directory
from compression_dags.cli.results import known_slug
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import Recipe, find_recipe, load_recipes
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.home import working
from compression_dags.step import BASE

#: What of a recipe decides the weights; its description and evaluations do not.
_DECIDES = ("calibration", "stages", "versions")


@dataclass(frozen=True)
class Exported:
    """What is exported: a scorecard, the weights that it is about, and the recipe as it was run."""

    slug: str
    recipe: dict[str, Any]
    base: Artifact
    weights: Artifact
    scores: dict[str, Any]
    lineage: dict[str, Artifact]


def export_checkpoint(home: Path, model: str, recipe: str, target: Path, *, as_run: bool = False) -> Path:
    """The folder with a copy of a recipe's last weights, a model card and `compression.json`. Both say the recipe as it
    was run.

    Args:
        as_run: export what was run though the recipe says something else now.

    Raises:
        InputError: not run yet, changed since, or the target is not an empty or new directory that can be written.
        IntegrityError: the stored weights are damaged; nothing was exported.
    """
    from compression_dags.provenance.decisions import join_ledger
    from compression_dags.reports.model_card import write_card

    with working(home):
        found = _found(home, model, recipe)
        if (changes := changes_since(found.recipe, find_recipe(load_recipes(), recipe))) and not as_run:
            raise InputError(
                f"recipe {recipe} has changed since it was run on {found.slug}: {changes[0]}; run it again, or export "
                "what was run with --as-run"
            )
        decisions = join_ledger("", [("", a) for a in found.lineage.values()])
        with new_directory(target, outside=home) as work:
            copy_checkpoint(found.weights, work)
            described = _described(found.lineage)
            write_card(work, found.recipe, found.slug, found.base, found.weights, described, found.scores, decisions)
    return target


def changes_since(as_run: Mapping[str, Any], present: Recipe | None) -> list[str]:
    """What a recipe file says now that was otherwise when it was run, a line each; nothing if the weights would be the
    same."""
    if present is None:
        return ["no recipe file has this name any more"]
    now = present.as_run()
    return [line for part in _DECIDES for line in _differences(as_run.get(part), now[part], part)]


def _differences(before: Any, now: Any, where: str) -> Iterator[str]:
    now = json.loads(json.dumps(now))  # tuples are lists in what was stored
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{where}.{i}")
    elif before != now:
        yield f"{where} was {json.dumps(before)}, is {json.dumps(now)}"


def _found(home: Path, model: str, recipe: str) -> Exported:
    store, slug = ArtifactStore(home=str(home)), known_slug(home, model)
    card, base = store.recall(SCORECARD, str(Place(slug, recipe))), store.recall(BASE, slug)
    if card is None or base is None or card.recipe is None:
        raise InputError(f"recipe {recipe} was not run on {slug}: compression-dags run -m {slug} -r {recipe}")
    scores = json.loads((card.path / "scorecard.json").read_text())
    about = scores["weights"]
    weights, damage = store.inspect(about["kind"], about["fingerprint"])
    if damage:
        raise IntegrityError(
            f"the stored {about['kind']} of {recipe} are damaged ({damage[0]}); nothing was exported, run it again"
        )
    if weights is None:
        raise InputError(f"the weights of {recipe} on {slug} are not stored any more: run the recipe again")
    lineage = lineage_of(store, slug, recipe, weights)
    return Exported(slug, card.recipe, base, weights, scores, lineage)


def lineage_of(store: ArtifactStore, slug: str, recipe: str, weights: Artifact) -> dict[str, Artifact]:
    """Asset key → artifact of everything that the weights were made from, in order, and of the weights themselves.

    Found by the digests of inputs, so that what a later run left under the same names does not count.
    """
    known = _by_digest(store, slug, recipe)
    found: dict[str, Artifact] = {}

    def visit(name: str, artifact: Artifact) -> None:
        for digest in artifact.inputs.values():
            if digest in known and known[digest][0] not in found:
                visit(*known[digest])
        found[name] = artifact

    visit(known.get(weights.digest, (weights.kind, weights))[0], weights)
    return found


def _by_digest(store: ArtifactStore, slug: str, recipe: str) -> dict[str, tuple[str, Artifact]]:
    """Digest → asset and artifact of all that a model's handles name; those of the recipe win."""
    found: dict[str, tuple[str, Artifact]] = {}
    own = str(Place(slug, recipe))
    for asset, partition in store.assets_of(slug):
        if asset == COMPRESSED:  # the same artifact as the last weights'
            continue
        artifact = store.recall(asset, partition)
        if artifact and (artifact.digest not in found or partition == own):
            found[artifact.digest] = (asset, artifact)
    return found


def _described(artifacts: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    return {
        key: {"fingerprint": a.fingerprint, "digest": a.digest, "run_id": a.run_id, "inputs": a.inputs}
        for key, a in artifacts.items()
    }


def changed_recipes(home: Path, slug: str, families: Sequence[str]) -> dict[str, str]:
    """Recipe → what changed since it was run on a model, of those on a leaderboard whose file says otherwise now."""
    store, present = ArtifactStore(home=str(home)), load_recipes()
    found = {}
    for name in families:
        card = store.recall(SCORECARD, str(Place(slug, name)))
        if card and card.recipe and (changes := changes_since(card.recipe, find_recipe(present, str(name)))):
            found[name] = changes[0]
    return found
