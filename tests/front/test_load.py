from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_models

import quantempo
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.bundle import OpenBundle


@pytest.fixture(scope="module")
def session(dit_bundle: OpenBundle) -> Any:
    with quantempo.load(dit_bundle.root, threads=1) as opened:
        yield opened


def test_load_returns_a_pipeline_with_the_arguments_of_diffusers(session: Any) -> None:
    steps: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, timestep: float, given: dict[str, Any]) -> None:
        assert pipe is session
        assert given["latents"].shape == (2, 4, 8, 8)
        steps.append((step, timestep))

    out = session(
        class_labels=[1, "digit 2"], num_inference_steps=4, guidance_scale=1.5, seed=7, callback_on_step_end=callback
    )
    assert all(isinstance(image, Image.Image) for image in out.images)
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert [timestep for _, timestep in steps] == [750, 500, 250, 0]
    assert out.latents.shape == (2, 4, 8, 8)


def test_a_seed_gives_the_same_picture_whatever_the_batch(session: Any) -> None:
    alone = session(class_labels=[5], num_inference_steps=4, seed=[21], output_type="latent").latents
    among = session(class_labels=[3, 5], num_inference_steps=4, seed=[20, 21], output_type="latent").latents
    assert np.abs(alone[0] - among[1]).max() < 1e-4 * np.abs(alone).max()
    other = session(class_labels=[5], num_inference_steps=4, seed=[22], output_type="latent").latents
    assert not np.allclose(alone, other, atol=1e-2)


def test_a_class_makes_a_difference_and_guidance_too(session: Any) -> None:
    def run(label: int, guidance: float) -> np.ndarray:
        out: np.ndarray = session(
            class_labels=[label], num_inference_steps=4, seed=0, guidance_scale=guidance, output_type="latent"
        ).latents
        return out

    assert not np.array_equal(run(1, 1.0), run(2, 1.0))
    assert not np.array_equal(run(1, 1.0), run(1, 4.0))


def test_default_steps_and_guidance_come_from_the_recipe(session: Any) -> None:
    named = session(class_labels=[1], seed=0, num_inference_steps=4, guidance_scale=1.5, output_type="latent")
    plain = session(class_labels=[1], seed=0, output_type="latent")
    assert np.array_equal(named.latents, plain.latents)
    assert plain.timings.calls == 4


def test_compile_takes_a_pipeline_object(small: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(tiny_models.dit_pipeline())
    recipe = quantempo.Recipe(precision="float32", max_steps=4, steps=(4,))
    made = quantempo.compile(pipeline, tmp_path / "bundle", recipe)
    assert made.bundle.manifest.provenance["model"] == dit_bundle.manifest.provenance["model"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_an_unknown_engine_is_refused_with_the_known_ones(dit_bundle: OpenBundle) -> None:
    with pytest.raises(EngineError, match=r"(?s)found.*'otr'.*did you mean 'ort'"):
        quantempo.load(dit_bundle.root, engine="otr")


def test_an_unknown_argument_is_refused_with_the_nearest(session: Any) -> None:
    with pytest.raises(RequestError, match="did you mean 'num_inference_steps'"):
        session(class_labels=[1], num_inference_step=4)


def test_a_moved_bundle_still_works(session: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    shutil.copytree(dit_bundle.root, tmp_path / "elsewhere")
    call = {"class_labels": [1], "seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    with quantempo.load(str(tmp_path / "elsewhere"), threads=1) as moved:
        assert np.array_equal(session(**call).latents, moved(**call).latents)


def test_loading_and_sampling_needs_no_torch(dit_bundle: OpenBundle) -> None:
    code = (
        "import sys, quantempo\n"
        "out = quantempo.load(sys.argv[1], threads=1)(class_labels=[1], num_inference_steps=2, seed=0)\n"
        "assert out.images[0].size == (16, 16)\n"
        "print([n for n in ('torch', 'diffusers', 'onnx', 'onnx_ir', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, dit_bundle.root], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
