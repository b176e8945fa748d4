"""Graph variants: reuse fed with this call's own features is the full graph, in float and in INT8, on every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.quant_graphs import min_max_table, sqnr_db, tap
from support.tiny_graphs import graph_of, normal

from quantempo.contracts.cache import Cut, DeltaCut, FeatureCut, Probe, SublayerCut
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.plan import Quantize, QuantPlan, Share
from quantempo.contracts.table import ScaleTable
from quantempo.demo import MODEL as DEMO
from quantempo.engines.registry import open_engine
from quantempo.errors import DataError, ExportError, PlanError, ScaleMissing
from quantempo.export.families import family_of
from quantempo.export.for_ort import for_onnxruntime
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import lower_portable
from quantempo.export.lower_variant import lower_variant, variant_plan, variant_table
from quantempo.export.passes.edit import MODULE
from quantempo.export.sites import default_plan
from quantempo.export.source import open_source
from quantempo.export.trace import load_denoiser, trace_module
from quantempo.export.variants import VariantSet, branch_cut, cut_variants, sublayer_cut, variant_of
from quantempo.export.weights import quantize_weights

UNET = Path(__file__).parents[1] / "models" / "unet"
ATTENTION, BOTH, NONE = (True, False), (True, True), (False, False)
DIT_CUTS: dict[str, Cut] = {
    "reuse.0": DeltaCut(1, 4, 6),
    "reuse.1": SublayerCut((NONE, BOTH, BOTH, ATTENTION, BOTH, (False, True))),
    "reuse.2": FeatureCut(("transformer_blocks.4/add#3",)),
}
openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
CASES = [
    ("float", "ort", ()), ("ort", "ort", ()), ("portable", "ort", ()), ("ort", "ort", ("feature",)),
    pytest.param("float", "openvino", (), marks=openvino),
    pytest.param("portable", "openvino", (), marks=openvino),
    pytest.param("portable", "openvino", ("feature",), marks=openvino),
]
Feeds = Mapping[str, np.ndarray]


class Model:
    """A float graph with everything that it takes to quantize it."""

    def __init__(self, folder: Path, source: Any) -> None:
        self.family = family_of(source)
        graph = trace_module(load_denoiser(source), self.family, folder)
        self.graph = ir.external_data.load_to_model(ir.load(graph.path))
        self.groups = [self.family.example(2, seed) for seed in range(3)]
        self.plan = default_plan(self.graph, graph.digest)
        self.table = centred(self.graph, self.plan, min_max_table(self.graph, self.plan, self.groups), self.groups)
        self.weights = quantize_weights(self.graph, self.plan, "minmax")
        self.sets: dict[Any, VariantSet] = {}

    def lowered(self, variants: VariantSet, dialect: str, backend: str) -> dict[str, ir.Model]:
        graphs = {}
        for name, variant in variants.variants.items():
            if dialect == "float":
                graphs[name] = for_onnxruntime(variant.graph) if backend == "ort" else variant.graph
            else:
                lower = lower_ort if dialect == "ort" else lower_portable
                graphs[name] = lower_variant(variant.graph, self.plan, self.table, self.weights, lower)
        return graphs


def centred(model: ir.Model, plan: QuantPlan, table: ScaleTable, groups: list[Any]) -> ScaleTable:
    """The table with the centres that the plan asks for."""
    taps = [tap(model, feeds, plan.centred) for feeds in groups] if plan.centred else []
    tensors = dict(table.tensors)
    for name in plan.centred:
        rows = [seen[name].reshape(-1, seen[name].shape[-1]) for seen in taps]
        centre = np.stack([(r.min(0) + r.max(0)) / 2 for r in rows])
        reach = np.array([np.abs(r - c).max() for r, c in zip(rows, centre, strict=True)])
        scale = (2 * reach / 255).astype(np.float32)
        middle = np.full(len(groups), 128, np.int32)
        tensors[name] = dataclasses.replace(
            tensors[name], scale=scale, zero_point=middle, symmetric_scale=scale, centre=centre
        )
    return ScaleTable(table.partition, tensors)


class Opened:
    """Written variants, run on one backend with the features of `full`."""

    def __init__(self, folder: Path, graphs: Mapping[str, ir.Model], backend: str) -> None:
        write_graphs(folder, graphs)
        self.folder, self.backend = folder, backend

    def run(self, variant: str, feeds: Feeds) -> dict[str, np.ndarray]:
        engine = open_engine(self.backend, self.folder / f"{variant}.onnx", EngineOptions(threads=1))
        try:
            return engine.run({name: feeds[name] for name in engine.inputs})
        finally:
            engine.close()


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("dit"), open_source(DEMO))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("unet"), open_source(UNET / "unet", UNET / "scheduler"))


def feeds_of(model: Model, dialect: str) -> dict[str, np.ndarray]:
    return {**model.groups[1], **({} if dialect == "float" else {"scale_group": np.array(1)})}


def neutral(variants: VariantSet, name: str) -> dict[str, np.ndarray]:
    """Gains of one and biases of zero."""
    sizes = {value.name: value.shape[0] for value in variants.variants[name].graph.graph.inputs if value.shape}
    return {v: np.full(sizes[v], v.endswith(".gain"), np.float32) for v in variants.variants[name].vectors}


@pytest.mark.parametrize(("dialect", "backend", "corrections"), CASES)
def test_dit_reuse_of_this_calls_features_is_the_full_graph(
    dit: Model, tmp_path: Path, dialect: str, backend: str, corrections: Any
) -> None:
    variants = cut_variants(dit.graph, DIT_CUTS, corrections=corrections)
    opened, feeds = Opened(tmp_path, dit.lowered(variants, dialect, backend), backend), feeds_of(dit, dialect)
    full = opened.run("full", feeds)
    nudged = {**feeds, "sample": np.nextafter(feeds["sample"], np.float32(np.inf))}
    noise = sqnr_db(full["prediction"], opened.run("full", nudged)["prediction"])
    found = {
        name: opened.run(name, {**feeds, **full, **neutral(variants, name)})["prediction"] for name in DIT_CUTS
    }
    delta = np.max(np.abs(found["reuse.0"] - full["prediction"])) / np.max(np.abs(full["prediction"]))
    if dialect == "float":
        assert delta <= 1e-5
    else:
        assert sqnr_db(full["prediction"], found["reuse.0"]) >= noise
    for name in ("reuse.1", "reuse.2"):
        if (dialect, backend) in (("float", "ort"), ("ort", "ort")):
            np.testing.assert_array_equal(found[name], full["prediction"])
        else:
            # These optimizers fuse a multiplication into an addition or a norm in one of the two graphs alone.
            np.testing.assert_allclose(found[name], full["prediction"], atol=1e-6 * np.abs(full["prediction"]).max())


@pytest.mark.parametrize(
    ("dialect", "backend"), [("ort", "ort"), pytest.param("portable", "openvino", marks=openvino)]
)
def test_reuse_of_all_sublayers_at_this_call_is_the_full_graph(
    dit: Model, tmp_path: Path, dialect: str, backend: str
) -> None:
    whole = sublayer_cut(dit.graph, "transformer_blocks", 6, range(6))
    assert whole == SublayerCut((BOTH,) * 6)
    variants = cut_variants(dit.graph, {"reuse.0": whole})
    opened, feeds = Opened(tmp_path, dit.lowered(variants, dialect, backend), backend), feeds_of(dit, dialect)
    full = opened.run("full", feeds)
    found = opened.run("reuse.0", {**feeds, **full})["prediction"]
    if backend == "ort":
        np.testing.assert_array_equal(found, full["prediction"])
    else:
        np.testing.assert_allclose(found, full["prediction"], atol=1e-6 * np.abs(full["prediction"]).max())


@pytest.mark.parametrize(("dialect", "backend", "corrections"), CASES)
def test_unet_reuse_of_this_calls_features_is_the_full_graph(
    unet: Model, tmp_path: Path, dialect: str, backend: str, corrections: Any
) -> None:
    cuts = {f"reuse.{index}": branch_cut(unet.graph, index) for index in (0, 2, 4)}
    variants = cut_variants(unet.graph, cuts, corrections=corrections)
    opened, feeds = Opened(tmp_path, unet.lowered(variants, dialect, backend), backend), feeds_of(unet, dialect)
    full = opened.run("full", feeds)
    for name in cuts:
        found = opened.run(name, {**feeds, **full, **neutral(variants, name)})
        np.testing.assert_array_equal(found["prediction"], full["prediction"])


def test_writing_features_does_not_change_the_prediction(unet: Model, tmp_path: Path) -> None:
    variants = cut_variants(unet.graph, {"reuse.0": branch_cut(unet.graph, 1)})
    graphs = unet.lowered(variants, "ort", "ort")
    plain = lower_ort(unet.graph, unet.plan, unet.table, unet.weights)
    opened, feeds = Opened(tmp_path, {**graphs, "plain": plain}, "ort"), feeds_of(unet, "ort")
    np.testing.assert_array_equal(opened.run("plain", feeds)["prediction"], opened.run("full", feeds)["prediction"])


@pytest.mark.parametrize("dialect", ["float", "ort", "portable"])
def test_gain_and_bias_act_on_each_channel(dit: Model, unet: Model, tmp_path: Path, dialect: str) -> None:
    for model, cut in ((dit, FeatureCut(("transformer_blocks.4/add#3",))), (unet, branch_cut(unet.graph, 2))):
        plain = cut_variants(model.graph, {"reuse.0": cut})
        corrected = cut_variants(model.graph, {"reuse.0": cut}, corrections=("feature",))
        feature = corrected.features["cache.0"]
        folder = tmp_path / str(feature.axis)
        folder.mkdir()
        both = {f"{kind}.{name}": graph for kind, given in (("plain", plain), ("corrected", corrected))
                for name, graph in model.lowered(given, dialect, "ort").items()}
        opened, feeds = Opened(folder, both, "ort"), feeds_of(model, dialect)
        cached = opened.run("plain.full", feeds)["cache.0"]
        gain, bias = 1 + 0.1 * normal(feature.channels), 0.1 * normal(feature.channels, seed=1)
        shape = [1] * cached.ndim
        shape[feature.axis] = -1
        by_hand = cached * gain.reshape(shape) + bias.reshape(shape)
        vectors = {"cache.0.gain": gain, "cache.0.bias": bias}
        found = opened.run("corrected.reuse.0", {**feeds, "cache.0": cached, **vectors})["prediction"]
        wanted = opened.run("plain.reuse.0", {**feeds, "cache.0": by_hand})["prediction"]
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())
        assert not np.allclose(found, opened.run("plain.reuse.0", {**feeds, "cache.0": cached})["prediction"])


def test_the_product_that_consumes_a_feature_is_corrected_after_its_bias(unet: Model, tmp_path: Path) -> None:
    cut = {"reuse.0": branch_cut(unet.graph, 2)}
    variants = cut_variants(unet.graph, cut, corrections=("feature", "product"))
    feature = variants.features["cache.0"]
    assert feature.product == "up_blocks.1.resnets.1.conv_shortcut/out"
    opened, feeds = Opened(tmp_path, unet.lowered(variants, "ort", "ort"), "ort"), feeds_of(unet, "ort")
    full = opened.run("full", feeds)
    vectors = neutral(variants, "reuse.0")
    assert vectors["cache.0.product.gain"].shape == (feature.product_channels,)
    np.testing.assert_array_equal(
        opened.run("reuse.0", {**feeds, **full, **vectors})["prediction"], full["prediction"]
    )
    graph = variants.variants["reuse.0"].graph
    vectors["cache.0.product.gain"] = 1 + normal(feature.product_channels)
    vectors["cache.0.product.bias"] = normal(feature.product_channels, seed=1)
    given = {**unet.groups[1], "cache.0": full["cache.0"], **vectors}
    raw, corrected = tap(graph, given, [f"{feature.product}.uncorrected", str(feature.product)]).values()
    gain, bias = (vectors[f"cache.0.product.{n}"].reshape(-1, 1, 1) for n in ("gain", "bias"))
    np.testing.assert_allclose(corrected, raw * gain + bias, rtol=1e-5, atol=1e-5)


def test_probes_compute_what_they_say(dit: Model, unet: Model) -> None:
    cases = (
        (dit, Probe("modulated_input"), "transformer_blocks.0.attn1.to_q/in", None),
        (dit, Probe("first_block"), "transformer_blocks.0/add#3", "pos_embed/add"),
        (unet, Probe("first_block", "down_blocks.0.resnets"), "down_blocks.0.downsamplers.0.conv/in", "conv_in/out"),
        (unet, Probe("modulated_input", "down_blocks.0.resnets"), "down_blocks.0.resnets.0.conv2/in", None),
    )
    for model, probe, tensor, before in cases:
        graph = cut_variants(model.graph, {}, probe).variants["probe"].graph
        assert [value.name for value in graph.graph.outputs] == ["indicator"]
        assert len(graph.graph) < len(model.graph.graph) / 4
        seen = tap(model.graph, model.groups[0], [tensor, *([before] if before else [])])
        wanted = seen[tensor] - seen[before] if before else seen[tensor]
        found = tap(graph, model.groups[0], ["indicator"])["indicator"]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_inputs_and_outputs_are_as_documented(dit: Model) -> None:
    variants = cut_variants(dit.graph, DIT_CUTS, Probe("first_block"), ("feature",)).variants
    names = {k: ([i.name for i in v.graph.graph.inputs], [o.name for o in v.graph.graph.outputs])
             for k, v in variants.items()}
    border = ["sample", "timestep", "class_labels"]
    assert names["full"] == (border, ["prediction", *(f"cache.{n}" for n in range(10))])
    assert names["reuse.0"] == ([*border, "cache.0", "cache.0.gain", "cache.0.bias"], ["prediction"])
    assert names["probe"] == (border, ["indicator"])
    assert variants["full"].writes == tuple(f"cache.{n}" for n in range(10))
    assert variants["reuse.1"].reads == tuple(f"cache.{n}" for n in range(1, 9))
    assert variants["reuse.1"].vectors[:2] == ("cache.1.gain", "cache.1.bias")
    assert [str(v.name) for v in dit.graph.graph.outputs] == ["prediction"]


def test_a_feature_of_several_variants_has_one_name(dit: Model) -> None:
    first = SublayerCut((NONE, BOTH, BOTH, NONE, NONE, NONE))
    second = SublayerCut((NONE, NONE, BOTH, BOTH, NONE, NONE))
    made = cut_variants(dit.graph, {"reuse.0": first, "reuse.1": second})
    assert len(made.features) == 6
    assert set(made.variants["reuse.0"].reads) & set(made.variants["reuse.1"].reads) == {"cache.2", "cache.3"}


@pytest.mark.parametrize("dialect", ["ort", "portable"])
def test_variants_share_their_weights(dit: Model, tmp_path: Path, dialect: str) -> None:
    variants = cut_variants(dit.graph, DIT_CUTS, Probe("modulated_input"), ("feature",))
    alone, together = tmp_path / "alone", tmp_path / "together"
    graphs = dit.lowered(variants, dialect, "ort")
    for folder, given in ((alone, {"full": graphs["full"]}), (together, graphs)):
        folder.mkdir()
        write_graphs(folder, given)
    sizes = [sum(f.stat().st_size for f in folder.glob("*.bin")) for folder in (alone, together)]
    assert sizes[1] - sizes[0] <= 0.02 * sizes[0]


def test_a_variants_plan_is_its_part_of_the_whole(dit: Model) -> None:
    variants = cut_variants(dit.graph, {"reuse.0": DeltaCut(1, 4, 6)})
    part = variant_plan(dit.plan, variants.variants["reuse.0"].graph)
    gone = {site.id for site in dit.plan.sites} - {site.id for site in part.sites}
    assert gone == {s.id for s in dit.plan.sites if s.id.split(".")[:2] in [["transformer_blocks", n] for n in "1234"]}
    assert variant_plan(dit.plan, variants.variants["full"].graph) == dit.plan
    for site in part.sites:
        assert part.settings(site) == dit.plan.settings(site)


def with_shapes(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def test_a_site_whose_partner_is_gone_keeps_its_settings() -> None:
    model = with_shapes(graph_of(
        """
        g (float[batch, 4, 16] sample, float[16, 16] w0, float[16, 16] w1, float[16, 16] w2)
          => (float[batch, 4, 16] prediction)
        {
          x = Sigmoid (sample)
          deep = MatMul (x, w0)
          left = MatMul (x, w1)
          right = MatMul (x, w2)
          both = Add (left, right)
          prediction = Add (both, deep)
        }
        """,
        {f"w{n}": normal(16, 16, seed=n) for n in range(3)},
    ))
    for node in model.graph:
        node.metadata_props[MODULE] = str(node.outputs[0].name)
    plan = default_plan(model, "digest")
    settings = Quantize(symmetric=True)
    plan = dataclasses.replace(plan, decisions={"deep": settings, "left": Share("deep"), "right": Share("deep")})
    part = variant_plan(plan, cut_variants(model, {"reuse.0": FeatureCut(("deep",))}).variants["reuse.0"].graph)
    assert part.decisions == {"left": settings, "right": Share("left")}


def test_scales_of_refreshing_and_reusing_calls_may_differ(dit: Model) -> None:
    graph = cut_variants(dit.graph, {"reuse.0": DeltaCut(1, 4, 6)}).variants["reuse.0"].graph
    part = variant_table(dit.table, variant_plan(dit.plan, graph))
    lower_variant(graph, dit.plan, part, dit.weights, lower_ort)
    poor = ScaleTable(part.partition, dict(list(part.tensors.items())[1:]))
    with pytest.raises(ScaleMissing, match=next(iter(part.tensors))):
        lower_variant(graph, dit.plan, poor, dit.weights, lower_ort)


def test_a_graphs_name_tells_its_variant() -> None:
    assert [variant_of(name) for name in ("full.ort-f32", "reuse.0.portable-f32")] == ["full", "reuse.0"]


TO_Q = "transformer_blocks.2.attn1.to_q/in"
DEEP = ("transformer_blocks.1/add#3", "transformer_blocks.4/add#3")


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (FeatureCut(("transformer_blocks.4/add#33",)), "did you mean 'transformer_blocks.4/add#3'"),
        (FeatureCut(("sample",)), r"tensor 'sample'.*no computed value"),
        (FeatureCut(("transformer_blocks.2.norm1.linear/out",)), "does not depend on the sample"),
        (FeatureCut(DEEP), r"feature 'cache\.0'.*does not read"),
        (FeatureCut(("transformer_blocks.2.norm1.norm/layer_normalization",)), "a reuse graph with all 69 products"),
        (DeltaCut(1, 4, 12), "found a cut for 12 blocks, wanted one for 6"),
        (DeltaCut(1, 2, 3, "blocks"), "no such list of blocks"),
        (SublayerCut((BOTH,) * 4), "found a cut for 4 blocks, wanted one for 6"),
        (SublayerCut(((True,),) * 6), r"a mask for 1 sublayers, wanted 2: .*attn1, .*ff"),
    ],
)
def test_cuts_that_do_not_fit_are_refused_by_name(dit: Model, cut: Cut, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        cut_variants(dit.graph, {"reuse.0": cut})


def _leaky(extra: str) -> ir.Model:
    text = f"""
    g (float[batch, 4, 16] sample, float[16, 16] w0, float[16, 16] w1, float[16, 16] w3, float[32, 16] w2)
      => (float[batch, 4, 16] prediction)
    {{
      early = MatMul (sample, w0)
      inside = MatMul (early, w1)
      deep = MatMul (inside, w3)
      both = Concat <axis = -1> (deep, early)
      shallow = MatMul (both, w2)
      prediction = {extra}
    }}
    """
    shapes = {"w0": (16, 16), "w1": (16, 16), "w2": (32, 16), "w3": (16, 16)}
    return with_shapes(graph_of(text, {name: normal(*shape) for name, shape in shapes.items()}))


def test_a_cut_that_needs_uncached_tensors_is_refused_by_their_names() -> None:
    cut_variants(_leaky("Sigmoid (shallow)"), {"reuse.0": FeatureCut(("deep",))})
    with pytest.raises(ExportError, match=r"cut 'reuse\.0', tensor 'deep'.*still needs inside"):
        cut_variants(_leaky("Add (shallow, inside)"), {"reuse.0": FeatureCut(("deep",))})


def test_a_unet_is_not_cut_like_a_transformer(unet: Model) -> None:
    with pytest.raises(ExportError, match=r"down_blocks 0 to 1[\s\S]*tensors that the cut does not cache"):
        cut_variants(unet.graph, {"reuse.0": DeltaCut(0, 1, 3, "down_blocks")})
    with pytest.raises(ExportError, match=r"found a model with 6 long skips, wanted 0 to 5"):
        branch_cut(unet.graph, 6)


def test_a_correction_without_a_product_is_refused(dit: Model) -> None:
    with pytest.raises(ExportError, match="no product that reads a cached feature"):
        cut_variants(dit.graph, {"reuse.0": DeltaCut(1, 4, 6)}, corrections=("product",))


def test_a_centred_tensor_is_no_feature(dit: Model) -> None:
    assert TO_Q in dit.plan.centred
    cut = FeatureCut((TO_Q, "transformer_blocks.1.ff.net.2/out"))
    graph = cut_variants(dit.graph, {"reuse.0": cut}).variants["full"].graph
    with pytest.raises(PlanError, match=r"centred: found the tensor 'transformer_blocks\.2\.attn1\.to_q/in'"):
        variant_plan(dit.plan, graph)


def test_an_unknown_place_for_a_probe_is_refused(dit: Model) -> None:
    for probe in (Probe("modulated_input", "blocks"), Probe("first_block", "blocks")):
        with pytest.raises(ExportError, match="probe, blocks"):
            cut_variants(dit.graph, {}, probe)


def test_a_cut_that_makes_no_sense_is_refused_first(dit: Model) -> None:
    with pytest.raises(DataError, match=r"cut 'reuse\.0': found blocks 4 to 1 of 6"):
        cut_variants(dit.graph, {"reuse.0": DeltaCut(4, 1, 6)})
