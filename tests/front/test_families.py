"""Families beyond the demo models through compile and sample: float bundles follow torch, INT8 bundles follow float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import families

import quantempo
from quantempo.errors import PlanError, RequestError
from quantempo.export.families import family_of
from quantempo.export.source import ModelParts, open_source
from quantempo.export.trace import load_denoiser
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe

STEPS = 3
ROWS = 2
SMALL = {"samples": 4, "batch": 2, "steps": (STEPS,), "max_steps": STEPS, "threads": 1, "weight_method": "mse"}


def compiled(folder, scheduler, out, **options):
    """The bundle and the arrays that it was calibrated on."""
    parts = ModelParts(
        options.get("size", ""), options.get("tokens", 0), tuple(map(Path, options.get("controlnets", ()))),
        tuple(map(Path, options.get("ip_adapters", ()))),
    )
    source = open_source(folder, scheduler, parts)
    denoiser = family_of(source).denoiser()
    arrays = families.conditioning(denoiser, 4)
    guided = any(array.guided for array in denoiser.arrays)
    recipe = Recipe(**{**SMALL, **options, **({"guidance": (1.0, 3.0)} if guided else {})})
    made = compile_model(
        folder, out, recipe, scheduler=scheduler, arrays=arrays, guard="off", work=out.parent / "work"
    )
    return made, {name: array[:ROWS] for name, array in arrays.items()}, source


def torch_loop(denoisers, source, given, latents, guidance, boundary=0.0):
    """The stock scheduler's loop over the module itself; `denoisers` are one, or two with the boundary's timestep."""
    import diffusers

    config = source.scheduler / "scheduler_config.json"
    kind = getattr(diffusers, families.json_class(config))
    scheduler = kind.from_pretrained(source.scheduler)
    scheduler.set_timesteps(STEPS)
    family = family_of(source)
    sample = torch.from_numpy(latents) * getattr(scheduler, "init_noise_sigma", 1.0)

    def predict(module, sample, time, negative):
        feeds = {"sample": sample, "timestep": torch.full((ROWS,), float(time))}
        for array in family.arrays:
            name = f"negative_{array.name}" if negative and array.guided else array.name
            feeds[array.name] = torch.from_numpy(given[name])
        made = family.prediction(module(**family.arguments(feeds)), feeds)
        return made[:, : family.sample_shape[0]]

    with torch.no_grad():
        for time in scheduler.timesteps:
            module = denoisers[0] if float(time) >= boundary else denoisers[-1]
            taken = scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample
            prediction = predict(module, taken, time, negative=False)
            if guidance > 1:
                other = predict(module, taken, time, negative=True)
                prediction = other + guidance * (prediction - other)
            sample = scheduler.step(prediction, time, sample, return_dict=False)[0]
    return sample.numpy()


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def check(folder, scheduler, out, guidance, denoisers=None, boundary=0.0, **options):
    made, given, source = compiled(folder, scheduler, out, **options)
    modules = denoisers or [load_denoiser(source)]
    shape = made.bundle.manifest.denoiser.latents_shape
    latents = np.random.default_rng(0).standard_normal((ROWS, *shape)).astype(np.float32)
    call = {"num_inference_steps": STEPS, "latents": latents, "output_type": "latent", "guidance_scale": guidance}
    wanted = torch_loop(modules, source, given, latents, guidance, boundary)
    with quantempo.load(out / "reference", threads=1, cache=False) as session:
        exact = session(**call, **given).latents
    with quantempo.load(out, threads=1, cache=False) as session:
        quantized = session(**call, **given).latents
    assert relative(exact, wanted) < 1e-4
    assert made.quantized >= 0.5 * made.sites
    assert 1e-6 < relative(quantized, exact) < 0.7  # random weights: the bound says that it is the same model
    return made, given


def test_two_experts_take_turns(tmp_path):
    folder = families.two_experts()
    source = open_source(folder, None, ModelParts("3x8x8", 6))
    modules = [load_denoiser(source), load_denoiser(source.second())]
    made, given = check(
        folder, None, tmp_path / "b", 3.0, modules, 875.0, size="3x8x8", tokens=6
    )
    with quantempo.load(tmp_path / "b", threads=1, cache=False) as session:
        calls = session.program(STEPS).calls
        assert [c.graph for c in calls] == ["full" if c.timestep >= 875 else "low_noise" for c in calls]
        assert {c.graph for c in calls} == {"full", "low_noise"}
        with pytest.raises(RequestError, match=r"'pil' for latents of shape \(4, 3, 8, 8\)"):
            session(num_inference_steps=STEPS, seed=0, **given)
    assert {"full.ort-f32", "low_noise.ort-f32"} <= set(made.bundle.manifest.graphs)


def test_two_experts_are_not_cached(tmp_path):
    with pytest.raises(PlanError, match=r"recipe, cache: found 'every:2'(?s:.*)two experts"):
        compiled(families.two_experts(), None, tmp_path / "b", size="3x8x8", tokens=6, cache="every:2")


def test_flux_is_guided_by_its_embedding(tmp_path):
    folder = families.directory("flux")
    made, _ = check(folder, folder / "scheduler", tmp_path / "b", 1.0, **families.MODELS["flux"].options)
    assert made.bundle.manifest.denoiser.latents_shape == (4, 8, 12)
    assert made.bundle.manifest.default_guidance == 1.0


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in families.MODELS if name != "flux"])
def test_family_compiles_and_samples(name, tmp_path):
    folder = families.directory(name)
    check(folder, folder / "scheduler", tmp_path / "b", 2.0, **families.MODELS[name].options)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_controlnet_compiles_and_samples(name, tmp_path):
    folder, control = families.directory(name), families.controlnet(large=name == "sdxl")
    check(folder, folder / "scheduler", tmp_path / "b", 2.0, tokens=7, controlnets=(str(control),))


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_adapter_compiles_and_samples(name, tmp_path):
    folder = families.directory(name)
    made, _ = check(
        folder, folder / "scheduler", tmp_path / "b", 2.0, tokens=7, ip_adapters=(str(families.ip_adapter()),)
    )
    assert "adapter" not in (made.bundle.root / "recipe.json").read_text()


@pytest.mark.full
def test_class_from_an_example_call(tmp_path):
    rng = np.random.default_rng(0)
    folder = families.directory("sd3")
    call = tmp_path / "call.npz"
    np.savez(
        call, hidden_states=rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
        timestep=np.array([300.0, 300.0], np.float32),
        encoder_hidden_states=rng.standard_normal((2, 9, 24)).astype(np.float32),
        pooled_projections=rng.standard_normal((2, 12)).astype(np.float32),
    )  # fmt: skip
    arrays = {
        name: rng.standard_normal((4, *shape)).astype(np.float32)
        for word, shape in (("encoder_hidden_states", (9, 24)), ("pooled_projections", (12,)))
        for name in (word, f"negative_{word}")
    }
    recipe = Recipe(**SMALL, guidance=(1.0, 3.0), inputs=str(call))
    made = compile_model(
        folder, tmp_path / "b", recipe, scheduler=folder / "scheduler", arrays=arrays, guard="off",
        work=tmp_path / "work",
    )
    assert [array.name for array in made.bundle.manifest.denoiser.arrays] == [
        "encoder_hidden_states", "pooled_projections",
    ]  # fmt: skip


OWN = '''
import torch


class Residual(torch.nn.Module):
    def __init__(self, in_channels=4, sample_size=8, num_classes=3):
        super().__init__()
        self.mix = torch.nn.Linear(sample_size, sample_size)
        self.label = torch.nn.Embedding(num_classes + 1, in_channels)

    def forward(self, x, t, class_labels):
        return self.mix(x) * (1 + t[:, None, None, None] / 1000) + self.label(class_labels)[:, :, None, None]
'''


def test_class_of_ones_own_becomes_a_bundle(tmp_path):
    """A torch module without diffusers, from `config.json` and its weights; the bundle samples as torch does."""
    import json

    import diffusers
    from safetensors.torch import save_file

    from quantempo.export.classes import find_class

    code, folder = tmp_path / "residual.py", tmp_path / "mine"
    code.write_text(OWN)
    torch.manual_seed(3)
    module = find_class("Residual", code)()
    folder.mkdir()
    save_file(module.state_dict(), str(folder / "weights.safetensors"))
    (folder / "config.json").write_text(json.dumps({"_class_name": "Residual", "in_channels": 4, "sample_size": 8}))
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    recipe = Recipe(**SMALL, precision="float32", code=str(code))
    made = compile_model(
        folder, tmp_path / "b", recipe, scheduler=folder / "scheduler", guard="off", work=tmp_path / "work"
    )
    assert "residual" not in (made.bundle.root / "recipe.json").read_text()
    latents = np.random.default_rng(0).standard_normal((ROWS, 4, 8, 8)).astype(np.float32)
    with quantempo.load(tmp_path / "b", threads=1, cache=False) as session:
        found = session(
            class_labels=[2, 0], num_inference_steps=STEPS, latents=latents, output_type="latent", guidance_scale=1.0
        ).latents
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    sample = torch.from_numpy(latents)
    with torch.no_grad():
        for time in scheduler.timesteps:
            prediction = module(sample, torch.full((ROWS,), float(time)), torch.tensor([2, 0]))
            sample = scheduler.step(prediction, time, sample, return_dict=False)[0]
    assert relative(found, sample.numpy()) < 1e-5
