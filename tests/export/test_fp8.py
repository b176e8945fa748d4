"""E4M3 rounding and weights: against ONNX Runtime's own quantizer, and against what theory allows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, run, sqnr_db

from quantempo.contracts.plan import Keep, Quantize
from quantempo.errors import PlanError
from quantempo.export.fp8 import LEAST_SCALE, fp8_scale, fp8_weight, fp8_weights, rounded, to_e4m3


def test_rounding_is_that_of_onnxruntime() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * np.exp2(np.arange(4096) % 24 - 14)
    values = np.concatenate([values, [0.0, 448, 449, 464, 465, 1e6, -1e6, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9]])
    maker = GraphMaker({"x": values.shape})
    one = maker.constant("one", np.float32(1))
    zero = maker.constant("zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    quantized = maker.op("QuantizeLinear", [maker.inputs["x"], one, zero], "q")
    model = maker.model(maker.op("DequantizeLinear", [quantized, one, zero], "y"))
    expected = run(model, {"x": values.astype(np.float32)}, optimize=False)[0]
    np.testing.assert_array_equal(rounded(values.astype(np.float32)), expected)


def test_every_e4m3_number_is_a_fixed_point() -> None:
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = numbers[np.isfinite(numbers)]
    np.testing.assert_array_equal(to_e4m3(finite).astype(np.float32), finite)


@pytest.mark.parametrize("largest", [1e-9, 1e-4, 0.3, 1.0, 7.77, 448.0, 5e4])
def test_a_scale_is_the_same_number_in_every_float_type(largest: float) -> None:
    scale = fp8_scale(np.float64(largest))
    assert scale.dtype == np.float32
    assert scale == scale.astype(np.float16).astype(np.float32) == scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert max(largest / 448, LEAST_SCALE) <= scale <= max(largest / 448, LEAST_SCALE) * (1 + 2.0**-7)


@pytest.mark.parametrize(("shape", "axis"), [((64, 24), 1), ((24, 8, 3, 3), 0)])
def test_a_weight_keeps_the_relative_error_of_the_format(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 0.02
    found = fp8_weight(weight, axis)
    assert found.values.dtype == ml_dtypes.float8_e4m3fn
    assert found.values.shape == shape
    assert found.scale.shape == (24,)
    # Uniform relative error in ±2^-4 at worst, spread over an octave: 31.6 dB for a smooth distribution.
    assert sqnr_db(weight, found.dequantized()) > 31
    # A plain scale is what the search starts from.
    columns = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
    plain = fp8_scale(columns.astype(np.float64)).reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
    naive = to_e4m3(weight / plain).astype(np.float32) * plain
    assert np.square(weight - found.dequantized()).sum() <= np.square(weight - naive).sum()


def test_compensation_lowers_the_output_error() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((512, 64)) @ rng.standard_normal((64, 64))
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    plain, better = fp8_weight(weight, 1), fp8_weight(weight, 1, x.T @ x)
    exact = x @ weight
    assert np.square(x @ better.dequantized() - exact).sum() < 0.8 * np.square(x @ plain.dequantized() - exact).sum()
    np.testing.assert_array_equal(better.scale, plain.scale)


def test_a_dead_channel_and_a_broken_weight() -> None:
    weight = np.ones((4, 2), np.float32)
    weight[:, 1] = 0
    found = fp8_weight(weight, 1)
    assert found.dead == (1,)
    assert np.all(found.scale > 0)
    weight[0, 0] = np.nan
    with pytest.raises(PlanError, match="NaN or infinity among the weights"):
        fp8_weight(weight, 1, where="a.weight")


def test_kept_sites_may_store_integers_and_fewer_bits_are_refused() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    y = maker.matmul(maker.matmul(maker.inputs["x"], 16, 16, "a"), 16, 16, "b")
    model: ir.Model = maker.model(y)
    plan = maker.plan(b=Keep("test", weight_storage="int8"))
    dtypes = {name: weight.values.dtype for name, weight in fp8_weights(model, plan).items()}
    assert dtypes == {"a.weight": ml_dtypes.float8_e4m3fn, "b.weight": np.int8}
    with pytest.raises(PlanError, match="8 and 8"):
        fp8_weights(model, maker.plan(Quantize(activation_bits=4)))
