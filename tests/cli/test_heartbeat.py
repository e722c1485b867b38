"""What long work says while it runs, by a clock that the test moves."""

import logging
import threading

import pytest

from compression_dags import heartbeat
from compression_dags.heartbeat import EVERY, FIRST, Count, Work, spoken, tracked, working_on
from compression_dags.stage import bar


def test_work_is_named_when_it_lasts_and_then_once_a_minute():
    work = Work("recovered_weights stories260k|shortgpt-20", 0.0)
    assert work.due(FIRST - 1) is None
    assert work.due(FIRST) == "computing recovered_weights stories260k|shortgpt-20"
    assert work.due(FIRST + EVERY - 1) is None
    assert work.due(FIRST + EVERY) == "computing recovered_weights stories260k|shortgpt-20 (70 s so far)"
    work.counts += [Count("least squares", 24, 60.0, done=7), Count("rows", None, 100.0, done=2)]
    line = work.due(130.0)
    assert line == "computing recovered_weights stories260k|shortgpt-20: least squares 7/24, rows 2, 3 min left"
    work.counts[0].done = 0
    line = work.due(200.0)
    assert line is not None and "0/24" in line and "left" not in line, "no pace is known before the first step"


def test_a_live_bar_speaks_for_itself():
    work = Work("a", 0.0, live=True)
    assert work.due(FIRST) == "computing a", "a download has no bar"
    work.counts.append(Count("layers", 3, 0.0, done=1))
    assert work.due(FIRST + EVERY) is None


def test_steps_are_counted_and_forgotten(capsys):
    with working_on("a"):
        work = heartbeat._current.get()
        assert work is not None
        seen = []
        for outer in bar([1, 2], "outer"):
            for _ in tracked(iter("xyz"), "inner", 3):
                seen.append([(c.description, c.done, c.total) for c in work.counts])
            assert outer in (1, 2) and len(work.counts) == 1
        assert seen[-1] == [("outer", 1, 2), ("inner", 2, 3)] and work.counts == []
        with pytest.raises(KeyError):
            for _ in tracked([1], "broken"):
                raise KeyError
    assert heartbeat._current.get() is None
    assert capsys.readouterr().out == ""


def test_the_thread_speaks_while_the_work_is_silent(monkeypatch, caplog):
    said, spoke = [], threading.Event()
    monkeypatch.setattr(heartbeat, "FIRST", 0.0)
    monkeypatch.setattr(heartbeat.logger, "info", lambda *a: (said.append(a[0] % a[1:]), spoke.set()))
    with caplog.at_level(logging.INFO), working_on("base_model"):
        assert spoke.wait(60)
    assert said[0] == "computing base_model"
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_a_terminal_gets_a_bar_whatever_silences_other_bars(monkeypatch):
    """`TQDM_DISABLE` is for libraries."""
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TQDM_DISABLE", "1")
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    with working_on("merge_plan stories260k|cut-20"):
        assert list(bar(range(3), "layers")) == [0, 1, 2]
    assert "merge_plan stories260k|cut-20: layers" in shown.getvalue() and "3" in shown.getvalue()
    quiet = io.StringIO()
    monkeypatch.setattr("sys.stderr", quiet)
    assert list(bar(range(3), "layers")) == [0, 1, 2] and quiet.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "says"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (5340, "89 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, says):
    assert spoken(seconds) == says
