"""Tiny random models, built in code, once per session: pipeline and denoiser directories as diffusers writes them."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "num_class_embeds": 11,
}
CONDITION_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}


def _randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of every parameter drawn anew: some start at zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim < 2 else 1.0 / max(1, parameter[0].numel()) ** 0.5
            centre = parameter if parameter.ndim < 2 else torch.zeros(())
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def build(class_name: str, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A diffusers model with random weights, the same ones whatever has drawn random numbers before."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what stays of the class's own start, such as biases
        return _randomise(getattr(diffusers, class_name)(**config), seed)


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="quantempo-tiny-"))


@functools.cache
def dit_pipeline() -> Path:
    """A `DiTPipeline` directory: transformer with learned variance, VAE, DDIM scheduler, ten class names."""
    from diffusers import DDIMScheduler, DiTPipeline

    pipeline = DiTPipeline(
        transformer=build("DiTTransformer2DModel", 0, **DIT), vae=build("AutoencoderKL", 1, **VAE),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=0),
    )
    folder = _folder() / "dit"
    pipeline.save_pretrained(folder)
    # Published pipelines carry their class names here; save_pretrained does not write them.
    index = folder / "model_index.json"
    names = {str(i): f"digit {i}" for i in range(10)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return folder


def _denoiser(class_name: str, seed: int, config: dict[str, Any]) -> Path:
    from diffusers import DDIMScheduler

    folder = _folder() / class_name.lower()
    build(class_name, seed, **config).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


@functools.cache
def unet() -> Path:
    """A class-conditional `UNet2DModel` directory; its scheduler lies in `scheduler/`."""
    return _denoiser("UNet2DModel", 2, UNET)


@functools.cache
def condition_unet() -> Path:
    """A `UNet2DConditionModel` directory; its scheduler lies in `scheduler/`."""
    return _denoiser("UNet2DConditionModel", 3, CONDITION_UNET)


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a denoiser directory whose `config.json` has other values."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target
