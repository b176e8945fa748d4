"""Sizes of samples: from what people say to what a denoiser works on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantempo.errors import UnsupportedModel, nearest

PRESETS: Mapping[str, tuple[int, ...]] = {
    "square-512": (512, 512), "square-768": (768, 768), "square-1024": (1024, 1024),
    "landscape-1024": (832, 1216), "portrait-1024": (1216, 832),
    "wide-1024": (768, 1344), "tall-1024": (1344, 768),
    "video-480p": (81, 480, 832), "video-720p": (81, 720, 1280),
}  # fmt: skip
"""Sizes in pixels by name: height and width of an image; frames, height and width of a video."""


def latent_size(text: str, class_name: str, vae: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """The size of a sample in the denoiser's own units.

    Args:
        text: `HEIGHTxWIDTH`, `FRAMESxHEIGHTxWIDTH` or a name in `PRESETS`, in pixels where the model has a VAE and in
            latents where it has none; empty for the model's own size.
        class_name: of the denoiser, for messages.
        vae: the VAE's configuration.

    Raises:
        UnsupportedModel: not such a size, or none that the VAE can make.
    """
    if not text:
        return None
    if text in PRESETS:
        pixels = PRESETS[text]
    elif re.fullmatch(r"\d+(x\d+){1,2}", text):
        pixels = tuple(int(part) for part in text.split("x"))
    else:
        raise _refuse(class_name, text, "HEIGHTxWIDTH, FRAMESxHEIGHTxWIDTH or a preset", nearest(text, PRESETS))
    if min(pixels) < 1:
        raise _refuse(class_name, text, "sizes of at least 1", "give, for example, 512x512")
    if vae is None:
        return pixels
    space, time = compression(vae)
    *frames, height, width = pixels
    if height % space or width % space:
        legal = "x".join(str(max(1, round(side / space)) * space) for side in (height, width))
        raise _refuse(class_name, text, f"multiples of {space} pixels", f"the nearest legal size is {legal}")
    if frames and (frames[0] - 1) % time:
        legal = str((frames[0] - 1) // time * time + 1)
        raise _refuse(class_name, text, f"1 + a multiple of {time} frames", f"the nearest legal number is {legal}")
    return (*((count - 1) // time + 1 for count in frames), height // space, width // space)


def compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels per latent along an axis, and frames per latent after the first, of an autoencoder's configuration."""
    space = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    time = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    blocks = vae.get("block_out_channels") or vae.get("dim_mult") or (0,) * 4
    halvings = vae.get("temperal_downsample") or ()
    return int(space or 2 ** (len(blocks) - 1)), int(time or 2 ** sum(bool(h) for h in halvings))


def _refuse(class_name: str, found: str, wanted: str, remedy: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"size for {class_name}", found=repr(found), wanted=wanted, cause="a slip in --size", remedy=remedy
    )
