"""Bad input from end to end: a typed error in five parts, and nothing half-written left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models

import quantempo
from quantempo.calib.trajectories import FIRST_SEED
from quantempo.contracts.codec import digest
from quantempo.errors import (
    BundleError,
    DataError,
    DigestMismatch,
    NewerBundle,
    NonFiniteActivation,
    NoSites,
    NotAModelDirectory,
    PickleCheckpoint,
    PlanError,
    QuantempoError,
    RequestError,
    SchedulerRefused,
    UnknownFeature,
    UnknownKey,
    UnsafePath,
    UnsupportedModel,
)
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(kind: type[QuantempoError], *words: str, work: Callable[[], Any]) -> None:
    """`work` raises `kind`; its message has five parts and holds the words."""
    with pytest.raises(kind) as caught:
        work()
    error = caught.value
    assert type(error) is kind
    for part in (error.where, error.found, error.wanted, error.cause, error.remedy):
        assert part
        assert part in str(error)
    for word in words:
        assert word in str(error), f"{word!r} is not in:\n{error}"


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A folder to write to, which has to be as empty afterwards as before."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert listing(folder) == []


# ------------------------------------------------------------------------------------------------- models


def compile_to(place: Path, model: Path, scheduler: Path | None = None, **changes: Any) -> Callable[[], Any]:
    recipe = Recipe(samples=4, batch=4, steps=(3,), guidance=(1.5,), max_steps=3, threads=1, **changes)
    return lambda: compile_model(model, place / "deep" / "bundle", recipe, scheduler=scheduler)


def test_a_path_that_does_not_exist(place: Path, tmp_path: Path) -> None:
    work = compile_to(place, tmp_path / "digits")
    refused(NotAModelDirectory, str(tmp_path / "digits"), "found no such directory", "check the path", work=work)


def test_a_directory_without_a_model(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    work = compile_to(place, tmp_path)
    refused(NotAModelDirectory, "it holds notes.txt", "model_index.json (a pipeline)", work=work)


def test_a_single_file_checkpoint(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    work = compile_to(place, tmp_path / "model.safetensors")
    refused(NotAModelDirectory, "found a single file", "from_single_file", work=work)


def test_a_denoiser_directory_without_a_scheduler(place: Path) -> None:
    refused(
        NotAModelDirectory, "a denoiser directory without a scheduler", "add --scheduler DIR",
        work=compile_to(place, tiny_models.unet()),
    )


def test_an_architecture_that_nobody_described(place: Path, tmp_path: Path) -> None:
    model = tiny_models.edited(tiny_models.unet(), tmp_path / "model", _class_name="UNet3DModel")
    work = compile_to(place, model, model / "scheduler")
    refused(UnsupportedModel, "class 'UNet3DModel'", "wanted a denoiser of diffusers", "--code FILE.py", work=work)


def test_a_checkpoint_that_is_only_there_as_a_pickle(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_models.unet(), model)
    weights = next(model.glob("*.safetensors"))
    torch.save(load_file(weights), model / "diffusion_pytorch_model.bin")
    weights.unlink()
    refused(
        PickleCheckpoint, "weights only as a pickle (diffusion_pytorch_model.bin)", "wanted safetensors",
        "safe_serialization=True", work=compile_to(place, model, model / "scheduler"),
    )


def test_a_pickled_decoder_is_refused_as_well(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_models.dit_pipeline(), model)
    weights = next((model / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    refused(PickleCheckpoint, "vae", "wanted safetensors", work=compile_to(place, model))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_that_is_not_linear(place: Path, tmp_path: Path, name: str) -> None:
    import diffusers

    getattr(diffusers, name)(thresholding=True).save_pretrained(tmp_path / "scheduler")
    refused(
        SchedulerRefused, f"{name} with thresholding=True", "wanted a step that is linear",
        "dynamic thresholding divides by a quantile of the data", "leave out thresholding=True",
        work=compile_to(place, tiny_models.dit_pipeline(), tmp_path / "scheduler"),
    )


def test_a_scheduler_class_that_does_not_exist(place: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMSheduler"}))
    refused(
        SchedulerRefused, "the class 'DDIMSheduler'", "did you mean 'DDIMScheduler'?",
        work=compile_to(place, tiny_models.dit_pipeline(), tmp_path),
    )


# ------------------------------------------------------------------ plans and calibration


def test_zero_matching_sites(place: Path, compile_tiny: Any) -> None:
    refused(
        NoSites, "21 sites, none of them to be quantized", "wanted at least one", "loosen the keep patterns",
        work=lambda: compile_tiny(place / "bundle", keep=("*",)),
    )


def test_a_keep_pattern_that_matches_nothing(place: Path, compile_tiny: Any) -> None:
    refused(
        PlanError, "pattern 'transformer_blocks.7.*'", "no site that it matches", "Next step",
        work=lambda: compile_tiny(place / "bundle", keep=("transformer_blocks.7.*",)),
    )


def test_a_damaged_plan(place: Path, compile_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"model": "abc", ')
    refused(
        DataError, "text that is not JSON", "wanted a JSON document",
        work=lambda: compile_tiny(place / "bundle", plan_file=tmp_path / "plan.json"),
    )


def test_a_plan_with_an_unknown_decision(
    place: Path, compile_tiny: Any, tmp_path: Path, dit_bundle: OpenBundle
) -> None:
    data = json.loads(dit_bundle.path("plan.json").read_text())
    first = next(iter(data["decisions"]))
    data["decisions"][first] = {"kind": "quantise"}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(
        DataError, first, '"quantise"', "did you mean 'quantize'?",
        work=lambda: compile_tiny(place / "bundle", plan_file=tmp_path / "plan.json"),
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.pop(next(iter(d))), "no decision for the site"),
        (lambda d: d.update(nowhere={"kind": "quantize"}), "a decision for a site that is not there"),
        (lambda d: d.update({next(iter(d)): {"kind": "share", "site": "nowhere"}}), "a share with 'nowhere'"),
        (lambda d: d.update({next(iter(d)): {"kind": "share", "site": [*d][-1]}}), "that quantizes the same tensor"),
    ],
    ids=["missing-decision", "decision-too-many", "share-with-unknown", "share-of-another-tensor"],
)
def test_a_plan_that_does_not_fit_itself(
    place: Path, compile_tiny: Any, tmp_path: Path, dit_bundle: OpenBundle, edit: Any, words: str
) -> None:
    data = json.loads(dit_bundle.path("plan.json").read_text())
    edit(data["decisions"])
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(PlanError, words, work=lambda: compile_tiny(place / "bundle", plan_file=tmp_path / "plan.json"))


def test_a_plan_that_keeps_everything(place: Path, compile_tiny: Any, tmp_path: Path, dit_bundle: OpenBundle) -> None:
    data = json.loads(dit_bundle.path("plan.json").read_text())
    data["decisions"] = {name: {"kind": "keep", "reason": "by hand"} for name in data["decisions"]}
    data["centred"] = []
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(
        NoSites, "21 sites, none of them to be quantized",
        work=lambda: compile_tiny(place / "bundle", plan_file=tmp_path / "plan.json"),
    )


def test_a_plan_with_other_sites(place: Path, compile_tiny: Any, tmp_path: Path, dit_bundle: OpenBundle) -> None:
    data = json.loads(dit_bundle.path("plan.json").read_text())
    data["sites"][2]["n"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(
        PlanError, "other sites than in the graph", data["sites"][2]["id"],
        work=lambda: compile_tiny(place / "bundle", plan_file=tmp_path / "plan.json"),
    )


def test_activations_that_are_not_finite(place: Path, tmp_path: Path) -> None:
    """The overflow shows on one class only, so that the sample that met it can be named."""
    model = tmp_path / "model"
    shutil.copytree(tiny_models.unet(), model)
    file = next(model.glob("*.safetensors"))
    weights = load_file(file)
    weights["class_embedding.weight"][3] = 3e38
    save_file(weights, file, metadata={"format": "pt"})
    recipe = Recipe(
        samples=4, batch=4, steps=(3,), guidance=(1.0,), max_steps=3, threads=1, classes=(1, 3), seed=0
    )
    with pytest.raises(NonFiniteActivation) as caught:
        compile_model(model, place / "bundle", recipe, scheduler=model / "scheduler")
    error = caught.value
    assert error.where.startswith("calibration, tensor '")
    assert "at timestep 666" in error.where
    seeds = [int(word) for word in error.where.split("seed")[1].removeprefix("s").replace(",", " ").split()]
    assert len(seeds) == 2, "half of the samples are of the broken class"
    assert all(FIRST_SEED <= seed < FIRST_SEED + 4 for seed in seeds)
    assert "wanted finite values" in str(error)
    assert "sample this seed with the float model" in str(error)


def test_fewer_samples_than_the_calibration_needs(place: Path, compile_tiny: Any) -> None:
    refused(
        RequestError, "calibration", "Next step",
        work=lambda: compile_tiny(place / "bundle", samples=2, guidance=(1.0, 1.5, 4.0)),
    )


# ------------------------------------------------------------------------------------------------- bundles


@pytest.fixture
def copy(dit_bundle: OpenBundle, tmp_path: Path) -> Path:
    shutil.copytree(dit_bundle.root, tmp_path / "copy", ignore=shutil.ignore_patterns("reference", "report"))
    return tmp_path / "copy"


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def loading(bundle: Path) -> Callable[[], Any]:
    return lambda: quantempo.load(bundle, threads=1)


def test_the_untouched_copy_loads(copy: Path) -> None:
    loading(copy)().close()


def test_a_directory_that_is_no_bundle(tmp_path: Path) -> None:
    refused(BundleError, "found no manifest.json", "quantempo compile -o", work=loading(tmp_path))
    refused(BundleError, "found no such directory", work=loading(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "name", ["graphs/weights.int8.bin", "graphs/full.ort-f32.onnx", "tables.safetensors", "programs/0004.json"]
)
def test_a_tampered_file(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    refused(DigestMismatch, name, "found SHA-256", "the file was changed after", "copy or compile", work=loading(copy))


def test_a_truncated_file(copy: Path) -> None:
    name = "graphs/weights.int8.bin"
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-100])
    refused(
        DigestMismatch, name, f"found {len(content) - 100} bytes", f"wanted {len(content)} bytes",
        "the file was cut short", work=loading(copy),
    )


def test_a_missing_file(copy: Path) -> None:
    (copy / "plan.json").unlink()
    refused(BundleError, "plan.json: found no such file", "copied incompletely", work=loading(copy))


def test_a_truncated_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    refused(DataError, "manifest.json", "text that is not JSON", work=loading(copy))


def test_a_newer_bundle(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(version=2, novelty=True))
    refused(NewerBundle, "found 2, wanted at most 1", "pip install --upgrade quantempo", work=loading(copy))


def test_an_unknown_manifest_key(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(partitoin={}))
    refused(UnknownKey, "manifest.json.partitoin", "did you mean 'partition'?", work=loading(copy))


def test_a_feature_that_is_required_and_unknown(copy: Path) -> None:
    edit_manifest(copy, lambda data: data["requires"].append("feature-cache-9"))
    refused(UnknownFeature, "the feature 'feature-cache-9'", "pip install --upgrade", work=loading(copy))


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.bin", "graphs/../../outside.bin", "C:\\x.bin"])
def test_a_path_that_leaves_the_bundle(copy: Path, name: str) -> None:
    outside = copy.parent / "outside.bin"
    outside.write_bytes(b"secret")
    entry = {"sha256": digest(b"secret"), "size": 6}
    edit_manifest(copy, lambda data: data["files"].update({name: entry}))
    refused(UnsafePath, repr(name), "wanted a path below the bundle", "do not use this bundle", work=loading(copy))


def test_a_graph_path_that_leaves_the_bundle(copy: Path) -> None:
    edit_manifest(copy, lambda data: data["graphs"]["full.ort-f32"].update(file="../full.onnx"))
    refused(UnsafePath, "graphs.full.ort-f32.file", "'../full.onnx'", work=loading(copy))


def test_a_file_that_is_a_link(copy: Path) -> None:
    file = copy / "graphs" / "weights.int8.bin"
    file.rename(copy.parent / "elsewhere.bin")
    file.symlink_to(copy.parent / "elsewhere.bin")
    refused(UnsafePath, "'graphs/weights.int8.bin' is a link", "wanted a plain file", work=loading(copy))


def test_a_folder_that_is_a_link(copy: Path) -> None:
    (copy / "graphs").rename(copy.parent / "elsewhere")
    (copy / "graphs").symlink_to(copy.parent / "elsewhere")
    refused(UnsafePath, "'graphs' is a link", work=loading(copy))


def test_a_file_that_nobody_listed(copy: Path) -> None:
    (copy / "graphs" / "extra.bin").write_bytes(b"")
    refused(BundleError, "graphs/extra.bin", "a file that the manifest does not list", work=loading(copy))


# ------------------------------------------------------------------------------------------------- calls


@pytest.fixture(scope="module")
def session(dit_bundle: OpenBundle) -> Any:
    with quantempo.load(dit_bundle.root, threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": [10]}, ("found 10", "labels 0 to 9", "the nearest legal label is 9")),
        ({"class_labels": [-3]}, ("found -3", "the nearest legal label is 0")),
        ({"class_labels": ["digit 10"]}, ("'digit 10'", "did you mean 'digit 1")),
        ({}, ("class_labels: found no value", "labels 0 to 9")),
        (
            {"class_labels": [1], "latents": np.zeros((1, 4, 16, 16), np.float32)},
            ("latents: found shape (1, 4, 16, 16)", "the nearest legal shape is (1, 4, 8, 8)", "resolution"),
        ),
        ({"class_labels": [1], "batch_size": 0}, ("batch", "the nearest legal batch is 1")),
        ({"class_labels": [1, 2], "seed": [1, 2, 3]}, ("class_labels: found 2 samples", "3, as in seed")),
        ({"class_labels": [1], "num_inference_steps": 7}, ("found 7", "(1 to 6)", "the nearest in the bundle is 6")),
        ({"class_labels": [1], "guidance_scale": -2}, ("guidance_scale", "finite numbers of at least 0")),
    ],
)
def test_a_call_outside_what_the_graph_takes(session: Any, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(RequestError, *words, work=lambda: session(**{"num_inference_steps": 2, **arguments}))


def test_calls_still_work_after_a_refusal(session: Any) -> None:
    with pytest.raises(RequestError):
        session(class_labels=[99])
    assert session(class_labels=[1], num_inference_steps=2, seed=0).latents.shape == (1, 4, 8, 8)


# ------------------------------------------------------------------------------------------------- missing extras

BLOCK = "import sys; sys.modules[{package!r}] = None; from quantempo.cli import main; sys.argv[0] = 'quantempo'; main()"


def without(package: str, *arguments: object) -> tuple[int, str]:
    """The command line in a process where a package cannot be imported."""
    command = [sys.executable, "-c", BLOCK.format(package=package), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("package", ["torch", "diffusers", "onnx", "onnx_ir", "scipy"])
def test_compiling_without_the_compile_extra_names_the_pip_command(place: Path, package: str) -> None:
    code, error = without(package, "compile", tiny_models.dit_pipeline(), "-o", place / "bundle")
    assert code == 1
    assert error.startswith("MissingExtra: ")
    assert f"no installed package '{package}'" in error
    assert "run: pip install 'quantempo[compile,cpu]'" in error


def test_sampling_without_an_engine_names_the_pip_command(place: Path, dit_bundle: OpenBundle) -> None:
    code, error = without("onnxruntime", "sample", dit_bundle.root, "-o", place / "a.png", "--class", 1)
    assert code == 1
    assert "no installed package 'onnxruntime'" in error
    assert "run: pip install 'quantempo[cpu]'" in error


def test_another_scheduler_without_the_compile_extra_names_the_pip_command(
    place: Path, dit_bundle: OpenBundle
) -> None:
    words = ("sample", dit_bundle.root, "-o", place / "a.png", "--class", 1, "--steps", 3)
    code, error = without("diffusers", *words, "--scheduler", tiny_models.dit_pipeline() / "scheduler")
    assert code == 1
    assert "run: pip install 'quantempo[compile,cpu]'" in error
