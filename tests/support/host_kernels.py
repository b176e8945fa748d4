"""The device's kernels, compiled as C++ for this machine."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantempo.engines.device_math import HOST, SOURCE


@functools.cache
def host_kernels() -> ctypes.CDLL:
    """The library; the test is skipped where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    with tempfile.TemporaryDirectory(prefix="quantempo-kernels-") as name:
        folder = Path(name)
        (folder / "kernels.cpp").write_text(HOST + SOURCE)
        command = [compiler, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror", "-o", "kernels.so"]
        subprocess.run([*command, "kernels.cpp"], cwd=folder, check=True)
        return ctypes.CDLL(str(folder / "kernels.so"))


def launch(source: str, kernel: str, count: int, arguments: Sequence[Any]) -> None:
    """Call a kernel as a C function, which loops over its elements."""
    assert source == SOURCE
    assert arguments[0].value == count
    getattr(host_kernels(), kernel)(*arguments)
