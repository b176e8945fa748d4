from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file
from support import tiny_models

import quantempo
from quantempo.calib.ranges import SCALE_FLOOR
from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import MANIFEST_NAME
from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share
from quantempo.engines import targets as engine_targets
from quantempo.engines.cpu import CpuFeatures
from quantempo.engines.ort import executed_operators
from quantempo.engines.registry import open_engine
from quantempo.engines.saturation import unsafe_reason
from quantempo.errors import OutputExists, PlanError, RequestError
from quantempo.export.graph_files import load_graph
from quantempo.export.weights import stored_weights
from quantempo.inspection import STATISTICS, load_plan
from quantempo.pipeline import compile_model
from quantempo.quality import sqnr_db
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.stages import quantizers
from quantempo.stages.quantizers import ScaleFloored

BUNDLES = ["dit_bundle", "unet_bundle"]
CENTRE = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> OpenBundle:
    found: OpenBundle = request.getfixturevalue(request.param)
    return found


def plan_of(bundle: OpenBundle) -> QuantPlan:
    plan = load_plan(bundle)
    assert plan is not None
    return plan


def graph_file(bundle: OpenBundle, dialect: str = "ort") -> Path:
    return bundle.path(bundle.manifest.graphs[f"full.{dialect}-f32"].file)


def feeds(bundle: OpenBundle, rows: int = 3, group: int | None = None) -> dict[str, Any]:
    """Inputs of the denoiser graph at one timestep."""
    denoiser = bundle.manifest.denoiser
    noise = np.random.default_rng(5).standard_normal((rows, *denoiser.latents_shape)).astype(np.float32)
    given: dict[str, Any] = {
        denoiser.sample_input: noise, denoiser.timestep_input: np.full(rows, 250, np.float32),
        "class_labels": np.arange(rows),
    }
    if group is not None:
        assert denoiser.group_input is not None
        given[denoiser.group_input] = np.array(group)
    return given


def predict(bundle: OpenBundle, dialect: str = "ort", group: int | None = 0) -> np.ndarray[Any, Any]:
    engine = open_engine("ort", graph_file(bundle, dialect), EngineOptions(threads=1))
    out = engine.run(feeds(bundle, group=group))[bundle.manifest.denoiser.prediction]
    engine.close()
    return out


def final_latents(path: Path, **given: Any) -> np.ndarray[Any, Any]:
    with quantempo.load(path, threads=1) as session:
        return session(class_labels=[1, 2], seed=3, num_inference_steps=4, output_type="latent", **given).latents


# ------------------------------------------------------------------------------------------------- what is written


def test_a_bundle_holds_what_its_manifest_says(bundle: OpenBundle) -> None:
    manifest = bundle.manifest
    assert read_bundle(bundle.root) == bundle
    assert manifest.precision == "int8"
    assert set(manifest.requires) == {"step-program-1", "scale-groups-1"}
    assert {"full.ort-f32", "full.portable-f32"} <= set(manifest.graphs)
    assert {"plan.json", "tables.safetensors", "recipe.json", "scheduler_config.json"} <= set(manifest.files)
    assert bundle.steps == (1, 2, 3, 4, 5, 6)
    assert manifest.programs.default_steps == 4
    on_disk = {p.relative_to(bundle.root).as_posix() for p in bundle.root.rglob("*") if p.is_file()}
    aside = {name for name in on_disk if name.startswith(("reference/", "report/"))}
    assert on_disk - aside == {*manifest.files, MANIFEST_NAME}
    assert STATISTICS in aside


def test_both_dialects_share_one_file_of_integer_weights(bundle: OpenBundle) -> None:
    ort, portable = (bundle.manifest.graphs[f"full.{d}-f32"] for d in ("ort", "portable"))
    assert "graphs/weights.int8.bin" in set(ort.data) & set(portable.data)
    graphs = [name for name in bundle.manifest.files if name.startswith("graphs/weights.")]
    assert sorted(graphs) == ["graphs/weights.float32.bin", "graphs/weights.int8.bin"]


def test_the_manifest_says_what_made_it_without_times_and_places(bundle: OpenBundle) -> None:
    made = bundle.manifest.provenance
    assert {"quantempo", "torch", "diffusers", "onnx", "onnxruntime", "model", "recipe", "seed"} <= set(made)
    text = (bundle.root / MANIFEST_NAME).read_text()
    assert str(bundle.root.parent) not in text
    assert "/home" not in text
    for path in (bundle.root / "graphs").glob("*.onnx"):
        assert str(Path.cwd()).encode() not in path.read_bytes()


def test_the_float_reference_is_a_bundle_of_its_own(bundle: OpenBundle) -> None:
    reference = read_bundle(bundle.root / "reference")
    assert reference.manifest.precision == "float32"
    assert reference.manifest.partition is None
    assert reference.manifest.denoiser.group_input is None
    assert final_latents(reference.root).shape == (2, *reference.manifest.denoiser.latents_shape)


def test_quantized_bundle_samples_close_to_its_float_reference_but_not_the_same(bundle: OpenBundle) -> None:
    quantized, reference = final_latents(bundle.root), final_latents(bundle.root / "reference")
    assert 10 < sqnr_db(quantized, reference) < 100


# ------------------------------------------------------------------------------------------------- determinism


def tree(root: Path) -> dict[str, bytes]:
    names = sorted(read_bundle(root).manifest.files)
    return {name: (root / name).read_bytes() for name in [*names, MANIFEST_NAME]}


def test_two_compiles_with_one_seed_give_the_same_bytes(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    """The second one runs in a process of its own, with other hash values, at another place."""
    code = (
        "import sys; from pathlib import Path; from quantempo.pipeline import compile_model\n"
        "from quantempo.contracts.codec import from_data, parse_json; from quantempo.recipe import Recipe\n"
        "recipe = from_data(Recipe, parse_json(Path(sys.argv[3]).read_bytes(), 'recipe'), 'recipe')\n"
        "compile_model(Path(sys.argv[1]), Path(sys.argv[2]), recipe, work='work')"
    )
    words = [tiny_models.dit_pipeline(), tmp_path / "again", dit_bundle.root / "recipe.json"]
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, env=environment, cwd=tmp_path)
    assert tree(tmp_path / "again") == tree(dit_bundle.root)
    reference = Path("reference")
    assert tree(tmp_path / "again" / reference) == tree(dit_bundle.root / reference)


@pytest.mark.full
def test_two_compiles_of_a_unet_give_the_same_bytes(unet_bundle: OpenBundle, small: Recipe, tmp_path: Path) -> None:
    scheduler = tiny_models.unet() / "scheduler"
    compile_model(tiny_models.unet(), tmp_path / "again", small, scheduler=scheduler, work=tmp_path / "work")
    assert tree(tmp_path / "again") == tree(unet_bundle.root)


def test_reused_stages_give_the_bytes_of_a_whole_compile(
    compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path
) -> None:
    """What the other tests of this folder rely on."""
    made = compile_tiny(tmp_path / "again")
    assert all(run.reused for run in made.stages)
    assert tree(tmp_path / "again") == tree(dit_bundle.root)


@pytest.mark.parametrize(("method", "same"), [("mse", True), ("gptq", False)])
def test_another_seed_gives_other_scales_and_other_weights_only_where_these_are_calibrated(
    compile_tiny: Any, tmp_path: Path, method: str, same: bool
) -> None:
    first = compile_tiny(tmp_path / "first", weight_method=method).bundle.manifest.files
    other = compile_tiny(tmp_path / "other", weight_method=method, seed=1).bundle.manifest.files
    name = "graphs/weights.int8.bin"
    assert (other[name] == first[name]) is same
    assert other["tables.safetensors"] != first["tables.safetensors"]


# ------------------------------------------------------------------------------------------------- plan, table, graphs


def test_scales_are_produced_for_exactly_what_the_plan_quantizes(bundle: OpenBundle) -> None:
    plan, partition = plan_of(bundle), bundle.manifest.partition
    assert partition is not None
    assert partition.groups == 4, "one group per calibrated timestep"
    arrays = load_file(bundle.path("tables.safetensors"))
    assert {name.rsplit("|", 1)[0] for name in arrays} == set(plan.scaled_tensors())
    assert all(len(array) == partition.groups for array in arrays.values())
    assert plan.model == bundle.manifest.provenance["float_graph"]
    assert len(plan.quantized()) > len(plan.kept()) > 0


def test_the_graph_looks_up_the_scales_of_the_table(bundle: OpenBundle) -> None:
    model = onnx.load(graph_file(bundle))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    group = bundle.manifest.denoiser.group_input
    rows = [n for n in model.graph.node if n.op_type == "Gather" and n.input[1] == group]
    lookups = [n for n in rows if n.name.startswith("activation.")]
    assert len(lookups) == 2, "one table of scales and one of zero points"
    scales = next(stored[n.input[0]] for n in lookups if stored[n.input[0]].dtype == np.float32)
    table = bundle.scale_table()
    assert table is not None
    found = {tuple(column) for column in scales.T}
    known = {tuple(form) for t in table.tensors.values() for form in (t.scale, t.symmetric_scale)}
    assert found <= known
    assert len(found) == len({tuple(table.of(t).scale) for t in plan_of(bundle).scaled_tensors()})
    used = {name for node in model.graph.node for name in node.input}
    splits = [n for n in model.graph.node if n.op_type == "Split" and n.input[0] in {x.output[0] for x in lookups}]
    assert splits
    assert all(output in used for split in splits for output in split.output), "a scale that nothing consumes"


def test_the_scale_group_changes_the_result_and_only_in_the_quantized_graphs(bundle: OpenBundle) -> None:
    for dialect in ("ort", "portable"):
        results = [predict(bundle, dialect, group) for group in range(4)]
        assert all(np.isfinite(result).all() for result in results)
        assert not np.array_equal(results[0], results[3]), dialect
    reference = read_bundle(bundle.root / "reference")
    assert set(reference.manifest.graphs["full.float-f32"].inputs) == {
        spec for spec in bundle.manifest.graphs["full.ort-f32"].inputs if spec.name != "scale_group"
    }


def test_both_dialects_compute_nearly_the_same(bundle: OpenBundle) -> None:
    reference = predict(read_bundle(bundle.root / "reference"), "float", None)
    ort, portable = predict(bundle, "ort", 1), predict(bundle, "portable", 1)
    assert sqnr_db(ort, reference) > 20
    assert sqnr_db(portable, ort) > 20


def test_a_session_takes_the_dialect_that_is_asked_for(dit_bundle: OpenBundle) -> None:
    results = {}
    for dialect in ("ort", "portable"):
        with quantempo.load(dit_bundle.root, dialect=dialect, threads=1) as session:
            results[dialect] = session(class_labels=[4], seed=0, num_inference_steps=2, output_type="latent").latents
    assert sqnr_db(results["portable"], results["ort"]) > 25
    with pytest.raises(Exception, match="dialect 'fp8'"):
        quantempo.load(dit_bundle.root, dialect="fp8")


# ------------------------------------------------------------------------------------------------- optimized graph


def test_every_quantized_site_runs_on_an_integer_operator(bundle: OpenBundle) -> None:
    ran = executed_operators(graph_file(bundle))
    ops = [site.op for site in plan_of(bundle).quantized()]
    assert ran["com.microsoft.MatMulIntegerToFloat"] == ops.count("matmul")
    assert ran["QLinearConv"] + ran["com.microsoft.QLinearConv"] == ops.count("conv")
    if "unet" in bundle.root.name:
        assert ops.count("conv") > 5


def test_no_dequantizer_feeds_a_product_in_the_optimized_graph(bundle: OpenBundle, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(graph_file(bundle)), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    maker = {name: node for node in graph.node for name in node.output}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv", "FusedMatMul", "FusedConv")]
    for product in products:
        sources = [maker[name].op_type for name in product.input if name in maker]
        assert "DequantizeLinear" not in sources, f"{product.name} multiplies dequantized values"
    float_weights = {t.name for t in graph.initializer}
    with_weights = [p for p in products if len(p.input) > 1 and p.input[1] in float_weights]
    assert len(with_weights) == len(plan_of(bundle).kept()), "a quantized site still multiplies in float"


# ------------------------------------------------------------------------------------------------- recipes and plans


def test_a_keep_pattern_leaves_its_sites_in_float(compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    pattern = "transformer_blocks.0.*"
    kept = compile_tiny(tmp_path / "kept", keep=(pattern,)).bundle
    before, plan = plan_of(dit_bundle), plan_of(kept)
    matching = {s.id for s in plan.sites if s.module.startswith("transformer_blocks.0.")}
    assert matching & {s.id for s in before.quantized()}
    assert not matching & {s.id for s in plan.quantized()}
    assert all(isinstance(plan.decisions[name], Keep) for name in matching)
    reasons = [d.reason for d in plan.decisions.values() if isinstance(d, Keep)]
    assert f"kept by pattern {pattern!r}" in reasons
    assert len(plan.quantized()) == executed_operators(graph_file(kept))["com.microsoft.MatMulIntegerToFloat"]


def test_exclude_is_another_word_for_keep(compile_tiny: Any, tmp_path: Path) -> None:
    first = compile_tiny(tmp_path / "keep", keep=("*.ff.*",)).bundle
    second = compile_tiny(tmp_path / "exclude", exclude=("*.ff.*",)).bundle
    assert first.manifest.files["plan.json"] == second.manifest.files["plan.json"]


def edited_plan(bundle: OpenBundle, path: Path, **changes: Any) -> Path:
    data = parse_json(bundle.path("plan.json").read_bytes(), "plan.json")
    data.update(changes)
    path.write_text(canonical_json(data))
    return path


def test_an_edited_plan_is_followed(compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    data = parse_json(dit_bundle.path("plan.json").read_bytes(), "plan.json")["decisions"]
    plan = plan_of(dit_bundle)
    shared_with = {d.site for d in plan.decisions.values() if isinstance(d, Share)}
    alone = next(s.id for s in plan.quantized() if s.id not in shared_with
                 and isinstance(plan.decisions[s.id], Quantize))
    data[alone] = {"kind": "keep", "reason": "by hand"}
    path = edited_plan(dit_bundle, tmp_path / "mine.json", decisions=data)
    made = compile_tiny(tmp_path / "edited", plan_file=path)
    assert made.quantized == len(plan.quantized()) - 1
    assert plan_of(made.bundle).decisions[alone] == Keep("by hand")
    assert plan_of(made.bundle) == from_data(QuantPlan, parse_json(path.read_bytes(), "plan"), "plan")


def test_a_plan_as_it_is_gives_the_same_bundle(compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    again = compile_tiny(tmp_path / "again", plan_file=dit_bundle.path("plan.json")).bundle
    assert again.digest == dit_bundle.digest


def test_a_plan_of_another_model_is_refused(compile_tiny: Any, unet_bundle: OpenBundle, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        compile_tiny(tmp_path / "out", plan_file=unet_bundle.path("plan.json"))
    message = str(caught.value)
    assert "found a plan for the graph" in message
    assert "it was written for another model or version" in message
    assert "compile without --plan" in message
    assert list(tmp_path.iterdir()) == []


def test_fewer_activation_bits_are_simulated_and_cost_accuracy(
    compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path
) -> None:
    coarse = compile_tiny(tmp_path / "six", activation_bits=6).bundle
    table = coarse.scale_table()
    assert table is not None
    assert all((scales.zero_point <= 63).all() for scales in table.tensors.values())
    reference = predict(read_bundle(dit_bundle.root / "reference"), "float", None)
    eight, six = (sqnr_db(predict(b, "ort", 1), reference) for b in (dit_bundle, coarse))
    assert six < eight - 4, f"{six:.1f} dB at 6 bits, {eight:.1f} at 8"


@pytest.mark.parametrize(("targets", "highest"), [(("cpu",), 63), (("openvino", "rtx-ada"), 63), ((), 127)])
def test_a_named_cpu_without_vnni_gets_weights_that_cannot_saturate(
    compile_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], highest: int
) -> None:
    monkeypatch.setattr(engine_targets, "cpu_features", lambda: CpuFeatures("x86", ("avx2",)))
    bundle = compile_tiny(tmp_path / "b", targets=targets).bundle
    weights = stored_weights(load_graph(graph_file(bundle)), plan_of(bundle))
    values = np.concatenate([np.abs(w.values.astype(np.int16)).ravel() for w in weights.values()])
    assert values.max() == highest
    assert bool(unsafe_reason(graph_file(bundle), CpuFeatures("x86", ("avx2",)))) == (highest > 63)


def test_activations_that_are_always_zero_are_reported(dit_bundle: OpenBundle) -> None:
    table = dit_bundle.scale_table()
    assert table is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleFloored)
        quantizers.say_floored(table)
    name = next(iter(table.tensors))
    least = np.full(table.partition.groups, SCALE_FLOOR, np.float32)
    dead = dataclasses.replace(
        table, tensors={**table.tensors, name: dataclasses.replace(table.tensors[name], scale=least)}
    )
    with pytest.warns(ScaleFloored, match=r"1 of \d+ quantized tensors were zero throughout .*least one, 1e-12"):
        quantizers.say_floored(dead)


def test_a_float_bundle_has_no_scales_and_no_plan(compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    made = compile_tiny(tmp_path / "float", precision="float32")
    assert (made.sites, made.quantized, made.groups) == (0, 0, 0)
    manifest = made.bundle.manifest
    assert (manifest.precision, manifest.plan, manifest.tables, manifest.partition) == ("float32", None, None, None)
    assert set(manifest.graphs) == {"full.float-f32", "decoder.float-f32"}
    assert np.array_equal(final_latents(made.bundle.root), final_latents(dit_bundle.root / "reference"))


def test_without_a_reference_nothing_lies_beside_the_bundle(compile_tiny: Any, tmp_path: Path) -> None:
    made = compile_tiny(tmp_path / "lean", reference=False).bundle
    assert not (made.root / "reference").exists()
    assert not (made.root / "report").exists()


@pytest.mark.parametrize(("words", "groups"), [("single", 1), ("uniform:2", 2), ("optimal:3", 3), ("auto", 4)])
def test_groups_are_what_was_asked_for(compile_tiny: Any, tmp_path: Path, words: str, groups: int) -> None:
    made = compile_tiny(tmp_path / "bundle", groups=words)
    assert made.groups == groups
    assert made.bundle.manifest.partition is not None
    assert made.bundle.manifest.partition.groups == groups
    assert f"{groups} scale groups" in made.text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"groups": "unifrom:4"}, "did you mean 'uniform'"), ({"range_method": "kl"}, "range method")],
)
def test_a_misspelt_method_is_refused_before_the_model_is_opened(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        compile_model(tmp_path / "no-model", tmp_path / "out", Recipe(**changes))


# ------------------------------------------------------------------------------------------------- where it is written


def test_an_existing_bundle_is_replaced_only_on_request(compile_tiny: Any, tmp_path: Path) -> None:
    compile_tiny(tmp_path / "bundle")
    with pytest.raises(OutputExists, match="found a bundle, wanted a path that is free"):
        compile_tiny(tmp_path / "bundle", precision="float32")
    assert read_bundle(tmp_path / "bundle").manifest.precision == "int8"
    compile_tiny(tmp_path / "bundle", precision="float32", overwrite=True)
    assert read_bundle(tmp_path / "bundle").manifest.precision == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_missing_folders_above_the_output_are_made(compile_tiny: Any, tmp_path: Path) -> None:
    compile_tiny(tmp_path / "new" / "folder" / "bundle", precision="float32")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["bundle"]
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(OutputExists, match="a directory that is not a bundle"):
        compile_model(tiny_models.dit_pipeline(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "words"


def test_step_counts_that_a_scheduler_refuses_are_left_out(small: Recipe, tmp_path: Path) -> None:
    from diffusers import PNDMScheduler

    PNDMScheduler().save_pretrained(tmp_path / "pndm")
    model = tiny_models.dit_pipeline() / "transformer"
    made = compile_model(model, tmp_path / "out", small, scheduler=tmp_path / "pndm").bundle
    assert made.steps == (4, 5, 6)
    with pytest.raises(RequestError, match=r"steps of PNDMScheduler: found 2[\s\S]*between 4 and 6[\s\S]*ask for 4"):
        compile_model(
            model, tmp_path / "few", dataclasses.replace(small, steps=(2,)), scheduler=tmp_path / "pndm"
        )
