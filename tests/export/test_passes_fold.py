from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from support.onnxruntime_run import run_model
from support.tiny_graphs import graph_of, normal

from quantempo.export.passes import run_passes
from quantempo.export.passes.evaluate import Size, Unknown, dimension
from quantempo.export.passes.fold_constants import FoldConstants
from quantempo.export.passes.remove_dead import RemoveDead
from quantempo.export.passes.remove_no_ops import RemoveNoOps
from quantempo.export.passes.share_subexpressions import ShareConstants, ShareSubexpressions
from quantempo.export.passes.slice_of_concat import SliceOfConcat

X = normal(3, 4, 6)


def ops(model):
    return Counter(node.op_type for node in model.graph)


def same_after(model, passes, feeds):
    """Run passes and check that the output did not change in a single bit."""
    before = run_model(model, feeds)
    run_passes(model, passes)
    after = run_model(model, feeds)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    return model


def test_constant_arithmetic_is_computed():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) {
        a = Constant <value = float {2.0}> ()
        b = Constant <value_float = 3.0> ()
        c = Mul(a, b)
        d = Sqrt(c)
        y = Mul(x, d)
    }""")
    same_after(model, [FoldConstants(), RemoveDead()], {"x": X})
    assert ops(model) == {"Mul": 1}
    assert len(model.graph.initializers) == 1


def test_reshape_to_the_batch_size_becomes_constant():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 2, 12] y) {
        shape = Shape <start = 0, end = 1> (x)
        two = Constant <value_ints = [2]> ()
        rest = Constant <value_ints = [-1]> ()
        target = Concat <axis = 0> (shape, two, rest)
        y = Reshape <allowzero = 1> (x, target)
    }""")
    same_after(model, [FoldConstants(), RemoveDead()], {"x": X})
    (node,) = model.graph
    assert list(node.inputs[1].const_value.numpy()) == [-1, 2, 12]
    assert run_model(model, {"x": X[:1]})["y"].shape == (1, 2, 12)


def test_batch_times_heads_becomes_constant():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[n, 6] y) {
        shape = Shape (x)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        batch = Gather <axis = 0> (shape, zero)
        heads = Gather <axis = 0> (shape, one)
        rows = Mul(batch, heads)
        axes = Constant <value_ints = [0]> ()
        row = Unsqueeze(rows, axes)
        six = Constant <value_ints = [6]> ()
        target = Concat <axis = 0> (row, six)
        y = Reshape(x, target)
    }""")
    same_after(model, [FoldConstants(), RemoveDead()], {"x": X})
    assert ops(model) == {"Reshape": 1}


def test_transcendental_constants_follow_torch():
    torch = pytest.importorskip("torch")
    model = graph_of("""g (float[1, 8] x) => (float[1, 8] y) {
        a = Constant <value_floats = [-0.1, -0.7, -1.3, -2.9, -3.1, -5.3, -7.7, -9.1]> ()
        e = Exp(a)
        y = Mul(x, e)
    }""")
    run_passes(model, [FoldConstants(), RemoveDead()])
    (value,) = model.graph.initializers.values()
    wanted = torch.exp(torch.tensor([-0.1, -0.7, -1.3, -2.9, -3.1, -5.3, -7.7, -9.1]))
    np.testing.assert_array_equal(value.const_value.numpy(), wanted.numpy())


def test_sizes_only_allow_what_is_certain():
    assert dimension(ir.SymbolicDim("batch")) == Size(1)
    assert dimension(ir.SymbolicDim("4*batch")) * 2 == Size(8)
    assert Size(8) // 4 == Size(2)
    assert Size(8) // Size(2) == 4
    for dim in ("batch + 1", "batch**2", None):
        with pytest.raises(Unknown):
            dimension(ir.SymbolicDim(dim))
    with pytest.raises(Unknown):
        Size(3) // 2
    with pytest.raises(Unknown):
        Size(3) * 0.5


def test_nodes_without_effect_go():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) <
        float one = {1.0}, int64[2] zeros = {0, 0}, int64[2] ends = {9223372036854775807, 4}, int64[2] axes = {0, 1},
        int64[3] same = {-1, 4, 6}
    > {
        a = Identity(x)
        b = Dropout(a)
        c = Mul(one, b)
        d = Div(c, one)
        e = Slice(d, zeros, ends, axes)
        f = Transpose <perm = [0, 1, 2]> (e)
        h = Cast <to = 1> (f)
        y = Add(h, x)
    }""")
    for value in [v for node in model.graph for v in node.outputs]:
        value.shape, value.dtype = ir.Shape(["batch", 4, 6]), ir.DataType.FLOAT
    same_after(model, [RemoveNoOps(), RemoveDead()], {"x": X})
    assert ops(model) == {"Add": 1}


def test_nodes_with_an_effect_stay():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 3, 6] y) <
        float[1] zero = {0.0}, float tiny = {1e-15}, float[3, 1, 1] ones = {1.0, 1.0, 1.0},
        int64[1] start = {1}, int64[1] end = {4}, int64[1] axis = {1}
    > {
        a = Add(x, zero)
        b = Add(a, tiny)
        c = Mul(b, ones)
        y = Slice(c, start, end, axis)
    }""")
    same_after(model, [RemoveNoOps(), RemoveDead()], {"x": X})
    assert ops(model) == {"Add": 2, "Mul": 1, "Slice": 1}


def test_identity_between_input_and_output_stays():
    model = graph_of("g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) { y = Identity(x) }")
    same_after(model, [RemoveNoOps()], {"x": X})
    assert ops(model) == {"Identity": 1}


def test_ones_of_the_batch_size_are_no_factor():
    model = graph_of("""g (float[batch] x) => (float[batch] y) <float one = {1.0}> {
        shape = Shape(x)
        ones = Expand(one, shape)
        z = Mul(x, ones)
        y = Sqrt(z)
    }""")
    for node in list(model.graph)[2:]:
        node.outputs[0].shape = ir.Shape(["batch"])
    same_after(model, [RemoveNoOps(), RemoveDead()], {"x": np.abs(X[:, 0, 0])})
    assert ops(model) == {"Sqrt": 1}


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ("Transpose <perm = [1, 2, 0]> (x)", "Transpose <perm = [2, 1, 0]> (a)", "Transpose"),
        ("Reshape (x, flat)", "Reshape (a, target)", "Reshape"),
        ("Unsqueeze (x, axis1)", "Unsqueeze (a, axis0)", "Unsqueeze"),
        ("Unsqueeze (x, last)", "Unsqueeze (a, axis1)", "Unsqueeze"),
    ],
)
def test_two_movements_become_one(first, second, left):
    model = graph_of(f"""g (float[batch, 4, 6] x) => (float[a, b, c] y) <
        int64[2] flat = {{-1, 24}}, int64[3] target = {{-1, 8, 3}}, int64[1] axis0 = {{0}}, int64[1] axis1 = {{1}},
        int64[1] last = {{-1}}
    > {{
        a = {first}
        y = {second}
    }}""")
    if left == "Unsqueeze":
        model.graph.outputs[0].shape = ir.Shape([None] * 5)
    same_after(model, [RemoveNoOps(), RemoveDead()], {"x": X})
    assert ops(model) == {left: 1}


def test_dead_nodes_and_constants_go_in_one_run():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) <float two = {2.0}> {
        a = Mul(x, two)
        b = Sqrt(a)
        y = Abs(x)
    }""")
    assert run_passes(model, [RemoveDead()]) == (("RemoveDead", 3),)
    assert (ops(model), dict(model.graph.initializers)) == ({"Abs": 1}, {})


def test_equal_constants_and_computations_are_shared():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) <
        float a = {2.0}, float b = {2.0}, float[1] c = {2.0}, int64 d = {2}
    > {
        p = Mul(x, a)
        q = Mul(x, b)
        r = Mul(x, c)
        s = Add(p, q)
        y = Add(s, r)
    }""")
    same_after(model, [ShareConstants(), ShareSubexpressions(), RemoveDead()], {"x": X})
    assert ops(model) == {"Mul": 2, "Add": 2}


def test_negative_zero_and_zero_are_not_shared():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) <float a = {0.0}, float b = {0.0}> {
        p = Div(x, a)
        q = Div(x, b)
        y = Max(p, q)
    }""")
    value = model.graph.initializers["b"]
    value.const_value = ir.tensor(np.asarray(-0.0, np.float32), name="b")
    same_after(model, [ShareConstants(), ShareSubexpressions()], {"x": X})
    assert ops(model)["Div"] == 2


def test_different_attributes_are_not_shared_and_random_numbers_neither():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) {
        a = Softmax <axis = 1> (x)
        b = Softmax <axis = 2> (x)
        c = RandomNormalLike (x)
        d = RandomNormalLike (x)
        e = Sum(a, b, c, d)
        y = Identity(e)
    }""")
    run_passes(model, [ShareSubexpressions()])
    assert (ops(model)["Softmax"], ops(model)["RandomNormalLike"]) == (2, 2)


def test_swap_of_concatenated_halves():
    model = graph_of("""g (float[batch, 4, 6] x, float[batch, 4, 2] z) => (float[batch, 4, 8] y) <
        int64[1] s0 = {0}, int64[1] s6 = {6}, int64[1] end = {9223372036854775807}, int64[1] axis = {-1},
        int64[1] one = {1}
    > {
        a = Concat <axis = -1> (x, z)
        b = Slice(a, s0, s6, axis, one)
        c = Slice(a, s6, end, axis, one)
        y = Concat <axis = -1> (c, b)
    }""")
    same_after(model, [SliceOfConcat(), RemoveDead()], {"x": X, "z": normal(3, 4, 2)})
    assert ops(model) == {"Concat": 1}


def test_slice_across_parts_stays():
    model = graph_of("""g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) <
        int64[1] s3 = {3}, int64[1] s9 = {9}, int64[1] axis = {2}
    > {
        a = Concat <axis = 2> (x, x)
        y = Slice(a, s3, s9, axis)
    }""")
    same_after(model, [SliceOfConcat(), RemoveDead()], {"x": X})
    assert ops(model) == {"Concat": 1, "Slice": 1}
