from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from support.onnxruntime_run import relative_difference, run_model
from support.tiny_graphs import graph_of, normal

from quantempo.export.passes import GeluAsSigmoid, GroupNormToInstanceNorm, run_passes
from quantempo.export.passes.attention import CollapseTransposes, MergeAttentionScales
from quantempo.export.passes.cut_output import CutOutputChannels
from quantempo.export.passes.einsum_to_transpose import EinsumToTranspose
from quantempo.export.passes.remove_dead import RemoveDead
from quantempo.export.passes.remove_no_ops import RemoveNoOps
from quantempo.export.passes.split_conv_bias import SplitConvBias
from quantempo.export.passes.split_sequences import SplitSequences
from quantempo.export.passes.unsqueeze_before_split import UnsqueezeBeforeSplit
from quantempo.export.passes.weights import FoldWeightTransposes, GemmToMatMul


def ops(model):
    return Counter(node.op_type for node in model.graph)


def change(model, passes, feeds):
    """Largest relative difference that the passes make to the output `y`."""
    before = run_model(model, feeds)["y"]
    run_passes(model, [*passes, RemoveDead()])
    after = run_model(model, feeds)["y"]
    assert after.shape == before.shape
    return relative_difference(after, before)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_becomes_matmul_and_add(transposed):
    weight = normal(7, 5) if transposed else normal(5, 7)
    model = graph_of(
        f"""g (float[batch, 5] x, float[{weight.shape[0]}, {weight.shape[1]}] w, float[7] b) => (float[batch, 7] y) {{
            y = Gemm <transB = {transposed}> (x, w, b)
        }}""",
        {"w": weight, "b": normal(7, seed=1)},
    )
    assert change(model, [GemmToMatMul()], {"x": normal(3, 5)}) <= 1e-6
    assert ops(model) == {"MatMul": 1, "Add": 1}
    product, add = model.graph
    assert list(product.inputs[1].shape.numpy()) == [5, 7]
    assert list(add.inputs[1].shape.numpy()) == [7]


def test_gemm_bias_of_rank_two_is_flattened():
    model = graph_of(
        "g (float[batch, 5] x, float[5, 7] w, float[1, 7] b) => (float[batch, 7] y) { y = Gemm(x, w, b) }",
        {"w": normal(5, 7), "b": normal(1, 7, seed=1)},
    )
    assert change(model, [GemmToMatMul()], {"x": normal(3, 5)}) <= 1e-6
    assert list(list(model.graph)[1].inputs[1].shape.numpy()) == [7]


def test_scaled_gemm_is_a_violation():
    from quantempo.errors import ExportError

    model = graph_of(
        "g (float[batch, 5] x, float[5, 7] w) => (float[batch, 7] y) { y = Gemm <alpha = 0.5> (x, w) }",
        {"w": normal(5, 7)},
    )
    with pytest.raises(ExportError, match=r"GemmToMatMul.*1 Gemm nodes with a stored weight"):
        run_passes(model, [GemmToMatMul()])


def test_transposed_weight_is_stored_and_shared():
    model = graph_of(
        """g (float[batch, 5] x, float[7, 5] w) => (float[batch, 7] y) {
            t = Transpose <perm = [1, 0]> (w)
            a = MatMul(x, t)
            u = Transpose <perm = [1, 0]> (w)
            b = MatMul(x, u)
            y = Add(a, b)
        }""",
        {"w": normal(7, 5)},
    )
    assert change(model, [FoldWeightTransposes()], {"x": normal(3, 5)}) == 0
    assert ops(model) == {"MatMul": 2, "Add": 1}
    assert [tuple(v.shape.numpy()) for v in model.graph.initializers.values()] == [(5, 7)]


def test_convolution_bias_becomes_an_add():
    model = graph_of(
        """g (float[batch, 4, 6, 6] x, float[8, 2, 3, 3] w, float[8] b) => (float[batch, 8, 3, 3] y) {
            y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2> (x, w, b)
        }""",
        {"w": normal(8, 2, 3, 3), "b": normal(8, seed=1)},
    )
    assert change(model, [SplitConvBias()], {"x": normal(3, 4, 6, 6)}) <= 1e-6
    conv, add = model.graph
    assert (len(conv.inputs), conv.attributes["group"].value) == (2, 2)
    assert list(add.inputs[1].shape.numpy()) == [1, 8, 1, 1]


def test_chunks_become_one_split():
    model = graph_of("""g (float[batch, 10] x) => (float[batch, 4] y) <int64 size = {4}, int64 i0 = {0}, int64 i1 = {1}>
    {
        parts = SplitToSequence <axis = 1> (x, size)
        a = SequenceAt(parts, i0)
        b = SequenceAt(parts, i1)
        y = Sub(a, b)
    }""")
    assert change(model, [SplitSequences()], {"x": normal(3, 10)}) == 0
    assert ops(model) == {"Split": 1, "Sub": 1}
    assert list(next(iter(model.graph)).inputs[1].const_value.numpy()) == [4, 4, 2]


def test_uneven_chunks_and_negative_indices():
    model = graph_of("""g (float[batch, 10] x) => (float[batch, 3] y) <int64[2] sizes = {7, 3}, int64 last = {-1}> {
        parts = SplitToSequence <axis = 1> (x, sizes)
        y = SequenceAt(parts, last)
    }""")
    assert change(model, [SplitSequences()], {"x": normal(3, 10)}) == 0


SPLIT = """g (float[batch, 6] x) => (float[batch, 1, 3] y) <
    int64[2] sizes = {3, 3}, int64[1] one = {%d}, int64[1] other = {%d}
> {
    a, b = Split <axis = -1> (x, sizes)
    c = Unsqueeze(a, one)
    d = Unsqueeze(b, other)
    y = Sub(c, d)
}"""


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, -2), (0, 0), (2, -1)])
def test_parts_of_a_split_are_unsqueezed_once(first, second):
    model = graph_of(SPLIT % (first, second))
    model.graph.outputs[0].shape = ir.Shape([None, None, None])
    assert change(model, [UnsqueezeBeforeSplit()], {"x": normal(3, 6)}) == 0
    assert ops(model) == {"Unsqueeze": 1, "Split": 1, "Sub": 1}


def test_parts_with_different_axes_keep_their_own():
    model = graph_of(SPLIT % (0, 1))
    model.graph.outputs[0].shape = ir.Shape([None, None, None])
    assert change(model, [UnsqueezeBeforeSplit()], {"x": normal(3, 6)}) == 0
    assert ops(model)["Unsqueeze"] == 2


def test_permuting_einsum_becomes_transpose():
    model = graph_of("""g (float[batch, 2, 3, 4] x) => (float[batch, 4, 2, 3] y) {
        y = Einsum <equation = "nhwc->nchw"> (x)
    }""")
    assert change(model, [EinsumToTranspose()], {"x": normal(3, 2, 3, 4)}) == 0
    assert ops(model) == {"Transpose": 1}


def test_summing_einsum_stays():
    model = graph_of('g (float[batch, 2, 3] x) => (float[batch, 2] y) { y = Einsum <equation = "nhw->nh"> (x) }')
    assert change(model, [EinsumToTranspose()], {"x": normal(3, 2, 3)}) == 0
    assert ops(model) == {"Einsum": 1}


ATTENTION = """g (float[batch, 6, 2, 8] q, float[batch, 6, 2, 8] k) => (float[batch, 2, 6, 6] y) <
    int64[3] flat = {-1, 6, 8}, int64[4] back = {-1, 2, 8, 6}, float c = {%s}, float[1] d = {%s}
> {
    qt = Transpose <perm = [0, 2, 1, 3]> (q)
    kt = Transpose <perm = [0, 2, 1, 3]> (k)
    kf = Reshape(kt, flat)
    ks = Transpose <perm = [0, 2, 1]> (kf)
    kb = Reshape(ks, back)
    qs = Mul(qt, c)
    kd = Mul(kb, d)
    y = MatMul(qs, kd)
}"""


@pytest.mark.parametrize(("scale", "tolerance"), [("0.5", 0.0), ("0.59460355", 1e-6)])
def test_keys_get_one_transpose_and_queries_the_scale(scale, tolerance):
    model = graph_of(ATTENTION % (scale, scale))
    for node in model.graph:
        if node.op_type == "Transpose" and len(node.attributes["perm"].value) == 4:
            node.outputs[0].shape = ir.Shape(["batch", 2, 6, 8])
    feeds = {"q": normal(3, 6, 2, 8), "k": normal(3, 6, 2, 8, seed=1)}
    assert change(model, [CollapseTransposes(), MergeAttentionScales(), RemoveNoOps()], feeds) <= tolerance
    assert ops(model) == {"Transpose": 2, "Mul": 1, "MatMul": 1}
    perms = sorted(tuple(n.attributes["perm"].value) for n in model.graph if n.op_type == "Transpose")
    assert perms == [(0, 2, 1, 3), (0, 2, 3, 1)]


def test_transposes_that_mix_dimensions_stay():
    # The flattened shape is not the last two dimensions: [-1, 12, 4] cuts across them.
    model = graph_of("""g (float[batch, 2, 6, 8] x) => (float[batch, 4, 12, 2] y) <
        int64[3] flat = {-1, 12, 4}, int64[4] back = {-1, 4, 12, 2}
    > {
        a = Reshape(x, flat)
        b = Transpose <perm = [0, 2, 1]> (a)
        y = Reshape(b, back)
    }""")
    assert change(model, [CollapseTransposes()], {"x": normal(3, 2, 6, 8)}) == 0
    assert ops(model) == {"Reshape": 2, "Transpose": 1}


@pytest.mark.parametrize("shape", [(6, 4, 4), (6, 5)])
def test_group_norm_as_instance_norm(shape):
    dims = ", ".join(map(str, shape))
    model = graph_of(
        f"""g (float[batch, {dims}] x, float[6] s, float[6] b) => (float[batch, {dims}] y) {{
            y = GroupNormalization <num_groups = 3, epsilon = 1e-3> (x, s, b)
        }}""",
        {"s": normal(6, seed=1), "b": normal(6, seed=2)},
    )
    assert change(model, [GroupNormToInstanceNorm()], {"x": 3 * normal(3, *shape) + 1}) <= 2e-6
    assert ops(model) == {"Reshape": 2, "InstanceNormalization": 1, "BatchNormalization": 1}


def test_group_norm_keeps_its_value_name():
    model = graph_of(
        """g (float[batch, 6, 4] x, float[6] s, float[6] b) => (float[batch, 6, 4] y) {
            normed = GroupNormalization <num_groups = 3> (x, s, b)
            y = Sigmoid(normed)
        }""",
        {"s": normal(6, seed=1), "b": normal(6, seed=2)},
    )
    run_passes(model, [GroupNormToInstanceNorm()])
    assert model.graph.outputs[0].producer().inputs[0].name == "normed"


def cut(text, weights, feeds, channels):
    """(found, wanted, model) after a cut to some channels."""
    model = graph_of(text, weights)
    wanted = run_model(model, feeds)["y"][:, :channels]
    run_passes(model, [CutOutputChannels(channels), RemoveDead()])
    found = run_model(model, feeds)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    return model


def test_cut_takes_rows_of_a_convolution():
    model = cut(
        """g (float[batch, 4, 6, 6] x, float[6, 4, 3, 3] w, float[1, 6, 1, 1] b) => (float[batch, 6, 6, 6] y) {
            p = Conv <pads = [1, 1, 1, 1]> (x, w)
            y = Add(p, b)
        }""",
        {"w": normal(6, 4, 3, 3), "b": normal(1, 6, 1, 1, seed=1)}, {"x": normal(2, 4, 6, 6)}, 3,
    )
    assert sorted(tuple(v.shape.numpy()) for v in model.graph.initializers.values()) == [(1, 3, 1, 1), (3, 4, 3, 3)]


def test_cut_takes_columns_of_an_unpatched_linear_layer():
    model = cut(
        """g (float[batch, 6, 5] x, float[5, 32] w, float[32] b) => (float[batch, 8, 4, 6] y) <
            int64[6] parts = {-1, 2, 3, 2, 2, 8}, int64[4] whole = {-1, 8, 4, 6}
        > {
            p = MatMul(x, w)
            l = Add(p, b)
            r = Reshape(l, parts)
            t = Transpose <perm = [0, 5, 1, 3, 2, 4]> (r)
            y = Reshape(t, whole)
        }""",
        {"w": normal(5, 32), "b": normal(32, seed=1)}, {"x": normal(2, 6, 5)}, 4,
    )
    assert [tuple(node.inputs[1].shape.numpy()) for node in model.graph if node.op_type == "MatMul"] == [(5, 16)]
    assert "Slice" not in ops(model)


def test_cut_of_anything_else_is_a_slice():
    model = cut(
        "g (float[batch, 8, 2, 2] x) => (float[batch, 8, 2, 2] y) { y = Sigmoid(x) }", {}, {"x": normal(2, 8, 2, 2)}, 4
    )
    assert ops(model) == {"Sigmoid": 1, "Slice": 1}
    assert model.graph.outputs[0].name == "y"


def test_cut_to_what_is_there_changes_nothing():
    model = graph_of("g (float[batch, 4, 2, 2] x) => (float[batch, 4, 2, 2] y) { y = Sigmoid(x) }")
    assert run_passes(model, [CutOutputChannels(4)]) == (("CutOutputChannels", 0),)


@pytest.mark.parametrize(("approximate", "factor", "rewritten"), [
    ("tanh", "float[1] f", True), ("none", "float[1] f", False), ("tanh", "float[4] f", False), ("tanh", "", False),
])  # fmt: skip
def test_gelu_behind_a_looked_up_factor_is_a_sigmoid(approximate, factor, rewritten):
    inputs = f"float[batch, 5] x{', ' if factor else ''}{factor}"
    stored = {} if factor else {"f": np.full(1, 1.3, np.float32)}
    model = graph_of(
        f"""g ({inputs}, float[5, 4] w, float[4] b{'' if factor else ', float[1] f'}) => (float[batch, 4] y) {{
            p = MatMul(x, w)
            m = Mul(p, f)
            a = Add(m, b)
            g = Gelu <approximate = "{approximate}"> (a)
            y = Add(g, b)
        }}""",
        {"w": normal(5, 4) * 3, "b": normal(4, seed=1), **stored},
    )
    factors = {"f": np.abs(normal(4 if "4" in factor else 1, seed=2)) + 0.5} if factor else {}
    assert change(model, [GeluAsSigmoid()], {"x": normal(64, 5) * 3, **factors}) <= 2e-6
    assert ("Gelu" not in ops(model)) == rewritten
    assert "g" in {value.name for node in model.graph for value in node.outputs}
