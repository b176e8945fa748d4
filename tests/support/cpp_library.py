"""The C++ runtime from Python: the command line in a process of its own, the C interface through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "runtime" / "cpp"
TOOLS = shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))


def call(*words: object, **environment: str) -> str:
    """Run a program and return what it prints; its words are the test's when it fails."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def configure_and_build(folder: Path, *options: str) -> Path:
    """A build folder; what is up to date in it is kept.  Skips where there is no CMake or no compiler."""
    if not TOOLS:
        pytest.skip("needs cmake and a C++ compiler")
    fresh = not (folder / "CMakeCache.txt").exists()
    json_headers = importlib.util.find_spec("nlohmann_json")
    if json_headers is not None and json_headers.origin is not None:
        options = (*options, f"-DNLOHMANN_JSON_INCLUDE={Path(json_headers.origin).parent / 'include'}")
    generator = ("-G", "Ninja") if shutil.which("ninja") and fresh else ()
    call("cmake", "-S", SOURCE, "-B", folder, *generator, *options)
    call("cmake", "--build", folder, "-j", "2")
    return folder


def engine_library(engine: str) -> Path:
    """An engine's shared library, as its Python package ships it.  Skips where the package is not installed."""
    package, pattern = {
        "ort": ("onnxruntime", "capi/libonnxruntime.so.*"), "openvino": ("openvino", "libs/libopenvino_c.so*")
    }[engine]  # fmt: skip
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"needs {package}")
    (library,) = Path(found.origin).parent.glob(pattern)
    return library


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("library", ctypes.c_char_p),
        ("threads", ctypes.c_int32), ("dialect", ctypes.c_char_p), ("feature_cache", ctypes.c_char_p),
        ("settings", ctypes.c_void_p), ("settings_count", ctypes.c_size_t), ("notice", ctypes.c_void_p),
        ("notice_user", ctypes.c_void_p),
    ]  # fmt: skip


class Library:
    """`libquantempo`, opened in this process; meant for what needs no engine."""

    def __init__(self, build: Path) -> None:
        self.raw = ctypes.CDLL(str(build / "libquantempo.so"))
        for name in ("quantempo_last_error", "quantempo_status_name", "quantempo_backends"):
            getattr(self.raw, name).restype = ctypes.c_char_p
        self.raw.quantempo_open.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
        self.raw.quantempo_close.argtypes = [ctypes.c_void_p]

    def open(self, bundle: Path, **options: Any) -> tuple[str, str]:
        """Open and close a bundle: the name of the status, and the words of the error."""
        made, handle = OpenOptions(), ctypes.c_void_p()
        self.raw.quantempo_open_options_defaults(ctypes.byref(made))
        for name, value in options.items():
            setattr(made, name, value.encode() if isinstance(value, str) else value)
        status = self.raw.quantempo_open(str(bundle).encode(), ctypes.byref(made), ctypes.byref(handle))
        words = self.raw.quantempo_last_error().decode()
        self.raw.quantempo_close(handle)
        return self.raw.quantempo_status_name(status).decode(), words


@dataclass(frozen=True)
class Sampler:
    """`quantempo-sample` of a build with an engine's library."""

    build: Path
    library: Path
    engine: str = "ort"

    def run(self, bundle: Path, *words: object) -> subprocess.CompletedProcess[str]:
        """Run it with the CLI's words."""
        command = [
            self.build / "quantempo-sample", bundle, "--engine", self.engine, "--library", self.library, "--quiet",
            "--threads", 1, *words,
        ]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)

    def latents(self, bundle: Path, shape: Sequence[int], folder: Path, *words: object) -> NDArray[np.float32]:
        """The final latents of a run."""
        file = folder / "latents.bin"
        done = self.run(bundle, "--latents", file, *words)
        assert done.returncode == 0, done.stderr
        values = np.fromfile(file, "<f4")
        return values.reshape(-1, *shape).astype(np.float32, copy=False)
