"""UNet2DModel: convolutional denoiser, unconditional or with a class label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ClassInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, refuse, renamed, square_size

CLASS_NAME = "UNet2DModel"


ARGUMENTS = renamed({name: name for name in ("sample", "timestep", "class_labels")})


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a UNet2DModel; with `num_class_embeds` its last row is the null class."""
    channels, given = kept_channels(CLASS_NAME, config)
    height, width = square_size(CLASS_NAME, config.get("sample_size"))
    if config.get("class_embed_type") is not None:
        raise refuse(CLASS_NAME, "class_embed_type", config["class_embed_type"], "none (labels by num_class_embeds)")
    rows = config.get("num_class_embeds")
    if rows is None:
        return Family(CLASS_NAME, (channels, height, width), ARGUMENTS, given)
    labels = ClassInput("class_labels", count=int(rows) - 1, null=int(rows) - 1, names=context.labels)
    return Family(CLASS_NAME, (channels, height, width), ARGUMENTS, given, classes=(labels,))
