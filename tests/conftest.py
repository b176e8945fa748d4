"""What holds for all tests: results of stages and compiled engines are kept in folders of the run, never in the
user's cache, the latency guard runs where a test asks for it alone, and torch draws the same numbers in any order of
tests."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _caches_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # What tests make with `tempfile` goes with the run; their subprocesses follow the variable.
        scratch = str(tmp_path_factory.mktemp("scratch"))
        patch.setenv("TMPDIR", scratch)
        patch.setattr(tempfile, "tempdir", scratch)
        patch.setenv("QUANTEMPO_WORK", str(tmp_path_factory.mktemp("stages")))
        patch.setenv("QUANTEMPO_CACHE", str(tmp_path_factory.mktemp("engine-cache")))
        patch.setenv("QUANTEMPO_GUARD", "off")
        yield


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    if "torch" in sys.modules:  # its import takes seconds, and many tests go without
        sys.modules["torch"].manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the C++ runtime took, and whether it was left out."""
    reports = [
        report for outcome in ("passed", "failed", "skipped", "") for report in terminalreporter.stats.get(outcome, [])
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/cpp/")
    ]
    if not reports:
        return
    ran = {report.nodeid for report in reports if report.when == "call"}
    skipped = {report.nodeid for report in reports if report.outcome == "skipped"}
    built = Path(__file__).parent.parent / "build" / "cpp" / "seconds.txt"
    words = f"configured and built in {built.read_text().strip()} s; " if built.exists() else ""
    counts = f"{len(ran - skipped)} tests ran and {len(skipped)} were skipped"
    terminalreporter.section("C++ runtime")
    terminalreporter.line(f"{words}{counts}, {sum(report.duration for report in reports):.0f} s in all")
