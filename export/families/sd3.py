"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ArrayInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, renamed, sample_size, square_size

CLASS_NAME = "SD3Transformer2DModel"
TOKENS = 333
"""Two CLIP encoders side by side (77), then T5 (256)."""
ARGUMENTS = renamed({
    "sample": "hidden_states", "timestep": "timestep", "encoder_hidden_states": "encoder_hidden_states",
    "pooled_projections": "pooled_projections",
})  # fmt: skip


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a Stable Diffusion 3 transformer."""
    channels, given = kept_channels(CLASS_NAME, config)
    configured = None if context.size else square_size(CLASS_NAME, config.get("sample_size"))
    size = sample_size(CLASS_NAME, context, configured, rank=2)
    arrays = (
        ArrayInput(
            "encoder_hidden_states", "float32", (context.tokens or TOKENS, int(config["joint_attention_dim"]))
        ),
        ArrayInput("pooled_projections", "float32", (int(config["pooled_projection_dim"]),)),
    )
    return Family(CLASS_NAME, (channels, *size), ARGUMENTS, given, arrays=arrays)
