"""The TensorRT backend of the C++ runtime on a device that is computed on the host (runtime/cpp/tests/tensorrt).

What the stand-in cannot show is TensorRT itself.  What it does show are copies that are missing or not waited for,
memory that only the device may touch, the device of each thread, features that graphs exchange, and the refusals.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.onnx_bundles import CACHED, write_onnx_bundle

import quantempo
from quantempo.contracts.codec import digest
from quantempo.contracts.manifest import FileEntry
from quantempo.engines.cache import KeyParts
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import EngineRecord, PlanRecord, write_record

VERSION = "10.13.3.0"
PROFILES = (parse_profile("batch=1:1:1"), parse_profile("batch=1:4:8"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a plan for each of its graphs: the path of the graph."""
    folder = tmp_path_factory.mktemp("planned")
    bundle = write_onnx_bundle(folder / "b", folder / "work")
    engines = bundle / "engines" / "l4"
    engines.mkdir(mode=0o700, parents=True)
    plans = {}
    for graph in (bundle / "graphs").glob("*.onnx"):
        content = str(graph).encode()
        (engines / f"{graph.stem}.plan").write_bytes(content)
        key = KeyParts(graph="g", backend="tensorrt", version=VERSION, device="sm_89")
        plans[graph.stem] = PlanRecord(
            f"{graph.stem}.plan", FileEntry(digest(content), len(content)), len(content), key, PROFILES
        )
    manifest = digest((bundle / "manifest.json").read_bytes())
    write_record(engines, EngineRecord("l4", "tensorrt", VERSION, "8.9", manifest, plans))
    return bundle


def run(
    built: Path, library: Path, bundle: Path, out: Path, steps: int, cache: str, *setting: str, fails: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [built / "quantempo-tensorrt", bundle, str(steps), cache, out, *setting]
    environment = {**os.environ, "FAKE_ORT_LIBRARY": str(library), "FAKE_FAILS": fails}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr[-5000:]
    return done


@pytest.mark.parametrize("steps", [5, *CACHED])
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_latents_are_those_of_python(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path, steps: int, cache: str
) -> None:
    done = run(built, ort_library, parts, tmp_path / "l", steps, cache)
    assert done.returncode == 0, done.stderr
    session = quantempo.load(parts, engine="ort", threads=1)
    wanted = session([3, 9], seed=0, num_inference_steps=steps, output_type="latent", feature_cache=cache)
    assert done.stdout.split() == 2 * [str(wanted.timings.reused)]
    assert (wanted.timings.reused > 0) == (cache == "auto" and steps in CACHED)
    assert (tmp_path / "l").read_bytes() == np.ascontiguousarray(wanted.latents).tobytes()


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("gpu", "engine 'tensorrt': found no CUDA-capable device is detected, wanted an NVIDIA GPU"),
        ("plan", "found a refusal: the plan has another magic tag, wanted a plan that the library loads"),
        ("memory", "found out of memory, wanted device memory"),
        ("context", "found a refusal: nothing, wanted memory for an execution context"),
        ("profile", "found a refusal: nothing, wanted a profile of the plan"),
        ("run", "found a refusal: nothing, wanted a call that runs"),
    ],
)
def test_what_the_device_refuses_is_an_engine_error(
    built: Path, ort_library: Path, parts: Path, tmp_path: Path, fails: str, words: str
) -> None:
    done = run(built, ort_library, parts, tmp_path / "l", 4, "auto", fails=fails)
    assert done.returncode == 1
    assert done.stderr.startswith("EngineError: ")
    assert words in done.stderr


def test_the_target_is_the_only_setting(built: Path, ort_library: Path, parts: Path, tmp_path: Path) -> None:
    assert run(built, ort_library, parts, tmp_path / "l", 4, "auto", "target=l4").returncode == 0
    refused = run(built, ort_library, parts, tmp_path / "l", 4, "auto", "precision=f16").stderr
    assert "settings: found precision=f16, wanted one of target" in refused
    absent = run(built, ort_library, parts, tmp_path / "l", 4, "auto", "target=b200").stderr
    assert absent.startswith("EngineError: ")
    assert "b200" in absent
