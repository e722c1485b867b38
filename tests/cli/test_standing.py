"""A run of what is stored and known starts no Dagster run; whatever a run would change still starts one."""

import json
import os
import shutil
from pathlib import Path

import dagster as dg
import dagster_caches
import pytest

from compression_dags.assets.publishing import known_versions
from compression_dags.cli.run import Outcome, run_recipes
from compression_dags.definitions import Settings
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Session

dagster_caches.install()
NAME, SLUG = "cut-20", "stories260k"
HERE = f"{SLUG}|{NAME}"
RECIPE = """name: cut-20
description: {words}
calibration: {{sequences: 24, length: 128}}
stages:
  - merge: {{method: shortgpt, ratio: 0.20}}
evaluate: [heldout_stories]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standing")
    (folder / "recipes").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSION_DAGS_RECIPES", str(folder / "recipes"))
        patch.setenv("DAGSTER_HOME", str(folder / "home" / "dagster"))
        patch.setattr(Session, "score", lambda self, task, directory: {"perplexity@512": 10.0})  # another test's affair
        patch.setattr(Session, "samples", lambda self: ["a", "b", "c"])
        patch.setattr(Session, "guard", lambda *a: None)
        write(folder / "home", "as it was")
        run(folder / "home")
        yield folder / "home"


@pytest.fixture(autouse=True)
def settled(home):
    """Every test begins where nothing is left to do."""
    if started(home, lambda: run(home)):
        assert started(home, lambda: run(home)) == 0


def write(home: Path, words: str) -> None:
    (home.parent / "recipes" / f"{NAME}.yaml").write_text(RECIPE.format(words=words))


def run(home: Path, *, tasks: str | None = None) -> Outcome:
    return run_recipes(SLUG, [NAME], Settings(home, device="cpu"), tasks=tasks)


def runs(home: Path) -> int:
    if not (home / "dagster" / "history").is_dir():
        return 0
    with dg.DagsterInstance.get() as instance:
        return instance.get_runs_count()


def started(home: Path, do) -> int:
    """How many Dagster runs `do` starts."""
    before = runs(home)
    do()
    return runs(home) - before


def states(outcome: Outcome) -> set[str]:
    return {said["cache"] for made in outcome.assets.values() for said in made.values()}


def versions(asset: str) -> dict[str, str]:
    with dg.DagsterInstance.get() as instance:
        return known_versions(instance, asset, [HERE, SLUG])


def test_it_says_what_a_run_would_say(home, capsys):
    quiet = run(home)
    lines = capsys.readouterr().err.splitlines()
    shutil.rmtree(home / "dagster")
    loud = run(home)
    hits = {line for line in capsys.readouterr().err.splitlines() if line.startswith("hit ")}
    assert {line for line in lines if line.startswith("hit ")} == hits and len(hits) > 15
    assert states(quiet) == states(loud) == {"hit"}
    assert timeless(quiet) == timeless(loud)
    assert quiet.scoreboard() == loud.scoreboard() and quiet.report.read_bytes() == loud.report.read_bytes()


def timeless(outcome: Outcome) -> dict:
    found = outcome.to_json()
    for recipe in found["recipes"].values():
        for said in recipe["assets"].values():
            assert said.pop("seconds") >= 0
    return json.loads(json.dumps(found))


def test_a_deleted_dagster_folder_learns_everything_again(home):
    known = {asset: versions(asset) for asset in ("merge_plan", "compressed_model", "scorecard", "leaderboard")}
    assert all(known.values())
    shutil.rmtree(home / "dagster")
    assert started(home, lambda: run(home)) == 3
    assert {asset: versions(asset) for asset in known} == known


def test_a_wiped_asset_is_materialized_again(home):
    with dg.DagsterInstance.get() as instance:
        instance.wipe_assets([dg.AssetKey("merge_plan")])
    assert started(home, lambda: run(home)) == 1
    assert versions("merge_plan")


def test_other_words_in_a_recipe_reach_its_handles(home):
    write(home, "in other words")
    outcome = None

    def again():
        nonlocal outcome
        outcome = run(home)

    assert started(home, again) == 1
    assert outcome is not None and states(outcome) == {"hit"}
    held = ArtifactStore(home=str(home)).recall("scorecard", HERE)
    assert held is not None and held.recipe is not None and held.recipe["description"] == "in other words"


@pytest.mark.parametrize("asset", ["merge_plan", "compressed_model"])
def test_a_lost_handle_is_found_again(home, asset):
    handle = home / "handles" / asset / f"{HERE}.json"
    handle.unlink()
    assert started(home, lambda: run(home)) >= 1
    assert handle.is_file()


def test_a_vanished_scorecard_is_made_again(home):
    store = ArtifactStore(home=str(home))
    card = store.recall("scorecard", HERE)
    assert card is not None
    shutil.rmtree(card.path)
    assert "computed" in states(run(home))
    again = store.recall("scorecard", HERE)
    assert again is not None and again.digest == card.digest


def test_a_damaged_artifact_is_no_hit(home):
    store = ArtifactStore(home=str(home))
    samples = store.recall("samples", HERE)
    assert samples is not None
    file = samples.path / "samples.json"
    os.chmod(file, 0o644)
    file.write_text("{}")
    assert "rebuilt" in states(run(home))
    assert file.read_text() != "{}"


@pytest.mark.slow
def test_a_card_that_would_count_more_scores_is_made_again(home):
    """As after a run that scored another task and ended before its card."""
    handle = home / "handles" / "scorecard" / f"{HERE}.json"
    before = handle.read_text()
    run(home, tasks="heldout_stories,heldout_c4")
    after = handle.read_text()
    assert after != before
    handle.write_text(before)
    assert started(home, lambda: run(home)) >= 1
    assert handle.read_text() == after


def test_a_partition_whose_last_run_failed_is_run_again(home):
    with dg.DagsterInstance.get() as instance:
        last = instance.get_runs(dg.RunsFilter(tags={"dagster/partition": HERE}), limit=1)[0]
        tags = {"dagster/partition": HERE}
        instance.add_run(dg.DagsterRun(job_name=last.job_name, status=dg.DagsterRunStatus.FAILURE, tags=tags))
    assert started(home, lambda: run(home)) == 1


def test_the_summary_is_run_alone_where_only_it_would_change(home):
    """As after another process scored another recipe."""
    other = home / "handles" / "scorecard" / f"{SLUG}|other.json"
    shutil.copyfile(home / "handles" / "scorecard" / f"{HERE}.json", other)
    assert started(home, lambda: run(home)) == 1
    other.unlink()
    assert started(home, lambda: run(home)) == 1
