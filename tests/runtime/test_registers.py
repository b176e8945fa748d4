from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from quantempo.contracts.program import Clamp, Correct, Lin, Noise
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import PhiloxNoise, standard_normal

SHAPE = (2, 3, 4)
NOISE = PhiloxNoise.from_seeds(5, 2)


def filled(*names: str) -> Registers:
    registers = Registers(names, SHAPE)
    for index, name in enumerate(names):
        registers[name][...] = standard_normal(index, 0, 0, SHAPE)
    return registers


def reference(registers: Registers, terms: tuple[tuple[str, float], ...]) -> np.ndarray:
    """Element by element with Python floats, which are float64 and never contracted."""
    out = np.empty(SHAPE, np.float32)
    for place in np.ndindex(SHAPE):
        total = None
        for name, coefficient in terms:
            product = float(registers[name][place]) * coefficient
            total = product if total is None else total + product
        out[place] = np.float32(total)
    return out


@pytest.mark.parametrize(
    "terms",
    [
        (("a", 0.1), ("b", -1.7), ("c", 1e-3)), (("c", 1e-3), ("a", 0.1), ("b", -1.7)), (("b", 1.0),), (("b", 0.3),),
        (("a", 1.0), ("a", -1.0)), (("a", 1e8), ("b", 1.0), ("a", -1e8)),
    ],
)
def test_lin_is_float64_in_the_written_order_rounded_once(terms: tuple[tuple[str, float], ...]) -> None:
    registers = filled("a", "b", "c")
    wanted = reference(registers, terms)
    registers.apply(Lin("c", terms), NOISE)
    assert np.array_equal(registers["c"], wanted)


def test_the_rounding_is_that_of_the_exact_sum_of_two_products() -> None:
    """Two terms whose float32 evaluation would be wrong in the last place."""
    registers = filled("a", "b")
    a, b = registers["a"].copy(), registers["b"].copy()
    registers.apply(Lin("a", (("a", 0.5), ("b", 0.25))), NOISE)
    for place in np.ndindex(SHAPE):
        exact = Fraction(float(a[place])) / 2 + Fraction(float(b[place])) / 4
        assert registers["a"][place] == np.float32(float(exact))


def test_an_empty_lin_is_zero() -> None:
    registers = filled("a")
    registers.apply(Lin("a", ()), NOISE)
    assert not registers["a"].any()


def test_a_register_may_be_read_and_written_by_one_operation() -> None:
    registers = filled("a", "b")
    wanted = reference(registers, (("a", 2.0), ("b", -1.0)))
    registers.apply(Lin("a", (("a", 2.0), ("b", -1.0))), NOISE)
    assert np.array_equal(registers["a"], wanted)


def test_clamp_is_in_float32_and_may_work_in_place() -> None:
    registers = filled("a")
    before = registers["a"].copy()
    registers.apply(Clamp("a", "a", -0.1, 0.3), NOISE)
    assert np.array_equal(registers["a"], np.minimum(np.maximum(before, np.float32(-0.1)), np.float32(0.3)))
    assert registers["a"].max() == np.float32(0.3)


def test_noise_is_the_numbered_draw() -> None:
    registers = filled("a")
    registers.apply(Noise("a", 4), NOISE)
    assert np.array_equal(registers["a"][1], standard_normal(5, 1, 4, SHAPE[1:]))


def test_operations_write_in_place() -> None:
    registers = filled("a", "b")
    address = registers["a"].ctypes.data
    registers.apply(Lin("a", (("b", 0.5), ("a", 0.1))), NOISE)
    assert registers["a"].ctypes.data == address


def test_correct_is_an_affine_map_per_channel_in_float64_rounded_once() -> None:
    vectors = {"gain": standard_normal(8, 0, 0, (2, 3)), "bias": standard_normal(9, 0, 0, (2, 3))}
    registers = Registers(("a", "b"), SHAPE, vectors)
    registers["a"][...] = source = standard_normal(1, 0, 0, SHAPE)
    registers.apply(Correct("b", "a", "gain", "bias", 1), NOISE)
    wanted = np.empty(SHAPE, np.float32)
    for place in np.ndindex(SHAPE):
        gain, bias = float(vectors["gain"][1, place[1]]), float(vectors["bias"][1, place[1]])
        wanted[place] = np.float32(float(source[place]) * gain + bias)
    assert np.array_equal(registers["b"], wanted)
    assert not np.array_equal(wanted, source * vectors["gain"][1][:, None] + vectors["bias"][1][:, None]), (
        "float32 arithmetic would do as well, so the test shows nothing"
    )
    registers.apply(Correct("a", "a", "gain", "bias", 1), NOISE)
    assert np.array_equal(registers["a"], wanted), "in place"


def test_a_gain_of_one_and_a_bias_of_zero_change_nothing() -> None:
    registers = Registers(("a",), SHAPE, {"one": np.ones((1, 3), np.float32), "zero": np.zeros((1, 3), np.float32)})
    registers["a"][...] = before = standard_normal(1, 0, 0, SHAPE)
    registers.apply(Correct("a", "a", "one", "zero", 0), NOISE)
    assert np.array_equal(registers["a"], before)
