"""Attention and normalization in the forms that ONNX Runtime runs fastest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, count, run

from quantempo.export.for_ort import for_onnxruntime
from quantempo.export.ort_attention import fuse_attention

HEADS, SIZE, LONG, SHORT = 3, 8, 10, 7


def attention(*, masked: bool = False, scaled: str = "query", softmax_axis: int = -1) -> GraphMaker:
    maker = GraphMaker({n: ("batch", length, HEADS * SIZE) for n, length in (("q", LONG), ("k", SHORT), ("v", SHORT))})
    heads = {}
    for name, value in maker.inputs.items():
        shape = np.array([-1, LONG if name == "q" else SHORT, HEADS, SIZE])
        split = maker.op("Reshape", [value, maker.constant(f"{name}.shape", shape)], f"{name}.split")
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        heads[name] = maker.op("Transpose", [split], f"{name}.heads", perm=perm)
    factor = np.array([0.3], np.float32)
    if scaled in ("query", "both"):
        heads["q"] = maker.op("Mul", [heads["q"], maker.constant("scale", factor)], "q.scaled")
    if scaled == "both":
        heads["k"] = maker.op("Mul", [maker.constant("scale.k", factor), heads["k"]], "k.scaled")
    scores = maker.op("MatMul", [heads["q"], heads["k"]], "scores")
    if masked:
        mask = np.triu(np.full((LONG, SHORT), -4, np.float32))
        scores = maker.op("Add", [scores, maker.constant("mask", mask)], "scores.masked")
    weights = maker.op("Softmax", [scores], "weights", axis=softmax_axis)
    mixed = maker.op("Transpose", [maker.op("MatMul", [weights, heads["v"]], "mixed")], "back", perm=[0, 2, 1, 3])
    maker.result = maker.op("Reshape", [mixed, maker.constant("out.shape", np.array([-1, LONG, HEADS * SIZE]))], "out")
    return maker


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        name: rng.standard_normal((2, length, HEADS * SIZE)).astype(np.float32)
        for name, length in (("q", LONG), ("k", SHORT), ("v", SHORT))
    }


@pytest.mark.parametrize("scaled", ["query", "both", "none"])
def test_attention_becomes_one_operator_that_computes_the_same(scaled: str) -> None:
    maker = attention(scaled=scaled)
    model = maker.model(maker.result)
    fused = model.clone()
    assert fuse_attention(fused) == 1
    assert count(fused) == {"MultiHeadAttention": 1}
    assert [value.name for value in fused.graph.outputs] == ["out"]
    np.testing.assert_allclose(run(fused, feeds())[0], run(model, feeds())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"masked": True}, {"softmax_axis": 2}])
def test_a_mask_or_another_axis_leaves_attention_as_it_is(options: dict[str, object]) -> None:
    maker = attention(**options)  # type: ignore[arg-type]
    model = maker.model(maker.result)
    before = count(model)
    assert fuse_attention(model) == 0
    assert count(model) == before


@pytest.mark.parametrize("inner", ["scores", "q.heads", "k.split", "weights"])
def test_attention_whose_inner_values_are_read_elsewhere_is_left_alone(inner: str) -> None:
    maker = attention()
    values = {value.name: value for node in maker.nodes for value in node.outputs}
    model = maker.model(maker.result, maker.op("Relu", [values[inner]], "reader"))
    assert fuse_attention(model) == 0


def test_the_copy_for_onnx_runtime_has_no_group_normalization_and_computes_the_same() -> None:
    maker = GraphMaker({"x": (2, 8, 5, 5)})
    scale = maker.constant("g", np.linspace(0.5, 2, 8).astype(np.float32))
    bias = maker.constant("b", np.linspace(-1, 1, 8).astype(np.float32))
    y = maker.op("GroupNormalization", [maker.inputs["x"], scale, bias], "y", num_groups=4, epsilon=1e-5)
    model = maker.model(y)
    x = {"x": np.random.default_rng(2).standard_normal((2, 8, 5, 5)).astype(np.float32)}
    tuned = for_onnxruntime(model)
    assert "GroupNormalization" not in count(tuned)
    assert "GroupNormalization" in count(model)
    np.testing.assert_allclose(run(tuned, x)[0], run(model, x)[0], rtol=1e-4, atol=1e-5)
    assert isinstance(tuned, ir.Model)
