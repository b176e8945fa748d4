"""FluxTransformer2DModel: rectified flow transformer on latents packed two by two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantempo.contracts.manifest import ArrayInput
from quantempo.export.families.base import SAMPLE, TIMESTEP, Family, FamilyContext, Feeds, refuse, sample_size

CLASS_NAME = "FluxTransformer2DModel"
TOKENS = 512
PACK = 2
TIMESTEPS = 1000.0


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, C, H, W] to [batch, H/2 · W/2, 4 C]."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACK * PACK)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`."""
    batch, _, channels = tokens.shape
    cells = tokens.reshape(batch, height // PACK, width // PACK, channels // PACK**2, PACK, PACK)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PACK**2, height, width)


def position_ids(height: int, width: int) -> torch.Tensor:
    """[H/2 · W/2, 3]: a zero, row and column of each packed token."""
    rows, columns = torch.meshgrid(torch.arange(height // PACK), torch.arange(width // PACK), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a Flux transformer; its samples are unpacked latents, as the VAE knows them."""
    packed = int(config.get("in_channels", 64))
    if config.get("out_channels") not in (None, packed):
        raise refuse(CLASS_NAME, "out_channels", config["out_channels"], f"{packed}, the channels of a sample")
    height, width = sample_size(CLASS_NAME, context, None, rank=2)
    if height % PACK or width % PACK:
        raise refuse(CLASS_NAME, "size", f"{height} x {width} latents", f"multiples of {PACK}")
    tokens = context.tokens or TOKENS
    # A model with a guidance embedding is guided by it, without a second branch.
    distilled = bool(config.get("guidance_embeds"))
    arrays = [
        ArrayInput("encoder_hidden_states", "float32", (tokens, int(config["joint_attention_dim"])), not distilled),
        ArrayInput("pooled_projections", "float32", (int(config["pooled_projection_dim"]),), not distilled),
    ]
    if distilled:
        arrays.append(ArrayInput("guidance", "float32", (), guided=False))
    return Family(
        CLASS_NAME, (packed // PACK**2, height, width), _arguments(height, width, tokens), arrays=tuple(arrays),
        prediction=lambda returned, _feeds: unpack(returned[0], height, width),
    )


def _arguments(height: int, width: int, tokens: int) -> Callable[[Feeds], Mapping[str, Any]]:
    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        return {
            "hidden_states": pack(feeds[SAMPLE]), "timestep": feeds[TIMESTEP] / TIMESTEPS,
            "guidance": feeds.get("guidance"), "pooled_projections": feeds["pooled_projections"],
            "encoder_hidden_states": feeds["encoder_hidden_states"], "txt_ids": torch.zeros(tokens, 3),
            "img_ids": position_ids(height, width), "return_dict": False,
        }

    return arguments
