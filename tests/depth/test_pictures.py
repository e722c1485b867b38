"""Every merge plan has one picture, drawn when it is published: the stored files stay as they are."""

import json
from pathlib import Path

import pytest

from compression_dags.assets.publishing import pictures
from compression_dags.depth.pictures import GOES, HOLDS, MERGED, STAYS, fates_of, plan_png
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions, keep_only
from compression_dags.provenance.artifacts import DECISIONS, Artifact
from compression_dags.provenance.decisions import Decision, write_decisions


@pytest.fixture
def stored(tmp_path: Path):
    """Stores a plan and its decision rows as the worker does."""

    def store(plan: MergePlan, decisions: list[Decision]) -> Path:
        plan.save(tmp_path)
        write_decisions(decisions, tmp_path / DECISIONS)
        return tmp_path

    return store


def test_a_layer_stays_goes_holds_others_or_is_merged_into_another():
    plan = MergePlan("m", 6, (PlannedLayer((0,)), PlannedLayer((1, 2), (0.5, 0.5)), PlannedLayer((5,))))
    assert fates_of(plan) == [STAYS, HOLDS, MERGED, GOES, GOES, STAYS]
    assert fates_of(MergePlan("m", 2, (PlannedLayer((0,), form="solved"),))) == [HOLDS, GOES]


def test_rows_a_layer_are_drawn_to_the_same_bytes(stored):
    plan = keep_only("shortgpt", 5, [0, 1, 3, 4])
    rows = depth_decisions(plan, [None, 0.3, 0.1, 0.2, None], "block influence", {}, ["why"] * 5)
    folder = stored(plan, rows)
    first = plan_png(folder)
    assert first.startswith(b"\x89PNG") and plan_png(folder) == first
    other = depth_decisions(plan, [None, 0.3, 0.1, 0.25, None], "block influence", {}, ["why"] * 5)
    write_decisions(other, folder / DECISIONS)
    assert plan_png(folder) != first


def test_rows_of_rounds_that_joined_several_layers_are_drawn(stored, monkeypatch: pytest.MonkeyPatch):
    plan = MergePlan("mka", 4, (PlannedLayer((0,)), PlannedLayer((1, 2), (0.5, 0.5), "solved"), PlannedLayer((3,))))
    rows = [
        Decision("merge", "mka", 0, "layers 1-2", "merge", [1, 2], 0.25, "nats a token", "why", {}),
        Decision("merge", "mka", 1, "layer 0", "keep", [0], None, "nats a token", "why", {}),
    ]
    drawn = {}
    monkeypatch.setattr(
        "compression_dags.depth.pictures.sorted_bars_png",
        lambda values, *rest: drawn.update(values=values, label=rest[-1]) or b"",
    )
    plan_png(stored(plan, rows))
    assert drawn == {"values": [None, 0.25, 0.25, None], "label": "nats a token"}


def test_the_page_of_a_plan_shows_it_and_nothing_is_stored(stored):
    plan = keep_only("reverse", 3, [0, 1])
    folder = stored(plan, depth_decisions(plan, [2.0, 1.0, 0.0], "layers after it", {}, ["why"] * 3))
    files = {path.name for path in folder.iterdir()}
    shown = pictures(Artifact("merge_plan", "f", "d", folder))
    assert "data:image/png;base64," in json.dumps(shown["plot"].value)
    assert files == {path.name for path in folder.iterdir()}
