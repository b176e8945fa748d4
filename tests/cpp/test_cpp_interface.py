"""The C interface from a native program, the installed package from a project of its own, and a short fuzz."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bundle_maker import rewrite_manifest
from support.cpp_library import ROOT, SANITIZE, Sampler, call, configure_and_build
from support.onnx_bundles import write_onnx_bundle

import quantempo
from quantempo.runtime.images import save

CONSUMER = ROOT / "tests" / "cpp" / "consumer"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    bundle = write_onnx_bundle(folder / "b", folder / "work", decoder=True)
    data = json.loads((bundle / "manifest.json").read_text())
    mask = {"name": "mask", "dtype": "int64", "shape": [3], "values": [1, 1, 0]}
    rewrite_manifest(
        bundle, requires=[*data["requires"], "pinned-inputs-1"], denoiser={**data["denoiser"], "pinned": [mask]}
    )
    return bundle


def test_null_and_short_arguments_callbacks_threads_and_cancelling(built: Path, ort_library: Path, parts: Path) -> None:
    out = call(built / "quantempo-interface", parts, ort_library, built / "libold_engine.so")
    assert out == "0 failures\n"


@pytest.mark.skipif(bool(SANITIZE), reason="the consumer is built without sanitizers")
def test_an_installed_tree_serves_a_project_of_its_own(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path
) -> None:
    call("cmake", "--install", built, "--prefix", tmp_path / "installed")
    call("cmake", "-S", CONSUMER, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}")
    call("cmake", "--build", tmp_path / "build")
    said = call(tmp_path / "build" / "consumer", parts, ort_library)
    session = quantempo.load(parts, engine="ort", threads=1)
    wanted = session(3, seed=1, num_inference_steps=4, output_type="latent").latents
    assert np.float32(float(said)) == wanted.flat[0]


def test_the_c_example_writes_a_picture(built: Path, ort_library: Path, parts: Path, tmp_path: Path) -> None:
    said = call(built / "quantempo-minimal", parts, tmp_path / "out.png", ort_library).splitlines()
    assert said == ["step 1 of 4", "step 2 of 4", "step 3 of 4", "step 4 of 4", f"wrote {tmp_path / 'out.png'}"]
    (image,) = quantempo.load(parts, engine="ort", threads=1)(0, seed=0, num_inference_steps=4).images
    save(image, tmp_path / "python.png")
    assert len(np.unique(np.asarray(image))) > 10
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "python.png").read_bytes()


def test_the_c_example_says_what_the_library_says(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path
) -> None:
    command = [built / "quantempo-minimal", parts, tmp_path / "nowhere" / "out.png", ort_library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "step 4 of 4" in done.stdout
    assert done.stderr.startswith("RequestError: ")
    assert "nowhere/out.png" in done.stderr


def test_previews_are_the_picture_as_it_becomes(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path
) -> None:
    Sampler(built, ort_library).run(parts, "--class", 3, "--seed", 1, "--steps", 4, "--preview", tmp_path / "seen")
    seen = [np.asarray(Image.open(tmp_path / f"seen-{step}.ppm")) for step in range(4)]
    assert not list(tmp_path.glob("seen-4*"))
    session = quantempo.load(parts, engine="ort", threads=1)
    (image,) = session(3, seed=1, num_inference_steps=4).images
    assert np.array_equal(seen[-1], np.asarray(image))
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(seen))


def test_exported_names_are_those_of_the_header(built: Path) -> None:
    listed = call("nm", "-D", "--defined-only", built / "libquantempo.so").split()
    names = {name for name in listed if name.startswith("quantempo_")}
    header = (ROOT / "runtime/cpp/include/quantempo/quantempo.h").read_text()
    assert names == set(re.findall(r"(quantempo_\w+)\(", header))
    assert len(names) >= 20


@pytest.mark.full
def test_a_short_fuzz_of_everything_that_reads_bytes_finds_nothing(tmp_path: Path) -> None:
    build = configure_and_build(
        ROOT / "build" / "cpp-fuzz", "-DQUANTEMPO_FUZZ=ON", "-DQUANTEMPO_EXAMPLES=OFF",
        "-DQUANTEMPO_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    )
    corpus = shutil.copytree(ROOT / "runtime/cpp/fuzz/corpus", tmp_path / "corpus")
    call(build / "fuzz-bundle", corpus, "-runs=20000", "-seed=1")  # fails on the first finding
