from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from support import tiny_models

import quantempo
from quantempo.contracts.cache import FULL
from quantempo.contracts.codec import to_data
from quantempo.devices.rewriting import plan_and_float_graph
from quantempo.errors import BundleError, ExportError, RequestError
from quantempo.inspection import describe, render
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.report.caching import fit_report
from quantempo.report.measure import ReportOptions
from quantempo.report.write import write_report
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import CacheUnused, Session

SMALL: dict[str, Any] = {"samples": 8, "batch": 4, "steps": (4,), "guidance": (1.5,), "max_steps": 6, "threads": 1}
CALL: dict[str, Any] = {"class_labels": [1, 2], "seed": 3, "guidance_scale": 1.5, "output_type": "latent"}
MODELS = ("dit", "unet")
NEEDS_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def compiled(which: str, out: Path, work: Path, **changes: Any) -> OpenBundle:
    cut = {"cache_cut": "delta:0-1"} if which == "dit" else {}
    recipe = Recipe(**{**SMALL, "cache": "every:2", **cut, **changes})
    model = tiny_models.dit_pipeline() if which == "dit" else tiny_models.unet()
    scheduler = None if which == "dit" else model / "scheduler"
    return compile_model(model, out, recipe, scheduler=scheduler, work=work, guard="off").bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cached")


@pytest.fixture(scope="module")
def bundles(folder: Path) -> dict[str, OpenBundle]:
    return {which: compiled(which, folder / which, folder / "work") for which in MODELS}


def opened(bundle: OpenBundle, engine: str = "ort") -> Session:
    return quantempo.load(bundle.root, engine=engine, threads=1)


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("engine", ["ort", pytest.param("openvino", marks=NEEDS_OPENVINO)])
def test_cached_runs_reuse_every_second_call_and_others_none(
    bundles: dict[str, OpenBundle], which: str, engine: str
) -> None:
    with opened(bundles[which], engine) as session:
        cached = session(num_inference_steps=4, **CALL)
        plain = session(num_inference_steps=4, feature_cache="none", **CALL)
        assert (cached.timings.reused, plain.timings.reused) == (8, 0)  # 2 samples, 2 branches, 2 of 4 calls
        assert cached.timings.rows == plain.timings.rows == 16
        assert np.isfinite(cached.latents).all()
        assert not np.array_equal(cached.latents, plain.latents)
        with pytest.warns(CacheUnused, match="has plans for.*4 steps"):
            other = session(num_inference_steps=5, **CALL)
        assert other.timings.reused == 0


def test_a_plan_is_for_the_guidance_that_it_was_fitted_at(bundles: dict[str, OpenBundle]) -> None:
    with opened(bundles["dit"]) as session:
        with pytest.warns(CacheUnused, match="4 steps of DDIMScheduler at this guidance scale.*at guidance 1.5"):
            other = session(num_inference_steps=4, **{**CALL, "guidance_scale": [1.5, 3.0]})
        plain = session(num_inference_steps=4, feature_cache="none", **{**CALL, "guidance_scale": [1.5, 3.0]})
        assert other.timings.reused == 0
        np.testing.assert_array_equal(other.latents, plain.latents)
        with pytest.raises(RequestError, match=r"(?s)at this guidance scale.*at guidance 1\.5.*guidance scale"):
            session(num_inference_steps=4, feature_cache="plan", **{**CALL, "guidance_scale": 3.0})
        default = {name: value for name, value in CALL.items() if name != "guidance_scale"}
        assert session(num_inference_steps=4, **default).timings.reused == 8  # the default is what it was fitted at
        named = bundles["dit"].cached_program(4)  # whoever names the program has chosen
        assert session(program=named, **{**CALL, "guidance_scale": 3.0}).timings.reused == 8


@pytest.mark.parametrize("which", MODELS)
def test_uncached_runs_are_those_of_a_bundle_without_caching(
    bundles: dict[str, OpenBundle], which: str, folder: Path, tmp_path: Path
) -> None:
    plain = compiled(which, tmp_path / "plain", folder / "work", cache="none")
    assert plain.manifest.cache is None
    assert plain.manifest.vectors is None
    found = []
    for bundle in (bundles[which], plain):
        with opened(bundle) as session, warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(session(num_inference_steps=4, feature_cache="none", **CALL).latents)
    if which == "unet":
        np.testing.assert_array_equal(*found)
    else:
        # A delta reads the hidden state before and after the blocks, which keeps ONNX Runtime from some fusions: other
        # roundings of the same values, of which one in many falls on the other side of an integer's edge.
        assert np.square(found[0] - found[1]).mean() < 1e-9 * np.square(found[1]).mean()


def test_a_method_of_two_calls_per_step_is_counted_per_call(folder: Path, tmp_path: Path) -> None:
    diffusers.HeunDiscreteScheduler().save_pretrained(tmp_path / "heun")
    recipe = Recipe(**{**SMALL, "cache": "every:3", "samples": 4})
    bundle = compile_model(
        tiny_models.dit_pipeline(), tmp_path / "out", recipe, scheduler=tmp_path / "heun", work=folder / "work",
        guard="off",
    ).bundle
    program = bundle.cached_program(4)
    assert [call.step for call in program.calls] == [0, 0, 1, 1, 2, 2, 3]
    assert [call.graph == FULL for call in program.calls] == [True, False, False] * 2 + [True]
    report = fit_report(bundle)["steps"]["4"]
    errors = {row["with"]: row["value"] for row in report["final_latent_mse"]}
    assert "history" in errors
    assert errors["history"] != errors["none"]  # both calls of a step can be corrected
    with opened(bundle) as session:
        assert session(num_inference_steps=4, **CALL).timings.reused == 4 * 4


@pytest.mark.parametrize("which", MODELS)
def test_two_compiles_are_byte_identical(
    bundles: dict[str, OpenBundle], which: str, folder: Path, tmp_path: Path
) -> None:
    """Once with the stages of the first compile, once without any."""
    for name, work in (("reused", folder / "work"), ("anew", tmp_path / "work")):
        again = compiled(which, tmp_path / name, work)
        assert again.digest == bundles[which].digest, name
        assert again.manifest.files == bundles[which].manifest.files


@pytest.mark.parametrize("which", MODELS)
def test_every_dialect_has_all_variants_and_weights_are_stored_once(
    bundles: dict[str, OpenBundle], which: str, folder: Path, tmp_path: Path
) -> None:
    manifest = bundles[which].manifest
    plain = compiled(which, tmp_path / "plain", folder / "work", cache="none").manifest
    assert {"feature-cache-1", "corrections-1"} <= set(manifest.requires)
    for dialect in ("ort-f32", "portable-f32"):
        full, reuse = manifest.graphs[f"full.{dialect}"], manifest.graphs[f"reuse.0.{dialect}"]
        assert (full.variant, full.writes, full.reads) == (FULL, ("cache.0",), ())
        assert (reuse.variant, reuse.writes, reuse.reads) == ("reuse.0", (), ("cache.0",))
        assert set(reuse.data) <= set(full.data)
    weights = "graphs/weights.int8.bin"
    assert manifest.files[weights] == plain.files[weights]


def test_inspection_shows_policy_steps_and_the_share_of_reused_calls(bundles: dict[str, OpenBundle]) -> None:
    facts = describe(bundles["dit"].root)
    assert facts["cache"]["policy"] == "every:2"
    assert facts["cache"]["reused"] == {"4": 0.5}
    assert facts["cache"]["cuts"]["reuse.0"]["kind"] == "delta"
    assert "every:2, calls that reuse features: 50 % at 4 steps" in render(facts)
    assert describe(bundles["unet"].root)["cache"]["cuts"]["reuse.0"]["kind"] == "feature"


def test_the_report_measures_runs_with_caching_without_and_without_corrections(
    bundles: dict[str, OpenBundle]
) -> None:
    options = ReportOptions(samples=4, steps=4, batch=4, timing_rounds=2, worst=1, worst_samples=2, threads=1)
    summary = write_report(bundles["dit"].root, options)
    facts = json.loads((summary.folder / "report.json").read_text())
    cache = facts["cache"]
    assert (cache["policy"], cache["steps"], cache["reused"]) == ("every:2", 4, 0.5)
    assert cache["psnr_db_uncached"] == facts["quality"]["psnr_db"]
    assert len({cache["psnr_db"], cache["psnr_db_uncached"], cache["psnr_db_naive"]}) == 3
    assert cache["psnr_db"] < cache["psnr_db_uncached"]
    assert cache["guidance"] == 1.5
    assert facts["speed"]["trajectory_ms"] > 0
    assert facts["speed"]["trajectory_ms_uncached"] > 0
    assert "caching    every:2 at 4 steps" in summary.text()
    assert (summary.folder / "cache.json").is_file()


def test_other_steps_cuts_and_policies(folder: Path, tmp_path: Path) -> None:
    bundle = compiled(
        "dit", tmp_path / "other", folder / "work", cache="programmed:3", cache_cut="delta:1-1", cache_steps=(3, 6)
    )
    assert bundle.cached_steps == (3, 6)
    facts = describe(bundle.root)["cache"]
    assert facts["policy"] == "programmed:3"
    assert {k: facts["cuts"]["reuse.0"][k] for k in ("first", "last", "depth")} == {"first": 1, "last": 1, "depth": 2}
    assert 0.5 <= facts["reused"]["6"] <= 0.7
    with opened(bundle) as session:
        assert session(num_inference_steps=6, feature_cache="plan", **CALL).timings.reused == 4 * 4


def test_the_command_line_compiles_and_samples(folder: Path, tmp_path: Path, cli: Any) -> None:
    code, _, err = cli(
        "compile", tiny_models.dit_pipeline(), "-o", tmp_path / "cli", "--cache", "every:2", "--cache-steps", "4",
        "--samples", 8, "--batch", 4, "--steps", 4, "--guidance", 1.5, "--max-steps", 6, "--threads", 1,
        "--guard", "off", "--work", folder / "work",
    )
    assert code == 0, err
    assert "cache: " in err
    assert read_bundle(tmp_path / "cli").cached_steps == (4,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"cache": "evry:2"}, "'evry:2'.*every:N"), ({"cache": "every"}, "every:N"), ({"cache": "every:1"}, "at least 2"),
     ({"cache_cut": "dleta:1-4"}, "'dleta:1-4'.*delta:FIRST-LAST"), ({"cache_steps": (7,)}, "7.*1 to 6"),
     ({"precision": "fp8"}, "every:2 with precision fp8.*int8")],
)  # fmt: skip
def test_words_that_mean_nothing_are_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=f"(?s){words}"):
        compiled("dit", tmp_path / "out", tmp_path / "work", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("which", "cut", "words"),
    [("dit", "delta:1-4", "1 to 4.*0 to 1.*has 2 blocks"), ("dit", "branch:0", "0 long skips"),
     ("unet", "branch:9", "branch 9")],
)  # fmt: skip
def test_cuts_that_do_not_fit_are_refused_before_calibration(
    folder: Path, tmp_path: Path, which: str, cut: str, words: str
) -> None:
    with pytest.raises(ExportError, match=f"(?s){words}"):
        compiled(which, tmp_path / "out", folder / "work", cache_cut=cut)
    assert not (tmp_path / "out").exists()


def test_other_steps_and_scales_are_refused_for_a_cached_bundle(bundles: dict[str, OpenBundle]) -> None:
    with pytest.raises(BundleError, match=r"(?s)with feature caching.*--cache none"):
        plan_and_float_graph(bundles["dit"])


def test_a_recipe_without_caching_is_written_as_before() -> None:
    assert not {"cache", "cache_cut", "cache_steps"} & set(to_data(Recipe()))
