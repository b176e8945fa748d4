"""DiTTransformer2DModel: class-conditional transformer with adaLN-zero (Peebles and Xie, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ClassInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, renamed, square_size

CLASS_NAME = "DiTTransformer2DModel"


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a DiT; the null class is the row after the last label in the embedding table."""
    channels, given = kept_channels(CLASS_NAME, config)
    height, width = square_size(CLASS_NAME, config.get("sample_size"))
    count = int(config["num_embeds_ada_norm"])
    return Family(
        class_name=CLASS_NAME,
        sample_shape=(channels, height, width),
        arguments=renamed({"sample": "hidden_states", "timestep": "timestep", "class_labels": "class_labels"}),
        output_channels=given,
        classes=(ClassInput("class_labels", count=count, null=count, names=context.labels),),
    )
