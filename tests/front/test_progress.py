from __future__ import annotations

import io
import json

import pytest

from quantempo import progress as module
from quantempo.progress import (
    ConsoleProgress,
    JsonProgress,
    Progress,
    SilentProgress,
    console_progress,
    counted,
    parts,
)


def run(shown: Progress) -> None:
    with shown.stage("calibrate", "changed: keep") as advance:
        for done in range(2, 5):
            advance(done, 4)
    shown.reused("plan", "same inputs")
    shown.note("a word")


def test_lines_say_what_ran_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    run(ConsoleProgress())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("  calibrate: run (changed: keep), 0.")
    assert lines[1:] == ["  plan: reused (same inputs)", "  a word"]


def test_a_stage_that_fails_has_no_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="boom"), ConsoleProgress().stage("calibrate"):
        raise ValueError("boom")
    assert capsys.readouterr().err == ""


def test_json_has_one_object_per_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 2.0
        return now[0]

    monkeypatch.setattr(module.time, "perf_counter", clock)
    stream = io.StringIO()
    run(JsonProgress(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert events == [
        {"event": "start", "stage": "calibrate", "why": "changed: keep"},
        {"event": "progress", "stage": "calibrate", "done": 2, "total": 4, "seconds_left": None},
        {"event": "progress", "stage": "calibrate", "done": 3, "total": 4, "seconds_left": 2.0},
        {"event": "progress", "stage": "calibrate", "done": 4, "total": 4, "seconds_left": 0.0},
        {"event": "end", "stage": "calibrate", "seconds": 8.0},
        {"event": "reused", "stage": "plan", "why": "same inputs"},
        {"event": "note", "text": "a word"},
    ]


def test_json_lines_are_rare_but_the_last_one_is_always_there() -> None:
    stream = io.StringIO()
    with JsonProgress(stream).stage("calibrate") as advance:
        for done in range(1001):
            advance(done, 1000)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[-2]["done"] == 1000
    assert len(lines) < 10


def test_parts_of_a_stage_add_up() -> None:
    told: list[tuple[int, int]] = []
    first, nothing, last = parts(lambda *seen: told.append(seen), 3, 0, 1)
    first(1, 2)
    first(2, 2)
    nothing(5, 5)
    last(0, 0)
    last(1, 1)
    assert told == [(375, 1000), (750, 1000), (750, 1000), (750, 1000), (1000, 1000)]


def test_items_are_counted_when_they_are_done() -> None:
    told: list[tuple[int, int]] = []
    for item in counted("ab", lambda *seen: told.append(seen)):
        assert told[-1] == (ord(item) - ord("a"), 2)
    assert told[-1] == (2, 2)


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console_progress(quiet=True)
    assert isinstance(shown, SilentProgress)
    run(shown)
    assert capsys.readouterr() == ("", "")
    assert isinstance(console_progress(log="json"), JsonProgress)
