"""The `ort` dialect: right numbers, right operators, right refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, count, min_max_table, optimized, run, sqnr_db, tap

from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import NoSites, PlanError, ScaleMissing
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lowering import LoweringOptions
from quantempo.export.weights import quantize_weights


def mixed() -> GraphMaker:
    """Rank-3 and rank-2 products, with and without bias, one tensor read thrice, strided and grouped Conv."""
    return GraphMaker({"x": (2, 6, 16), "t": (2, 12), "p": (2, 8, 9, 9)})


def build(maker: GraphMaker) -> ir.Model:
    x, t, p = maker.inputs.values()
    q, k, v = (maker.matmul(x, 16, 24, f"block.to_{n}", bias=n != "k") for n in "qkv")
    mixture = maker.op("Add", [maker.op("Mul", [q, k], "qk"), v], "mixture")
    gate = maker.op("Relu", [maker.matmul(t, 12, 24, "time", rank=2)], "gate")
    y = maker.op("Add", [maker.matmul(mixture, 24, 24, "block.out"), gate_row(maker, gate)], "sum")
    c = maker.conv(p, 8, 16, "conv_in", stride=2)
    c = maker.conv(maker.op("Relu", [c], "c.relu"), 16, 16, "conv_grouped", group=4)
    c = maker.conv(c, 16, 8, "conv_1x1", size=1)
    return maker.model(y, c)


def gate_row(maker: GraphMaker, gate: ir.Value) -> ir.Value:
    return maker.op("Unsqueeze", [gate, maker.constant("axes", np.array([1]))], "gate.row")


def feeds(seed: int, shift: float = 0.3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (2, 6, 16), "t": (2, 12), "p": (2, 8, 9, 9)}
    return {n: (rng.standard_normal(s) * (1 + seed) + shift).astype(np.float32) for n, s in shapes.items()}


GROUPS = [feeds(0), feeds(1), feeds(2)]


def group(index: int) -> dict[str, np.ndarray]:
    return {**GROUPS[index], "scale_group": np.array(index)}


@pytest.fixture(scope="module")
def setup() -> tuple[ir.Model, QuantPlan, ScaleTable]:
    maker = mixed()
    model = build(maker)
    plan = maker.plan(**{"block.to_k": Share("block.to_q")})
    return model, plan, min_max_table(model, plan, GROUPS)


def test_with_quantization_off_it_equals_the_float_graph(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    lowered = lower_ort(model, plan, table, options=LoweringOptions(quantization=False))
    for expected, got in zip(run(model, GROUPS[1]), run(lowered, group(1)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_group_is_close_to_the_float_graph_on_the_data_of_that_group(
    setup: tuple[ir.Model, QuantPlan, ScaleTable], index: int
) -> None:
    model, plan, table = setup
    lowered = lower_ort(model, plan, table)
    for expected, got in zip(run(model, GROUPS[index]), run(lowered, group(index)), strict=True):
        assert got.shape == expected.shape
        assert sqnr_db(expected, got) > 30


def test_a_foreign_group_is_worse(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    lowered = lower_ort(model, plan, table)
    expected, own = run(model, GROUPS[2])[0], run(lowered, group(2))[0]
    foreign = run(lowered, {**GROUPS[2], "scale_group": np.array(0)})[0]
    assert sqnr_db(expected, foreign) < sqnr_db(expected, own) - 10


def test_a_baked_group_gives_the_bits_of_the_looked_up_one(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    baked = lower_ort(model, plan, table, options=LoweringOptions(group=1))
    assert "scale_group" not in [value.name for value in baked.graph.inputs]
    for a, b in zip(run(baked, GROUPS[1]), run(lower_ort(model, plan, table), group(1)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_onnx_runtime_runs_has_one_integer_kernel_per_site_and_no_dequantized_weight(
    setup: tuple[ir.Model, QuantPlan, ScaleTable], tmp_path: Path
) -> None:
    model, plan, table = setup
    final = optimized(lower_ort(model, plan, table), tmp_path)
    nodes = count(final)
    assert nodes["MatMulIntegerToFloat"] == sum(site.op == "matmul" for site in plan.quantized()) == 5
    assert nodes["QLinearConv"] == sum(site.op == "conv" for site in plan.quantized()) == 3
    assert not {"MatMul", "Gemm", "Conv", "FusedConv", "MatMulNBits"} & set(nodes)
    for node in final.graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if node.op_type in ("MatMul", "Gemm", "Conv") and producer is not None:
                assert producer.op_type != "DequantizeLinear"


def test_sites_that_read_one_tensor_share_one_quantizer(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    nodes = count(lower_ort(model, plan, table))
    # x, mixture, t and three convolution inputs; the outputs of the convolutions are not quantized again.
    assert nodes["QuantizeLinear"] == 6
    assert nodes["Gather"] == nodes["Split"] == 2


def test_the_float_graph_is_left_alone_and_float_weights_are_gone(
    setup: tuple[ir.Model, QuantPlan, ScaleTable],
) -> None:
    model, plan, table = setup
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lowered = lower_ort(model, plan, table)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert not {site.weight for site in plan.sites} & set(lowered.graph.initializers)
    assert "block.to_q.bias" in lowered.graph.initializers


def test_two_lowerings_give_the_same_bytes(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    first, second = (ir.to_proto(lower_ort(*setup)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_onnx_runtime_infers_shapes_of_inner_values_but_sums_itself(
    setup: tuple[ir.Model, QuantPlan, ScaleTable]
) -> None:
    model, plan, table = setup
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    lowered = lower_ort(model, plan, table)
    written = ir.to_proto(lowered).graph
    sums = {value.name for node in lowered.graph if node.op_type == "Add" for value in node.outputs}
    assert {info.name for info in written.value_info} <= {i.name for i in written.initializer} | sums
    assert all(value.shape is not None and value.dtype is not None for value in lowered.graph.outputs)
    assert {value.name: value.shape for node in model.graph for value in node.outputs} == shapes


def test_float_values_keep_their_names(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    names = ["block.to_q.out", "block.to_k.product", "time.out", "conv_in.product", "conv_1x1.out"]
    expected = tap(model, GROUPS[0], names)
    got = tap(lower_ort(model, plan, table), group(0), names)
    for name in names:
        assert sqnr_db(expected[name], got[name]) > 30, name


def test_the_integers_are_those_of_the_table() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    model = maker.model(maker.matmul(maker.inputs["x"], 16, 24, "a"))
    data = [{"x": GROUPS[i]["x"]} for i in range(2)]
    table = min_max_table(model, maker.plan(), data)
    scales, weight = table.of("x"), quantize_weights(model, maker.plan())["a.weight"]
    bias = model.graph.initializers["a.bias"].const_value
    assert bias is not None
    for index in range(2):
        stored = np.clip(np.rint(data[index]["x"] / scales.scale[index]) + scales.zero_point[index], 0, 255)
        real = (stored - scales.zero_point[index]).astype(np.float64) * scales.scale[index]
        expected = real @ weight.dequantized().astype(np.float64) + bias.numpy()
        got = run(lower_ort(model, maker.plan(), table), {**data[index], "scale_group": np.array(index)})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_activation_bits_clip_to_the_range_of_the_narrow_format(bits: int) -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    model = maker.model(maker.matmul(maker.inputs["x"], 16, 24, "a"))
    plan = maker.plan(Quantize(activation_bits=bits))
    data = {"x": GROUPS[0]["x"]}
    table = min_max_table(model, plan, [{"x": data["x"] / 2}], bits)
    lowered = lower_ort(model, plan, table)
    stored = tap(lowered, {**data, "scale_group": np.array(0)}, [f"x.affine{bits}.quantized"])
    values = stored[f"x.affine{bits}.quantized"]
    assert (values.min(), values.max()) == (0, 2**bits - 1)


def test_kept_sites_with_int8_storage_compute_in_float_with_the_stored_weight(tmp_path: Path) -> None:
    maker = GraphMaker({"x": (2, 6, 16), "p": (2, 8, 9, 9)})
    x, p = maker.inputs.values()
    y = maker.matmul(maker.matmul(x, 16, 32, "a"), 32, 32, "b")
    model = maker.model(y, maker.conv(p, 8, 8, "c"))
    keep = Keep("sensitive", weight_storage="int8")
    plan = maker.plan(b=keep, c=keep)
    data = {"x": GROUPS[0]["x"], "p": GROUPS[0]["p"]}
    table, weights = min_max_table(model, plan, [data]), quantize_weights(model, plan)
    lowered = lower_ort(model, plan, table, weights)
    assert lowered.graph.initializers["b.weight.int8"].dtype == ir.DataType.INT8
    assert not {"b.weight", "c.weight"} & set(lowered.graph.initializers)
    values = tap(lowered, {**data, "scale_group": np.array(0)}, ["a.out", "b.product", "c.product"])
    exact = values["a.out"].astype(np.float64) @ weights["b.weight"].dequantized()
    np.testing.assert_allclose(values["b.product"], exact, rtol=1e-5, atol=1e-5)
    nodes = count(optimized(lowered, tmp_path))
    assert "MatMulNBits" not in nodes
    assert nodes["Cast"] == nodes["Mul"] == 0, "the weights are not dequantized at load time"


def test_a_plan_without_quantized_sites_is_refused() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    model = maker.model(maker.matmul(maker.inputs["x"], 16, 24, "a"))
    plan = maker.plan(Keep("too small"))
    table = ScaleTable(min_max_table(model, maker.plan(), [{"x": GROUPS[0]["x"]}]).partition, {})
    with pytest.raises(NoSites, match="found 1 sites, none of them quantized, wanted at least one quantized site"):
        lower_ort(model, plan, table)


def test_scales_that_are_missing_or_left_over_are_named(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    model, plan, table = setup
    fewer = {name: scales for name, scales in table.tensors.items() if name != "mixture"}
    with pytest.raises(ScaleMissing, match="tensor 'mixture': found no scales, wanted 3 groups"):
        lower_ort(model, plan, ScaleTable(table.partition, fewer))
    one = np.ones(3, np.float32)
    more = {**table.tensors, "extra": TensorScales(one, np.zeros(3, np.int32), one)}
    with pytest.raises(ScaleMissing, match="scales that no quantized site reads: extra"):
        lower_ort(model, plan, ScaleTable(table.partition, more))


def test_a_plan_of_another_graph_is_refused(setup: tuple[ir.Model, QuantPlan, ScaleTable]) -> None:
    _, plan, table = setup
    maker = mixed()
    x, t, p = maker.inputs.values()
    maker.matmul(t, 12, 24, "time", rank=2)
    other = maker.model(maker.matmul(x, 16, 24, "block.to_q"), maker.conv(p, 8, 16, "conv_in"))
    with pytest.raises(PlanError, match=r"(?s)found no node .* wanted MatMul.* plan belongs to another graph"):
        lower_ort(other, plan, table, {})


def test_zero_points_that_do_not_change_with_the_group_are_constants() -> None:
    maker = GraphMaker({"p": (2, 8, 9, 9)})
    model = maker.model(maker.conv(maker.inputs["p"], 8, 16, "c"))
    plan = maker.plan(Quantize(symmetric=True))
    data = [{"p": group["p"]} for group in GROUPS]
    lowered = lower_ort(model, plan, min_max_table(model, plan, data))
    node = next(node for node in lowered.graph if node.op_type == "QLinearConv")
    point = node.inputs[2]
    assert point is not None
    assert point.const_value is not None
    assert point.const_value.numpy() == 128
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is None, "the scale still is looked up"
    for index in range(3):
        got = run(lowered, {**data[index], "scale_group": np.array(index)})[0]
        assert sqnr_db(run(model, data[index])[0], got) > 30
