"""IP-Adapters: image embeddings as further keys and values of a UNet's cross attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from quantempo.errors import UnsupportedModel

PARTS = ("image_proj", "ip_adapter")
RESAMPLED_TOKENS = 257
"""Tokens of the CLIP image encoder, all of which the "plus" adapters read."""


def embedding_shape(path: Path) -> tuple[int, ...]:
    """Shape of the image embedding that an adapter's file takes, per image.

    Raises:
        UnsupportedModel: not an IP-Adapter, or one of another kind.
    """
    with safe_open(str(path), "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if "image_proj.proj.weight" in shapes:
        return (int(shapes["image_proj.proj.weight"][-1]),)
    if "image_proj.latents" in shapes:
        return RESAMPLED_TOKENS, int(shapes["image_proj.proj_in.weight"][-1])
    raise UnsupportedModel(
        str(path), found="tensors " + ", ".join(sorted(shapes)[:3]), wanted="image_proj.proj or image_proj.latents",
        cause="this is no IP-Adapter, or one for faces", remedy="take a plain or 'plus' IP-Adapter",
    )


def load_adapters(unet: nn.Module, paths: Sequence[Path]) -> None:
    """Put adapters into a UNet, as `load_ip_adapter` of its pipeline does."""
    from safetensors.torch import load_file

    model: Any = unet
    parts = []
    for path in paths:
        tensors = load_file(str(path))
        parts.append({
            part: {name.removeprefix(part + "."): t.float() for name, t in tensors.items() if name.startswith(part)}
            for part in PARTS
        })  # fmt: skip
    model._load_ip_adapter_weights(parts, low_cpu_mem_usage=False)
    model.eval()


def embedding_shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shape of the image embedding of each adapter in a UNet, per image."""
    for layer in getattr(getattr(module, "encoder_hid_proj", None), "image_projection_layers", ()):
        projection: Any = layer
        if hasattr(layer, "image_embeds"):
            yield (int(projection.image_embeds.in_features),)
        else:
            yield RESAMPLED_TOKENS, int(projection.proj_in.in_features)
