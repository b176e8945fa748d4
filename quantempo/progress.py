"""Progress of long stages: what runs and why, time left where the amount of work is known, and how long it took."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, TextIO, TypeVar

Advance = Callable[[int, int], None]
"""Called with (done, total)."""
LOGS = ("text", "json")
UPDATE_SECONDS, UPDATE_VARIABLE = 1.0, "QUANTEMPO_PROGRESS_SECONDS"
"""Least time between two progress lines of the JSON log, and the environment variable that sets another one."""


Item = TypeVar("Item")


def silent(done: int, total: int) -> None:
    """The `Advance` that tells nobody."""


def counted(items: Sequence[Item], advance: Advance) -> Iterator[Item]:
    """The items, each counted when the next one is asked for."""
    advance(0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        advance(done, len(items))


def parts(advance: Advance, *weights: float) -> tuple[Advance, ...]:
    """An `Advance` for each of several parts of a stage, one after the other.

    Args:
        advance: of the whole stage; it is told thousandths.
        weights: how the work is spread over the parts.
    """

    def part(before: float, weight: float) -> Advance:
        return lambda done, total: advance(round(1000 * (before + weight * done / max(total, 1)) / sum(weights)), 1000)

    return tuple(part(sum(weights[:index]), weight) for index, weight in enumerate(weights))


class Progress(Protocol):
    """Shows stages one after the other."""

    def stage(self, title: str, why: str = "") -> AbstractContextManager[Advance]:
        """A context manager; inside, the yielded function reports how far the stage is.

        Args:
            title: the stage.
            why: why it runs, where an earlier result could have been reused.
        """

    def reused(self, title: str, why: str) -> None:
        """An earlier result of a stage is taken."""

    def note(self, text: str) -> None:
        """Something that people should know, in one line."""


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, why: str = "") -> Iterator[Advance]:
        """See `Progress`."""
        yield silent

    def reused(self, title: str, why: str) -> None:
        """See `Progress`."""

    def note(self, text: str) -> None:
        """See `Progress`."""


class ConsoleProgress:
    """A live bar with the time left on a terminal, plain lines elsewhere; both on standard error."""

    @contextmanager
    def stage(self, title: str, why: str = "") -> Iterator[Advance]:
        """See `Progress`."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        started = time.perf_counter()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(title, total=None)
                begun: list[int] = []

                def advance(done: int, total: int) -> None:
                    if begun:
                        bar.update(task, completed=done, total=total)
                    else:  # what an earlier run did says nothing about the pace of this one
                        bar.reset(task, completed=done, total=total)
                        begun.append(done)

                yield advance
        else:
            yield silent
        self.note(f"{title}: {f'run ({why}), ' if why else ''}{time.perf_counter() - started:.1f} s")

    def reused(self, title: str, why: str) -> None:
        """See `Progress`."""
        self.note(f"{title}: reused ({why})")

    def note(self, text: str) -> None:
        """See `Progress`."""
        print(f"  {text}", file=sys.stderr, flush=True)


class JsonProgress:
    """One JSON object per line on standard error, for machines.

    Events: `start` (stage, why), `progress` (stage, done, total, seconds_left; at most one a second), `end` (stage,
    seconds), `reused` (stage, why), `note` (text).
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def _write(self, event: str, **facts: object) -> None:
        print(json.dumps({"event": event, **facts}), file=self._stream or sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, why: str = "") -> Iterator[Advance]:
        """See `Progress`."""
        started = time.perf_counter()
        shown = first_done = -1.0
        least = float(os.environ.get(UPDATE_VARIABLE) or UPDATE_SECONDS)
        first_time = started
        self._write("start", stage=title, **({"why": why} if why else {}))

        def advance(done: int, total: int) -> None:
            nonlocal shown, first_done, first_time
            now = time.perf_counter()
            if first_done < 0:  # what an earlier run did took no time in this one
                first_done, first_time = float(done), now
            if now - shown < least and done < total:
                return
            shown = now
            pace = (now - first_time) / (done - first_done) if done > first_done else None
            left = None if pace is None else round(pace * (total - done), 1)
            self._write("progress", stage=title, done=done, total=total, seconds_left=left)

        yield advance
        self._write("end", stage=title, seconds=round(time.perf_counter() - started, 3))

    def reused(self, title: str, why: str) -> None:
        """See `Progress`."""
        self._write("reused", stage=title, why=why)

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._write("note", text=text)


def console_progress(quiet: bool = False, log: Literal["text", "json"] = "text") -> Progress:
    """What the command line uses."""
    if quiet:
        return SilentProgress()
    return JsonProgress() if log == "json" else ConsoleProgress()
