"""What holds for all tests: results of stages and compiled engines are kept in folders of the run, never in the
user's cache, and the latency guard runs where a test asks for it alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

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
