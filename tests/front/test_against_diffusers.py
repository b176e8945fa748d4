"""A float bundle samples what diffusers samples: a stock scheduler around the torch model, and `DiTPipeline`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import quantempo
from quantempo.demo import MODEL
from quantempo.export.sampler import trace_program
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.session import Session

UNET = Path(__file__).resolve().parents[1] / "models" / "unet"
STEPS, GUIDANCE, LABELS, SEED = 20, 1.5, [3, 8], 11
LIMIT = 1e-4

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++3m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm-single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
LONG = ("dpm++2m-karras", "dpm-single", "kdpm2-ancestral", "lms", "deis")
"""Only in the full run."""


class Subject:
    """One model in both worlds."""

    def __init__(self, module: Any, session: Session, channels: int, null: int) -> None:
        self.session = session
        self._module, self._channels, self._null = module.eval(), channels, null

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Guided prediction, both branches in one call."""
        labels = torch.tensor([*LABELS, *[self._null] * len(LABELS)])
        both = torch.cat([sample, sample])
        with torch.no_grad():
            out = self._module(both, timestep.expand(len(both)), class_labels=labels).sample[:, : self._channels]
        conditional, unconditional = out.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    def stock_loop(self, scheduler: Any) -> torch.Tensor:
        """The loop of any diffusers pipeline around the scheduler object."""
        generator = torch.Generator().manual_seed(SEED)
        scheduler.set_timesteps(STEPS)
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        shape = (len(LABELS), *self.session.manifest.denoiser.latents_shape)
        sample = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(self.predict(scaled, timestep), timestep, sample, **extra).prev_sample
        return sample


def config_of(folder: Path) -> Any:
    return diffusers.DDIMScheduler.load_config(folder / "scheduler")


def compile_float(model: Path, scheduler: Path, out: Path) -> Session:
    compile_model(model, out, Recipe(precision="float32", steps=(STEPS,), max_steps=1), scheduler=scheduler)
    return quantempo.load(out, threads=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two libraries with threads that wait for work by spinning take each other's processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    module = diffusers.DiTTransformer2DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.float32)
    with compile_float(MODEL, MODEL / "scheduler", tmp_path_factory.mktemp("float") / "dit") as session:
        yield Subject(module, session, module.config.in_channels, module.config.num_embeds_ada_norm)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    module = diffusers.UNet2DModel.from_pretrained(UNET / "unet", torch_dtype=torch.float32)
    with compile_float(UNET / "unet", UNET / "scheduler", tmp_path_factory.mktemp("float") / "unet") as session:
        yield Subject(module, session, module.config.in_channels, module.config.num_class_embeds - 1)


def relative_error(ours: Any, theirs: Any) -> float:
    assert np.isfinite(theirs).all()
    assert np.std(theirs) > 0.05, "a reference without contrast proves nothing"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full if n in LONG else ()) for n in SCHEDULERS])
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_float_bundle_follows_the_stock_scheduler(model: str, name: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(model)
    class_name, options = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    base = config_of(MODEL if model == "dit" else UNET)
    program = trace_program(kind.from_config(base, **options), STEPS)
    ours = subject.session(
        class_labels=LABELS, program=program, guidance_scale=GUIDANCE, output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
    ).latents
    assert relative_error(ours, subject.stock_loop(kind.from_config(base, **options)).numpy()) <= LIMIT


def test_stochastic_schedulers_are_among_them() -> None:
    draws = {}
    for name, (class_name, options) in SCHEDULERS.items():
        scheduler = getattr(diffusers, class_name).from_config(config_of(MODEL), **options)
        draws[name] = trace_program(scheduler, 4).noise_draws
    assert sum(count > 0 for count in draws.values()) >= 4, draws
    assert sum(count == 0 for count in draws.values()) >= 8, draws


def test_float_bundle_gives_the_pictures_of_the_dit_pipeline(dit: Subject) -> None:
    pipeline = diffusers.DiTPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        class_labels=LABELS, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(SEED),
    ).images
    ours = dit.session(
        class_labels=LABELS, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np", rng="torch-cpu",
        seed=SEED,
    ).images
    assert np.shape(ours) == theirs.shape
    assert relative_error(np.asarray(ours), theirs) <= LIMIT


def test_given_latents_are_the_starting_point(unet: Subject) -> None:
    shape = (len(LABELS), *unet.session.manifest.denoiser.latents_shape)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).numpy()
    theirs = unet.stock_loop(diffusers.DDIMScheduler.from_config(config_of(UNET))).numpy()
    ours = unet.session(
        class_labels=LABELS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=start, output_type="latent",
        seed=12345,
    ).latents
    assert relative_error(ours, theirs) <= LIMIT
