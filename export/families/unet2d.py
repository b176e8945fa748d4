"""UNet2DModel: convolutional denoiser, unconditional or with a class label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantempo.contracts.manifest import ClassInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, refuse, square_size

CLASS_NAME = "UNet2DModel"


class FlatUNet2D(nn.Module):
    """Positional tensors in, a tuple out."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.denoiser(sample, timestep, return_dict=False)[0],)


class FlatClassUNet2D(FlatUNet2D):
    """The same with a class label."""

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (self.denoiser(sample, timestep, class_labels=class_labels, return_dict=False)[0],)


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a UNet2DModel; with `num_class_embeds` its last row is the null class."""
    channels, given = kept_channels(CLASS_NAME, config)
    height, width = square_size(CLASS_NAME, config.get("sample_size"))
    if config.get("class_embed_type") is not None:
        raise refuse(CLASS_NAME, "class_embed_type", config["class_embed_type"], "none (labels by num_class_embeds)")
    rows = config.get("num_class_embeds")
    if rows is None:
        return Family(CLASS_NAME, (channels, height, width), FlatUNet2D, given)
    labels = ClassInput("class_labels", count=int(rows) - 1, null=int(rows) - 1, names=context.labels)
    return Family(CLASS_NAME, (channels, height, width), FlatClassUNet2D, given, classes=(labels,))
