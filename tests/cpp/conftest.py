"""The C++ runtime, built once per session where CMake and a compiler are there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "runtime" / "cpp"
TOOLS = shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))
needs_compiler = pytest.mark.skipif(not TOOLS, reason="needs cmake and a C++ compiler")


def call(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program; its words are the test's when it fails."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def configure_and_build(folder: Path, *options: str) -> Path:
    """A build folder; what is up to date in it is kept."""
    if not TOOLS:
        pytest.skip("needs cmake and a C++ compiler")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    call("cmake", "-S", SOURCE, "-B", folder, *generator, *options)
    call("cmake", "--build", folder, "-j", "2")
    return folder


@pytest.fixture(scope="session")
def built() -> Path:
    """A release build with the test programs; kept from run to run."""
    return configure_and_build(ROOT / "build" / "cpp", "-DQUANTEMPO_TESTS=ON")


@pytest.fixture(scope="session")
def ort_library() -> Path:
    """ONNX Runtime's shared library, as the Python package ships it."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    (library,) = (Path(found.origin).parent / "capi").glob("libonnxruntime.so.*")
    return library
