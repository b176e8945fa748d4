"""The C++ runtime from Python: its programs, each in a process of its own, so that a crash or a leak fails a test.

With `QUANTEMPO_CPP_SANITIZE` set to sanitizers (`address,undefined` or `thread`), the programs are built with them; see
tools/cpp_sanitizers.py.  `QUANTEMPO_CPP_BUILD` names a folder of programs to use instead, such as scripts that run
those of another processor in an emulator.  Where `CI` is set, a missing tool fails the tests that need it; elsewhere it
skips them.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "runtime" / "cpp"
SANITIZE = os.environ.get("QUANTEMPO_CPP_SANITIZE", "")
BUILT = os.environ.get("QUANTEMPO_CPP_BUILD", "")
SECONDS = "seconds.txt"
"""In a build folder: how long it took to configure and build from nothing."""

# CMake and Ninja may be those that pip installed beside this Python; the system's come first.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))


def missing(what: str) -> NoReturn:
    """End a test that needs something which is not here."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}, and CI must not leave the C++ runtime out", pytrace=False)
    pytest.skip(f"needs {what}")


def call(*words: object, **environment: str) -> str:
    """Run a program and return what it prints; its words are the test's when it fails."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def configure_and_build(folder: Path, *options: str) -> Path:
    """A build folder; what is up to date in it is kept.  Skips, or fails in CI, where there is no CMake or compiler.

    Tests run in several processes: one builds, the others wait for it.
    """
    if not shutil.which("cmake") or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        missing("CMake and a C++ compiler")
    json_headers = importlib.util.find_spec("nlohmann_json")
    if json_headers is not None and json_headers.origin is not None:
        options = (*options, f"-DNLOHMANN_JSON_INCLUDE={Path(json_headers.origin).parent / 'include'}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = not (folder / "CMakeCache.txt").exists()
        generator = ("-G", "Ninja") if shutil.which("ninja") and fresh else ()
        started = time.monotonic()
        call("cmake", "-S", SOURCE, "-B", folder, *generator, *options)
        call("cmake", "--build", folder, "-j", "2")
        if fresh:
            (folder / SECONDS).write_text(f"{time.monotonic() - started:.0f}\n")
    return folder


def build_for_tests() -> Path:
    """The library with its programs, as the environment says: for release, with sanitizers, or built elsewhere."""
    if BUILT:
        return Path(BUILT)
    if not SANITIZE:
        return configure_and_build(ROOT / "build" / "cpp", "-DQUANTEMPO_TESTS=ON")
    return configure_and_build(
        ROOT / "build" / f"cpp-{SANITIZE.split(',')[0]}", "-DQUANTEMPO_TESTS=ON", f"-DQUANTEMPO_SANITIZE={SANITIZE}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    )


def engine_library(engine: str) -> Path:
    """An engine's shared library, as its Python package ships it.  Skips, or fails in CI, where that is missing."""
    package, pattern = {
        "ort": ("onnxruntime", "capi/libonnxruntime.so.*"), "openvino": ("openvino", "libs/libopenvino_c.so*")
    }[engine]  # fmt: skip
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        missing(package)
    (library,) = Path(found.origin).parent.glob(pattern)
    return library


@dataclass(frozen=True)
class Sampler:
    """`quantempo-sample` of a build with an engine's library (`None`: where the system looks)."""

    build: Path
    library: Path | None
    engine: str = "ort"

    def run(self, bundle: Path, *words: object) -> subprocess.CompletedProcess[str]:
        """Run it with the CLI's words."""
        given = (*(("--library", self.library) if self.library else ()), "--quiet", "--threads", 1)
        command = [self.build / "quantempo-sample", bundle, "--engine", self.engine, *given, *words]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), f"{words}: exit {done.returncode}\n{done.stderr[-5000:]}"
        assert "Sanitizer" not in done.stderr, done.stderr[-5000:]
        return done

    def refusal(self, bundle: Path, *words: object) -> tuple[str, str]:
        """The name and the words of the error that a run ends with."""
        done = self.run(bundle, *words)
        assert done.returncode == 1, done.stderr
        name, _, said = done.stderr.removesuffix("\n").partition(": ")
        return name, said

    def latents(self, bundle: Path, shape: Sequence[int], folder: Path, *words: object) -> NDArray[np.float32]:
        """The final latents of a run."""
        file = folder / "latents.bin"
        done = self.run(bundle, "--latents", file, *words)
        assert done.returncode == 0, done.stderr
        values = np.fromfile(file, "<f4")
        return values.reshape(-1, *shape).astype(np.float32, copy=False)
