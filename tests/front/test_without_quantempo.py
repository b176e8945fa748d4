"""What docs/bundle-format.md shows for users of plain ONNX Runtime and of TensorRT's own tool, taken from the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantempo
from quantempo import building
from quantempo.demo import MODEL
from quantempo.engines.tensorrt import BuildJob
from quantempo.engines.trt_profiles import parse_profile
from quantempo.export.families import family_of
from quantempo.export.source import open_source
from quantempo.runtime.bundle import OpenBundle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bundle-format.md"


def block(language: str, word: str) -> str:
    """The one fenced block in a language that contains a word."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (match,) = [text for text in found if word in text]
    return str(match)


STEPS = 6
"""The tiny bundle has no program for the page's 20 steps."""


@pytest.fixture(scope="module")
def bundle(dit_bundle: OpenBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DiT, in a folder called `bundle` of its own."""
    return Path(shutil.copytree(dit_bundle.root, tmp_path_factory.mktemp("plain") / "bundle"))


def run_page(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the example where `bundle` lies, and return its variables."""
    text = block("python", "InferenceSession")
    assert text.count(', 20, 4.0, [7, 3]') == 1
    monkeypatch.chdir(bundle.parent)
    names: dict[str, Any] = {}
    exec(compile(text.replace(", 20, 4.0,", f", {STEPS}, 4.0,"), str(PAGE), "exec"), names)
    return names


def first_noise(names: dict[str, Any]) -> np.ndarray:
    """What the page's generator draws first."""
    shape = (2, *names["denoiser"]["latents_shape"])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_the_page_samples_to_the_bits_that_quantempo_gives(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page(bundle, monkeypatch)
    with quantempo.load(bundle, cache=False) as pipe:
        given = {"class_labels": [7, 3], "guidance_scale": 4.0, "num_inference_steps": STEPS}
        out = pipe(**given, latents=first_noise(names), output_type="latent")
        pixels = pipe.decode(out.latents)
    np.testing.assert_array_equal(names["latents"], out.latents)
    np.testing.assert_allclose(names["pixels"], pixels, atol=1e-6)
    assert np.abs(names["latents"]).max() > 0.1


def test_the_page_depends_on_its_scale_groups(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above could not tell a wrong group if all groups were alike."""
    before = run_page(bundle, monkeypatch)["latents"]
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    data = json.loads(text)
    data["partition"]["edges"] = []  # every call then takes the first group
    try:
        manifest.write_text(json.dumps(data))
        after = run_page(bundle, monkeypatch)["latents"]
    finally:
        manifest.write_text(text)
    assert not np.array_equal(before, after)


def test_the_line_for_trtexec_has_the_files_and_shapes_of_the_demo(bundle: Path) -> None:
    program, *words = shlex.split(block("text", "trtexec").replace("\\\n", " "))
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    assert program == "trtexec"
    graph = Path(flags["onnx"])
    entry = json.loads((bundle / "manifest.json").read_text())["graphs"]["full.portable-f32"]
    assert graph == Path("bundle") / entry["file"]
    assert flags["saveEngine"] == f"{graph.stem}.plan"
    inputs = family_of(open_source(MODEL)).inputs()
    for flag, rows in (("minShapes", 1), ("optShapes", 2), ("maxShapes", 8)):
        wanted = [f"{s.name}:{'x'.join(str(rows if d == 'batch' else d) for d in s.shape)}" for s in inputs]
        assert flags[flag] == ",".join(wanted)
    others = {spec["name"] for spec in entry["inputs"]} - {spec.name for spec in inputs}
    assert others == {"scale_group"}
    assert next(spec for spec in entry["inputs"] if spec["name"] == "scale_group")["shape"] == []
    job = BuildJob("tensorrt", str(bundle / entry["file"]), "", "8.9", (parse_profile("batch=1:2:8"),))
    ours = building.tool_line(job).replace("8x8", "16x16")  # the tiny model's latents, the demo's
    for word in words:
        assert word.split("=")[0] in ("--onnx", "--saveEngine") or word in shlex.split(ours)
