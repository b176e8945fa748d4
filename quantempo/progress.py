"""Progress of long stages: one line per stage, with time left where the amount of work is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


class Progress(Protocol):
    """Shows stages one after the other."""

    def stage(self, title: str) -> AbstractContextManager[Advance]:
        """A context manager; inside, the yielded function reports how far the stage is."""


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """See `Progress`."""
        yield lambda done, total: None


class ConsoleProgress:
    """A live bar on a terminal, plain lines elsewhere; both on standard error."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """See `Progress`."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        started = time.perf_counter()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield lambda done, total: None
        print(f"  {title}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def console_progress() -> ConsoleProgress:
    """What the command line uses."""
    return ConsoleProgress()
