"""The `unfold` dialect: convolutions as matrix products, exactly, from the same weight bytes; narrow ones stay."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, count, min_max_table, run, tap

from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share
from quantempo.contracts.table import ScaleTable
from quantempo.errors import PlanError
from quantempo.export.float_types import to_half
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_portable import lower_portable
from quantempo.export.lower_variant import variant_table
from quantempo.export.passes.base import run_passes
from quantempo.export.sites import check_plan, find_sites
from quantempo.export.unfold import NARROW, UnfoldConvolutions, kept_when_unfolded

SHAPE = (2, 8, 9, 7)
KINDS = {
    "3x3": {}, "1x1": {"size": 1}, "5x5": {"size": 5}, "strided": {"stride": 2},
    "1x1 strided": {"size": 1, "stride": 2},
}
"""Arguments of `GraphMaker.conv`; the others are set on the node."""
ATTRIBUTES = {"dilated": {"dilations": [2, 1]}, "lopsided": {"pads": [0, 1, 1, 0]}, "bare": {"pads": [0, 0, 0, 0]}}


def one(kind: str) -> tuple[ir.Model, QuantPlan, list[dict[str, np.ndarray]]]:
    maker = GraphMaker({"p": ("batch", *SHAPE[1:])})
    y = maker.conv(maker.inputs["p"], 8, 16, "a", **KINDS.get(kind, {}))
    node = next(node for node in maker.nodes if node.op_type == "Conv")
    for name, value in ATTRIBUTES.get(kind, {}).items():
        node.attributes[name] = ir.AttrInt64s(name, value)
    rng = np.random.default_rng(0)
    feeds = [{"p": (rng.standard_normal(SHAPE) * (1 + i) + 0.3).astype(np.float32)} for i in range(3)]
    return maker.model(y), maker.plan(), feeds


def unfolded(model: ir.Model, plan: QuantPlan, table: ScaleTable) -> tuple[ir.Model, ir.Model]:
    """The `portable` graph, and what the pass makes of it."""
    before = lower_portable(model, plan, table)
    after = before.clone()
    assert run_passes(after, (UnfoldConvolutions(),)) == (("UnfoldConvolutions", len(plan.quantized())),)
    return before, after


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("kind", [*KINDS, *ATTRIBUTES])
def test_the_product_is_the_convolution(kind: str, bits: int) -> None:
    model, plan, feeds = one(kind)
    plan = replace(plan, decisions={"a": Quantize(activation_bits=bits)})
    before, after = unfolded(model, plan, min_max_table(model, plan, feeds, bits))
    assert "Conv" not in count(after)
    assert count(after)["MatMul"] == 1
    for index in range(3):
        feed = {**feeds[index], "scale_group": np.array(index)}
        for rows in (1, 2):
            given = {**feed, "p": feed["p"][:rows]}
            # Products of integers times one scale: what differs is the order of float32 sums.
            wanted, got = run(before, given, optimize=False)[0], run(after, given, optimize=False)[0]
            assert got.shape == wanted.shape
            assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_the_same_integers_are_multiplied_and_padding_is_zero() -> None:
    model, plan, feeds = one("3x3")
    before, after = unfolded(model, plan, min_max_table(model, plan, feeds))
    feed = {**feeds[1], "scale_group": np.array(1)}

    def integers(graph: ir.Model) -> np.ndarray:
        names = [str(n.outputs[0].name) for n in graph.graph if n.op_type == "QuantizeLinear"]
        return tap(graph, feed, names)[names[0]]

    columns, plain = integers(after), integers(before)
    assert columns.shape == (2, 9, 7, 8 * 9)
    padded = np.pad(plain, ((0, 0), (0, 0), (1, 1), (1, 1)))
    by_hand = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3)).transpose(0, 2, 3, 1, 4, 5)
    np.testing.assert_array_equal(columns, by_hand.reshape(columns.shape))


def test_convolutions_of_one_tensor_share_its_columns() -> None:
    maker = GraphMaker({"p": SHAPE})
    x = maker.inputs["p"]
    y = maker.op("Add", [maker.conv(x, 8, 16, "a"), maker.conv(x, 8, 16, "b")], "both")
    y = maker.op("Add", [y, maker.conv(x, 8, 16, "c", size=1)], "all")
    model, plan = maker.model(y), maker.plan()
    feeds = [{"p": np.ones(SHAPE, np.float32)}]
    before, after = unfolded(model, plan, min_max_table(model, plan, feeds))
    assert count(after)["QuantizeLinear"] == 2, "one for 3x3, one for 1x1"
    given = {**feeds[0], "scale_group": np.array(0)}
    np.testing.assert_allclose(run(after, given)[0], run(before, given)[0], rtol=1e-5, atol=1e-6)


def test_weights_keep_their_bytes(tmp_path: Path) -> None:
    maker = GraphMaker({"p": (2, 64, 4, 4)})
    model, plan = maker.model(maker.conv(maker.inputs["p"], 64, 64, "a")), maker.plan()
    table = min_max_table(model, plan, [{"p": np.ones((2, 64, 4, 4), np.float32)}])
    before, after = unfolded(model, plan, table)
    for folder, graphs in (("one", {"a": before}), ("both", {"a": before, "b": after})):
        (tmp_path / folder).mkdir()
        write_graphs(tmp_path / folder, graphs)
    sizes = [(tmp_path / folder / "weights.int8.bin").stat().st_size for folder in ("one", "both")]
    assert sizes == [64 * 64 * 9] * 2


def wide_and_narrow() -> tuple[ir.Model, QuantPlan]:
    maker = GraphMaker({"p": (2, 8, 4, 4)})
    x = maker.inputs["p"]
    parts = [
        maker.conv(x, 8, NARROW, "wide"), maker.conv(x, 8, NARROW - 16, "narrow"),
        maker.conv(x, 8, NARROW - 16, "point", size=1), maker.conv(x, 8, NARROW, "grouped", group=2),
    ]
    model = maker.model(*(maker.op("Identity", [part], f"out{i}") for i, part in enumerate(parts)))
    return model, replace(maker.plan(), decisions={
        "grouped": Quantize(True), "narrow": Share("grouped"), "point": Share("grouped"), "wide": Share("grouped"),
    })  # fmt: skip


def test_narrow_and_grouped_convolutions_stay_in_float_for_a_reason() -> None:
    model, plan = wide_and_narrow()
    kept = kept_when_unfolded(model, plan)
    assert sorted(kept) == ["grouped", "narrow"]
    assert "112 output channels" in kept["narrow"].reason
    assert "grouped" in kept["grouped"].reason
    part = replace(plan, dialects={"unfold": kept}).for_graph("unfold")
    # The owner of the scale is gone: the first that shared it has it now.
    assert part.decisions["point"] == Quantize(True)
    assert part.decisions["wide"] == Share("point")
    assert [site.id for site in part.kept()] == ["grouped", "narrow"]
    assert part.dialects == {}
    assert replace(plan, dialects={"unfold": kept}).for_graph("portable").decisions == plan.decisions
    table = min_max_table(model, plan, [{"p": np.ones((2, 8, 4, 4), np.float32)}])
    _, after = unfolded(model, part, variant_table(table, part))
    assert count(after)["Conv"] == 2
    to_half(after, "float16", {})
    weights = [v for v in after.graph.initializers.values() if v.name and v.name.startswith("narrow.weight")]
    assert [v.dtype for v in weights] == [ir.DataType.FLOAT16], "plain half, nothing is dequantized at every call"


def test_what_overflows_in_half_stays_in_float_behind_the_unfolding() -> None:
    model, plan, feeds = one("3x3")
    _, after = unfolded(model, plan, min_max_table(model, plan, feeds))
    hot, cool = after.clone(), after
    to_half(hot, "float16", {"p": 3e4, "a.product": 3e4})
    to_half(cool, "float16", {})
    for graph, kind in ((hot, ir.DataType.FLOAT), (cool, ir.DataType.FLOAT16)):
        (pad,) = [node for node in graph.graph if node.op_type == "Pad"]
        (product,) = [node for node in graph.graph if node.op_type == "MatMul"]
        assert pad.outputs[0].dtype == kind
        assert product.outputs[0].dtype == kind
    big = {"p": feeds[0]["p"] * 1e5, "scale_group": np.array(0)}
    assert np.isfinite(run(hot, big)[0]).all()
    for graph in (hot, cool):
        (quantizer,) = [node for node in graph.graph if node.op_type == "QuantizeLinear"]
        assert quantizer.inputs[0] is not None
        assert quantizer.inputs[0].dtype == ir.DataType.FLOAT, "the pre-multiply is not rounded to half"


def test_a_plan_may_say_what_a_dialect_keeps() -> None:
    maker = GraphMaker({"x": (2, 6, 16)})
    model = maker.model(maker.matmul(maker.matmul(maker.inputs["x"], 16, 32, "a"), 32, 32, "b"))
    sites = find_sites(model)
    plan = QuantPlan("toy", sites, {site.id: Quantize() for site in sites})
    first = sites[0].id
    check_plan(replace(plan, dialects={"unfold": {first: Keep("because")}}), model, "plan p")
    with pytest.raises(PlanError, match=r"plan p: dialects\.unfold: found a decision for 'c', which is not there"):
        check_plan(replace(plan, dialects={"unfold": {"c": Keep("because")}}), model, "plan p")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
def test_turing_multiplies_integers(tmp_path: Path) -> None:
    """The same two convolutions, as they are and unfolded, in float16 and with a free batch."""
    from quantempo.engines import gate, trt_process
    from quantempo.engines.onnx_reader import read_graph
    from quantempo.engines.targets import target
    from quantempo.engines.tensorrt import BuildJob
    from quantempo.engines.trt_profiles import parse_profile

    maker = GraphMaker({"p": ("batch", 64, 16, 16)})
    x = maker.conv(maker.inputs["p"], 64, NARROW, "a")
    x = maker.op("Mul", [x, maker.op("Sigmoid", [x], "sigmoid")], "silu")
    parts = [maker.conv(x, NARROW, NARROW, name, stride=2, size=size) for name, size in (("b", 3), ("c", 1))]
    model, plan = maker.model(maker.op("Add", parts, "sum")), maker.plan()
    rng = np.random.default_rng(0)
    feeds = [{"p": (rng.standard_normal((2, 64, 16, 16)) * s).astype(np.float32)} for s in (1, 2)]
    before, after = unfolded(model, plan, min_max_table(model, plan, feeds))
    found = {}
    for name, graph in (("before", before), ("after", after)):
        to_half(graph, "float16", {})
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"{write_graphs(tmp_path / name, {name: graph})[name].file}"
        job = BuildJob("tensorrt_rtx", str(path), str(tmp_path / "plan"), "7.5", (parse_profile("batch=1:2:8"),))
        trt_process.build(job)
        found[name] = gate.check_rtx((tmp_path / "plan").read_bytes(), read_graph(path), target("rtx-turing"))
    assert found["before"].formats == {}, "if this fails, the library has INT8 convolutions now: drop the dialect"
    assert found["after"].breaches == ()
    assert found["after"].formats == {"int8": 3}
