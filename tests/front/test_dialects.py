"""Every graph that a bundle can hold: what is asked for, what is in it, and that no engine falls back to float."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import tiny_models

from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.plan import QuantPlan
from quantempo.engines import gate
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.ort import optimized_graph
from quantempo.engines.registry import open_engine
from quantempo.engines.simulation import SimulatedNotice, narrow_floats
from quantempo.engines.targets import target
from quantempo.errors import PlanError, RequestError
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.report import ReportOptions, write_report
from quantempo.runtime.bundle import OpenBundle
from quantempo.stages.dialects import GraphChoice, attention_products, chosen_graphs

ONE = EngineOptions(threads=1)
SMALL: dict[str, Any] = {"samples": 8, "batch": 4, "steps": (4,), "guidance": (1.5,), "max_steps": 6, "threads": 1}
ROWS = 2
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra tensorrt-rtx)"
)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed (extra openvino)"
)


@pytest.fixture(scope="module", params=["dit", "unet"])
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenBundle]:
    """A tiny model in INT8 and in FP8, for devices that read half precision."""
    made, folder = {}, tmp_path_factory.mktemp("dialects")
    model = tiny_models.dit_pipeline() if request.param == "dit" else tiny_models.unet()
    scheduler = None if request.param == "dit" else model / "scheduler"
    for precision, targets in (("int8", ("rtx-ampere", "orin-jp6", "rtx-turing")), ("fp8", ("rtx-ada",))):
        wide = "portable-bf16" if precision == "int8" else "fp8-bf16"
        recipe = Recipe(**SMALL, precision=precision, targets=targets, graphs=(wide,))  # type: ignore[arg-type]
        made[precision] = compile_model(model, folder / precision, recipe, scheduler=scheduler).bundle
    return made


def graphs(bundle: OpenBundle) -> dict[str, Path]:
    return {name: bundle.path(g.file) for name, g in bundle.manifest.graphs.items() if name.startswith("full.")}


def sizes(path: Path) -> dict[str, int]:
    shapes = [spec.shape for spec in read_graph(path).inputs.values()]
    return {size: ROWS for shape in shapes for size in shape if isinstance(size, str)}


def feeds(bundle: OpenBundle, rows: int = ROWS) -> dict[str, np.ndarray]:
    denoiser, rng = bundle.manifest.denoiser, np.random.default_rng(0)
    given = {
        "sample": rng.standard_normal((rows, *denoiser.latents_shape)).astype(np.float32),
        "timestep": np.full(rows, 500.0, np.float32), "scale_group": np.array(0),
    }
    return given | {entry.name: np.ones(rows, np.int64) for entry in denoiser.classes}


def test_bundles_hold_the_graphs_of_their_targets(bundles: dict[str, OpenBundle]) -> None:
    assert set(graphs(bundles["int8"])) == {
        "full.ort-f32", "full.portable-bf16", "full.portable-f16", "full.portable-f32", "full.unfold-f16",
    }
    assert set(graphs(bundles["fp8"])) == {"full.fp8-bf16", "full.fp8-f16", "full.fp8-f32"}
    entry = bundles["fp8"].manifest.graphs["full.fp8-f16"]
    assert (entry.dialect, entry.float_type, bundles["fp8"].manifest.precision) == ("fp8", "float16", "fp8")


def test_all_graphs_are_legal_and_have_one_contract(bundles: dict[str, OpenBundle]) -> None:
    for bundle in bundles.values():
        contracts = set()
        for name, path in graphs(bundle).items():
            if not name.startswith("full.ort"):
                onnx.checker.check_model(str(path), full_check=True)
            entry = bundle.manifest.graphs[name]
            contracts.add((entry.inputs, entry.outputs))
        assert len(contracts) == 1


@needs_rtx
def test_the_gate_passes_every_graph_on_rtx(bundles: dict[str, OpenBundle], tmp_path: Path) -> None:
    from quantempo.building import default_ranges
    from quantempo.engines.tensorrt import BuildJob, build_here
    from quantempo.engines.trt_profiles import complete

    for kind, bundle in bundles.items():
        for name, path in graphs(bundle).items():
            if name.startswith("full.ort"):
                continue
            profile = target("rtx-turing" if "unfold" in name else "rtx-ada")
            inputs = {spec.name: spec for spec in bundle.manifest.graphs[name].inputs}
            profiles = complete(name, inputs, (), default_ranges(bundle.manifest, name))
            plan = tmp_path / f"{kind}.{name}.plan"
            build_here(BuildJob("tensorrt_rtx", str(path), str(plan), profile.capability, profiles))
            report = gate.check_rtx(plan.read_bytes(), read_graph(path), profile)
            assert report.breaches == (), name
            assert report.formats == {kind: report.sites}, name
            assert report.sites > 5


def test_what_the_graph_for_turing_keeps_stands_in_the_plan_with_its_reason(bundles: dict[str, OpenBundle]) -> None:
    bundle = bundles["int8"]
    plan = from_data(QuantPlan, parse_json((bundle.root / "plan.json").read_bytes(), "plan"), "plan")
    kept = plan.dialects["unfold"]
    convolutions = [site for site in plan.quantized() if site.op == "conv"]
    assert set(kept) <= {site.id for site in convolutions}
    assert all("the device has no INT8 convolutions" in decision.reason for decision in kept.values())
    assert not any(node.op_type == "Conv" and "unfold" in name for name, path in graphs(bundle).items()
                   for node in gate.intended_sites(read_graph(path)))  # fmt: skip
    sites = {name: len(gate.intended_sites(read_graph(path))) for name, path in graphs(bundle).items()}
    assert sites["full.unfold-f16"] == sites["full.portable-f16"] - len(kept)
    assert bool(kept) == bool(convolutions), "all convolutions of the tiny model are narrow"


def test_the_gate_passes_the_graph_of_onnxruntime(bundles: dict[str, OpenBundle]) -> None:
    path = graphs(bundles["int8"])["full.ort-f32"]
    report = gate.check_ort(optimized_graph(path, ONE), read_graph(path), target("cpu"))
    assert report.breaches == ()
    assert report.formats["int8"] == report.sites > 5


@needs_openvino
def test_the_gate_passes_the_graph_of_openvino(bundles: dict[str, OpenBundle]) -> None:
    from quantempo.engines.openvino import integer_layers

    path = graphs(bundles["int8"])["full.portable-f32"]
    report = gate.check_openvino(integer_layers(path, ONE, sizes(path)), read_graph(path), target("openvino"))
    assert report.breaches == ()
    assert report.formats["int8"] == report.sites > 5


def test_a_graph_for_an_old_parser_has_no_group_normalization(bundles: dict[str, OpenBundle]) -> None:
    path = graphs(bundles["int8"])["full.portable-f16"]
    assert not [node for node in read_graph(path).nodes if node.op_type == "GroupNormalization"]


def test_half_graphs_are_as_close_to_the_float_model_as_float_graphs(bundles: dict[str, OpenBundle]) -> None:
    """Errors of quantization are noise: over few samples those of two roundings differ by half of themselves."""
    basic = EngineOptions(threads=1, settings={"optimization": "basic"})

    def predict(path: Path, given: dict[str, np.ndarray]) -> np.ndarray:
        engine = open_engine("ort", path, basic)
        found = engine.run({name: given[name] for name in engine.inputs})["prediction"].astype(np.float64)
        engine.close()
        return found

    for kind, dialect in (("int8", "portable"), ("fp8", "fp8")):
        bundle = bundles[kind]
        exact = predict(next((bundle.root / "reference" / "graphs").glob("full.float-f32.onnx")), feeds(bundle, 32))
        errors = []
        for name in (f"{dialect}-f32", f"{dialect}-f16", *(["unfold-f16"] if kind == "int8" else [])):
            found = predict(graphs(bundle)[f"full.{name}"], feeds(bundle, 32))
            errors.append(float(np.square(found - exact).mean() / np.square(exact).mean()))
        assert max(errors[1:]) < 1.5 * errors[0] + 1e-4, (kind, errors)


def test_attention_is_quantized_in_fp8_its_scores_for_openvino_and_all_on_request(
    bundles: dict[str, OpenBundle]
) -> None:
    def inner(name: str, kind: str) -> int:
        structure = read_graph(graphs(bundles[kind])[name])
        return sum(
            structure.dequantizer(n.input(0)) is not None and not structure.is_constant(n.input(1))
            for n in gate.intended_sites(structure)
        )

    attentions = Counter(n.op_type for n in read_graph(graphs(bundles["int8"])["full.portable-f32"]).nodes)["Softmax"]
    assert inner("full.fp8-f32", "fp8") == inner("full.fp8-f16", "fp8") == 2 * attentions
    assert inner("full.portable-f32", "int8") == attentions
    assert inner("full.portable-f16", "int8") == 0
    assert attention_products("portable-f16", "quantized") == attention_products("portable-f32", "quantized") == "both"
    assert attention_products("portable-f32", "auto") == "scores"
    assert attention_products("fp8-f16", "float") is attention_products("portable-f32", "float") is None
    assert attention_products("portable-bf16", "auto") is attention_products("ort-f32", "quantized") is None


def test_fp8_on_a_cpu_says_that_it_is_simulated(bundles: dict[str, OpenBundle]) -> None:
    import quantempo

    path = graphs(bundles["fp8"])["full.fp8-f32"]
    assert narrow_floats(read_graph(path)) > 5
    with pytest.warns(SimulatedNotice, match=r"simulated on this CPU.*do not time it"):
        session = quantempo.load(bundles["fp8"].root, threads=1)
    with session:
        labels = [1] if session.manifest.denoiser.classes else None
        images = session(labels, seed=0, num_inference_steps=4, output_type="np", batch_size=1).images
        assert np.all(np.isfinite(images))


def test_a_report_on_fp8_says_simulated_and_shows_no_speed(bundles: dict[str, OpenBundle]) -> None:
    options = ReportOptions(samples=4, batch=4, population=0, guidance=(1.5,), steps=4, threads=1)
    report = write_report(bundles["fp8"].root, options)
    assert "FP8 (E4M3), simulated on this machine: fidelity only, no speed" in report.text()
    assert report.facts["speed"] is None
    page = (report.folder / "index.html").read_text()
    assert "FP8 (E4M3) is simulated" in page
    assert "ms a call" not in page


def test_recipes_name_their_graphs() -> None:
    assert chosen_graphs(Recipe()).names == ("ort-f32", "portable-f32")
    assert chosen_graphs(Recipe(precision="float32")) == GraphChoice(())
    assert chosen_graphs(Recipe(precision="fp8")).names == ("fp8-f32",)
    chosen = chosen_graphs(Recipe(targets=("orin-jp6", "rtx-ada")))
    assert (chosen.names, chosen.old_parser) == (("ort-f32", "portable-f16", "portable-f32"), True)
    assert not chosen_graphs(Recipe(targets=("rtx-ada",))).old_parser


@pytest.mark.parametrize("name", ["orin-jp6", "rtx-ampere", "rtx-turing", "ampere", "cpu"])
def test_fp8_for_a_device_without_it_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(PlanError, match="number format 'fp8'"):
        chosen_graphs(Recipe(precision="fp8", targets=(name,)))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(RequestError, match="orin"):
        chosen_graphs(Recipe(targets=("orin",)))
    assert "portable-bf16" in chosen_graphs(Recipe(graphs=("portable-bf16",))).names
    for precision, graph in (("int8", "fp8-f16"), ("fp8", "portable-f16"), ("int8", "portable-fp16")):
        with pytest.raises(PlanError, match="recipe, graphs"):
            chosen_graphs(Recipe(precision=precision, graphs=(graph,)))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="auto, float or quantized"):
        Recipe(attention="int8")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="8 with fp8"):
        Recipe(precision="fp8", activation_bits=4)
