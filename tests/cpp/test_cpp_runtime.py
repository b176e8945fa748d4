"""Python and C++ agree to the last bit: around the engine by arithmetic, in the engine because it is the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_models
from support.bundle_maker import make_program
from support.cpp_library import Sampler
from support.onnx_bundles import CACHED, write_onnx_bundle

from quantempo.contracts.codec import canonical_json
from quantempo.contracts.program import LATENTS
from quantempo.errors import EngineError
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.images import grid, save
from quantempo.runtime.session import Session
from quantempo.stages.programs import trace_scheduler

SMALL = Recipe(samples=8, batch=4, steps=(4,), guidance=(1.5,), max_steps=6, threads=1)
CACHING = replace(SMALL, cache="every:2")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="session")
def sampler(built: Path, ort_library: Path) -> Sampler:
    return Sampler(built, ort_library)


@pytest.fixture(scope="session")
def openvino_sampler(built: Path, openvino_library: Path) -> Sampler:
    return Sampler(built, openvino_library, "openvino")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    return write_onnx_bundle(folder / "b", folder / "work")


def load(bundle: Path, engine: str = "ort") -> Session:
    import quantempo

    return quantempo.load(bundle, engine=engine, threads=1)


def same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


CALLS: list[tuple[list[object], dict[str, Any]]] = [
    (["--class", 3, "--seed", 1], {"class_labels": 3, "seed": 1}),
    (["--class", 3, "--seed", 2**64 - 1, "--guidance", 1], {"class_labels": 3, "seed": 2**64 - 1, "guidance_scale": 1}),
    (["--class", 3, "--class", 4, "--count", 2, "--mode", "split"],
     {"class_labels": [3, 3, 4, 4], "seed": 0, "guidance_mode": "split"}),
    (["--class", 1, "--class", 2, "--class", 9, "--guidance", 1, "--guidance", 7.5, "--guidance", 3, "--rescale", 0.7],
     {"class_labels": [1, 2, 9], "seed": 0, "guidance_scale": [1, 7.5, 3], "guidance_rescale": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "arguments"), CALLS)
@pytest.mark.parametrize("steps", [1, 5, *CACHED])
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_latents_are_those_of_python(
    sampler: Sampler, parts: Path, tmp_path: Path, words: list[object], arguments: dict[str, Any], steps: int,
    cache: str,
) -> None:
    if cache == "none" and steps not in CACHED:
        pytest.skip("has no cached program: the same run as with 'auto'")
    found = sampler.latents(parts, SHAPE, tmp_path, "--steps", steps, "--cache", cache, *words)
    wanted = load(parts)(num_inference_steps=steps, output_type="latent", feature_cache=cache, **arguments).latents
    assert same(found, wanted)


def test_decisions_split_the_rows_of_a_batch(sampler: Sampler, parts: Path) -> None:
    words = ["--class", 1, "--class", 5, "--class", 9, "--steps", 9]
    done = sampler.run(parts, *words)
    timings = load(parts)([1, 5, 9], seed=0, num_inference_steps=9, output_type="latent").timings
    assert 0 < timings.reused < timings.rows
    assert f"{timings.calls} engine calls" in done.stdout
    assert f"{timings.reused} of {timings.rows} evaluations reused" in done.stdout


def test_another_program_runs_from_a_file(sampler: Sampler, parts: Path, tmp_path: Path) -> None:
    program = replace(make_program(7, noisy=True), scheduler="Other")
    file = tmp_path / "program.json"
    file.write_text(canonical_json(program))
    found = sampler.latents(parts, SHAPE, tmp_path, "--program", file, "--class", 2)
    assert same(found, load(parts)(2, seed=0, program=program, output_type="latent", feature_cache="none").latents)


@pytest.mark.parametrize("name", ["timestep", "class_labels"])
def test_registers_are_fed_only_where_latents_go(sampler: Sampler, parts: Path, tmp_path: Path, name: str) -> None:
    """An input of another shape would be written over its end."""
    program = make_program(2)
    fed = {"sample": program.calls[0].inputs["sample"], name: ((LATENTS, 0.9),)}
    program = replace(program, calls=tuple(replace(call, inputs=fed) for call in program.calls))
    file = tmp_path / "program.json"
    file.write_text(canonical_json(program))
    with pytest.raises(EngineError, match="since the program feeds registers to it") as caught:
        load(parts)([1, 2, 3], seed=0, program=program, output_type="latent", feature_cache="none")
    labels = ["--class", 1, "--class", 2, "--class", 3]
    assert sampler.refusal(parts, "--program", file, "--cache", "none", *labels) == ("EngineError", str(caught.value))


@pytest.fixture(scope="module", params=["dit", "unet"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in INT8 with a cached program for four steps, its float twin in `reference/`."""
    model = tiny_models.dit_pipeline() if request.param == "dit" else tiny_models.unet()
    scheduler = None if request.param == "dit" else model / "scheduler"
    return compile_model(model, tmp_path_factory.mktemp("cpp") / "b", CACHING, scheduler=scheduler).bundle.root


SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_compiled_models_give_the_same_latents_and_png(
    sampler: Sampler, compiled: Path, tmp_path: Path, precision: str, scheduler: str
) -> None:
    compare(sampler, compiled if precision == "int8" else compiled / "reference", tmp_path, scheduler, 5)


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_on_openvino_compiled_models_give_the_same_latents_and_png(
    openvino_sampler: Sampler, compiled: Path, tmp_path: Path, precision: str, scheduler: str
) -> None:
    compare(openvino_sampler, compiled if precision == "int8" else compiled / "reference", tmp_path, scheduler, 5)


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_compiled_models_with_feature_caching_give_the_same_latents_and_png(
    request: pytest.FixtureRequest, compiled: Path, tmp_path: Path, engine: str
) -> None:
    sampler = request.getfixturevalue("sampler" if engine == "ort" else "openvino_sampler")
    reused = compare(sampler, compiled, tmp_path, "DDIMScheduler", 4, guidance=SMALL.guidance[0])
    assert reused == 2 * 3 * 2  # two calls of four, three samples, two branches


@pytest.mark.parametrize("steps", CACHED)
def test_cached_programs_on_openvino_give_the_same_latents(
    openvino_sampler: Sampler, parts: Path, tmp_path: Path, steps: int
) -> None:
    found = openvino_sampler.latents(parts, SHAPE, tmp_path, "--class", 3, "--class", 9, "--steps", steps)
    wanted = load(parts, "openvino")([3, 9], seed=0, num_inference_steps=steps, output_type="latent").latents
    assert same(found, wanted)


def compare(
    sampler: Sampler, bundle: Path, folder: Path, scheduler: str, steps: int, guidance: float = 3.0
) -> int:
    """Three samples of both runtimes: latents bit for bit, and the PNG's bytes.  Returns the reused evaluations."""
    session = load(bundle, sampler.engine)
    given: dict[str, Any] = {"num_inference_steps": steps}
    words: list[object] = ["--steps", steps]
    if scheduler != session.manifest.programs.scheduler:
        config = folder / "config"
        config.mkdir()
        stock = json.loads((bundle / "scheduler_config.json").read_text())
        (config / "scheduler_config.json").write_text(json.dumps({**stock, "_class_name": scheduler}))
        program = trace_scheduler(config, steps)
        (folder / "program.json").write_text(canonical_json(program))
        given, words = {"program": program}, ["--program", folder / "program.json"]
    out = folder / "out.png"
    labels = [word for label in (1, 2, 7) for word in ("--class", label)]
    shape = session.manifest.denoiser.latents_shape
    found = sampler.latents(bundle, shape, folder, *labels, "--seed", 5, "--guidance", guidance, "-o", out, *words)
    wanted = session([1, 2, 7], seed=5, guidance_scale=guidance, **given)
    assert np.isfinite(wanted.latents).all()
    assert same(found, wanted.latents)
    sheet = grid(list(wanted.images), columns=1)
    save(sheet, folder / "python.png")
    assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(out)))
    assert out.read_bytes() == (folder / "python.png").read_bytes()
    return int(wanted.timings.reused)


def test_a_library_that_refuses_to_share_packed_weights_still_opens_every_graph(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels on some processors cannot; the graph then packs for itself."""
    monkeypatch.setenv("REAL_ORT_LIBRARY", str(ort_library))
    refusing = Sampler(built, built / "librefusing_engine.so")
    done = refusing.run(parts, "--class", 3, "--steps", 6)
    refused = {line for line in done.stderr.splitlines() if line.startswith("refused to share: ")}
    assert refused >= {f"refused to share: {name}.float-f32.onnx" for name in ("full", "reuse.1")}
    found = refusing.latents(parts, SHAPE, tmp_path, "--class", 3, "--steps", 6)
    assert same(found, load(parts)(3, seed=0, num_inference_steps=6, output_type="latent").latents)


def test_notices_of_a_run_are_told(sampler: Sampler, parts: Path) -> None:
    done = sampler.run(parts, "--class", 1, "--steps", 5)
    assert "CacheUnused: the bundle has no cache plan for 5 steps of EchoScheduler" in done.stderr
    assert "CacheUnused" not in sampler.run(parts, "--class", 1, "--steps", 4).stderr
    other = sampler.run(parts, "--class", 1, "--steps", 4, "--guidance", 3)
    assert "for 4 steps of EchoScheduler at this guidance scale" in other.stderr
    assert "at guidance 2 (" in other.stderr
