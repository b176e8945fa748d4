"""Channel centres: an exact rewrite, where it is free, and what it buys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, min_max_table, run, sqnr_db, tap

from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.errors import PlanError, ScaleMissing
from quantempo.export.centring import centreable, check_centred
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import lower_portable
from quantempo.export.lowering import LoweringOptions

Lower = Callable[..., ir.Model]
BOTH = pytest.mark.parametrize("lower", [lower_ort, lower_portable])
OFFSET = np.random.default_rng(5).standard_normal((1, 16)).astype(np.float32) * 20


def graph() -> GraphMaker:
    """Modulated input of q and k; a norm with a bias in front of v; a product whose input nothing can shift."""
    maker = GraphMaker({"x": (2, 6, 16), "shift": (2, 1, 16), "plain": (2, 6, 16)})
    x, shift, plain = maker.inputs.values()
    modulated = maker.op("Add", [x, shift], "modulated")
    norm = maker.op(
        "LayerNormalization",
        [x, maker.constant("gain", np.ones(16, np.float32)), maker.constant("norm.bias", OFFSET[0])], "normed", axis=-1,
    )
    q, k = (maker.matmul(modulated, 16, 24, f"to_{n}", bias=n == "q") for n in "qk")
    v, o = maker.matmul(norm, 16, 24, "to_v"), maker.matmul(plain, 16, 24, "other")
    maker.result = maker.op("Add", [maker.op("Add", [q, k], "qk"), maker.op("Add", [v, o], "vo")], "sum")
    return maker


def feeds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    small = {n: rng.standard_normal((2, 6, 16)).astype(np.float32) for n in ("x", "plain")}
    return {**small, "shift": np.repeat(OFFSET[None] * (1 + seed), 2, 0).astype(np.float32)}


GROUPS = [feeds(0), feeds(1), feeds(2)]


def only(model: ir.Model, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds that a graph takes."""
    return {value.name: given[value.name] for value in model.graph.inputs if value.name is not None}


def table_of(model: ir.Model, plan: QuantPlan, centred: bool) -> ScaleTable:
    """Min-max scales; of the centred values where that is asked for."""
    table = min_max_table(model, plan, [only(model, given) for given in GROUPS])
    if not centred:
        return table
    tensors = dict(table.tensors)
    for name in plan.centred:
        seen = [tap(model, only(model, given), [name])[name].reshape(-1, 16) for given in GROUPS]
        centre = np.stack([(rows.min(0) + rows.max(0)) / 2 for rows in seen])
        reach = np.array([np.abs(rows - row).max() for rows, row in zip(seen, centre, strict=True)])
        scale = (2 * reach / 255).astype(np.float32)
        tensors[name] = dataclasses.replace(
            tensors[name], scale=scale, zero_point=np.full(3, 128, np.int32), symmetric_scale=scale, centre=centre
        )
    return ScaleTable(table.partition, tensors)


@pytest.fixture(scope="module")
def setup() -> tuple[ir.Model, QuantPlan]:
    maker = graph()
    assert maker.result is not None
    model, plan = maker.model(maker.result), maker.plan()
    return model, dataclasses.replace(plan, centred=centreable(model, plan.sites, plan.decisions))


def test_sums_with_a_row_and_norms_with_a_bias_can_be_centred(setup: tuple[ir.Model, QuantPlan]) -> None:
    assert setup[1].centred == ("modulated", "normed")


def test_a_tensor_that_a_kept_site_reads_cannot(setup: tuple[ir.Model, QuantPlan]) -> None:
    model, plan = setup
    decisions = {**plan.decisions, "to_k": Keep("test")}
    assert centreable(model, plan.sites, decisions) == ("normed",)
    with pytest.raises(PlanError, match="centred: found the tensor 'modulated'") as caught:
        check_centred(dataclasses.replace(plan, decisions=decisions), model, "plan.json")
    assert "was set to stay in float" in str(caught.value)
    assert "take the tensor off the list" in str(caught.value)


@BOTH
def test_with_quantization_off_it_is_an_identity(setup: tuple[ir.Model, QuantPlan], lower: Lower) -> None:
    model, plan = setup
    lowered = lower(model, plan, table_of(model, plan, True), options=LoweringOptions(quantization=False))
    assert "modulated.centred" in {value.name for node in lowered.graph for value in node.outputs}
    for index, given in enumerate(GROUPS):
        (expected,), (got,) = run(model, given), run(lowered, {**given, "scale_group": np.array(index)})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@BOTH
@pytest.mark.parametrize("index", [0, 1, 2])
def test_offsets_that_differ_from_group_to_group_cost_no_precision(
    setup: tuple[ir.Model, QuantPlan], lower: Lower, index: int
) -> None:
    model, plan = setup
    given = {**GROUPS[index], "scale_group": np.array(index)}
    (expected,) = run(model, GROUPS[index])
    (centred,) = run(lower(model, plan, table_of(model, plan, True)), given)
    plain = dataclasses.replace(plan, centred=())
    (without,) = run(lower(model, plain, table_of(model, plain, False)), given)
    assert sqnr_db(expected, centred) > sqnr_db(expected, without) + 10


def test_the_look_up_of_a_single_group_can_be_baked_in(setup: tuple[ir.Model, QuantPlan]) -> None:
    model, plan = setup
    table = table_of(model, plan, True)
    baked = lower_ort(model, plan, table, options=LoweringOptions(group=1))
    (expected,) = run(lower_ort(model, plan, table), {**GROUPS[1], "scale_group": np.array(1)})
    assert np.array_equal(run(baked, GROUPS[1])[0], expected)


def test_a_table_without_the_plans_centres_is_refused(setup: tuple[ir.Model, QuantPlan]) -> None:
    model, plan = setup
    with pytest.raises(ScaleMissing, match=r"found centres of 0 tensors, wanted those of the 2 tensors"):
        lower_ort(model, plan, table_of(model, plan, False))


@pytest.fixture(scope="module")
def chain() -> tuple[ir.Model, QuantPlan]:
    """A product that reads the result of another one, whose bias is the only part that can take the centre off."""
    maker = GraphMaker({"x": (2, 6, 16)})
    first = maker.matmul(maker.inputs["x"], 16, 16, "embed")
    model, plan = maker.model(maker.matmul(first, 16, 24, "to_k")), maker.plan()
    return model, dataclasses.replace(plan, centred=centreable(model, plan.sites, plan.decisions))


@BOTH
@pytest.mark.parametrize("quantization", [False, True])
def test_the_result_of_another_quantized_product_is_centred_by_its_bias(
    chain: tuple[ir.Model, QuantPlan], lower: Lower, quantization: bool
) -> None:
    model, plan = chain
    assert plan.centred == ("embed.out",)
    lowered = lower(model, plan, table_of(model, plan, True), options=LoweringOptions(quantization=quantization))
    for index, given in enumerate(GROUPS):
        feed = {"x": given["x"]}
        expected, found = run(model, feed)[0], run(lowered, {**feed, "scale_group": np.array(index)})[0]
        assert sqnr_db(expected, found) > (30 if quantization else 100)
