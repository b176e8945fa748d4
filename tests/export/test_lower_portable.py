"""The `portable` dialect: standard operators, constant symmetric scales, and the integers of the other dialect."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, count, min_max_table, run, sqnr_db, tap

from quantempo.contracts.plan import Keep, Quantize
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import AffineForm, lower_portable
from quantempo.export.lowering import LoweringOptions
from quantempo.export.weights import quantize_weights

SHAPES = {"x": (2, 6, 16), "t": (2, 12), "p": (2, 8, 9, 9)}


def data(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * (1 + seed) + 0.4).astype(np.float32) for n, s in SHAPES.items()}


GROUPS = [data(0), data(1), data(2)]


def single(kind: str) -> tuple[GraphMaker, ir.Model, str]:
    """One site: its maker, its graph and its input."""
    name = {"rank3": "x", "rank2": "t", "bare": "x"}.get(kind, "p")
    maker = GraphMaker({name: SHAPES[name]})
    x = maker.inputs[name]
    if kind.startswith("rank") or kind == "bare":
        y = maker.matmul(x, SHAPES[name][-1], 24, "a", rank=len(SHAPES[name]), bias=kind != "bare")
    else:
        y = maker.conv(x, 8, 16, "a", stride=2 if kind == "strided" else 1, group=2 if kind == "grouped" else 1)
    return maker, maker.model(y), name


KINDS = ["rank3", "rank2", "bare", "padded", "strided", "grouped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lower", [lower_ort, lower_portable])
def test_with_quantization_off_each_lowering_equals_the_float_graph(kind: str, lower: object) -> None:
    maker, model, name = single(kind)
    feeds = [{name: g[name]} for g in GROUPS]
    table = min_max_table(model, maker.plan(), feeds)
    assert callable(lower)
    lowered = lower(model, maker.plan(), table, options=LoweringOptions(quantization=False))
    for index in range(3):
        expected = run(model, feeds[index])[0]
        got = run(lowered, {**feeds[index], "scale_group": np.array(index)})[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_hold_the_same_integers_and_agree(kind: str, symmetric: bool) -> None:
    maker, model, name = single(kind)
    plan = maker.plan(Quantize(symmetric=symmetric))
    feeds = [{name: g[name]} for g in GROUPS]
    table, weights = min_max_table(model, plan, feeds), quantize_weights(model, plan)
    wide, narrow = lower_ort(model, plan, table, weights), lower_portable(model, plan, table, weights)
    is_conv = model.graph[0].op_type == "Conv"
    for index in range(3):
        feed = {**feeds[index], "scale_group": np.array(index)}
        unsigned = _quantized(wide, feed).astype(int)
        signed = _quantized(narrow, feed).astype(int)
        if symmetric or not is_conv:
            np.testing.assert_array_equal(unsigned - 128, signed)
        expected, a, b = run(model, feeds[index])[0], run(wide, feed)[0], run(narrow, feed)[0]
        assert sqnr_db(expected, a) > 35
        assert sqnr_db(expected, b) > 35
        if not is_conv:
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
        elif symmetric:
            # The `ort` dialect also quantizes the output; do the same by hand.
            bias = model.graph.initializers["a.bias"].const_value
            assert bias is not None
            output, offset = table.of("a.product"), bias.numpy()
            step, point = output.scale[index], output.zero_point[index]
            stored = np.clip(np.rint((b - offset) / step) + point, 0, 255)
            distance = np.abs((a - offset) / step + point - stored)
            assert distance.max() < 1.01
            assert (distance > 0.01).mean() < 0.01, "more than a few values on the border of two integers"


def _quantized(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    name = next(node.outputs[0].name for node in model.graph if node.op_type == "QuantizeLinear")
    assert name is not None
    return tap(model, feeds, [name])[name]


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits_hold_the_same_integers_in_both_dialects(bits: int) -> None:
    maker, model, name = single("rank3")
    plan = maker.plan(Quantize(activation_bits=bits))
    feeds = [{name: g[name]} for g in GROUPS]
    # Ranges of half the data, so that values are really clipped.
    table = min_max_table(model, plan, [{name: g[name] / 2} for g in GROUPS], bits)
    wide, narrow = lower_ort(model, plan, table), lower_portable(model, plan, table)
    for index in range(3):
        feed = {**feeds[index], "scale_group": np.array(index)}
        unsigned, signed = _quantized(wide, feed).astype(int), _quantized(narrow, feed).astype(int)
        np.testing.assert_array_equal(unsigned - 2 ** (bits - 1), signed)
        assert (unsigned.min(), unsigned.max()) == (0, 2**bits - 1)


def test_a_chain_of_sites_agrees_between_the_dialects_like_two_quantizations_of_one_model() -> None:
    maker = GraphMaker({"x": SHAPES["x"]})
    y = maker.matmul(maker.inputs["x"], 16, 32, "a")
    y = maker.matmul(maker.op("Relu", [y], "relu"), 32, 32, "b")
    model = maker.model(maker.matmul(y, 32, 16, "c"))
    feeds = [{"x": g["x"]} for g in GROUPS]
    plan = maker.plan()
    table = min_max_table(model, plan, feeds)
    for index in range(3):
        feed = {**feeds[index], "scale_group": np.array(index)}
        expected = run(model, feeds[index])[0]
        a, b = run(lower_ort(model, plan, table), feed)[0], run(lower_portable(model, plan, table), feed)[0]
        # A value on the border of two integers may fall to either side: compare as noise, not bit by bit.
        assert sqnr_db(a, b) > sqnr_db(expected, a) + 6


def test_the_graph_is_standard_onnx_with_constant_symmetric_scales() -> None:
    maker = GraphMaker({"x": SHAPES["x"], "p": SHAPES["p"]})
    y = maker.matmul(maker.inputs["x"], 16, 24, "a")
    model = maker.model(y, maker.conv(maker.inputs["p"], 8, 16, "c"))
    feeds = [{n: g[n] for n in ("x", "p")} for g in GROUPS]
    lowered = lower_portable(model, maker.plan(), min_max_table(model, maker.plan(), feeds))
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    assert {node.domain for node in lowered.graph} == {""}
    for node in lowered.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert all(v is not None and v.const_value is not None for v in node.inputs[1:])
            assert node.outputs[0].dtype in (ir.DataType.INT8, ir.DataType.FLOAT)
    assert count(lowered)["QuantizeLinear"] == 2
    assert not {"a.weight", "c.weight"} & set(lowered.graph.initializers)


def test_one_symmetric_group_needs_no_arithmetic_around_the_quantizer() -> None:
    maker, model, name = single("rank3")
    plan = maker.plan(Quantize(symmetric=True))
    lowered = lower_portable(model, plan, min_max_table(model, plan, [{name: GROUPS[0][name]}]))
    assert count(lowered) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    assert [value.name for value in lowered.graph.inputs] == [name, "scale_group"]


def test_the_affine_form_never_grows_a_value_and_undoes_itself() -> None:
    scale = np.array([0.5, 0.031, 7.0, 0.2], np.float32)
    form = AffineForm.of(scale, np.array([3, 128, 255, 90], np.int32), 8)
    assert form.base == np.float32(2.0**-6)
    assert 0.5 < form.shrink.max() <= 1.0
    np.testing.assert_allclose(form.shrink * form.grow, 1, rtol=1e-6)
    np.testing.assert_allclose(form.correction, (np.array([3, 128, 255, 90]) - 128) * scale, rtol=1e-6)


def test_all_single_numbers_come_out_of_one_look_up() -> None:
    maker = GraphMaker({"x": SHAPES["x"], "p": SHAPES["p"]})
    y = maker.matmul(maker.matmul(maker.inputs["x"], 16, 24, "a"), 24, 16, "b")
    model = maker.model(y, maker.conv(maker.inputs["p"], 8, 16, "c"))
    feeds = [{n: g[n] for n in ("x", "p")} for g in GROUPS]
    lowered = lower_portable(model, maker.plan(), min_max_table(model, maker.plan(), feeds))
    assert count(lowered)["Gather"] == count(lowered)["Split"] == 1
    numbers = next(node for node in lowered.graph if node.op_type == "Split").outputs
    # Two matrix products with shrink, offset, grow and correction, one convolution with shrink and grow.
    assert len(numbers) == 10
    assert all(list(value.uses()) for value in numbers)
    tables = [name for name in lowered.graph.initializers if name.endswith(".table")]
    assert tables == ["scalars.table"]


def test_offsets_are_exact_in_half_precision_wherever_groups_differ() -> None:
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.003, 0.3, 40).astype(np.float32)
    form = AffineForm.of(scale, rng.integers(0, 256, 40).astype(np.int32), 8)
    for half in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(form.offset.astype(half).astype(np.float32), form.offset)


def test_one_scale_is_kept_as_it_is() -> None:
    form = AffineForm.of(np.full(3, 0.3, np.float32), np.full(3, 7, np.int32), 8)
    assert form.base == np.float32(0.3)
    assert set(form.shrink) == set(form.grow) == {np.float32(1)}


def test_kept_sites_with_int8_storage_are_dequantized_by_the_standard_operator(tmp_path: Path) -> None:
    maker = GraphMaker({"x": SHAPES["x"]})
    model = maker.model(maker.matmul(maker.matmul(maker.inputs["x"], 16, 32, "a"), 32, 32, "b"))
    plan = maker.plan(b=Keep("sensitive", weight_storage="int8"))
    lowered = lower_portable(model, plan, min_max_table(model, plan, [{"x": GROUPS[0]["x"]}]))
    nodes = {node.outputs[0].name: node.op_type for node in lowered.graph}
    assert nodes["b.weight.dequantized"] == "DequantizeLinear"
    assert "b.weight" not in lowered.graph.initializers
