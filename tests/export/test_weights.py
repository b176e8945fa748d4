"""INT8 weights: range, error, channels of zeros, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from support.quant_graphs import GraphMaker

from quantempo.contracts.plan import Keep, Quantize
from quantempo.errors import PlanError
from quantempo.export.weights import SCALE_FLOOR, quantize_weight, quantize_weights


def heavy_tailed(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_t(4, shape).astype(np.float32)


def error(weight: np.ndarray, axis: int, bits: int, method: str) -> np.ndarray:
    quantized = quantize_weight(weight, axis, bits, method)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    return np.square(quantized.dequantized() - weight).sum(others)


@pytest.mark.parametrize(("shape", "axis"), [((700, 300), 1), ((300, 20, 3, 3), 0), ((1, 5), 1), ((5, 1, 1, 1), 0)])
def test_min_max_rounds_each_weight_to_the_nearest_of_255_levels(shape: tuple[int, ...], axis: int) -> None:
    weight = heavy_tailed(shape)
    quantized = quantize_weight(weight, axis, method="minmax")
    others = tuple(a for a in range(weight.ndim) if a != axis)
    np.testing.assert_allclose(quantized.scale, np.abs(weight).max(others) / 127, rtol=1e-6)
    step = np.expand_dims(quantized.scale, others)
    assert quantized.values.dtype == np.int8
    assert quantized.values.shape == shape
    assert np.all(np.abs(quantized.dequantized() - weight) <= step * 0.5001)
    assert quantized.values.min() >= -127


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "share"), [(8, 1.0), (6, 0.96), (4, 0.7), (2, 0.5)])
def test_mse_search_loses_less_than_min_max_on_every_channel(axis: int, bits: int, share: float) -> None:
    weight = heavy_tailed((640, 200) if axis else (200, 640))
    searched, plain = error(weight, axis, bits, "mse"), error(weight, axis, bits, "minmax")
    assert np.all(searched <= plain * (1 + 1e-6))
    assert searched.sum() < plain.sum() * share


def test_both_axes_give_the_same_integers_for_a_transposed_weight() -> None:
    weight = heavy_tailed((333, 77))
    columns, rows = quantize_weight(weight, 1), quantize_weight(np.ascontiguousarray(weight.T), 0)
    np.testing.assert_array_equal(columns.values, rows.values.T)
    np.testing.assert_allclose(columns.scale, rows.scale, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_use_a_narrower_range_of_int8(bits: int) -> None:
    values = quantize_weight(heavy_tailed((64, 32)), 1, bits).values
    top = 2 ** (bits - 1) - 1
    assert (values.min(), values.max()) == (-top, top)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_channel_of_zeros_gets_the_least_scale_and_is_reported(method: str) -> None:
    weight = heavy_tailed((16, 6))
    weight[:, [1, 4]] = 0
    quantized = quantize_weight(weight, 1, 8, method)
    assert quantized.dead == (1, 4)
    assert quantized.scale[1] == SCALE_FLOOR > 0
    assert not quantized.values[:, [1, 4]].any()
    assert not quantize_weight(heavy_tailed((16, 6)), 1).dead


def test_column_sums_are_those_of_the_dequantized_weight() -> None:
    quantized = quantize_weight(heavy_tailed((50, 9)), 1)
    np.testing.assert_allclose(quantized.column_sums(), quantized.dequantized().sum(0), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = heavy_tailed((16, 6))
    weight[3, 2] = bad
    with pytest.raises(PlanError, match=r"weight 'w': found NaN or infinity .* wanted finite weights"):
        quantize_weight(weight, 1, where="weight 'w'")


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_bit_widths_are_refused(bits: int) -> None:
    with pytest.raises(PlanError, match=f"found weight_bits {bits}, wanted 2 to 8"):
        quantize_weight(heavy_tailed((16, 6)), 1, bits)


def test_a_plan_gets_the_weights_of_quantized_sites_and_of_kept_ones_with_int8_storage() -> None:
    maker = GraphMaker({"x": (2, 3, 8)})
    y = maker.matmul(maker.inputs["x"], 8, 16, "a")
    y = maker.matmul(y, 16, 8, "b")
    model = maker.model(maker.matmul(y, 8, 8, "c"))
    plan = maker.plan(Quantize(weight_bits=4), b=Keep("test"), c=Keep("test", weight_storage="int8"))
    weights = quantize_weights(model, plan)
    assert sorted(weights) == ["a.weight", "c.weight"]
    assert np.abs(weights["a.weight"].values).max() == 7
    assert np.abs(weights["c.weight"].values).max() == 127


def test_a_plan_of_another_graph_is_refused() -> None:
    maker, other = GraphMaker({"x": (2, 3, 8)}), GraphMaker({"x": (2, 3, 8)})
    maker.matmul(maker.inputs["x"], 8, 16, "a")
    model = other.model(other.matmul(other.inputs["x"], 8, 12, "a"))
    with pytest.raises(PlanError, match=r"site 'a', weight 'a.weight': found FLOAT of shape \[8, 12\]"):
        quantize_weights(model, maker.plan())
