"""Half-precision graphs: legal ONNX, the same function, and float32 where the bits are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, min_max_table, run, sqnr_db

from quantempo.export.float_types import OVERFLOW, to_half
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_fp8 import lower_fp8
from quantempo.export.lower_portable import lower_portable

SHAPES = {"sample": (2, 8, 9, 9), "timestep": (2,)}
KINDS = ("float16", "bfloat16")
LOWERINGS = {"portable": lower_portable, "fp8": lower_fp8}


def feeds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sample = (rng.standard_normal(SHAPES["sample"]) * (1 + seed)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([999.0, 7.0], np.float32)}


GROUPS = [feeds(0), feeds(1)]


def block() -> tuple[GraphMaker, ir.Model]:
    """A convolution, a sinusoid of the timestep with its projection, a norm, a matrix product."""
    maker = GraphMaker(SHAPES)
    angle = maker.op("Mul", [maker.inputs["timestep"], maker.constant("frequency", np.float32(0.7))], "angle")
    column = maker.op("Unsqueeze", [angle, maker.constant("axes", np.array([1]))], "column")
    waves = maker.op("Concat", [maker.op("Sin", [column], "sin"), maker.op("Cos", [column], "cos")], "waves", axis=1)
    embedding = maker.matmul(waves, 2, 16, "embed", rank=2)
    rows = maker.op("Unsqueeze", [embedding, maker.constant("last", np.array([2, 3]))], "rows")
    value = maker.op("Add", [maker.conv(maker.inputs["sample"], 8, 16, "conv"), rows], "sum")
    value = maker.op("Reshape", [value, maker.constant("flat", np.array([0, 16, 81]))], "flattened")
    value = maker.op("Transpose", [value], "tokens", perm=[0, 2, 1])
    unit, zero = maker.constant("unit", np.ones(16, np.float32)), maker.constant("zero", np.zeros(16, np.float32))
    value = maker.op("LayerNormalization", [value, unit, zero], "norm", axis=-1)
    made = maker.matmul(value, 16, 24, "out")
    return maker, maker.model(made)


def lowered(dialect: str) -> tuple[ir.Model, ir.Model]:
    maker, model = block()
    from quantempo.contracts.plan import Keep

    plan = maker.plan(embed=Keep("test"))
    return model, LOWERINGS[dialect](model, plan, min_max_table(model, plan, GROUPS))


def check(model: ir.Model, folder: Path) -> None:
    """The file passes ONNX's own checker, types of all values included."""
    write_graphs(folder, {"graph": model})
    onnx.checker.check_model(str(folder / "graph.onnx"), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", list(LOWERINGS))
def test_the_graph_is_legal_and_keeps_its_contract(dialect: str, kind: str, tmp_path: Path) -> None:
    model, graph = lowered(dialect)
    before = [(v.name, v.dtype) for v in (*graph.graph.inputs, *graph.graph.outputs)]
    original = [v.dtype for node in model.graph for v in node.outputs]
    converted = to_half(graph, kind, {})  # type: ignore[arg-type]
    check(graph, tmp_path)
    assert [(v.name, v.dtype) for v in (*graph.graph.inputs, *graph.graph.outputs)] == before
    assert converted.half > 10
    assert graph.metadata_props["quantempo.float_type"] == kind
    # The float graph shares type objects with its clone; it must not change.
    assert [v.dtype for node in model.graph for v in node.outputs] == original


@pytest.mark.parametrize("dialect", list(LOWERINGS))
def test_float16_computes_the_same(dialect: str) -> None:
    model, graph = lowered(dialect)
    given = {**GROUPS[1], "scale_group": np.array(1)}
    exact, floating = run(graph, given, optimize=False)[0], run(model, GROUPS[1])[0]
    to_half(graph, "float16", {})
    half = run(graph, given, optimize=False)[0]
    assert half.dtype == np.float32
    assert sqnr_db(exact, half) > 40
    assert sqnr_db(floating, half) > sqnr_db(floating, exact) - 1


def by_name(graph: ir.Model) -> Mapping[str, ir.Value]:
    return {str(v.name): v for node in graph.graph for v in node.outputs}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_a_quantizer_and_what_the_timestep_needs_stay_in_float32(kind: str) -> None:
    _, graph = lowered("portable")
    half = to_half(graph, kind, {})  # type: ignore[arg-type]
    values = by_name(graph)
    for name in ("norm.affine8.shrunk", "norm.affine8.shifted", "out.out", "sin", "cos", "angle"):
        assert values[name].dtype == ir.DataType.FLOAT, name
    for name in ("norm", "sum", "rows", "embed.product"):
        assert values[name].dtype == (ir.DataType.FLOAT16 if kind == "float16" else ir.DataType.BFLOAT16), name
    assert half.reasons["timestep"] == 5
    assert half.reasons["around a quantizer"] > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_means_the_same_on_both_sides_of_a_quantizer(kind: str) -> None:
    _, graph = lowered("portable")
    to_half(graph, kind, {})  # type: ignore[arg-type]
    pairs = 0
    for node in graph.graph:
        if node.op_type == "QuantizeLinear":
            (reader, _), *_ = node.outputs[0].uses()
            one, other = (v.inputs[1].const_value.numpy() for v in (node, reader))  # type: ignore[union-attr]
            assert np.float32(one) == np.float32(other)
            pairs += 1
    assert pairs == 2


def test_an_overflowing_tensor_stays_in_float32_with_its_neighbours(tmp_path: Path) -> None:
    _, graph = lowered("portable")
    converted = to_half(graph, "float16", {"sum": 2 * OVERFLOW, "tokens": OVERFLOW})
    values = by_name(graph)
    assert converted.reasons["overflow"] == 2
    assert values["sum"].dtype == values["flattened"].dtype == ir.DataType.FLOAT
    assert values["tokens"].dtype == ir.DataType.FLOAT16
    check(graph, tmp_path)
    _, wide = lowered("portable")
    assert "overflow" not in to_half(wide, "bfloat16", {"sum": 2 * OVERFLOW}).reasons


def test_a_product_that_overflows_gets_dequantizers_in_float32_and_no_cast(tmp_path: Path) -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    x = maker.inputs["x"]
    y = maker.op("Add", [maker.matmul(x, 16, 16, "a", bias=False), maker.matmul(x, 16, 16, "b", bias=False)], "y")
    model, plan = maker.model(y), maker.plan()
    given = {"x": np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)}
    graph = lower_portable(model, plan, min_max_table(model, plan, [given]))
    to_half(graph, "float16", {"a.product": 1e5})
    values = by_name(graph)
    assert values["a.product"].dtype == ir.DataType.FLOAT
    for name, kind in (("a.product", ir.DataType.FLOAT), ("b.product", ir.DataType.FLOAT16)):
        product = next(node for node in graph.graph if node.outputs[0].name in (name, f"{name}.product"))
        for value in product.inputs:
            maker_node = value.producer()  # type: ignore[union-attr]
            assert maker_node is not None
            assert (maker_node.op_type, value.dtype) == ("DequantizeLinear", kind)  # type: ignore[union-attr]
    check(graph, tmp_path)


def test_constants_that_half_precision_cannot_hold_keep_their_nodes() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    x = maker.inputs["x"]
    tiny = maker.op("Add", [x, maker.constant("tiny", np.float32(1e-15))], "with_epsilon")
    large = maker.op("Mul", [tiny, maker.constant("large", np.float32(1e6))], "with_large")
    model = maker.model(maker.op("Add", [large, x], "y"))
    copy = model.clone()
    assert to_half(model, "float16", {}).reasons == {"constant": 2}
    assert to_half(copy, "bfloat16", {}).reasons == {}


def test_small_int8_scales_keep_their_bits_in_float16() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    model = maker.model(maker.matmul(maker.inputs["x"], 16, 16, "a", bias=False))
    weight = model.graph.initializers["a.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1e-4, name="a.weight")  # type: ignore[union-attr]
    plan = maker.plan()
    given = {"x": np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)}
    graph = lower_portable(model, plan, min_max_table(model, plan, [given]))
    assert to_half(graph, "float16", {}).reasons["scale"] == 1
    got = run(graph, {**given, "scale_group": np.array(0)}, optimize=False)[0]
    assert sqnr_db(run(model, given)[0], got) > 35


def test_bfloat16_names_the_operator_set_that_has_its_convolution() -> None:
    _, graph = lowered("portable")
    to_half(graph, "bfloat16", {})
    assert graph.opset_imports[""] == 22
    stored = {v.const_value.dtype for v in graph.graph.initializers.values() if v.const_value is not None}
    assert ir.DataType.BFLOAT16 in stored
    assert ml_dtypes.bfloat16(1.0) == 1
