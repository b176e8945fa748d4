"""The device's arithmetic is the host's, bit for bit: the same kernels, compiled for this machine."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.fake_tensorrt import FakeDevice

from quantempo.contracts.program import Clamp, Correct
from quantempo.engines import cuda_device
from quantempo.engines.cuda_device import compile_cubin
from quantempo.engines.device_math import SOURCE, DeviceMath
from quantempo.errors import EngineError, MissingExtra
from quantempo.runtime.guidance import Combine
from quantempo.runtime.registers import Registers

SHAPE = (3, 4, 6, 5)
COUNT = int(np.prod(SHAPE))


class Waiting(DeviceMath):
    """Waits after each kernel."""

    def _launch(self, kernel: str, count: int, *arguments: Any) -> None:
        super()._launch(kernel, count, *arguments)
        self._device.wait(7)  # type: ignore[attr-defined]  # the fake device has it


@pytest.fixture
def math() -> DeviceMath:
    return Waiting(FakeDevice(), 7)


def randoms(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def at(array: np.ndarray) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize("coefficients", [(), (1.0,), (0.3,), (0.9, -1.7, 1e-3), tuple(np.linspace(-2, 2, 16))])
def test_linear_forms(math: DeviceMath, coefficients: tuple[float, ...]) -> None:
    names = [f"r{i}" for i in range(len(coefficients))]
    registers = Registers(names, SHAPE)
    for index, name in enumerate(names):
        registers[name][...] = randoms(index)
    expected, found = np.empty(SHAPE, np.float32), np.full(SHAPE, 9, np.float32)
    registers.lin(tuple(zip(names, coefficients, strict=True)), expected)
    math.lin([(at(registers[n]), c) for n, c in zip(names, coefficients, strict=True)], at(found), COUNT)
    np.testing.assert_array_equal(found, expected)


def test_a_register_may_be_its_own_source(math: DeviceMath) -> None:
    values = randoms(1)
    expected = (values.astype(np.float64) * 0.7 + values.astype(np.float64) * 0.1).astype(np.float32)
    math.lin([(at(values), 0.7), (at(values), 0.1)], at(values), COUNT)
    np.testing.assert_array_equal(values, expected)


def test_too_many_terms_are_refused(math: DeviceMath) -> None:
    with pytest.raises(EngineError, match="17 terms, wanted at most 16"):
        math.lin([(0, 1.0)] * 17, 0, 1)


def test_clamps(math: DeviceMath) -> None:
    registers = Registers(["x", "y"], SHAPE)
    registers["x"][...] = randoms(2)
    registers["x"].reshape(-1)[:3] = np.nan, np.inf, -np.inf
    registers.apply(Clamp("y", "x", -0.7, 0.1), None)  # type: ignore[arg-type]  # draws no noise
    found = np.empty(SHAPE, np.float32)
    math.clamp(at(registers["x"]), -0.7, 0.1, at(found), COUNT)
    np.testing.assert_array_equal(found, registers["y"])


def test_corrections(math: DeviceMath) -> None:
    vectors = {"gain": randoms(3, (2, SHAPE[1])), "bias": randoms(4, (2, SHAPE[1]))}
    registers = Registers(["x", "y"], SHAPE, vectors)
    registers["x"][...] = randoms(5)
    registers.apply(Correct("y", "x", "gain", "bias", 1), None)  # type: ignore[arg-type]  # draws no noise
    found = np.empty(SHAPE, np.float32)
    gain, bias = vectors["gain"][1].copy(), vectors["bias"][1].copy()
    math.correct(at(registers["x"]), at(gain), at(bias), SHAPE[1], SHAPE[2] * SHAPE[3], at(found), COUNT)
    np.testing.assert_array_equal(found, registers["y"])


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scales", [(4.0, 1.5, 7.5), (1.0, 4.0, 1.0), (3.0, 1.0, 2.0)])
def test_guidance(math: DeviceMath, scales: tuple[float, ...], rescale: float) -> None:
    combine = Combine(scales, rescale, SHAPE[1:])
    conditional, unconditional = randoms(6), randoms(7, (len(combine.guided), *SHAPE[1:]))
    expected, found = np.empty(SHAPE, np.float32), np.empty(SHAPE, np.float32)
    combine(conditional, unconditional, expected)
    rows = np.full(len(scales), -1, np.int32)
    for row, (sample, _) in enumerate(combine.guided):
        rows[sample] = row
    weights = np.array(scales, np.float64)
    places = [at(array) for array in (conditional, unconditional, rows, weights, found)]
    math.guide(*places, (SHAPE[0], COUNT // SHAPE[0]), rescale)  # type: ignore[misc]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_87", "sm_89", "sm_90", "sm_120"])
def test_the_kernels_compile_for_every_device(architecture: str) -> None:
    assert compile_cubin(SOURCE, architecture)[:4] == b"\x7fELF"


def test_without_the_compiler_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("Failure finding libnvrtc.so")  # what cuda-bindings raises where only it is installed

    monkeypatch.setattr(cuda_device, "_bindings", lambda name: SimpleNamespace(nvrtcCreateProgram=missing))
    with pytest.raises(MissingExtra, match="nvidia-cuda-nvrtc"):
        compile_cubin(SOURCE, "sm_89")


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
def test_a_source_that_does_not_compile_is_quoted() -> None:
    with pytest.raises(EngineError, match="expected"):
        compile_cubin("nonsense", "sm_89")
