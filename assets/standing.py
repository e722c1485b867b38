"""What a run would give, where the store and Dagster have all of it already: then none need be started."""

import functools
import json
import time
from collections.abc import Mapping, Sequence

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG

from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import Place
from compression_dags.assets.publishing import known_versions
from compression_dags.assets.scorecard import SCORECARD, card_work
from compression_dags.assets.selection import Planner, selection
from compression_dags.assets.summary import summary_requests
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import Recipe
from compression_dags.recipes.pipeline import last_weights
from compression_dags.resources.artifact_store import Produced
from compression_dags.step import BASE

#: Asset → its stored artifact.
Hits = dict[str, Produced]


class Standing:
    """Answers whether a run on one base model would change anything in the store or in Dagster.

    The store is asked as a run asks it, when the question comes: a run of the baseline may change what others lack.

    Args:
        slug: the base model.
        recipes: names of those that will be asked about, so that Dagster is queried once for all of them.
    """

    def __init__(self, instance: dg.DagsterInstance, planner: Planner, slug: str, recipes: Sequence[str]):
        self.instance, self.planner, self.store, self.slug = instance, planner, planner.store, slug
        self._places = [str(Place(slug, name)) for name in recipes]
        self._versions = functools.cache(lambda asset: known_versions(instance, asset, [slug, *self._places]))

    def recipe(self, recipe: Recipe, tasks: Sequence[str]) -> Hits | None:
        """What a run of a recipe would give, if all of it is a hit that Dagster knows of; None if a run is due."""
        here = Place(self.slug, recipe.name)
        wanted = self._fingerprints(recipe, tasks, here)
        as_run = json.loads(json.dumps(recipe.as_run()))
        return self._hits(str(here), {asset: wanted.get(asset, "") for asset in selection(recipe, tasks)}, as_run)

    def summary(self) -> Hits | None:
        """`leaderboard` and `decision_ledger`, if a run would find just these; None if one is due."""
        requests = summary_requests(self.store, self.slug)
        return self._hits(self.slug, {asset: request.fingerprint for asset, request in requests.items()})

    def _fingerprints(self, recipe: Recipe, tasks: Sequence[str], here: Place) -> Mapping[str, str]:
        """Asset → fingerprint of what a run would find or make; nothing where one of them is not stored."""
        base = self.store.recall(BASE, self.slug)
        foreseen = self.planner.foreseen(recipe, tasks, base, self.slug)
        weights = self.store.recall(COMPRESSED, str(here))
        if base is None or weights is None or not all(each.stored for each in foreseen):
            return {}
        found = {BASE: base.fingerprint} | {each.asset: each.fingerprint for each in foreseen}
        # a card counts every score that is there, also of tasks that this run does not select
        card, _ = card_work(self.store, self.planner.tasks.values(), here)
        return found | {COMPRESSED: found[last_weights(recipe)], SCORECARD: card.fingerprint}

    def _hits(self, partition: str, wanted: Mapping[str, str], recipe: Mapping | None = None) -> Hits | None:
        """The artifacts of a partition, if its handles lead to `wanted`, made of `recipe`, and Dagster knows them."""
        found: Hits = {}
        for asset, fingerprint in wanted.items():
            start = time.monotonic()
            held = self.store.recall(asset, partition)
            if held is None or held.fingerprint != fingerprint or held.recipe != recipe:
                return None
            found[asset] = Produced(held, True, time.monotonic() - start)
        known = {asset: produced.artifact for asset, produced in found.items()}
        return found if self._knows(partition, known) else None

    def _knows(self, partition: str, artifacts: Mapping[str, Artifact]) -> bool:
        """Whether the latest materializations are these artifacts, and no later run ended in another way.

        Dagster's pages show a partition as failed until it is materialized again, so that a run has its use there.
        """
        if any(self._versions(asset).get(partition) != artifact.digest for asset, artifact in artifacts.items()):
            return False
        asked = dg.RunsFilter(tags={PARTITION_NAME_TAG: partition})
        return all(run.status == dg.DagsterRunStatus.SUCCESS for run in self.instance.get_runs(asked, limit=1))
