"""Quantizers inside attention: where they stand, and what they cost."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, count, run, sqnr_db, tap

from quantempo.errors import ScaleMissing
from quantempo.export.quantize_attention import (
    attention_tensors,
    find_attention,
    quantize_attention,
    stored_products,
    stored_ranges,
)


def attention(size: int = 16, length: int = 12, mask: bool = False, constant_keys: bool = False) -> ir.Model:
    heads = 2
    maker = GraphMaker({"x": (2, length, heads * size), "mask": (1, 1, length, length)} if mask else
                       {"x": (2, length, heads * size)})  # fmt: skip
    shape = maker.constant("heads", np.array([0, 0, heads, size]))

    def part(name: str, *perm: int) -> ir.Value:
        projected = maker.matmul(maker.inputs["x"], heads * size, heads * size, name)
        split = maker.op("Reshape", [projected, shape], f"{name}.heads")
        return maker.op("Transpose", [split], f"{name}.t", perm=list(perm))

    query = maker.op("Mul", [part("q", 0, 2, 1, 3), maker.constant("scale", np.float32(size**-0.5))], "query")
    keys = part("k", 0, 2, 3, 1)
    if constant_keys:
        keys = maker.constant("keys", np.ones((1, heads, size, length), np.float32))
    scores = maker.op("MatMul", [query, keys], "scores")
    if mask:
        scores = maker.op("Add", [scores, maker.inputs["mask"]], "masked")
    mixed = maker.op("MatMul", [maker.op("Softmax", [scores], "p", axis=-1), part("v", 0, 2, 1, 3)], "mixed")
    return maker.model(mixed)


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {str(v.name): tuple(v.shape.numpy()) for v in model.graph.inputs}  # type: ignore[union-attr]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ranges(model: ir.Model) -> dict[str, float]:
    seen = tap(model, feeds(model), attention_tensors(model, "fp8"))
    return {name: float(np.abs(values).max()) for name, values in seen.items()}


@pytest.mark.parametrize(("kind", "least"), [("fp8", 26.0), ("int8", 32.0)])
@pytest.mark.parametrize("mask", [False, True])
def test_all_four_operands_are_quantized_right_in_front_of_their_products(
    kind: str, least: float, mask: bool
) -> None:
    model = attention(mask=mask)
    scales = ranges(model)
    assert sorted(scales) == ["k.t", "query", "v.t"]
    exact = run(model, feeds(model))[0]
    copy = model.clone()
    assert quantize_attention(copy, scales, kind) == 1  # type: ignore[arg-type]
    counts = count(copy)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (4, 4)
    (found,) = find_attention(model)
    products = [n for n in copy.graph if n.outputs[0].name in ("scores", "mixed")]
    assert found.probabilities.name == "p"
    assert all(v.producer().op_type == "DequantizeLinear" for n in products for v in n.inputs)  # type: ignore[union-attr]
    assert sqnr_db(exact, run(copy, feeds(model), optimize=False)[0]) > least


def test_probabilities_have_a_scale_that_no_data_changes() -> None:
    model = attention()
    quantize_attention(model, ranges(model), "fp8")
    scale = model.graph.initializers["p.attention.scale"].const_value
    assert scale is not None
    assert scale.numpy() == np.float32(1 / 448)


@pytest.mark.parametrize(("options", "kind"), [
    ({"size": 8}, "fp8"), ({"size": 272}, "fp8"), ({"length": 520}, "int8"), ({"constant_keys": True}, "fp8"),
])  # fmt: skip
def test_what_has_no_fused_kernel_or_gains_nothing_stays_float(options: dict[str, int], kind: str) -> None:
    model = attention(**options)  # type: ignore[arg-type]
    before = count(model)
    assert quantize_attention(model, {}, kind) == 0  # type: ignore[arg-type]
    assert count(model) == before


def test_a_missing_range_is_refused() -> None:
    with pytest.raises(ScaleMissing, match=r"'query'.*no calibrated range"):
        quantize_attention(attention(), {}, "fp8")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_ranges_can_be_read_back_from_the_graph(kind: str) -> None:
    model = attention()
    first, second = model.clone(), model.clone()
    quantize_attention(first, ranges(model), kind)  # type: ignore[arg-type]
    quantize_attention(second, stored_ranges(first, kind), kind)  # type: ignore[arg-type]
    for name, value in first.graph.initializers.items():
        if name.endswith(".attention.scale"):
            again = second.graph.initializers[name].const_value
            assert value.const_value is not None
            assert again is not None
            np.testing.assert_allclose(again.numpy(), value.const_value.numpy(), rtol=2e-6)


@pytest.mark.parametrize("length", [12, 520])
def test_scores_alone_are_quantized_at_any_length_and_lose_less(length: int) -> None:
    model = attention(length=length)
    assert attention_tensors(model, "int8", "scores") == ("k.t", "query")
    seen = tap(model, feeds(model), ["k.t", "query", "v.t"])
    scales = {name: float(np.abs(values).max()) for name, values in seen.items()}
    exact, errors = run(model, feeds(model))[0], {}
    for products in ("scores", "both"):
        copy = model.clone()
        quantized = quantize_attention(copy, scales, "int8", products)  # type: ignore[arg-type]
        assert quantized == (products == "scores" or length <= 512)
        assert stored_products(copy) == (products if quantized else None)
        errors[products] = sqnr_db(exact, run(copy, feeds(model), optimize=False)[0]) if quantized else -np.inf
    assert errors["scores"] > errors["both"] + 2
    assert stored_products(model) is None
