"""PixArtTransformer2DModel: PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ArrayInput
from quantempo.export.families.base import (
    SAMPLE,
    TIMESTEP,
    Family,
    FamilyContext,
    Feeds,
    kept_channels,
    sample_size,
    square_size,
)

CLASS_NAME = "PixArtTransformer2DModel"
TOKENS = 120
LARGE = 128
"""Models of this sample size are told resolution and aspect ratio, where the configuration does not say."""


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a PixArt transformer; the predicted variance is cut."""
    channels, given = kept_channels(CLASS_NAME, config)
    configured = None if context.size else square_size(CLASS_NAME, config.get("sample_size"))
    size = sample_size(CLASS_NAME, context, configured, rank=2)
    tokens = context.tokens or TOKENS
    arrays = [
        ArrayInput("encoder_hidden_states", "float32", (tokens, int(config["caption_channels"]))),
        ArrayInput("encoder_attention_mask", "int64", (tokens,)),
    ]
    told = config.get("use_additional_conditions")
    if told or (told is None and config.get("sample_size") == LARGE):
        arrays += [
            ArrayInput("resolution", "float32", (2,), guided=False),
            ArrayInput("aspect_ratio", "float32", (1,), guided=False),
        ]
    return Family(CLASS_NAME, (channels, *size), _arguments, given, arrays=tuple(arrays))


def _arguments(feeds: Feeds) -> Mapping[str, Any]:
    added = {name: feeds.get(name) for name in ("resolution", "aspect_ratio")}
    return {
        "hidden_states": feeds[SAMPLE], "timestep": feeds[TIMESTEP],
        "encoder_hidden_states": feeds["encoder_hidden_states"],
        "encoder_attention_mask": feeds["encoder_attention_mask"], "added_cond_kwargs": added, "return_dict": False,
    }
