"""The `fp8` dialect: standard E4M3 QDQ, one scale per tensor unless the groups differ wildly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.quant_graphs import GraphMaker, count, min_max_table, run, sqnr_db

from quantempo.contracts.plan import Keep
from quantempo.export.fp8 import fp8_scale, rounded
from quantempo.export.lower_fp8 import SPREAD, lower_fp8, scales_of
from quantempo.export.lowering import LoweringOptions

SHAPES = {"x": (2, 6, 16), "t": (2, 12), "p": (2, 8, 9, 9)}


def data(seed: int, factor: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * factor).astype(np.float32) for n, s in SHAPES.items()}


def single(kind: str) -> tuple[GraphMaker, str]:
    name = {"rank2": "t", "conv": "p"}.get(kind, "x")
    maker = GraphMaker({name: SHAPES[name]})
    x = maker.inputs[name]
    rank, k = len(SHAPES[name]), SHAPES[name][-1]
    made = maker.conv(x, 8, 16, "a") if kind == "conv" else maker.matmul(x, k, 24, "a", rank=rank)
    maker.result = made
    return maker, name


GROUPS = {"like": [data(0), data(1, 2.0)], "wild": [data(0), data(1, 3 * SPREAD)]}


@pytest.mark.parametrize("spread", list(GROUPS))
@pytest.mark.parametrize("kind", ["rank3", "rank2", "conv"])
def test_the_graph_computes_what_the_format_says(kind: str, spread: str) -> None:
    maker, name = single(kind)
    assert maker.result is not None
    feeds = [{name: g[name]} for g in GROUPS[spread]]
    plan, model = maker.plan(), maker.model(maker.result)
    table = min_max_table(model, plan, feeds)
    lowered = lower_fp8(model, plan, table)
    expected = {"QuantizeLinear": 1, "DequantizeLinear": 2, "Mul": 2 if spread == "wild" else 0}
    counts = count(lowered)
    assert {op: counts[op] for op in expected} == expected
    assert lowered.graph.initializers["a.weight.fp8"].dtype.name == "FLOAT8E4M3FN"  # type: ignore[union-attr]
    for group, given in enumerate(feeds):
        floating = run(model, given)[0]
        got = run(lowered, {**given, "scale_group": np.array(group)}, optimize=False)[0]
        # Two tensors of 31.5 dB each give about 28.5 dB.
        assert sqnr_db(floating, got) > 26


def test_without_quantizers_the_graph_equals_the_float_graph() -> None:
    maker, name = single("rank3")
    assert maker.result is not None
    feeds = [{name: g[name]} for g in GROUPS["wild"]]
    plan, model = maker.plan(), maker.model(maker.result)
    lowered = lower_fp8(model, plan, min_max_table(model, plan, feeds), options=LoweringOptions(quantization=False))
    for group, given in enumerate(feeds):
        got = run(lowered, {**given, "scale_group": np.array(group)})[0]
        np.testing.assert_allclose(got, run(model, given)[0], rtol=1e-5, atol=1e-5)


def test_one_scale_serves_groups_within_the_spread() -> None:
    base, shrink = scales_of(np.array([0.01, 0.01 * SPREAD], np.float32))
    assert base == fp8_scale(np.float64(np.float32(0.01 * SPREAD)) * 128)
    np.testing.assert_array_equal(shrink, 1)


def test_beyond_the_spread_powers_of_two_keep_every_group_below_the_largest_number() -> None:
    symmetric = np.array([0.001, 0.01, 0.5, 3.0], np.float32)
    base, shrink = scales_of(symmetric)
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(shrink))), shrink)
    largest = symmetric.astype(np.float64) * 128 * shrink / base
    assert np.all(largest <= 448)
    assert np.all(largest > 448 / 2.1)


def test_sites_that_read_one_tensor_share_its_quantizer_and_kept_sites_stay_float() -> None:
    maker = GraphMaker({"x": SHAPES["x"]})
    x = maker.inputs["x"]
    outs = [maker.matmul(x, 16, 16, name) for name in ("q", "k", "v")]
    model = maker.model(maker.op("Add", [maker.op("Add", outs[:2], "s"), outs[2]], "y"))
    plan = maker.plan(v=Keep("test"))
    feeds = [{"x": GROUPS["like"][0]["x"]}]
    lowered = lower_fp8(model, plan, min_max_table(model, plan, feeds))
    counts = count(lowered)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 3)
    assert "v.weight" in lowered.graph.initializers
    assert "q.weight" not in lowered.graph.initializers


def test_the_activation_is_rounded_to_the_numbers_of_the_format() -> None:
    maker, name = single("rank3")
    assert maker.result is not None
    given = {name: GROUPS["like"][0][name]}
    plan, model = maker.plan(), maker.model(maker.result)
    lowered = lower_fp8(model, plan, min_max_table(model, plan, [given]))
    scale = lowered.graph.initializers["x.e4m3.scale"].const_value.numpy()  # type: ignore[union-attr]
    feeds = {**given, "scale_group": np.array(0)}
    seen = run(lowered, feeds, ["x.e4m3.dequantized"], optimize=False)[0]
    np.testing.assert_array_equal(seen, (rounded(given[name] / scale) * scale).astype(np.float32))
    assert lowered.graph.initializers["activation.zero_point"].const_value.numpy().dtype == ml_dtypes.float8_e4m3fn  # type: ignore[union-attr]
