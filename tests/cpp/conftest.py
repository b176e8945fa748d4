"""The C++ runtime, built once per session where CMake and a compiler are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cpp_library import build_for_tests, engine_library


@pytest.fixture(scope="session")
def built() -> Path:
    """A build with the test programs; kept from run to run."""
    return build_for_tests()


@pytest.fixture(scope="session")
def ort_library() -> Path:
    """ONNX Runtime's shared library, as the Python package ships it."""
    return engine_library("ort")


@pytest.fixture(scope="session")
def openvino_library() -> Path:
    """OpenVINO's C library, as the Python package ships it."""
    return engine_library("openvino")
