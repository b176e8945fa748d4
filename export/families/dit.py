"""DiTTransformer2DModel: class-conditional transformer with adaLN-zero (Peebles and Xie, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantempo.contracts.manifest import ClassInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, square_size

CLASS_NAME = "DiTTransformer2DModel"


class FlatDiT(nn.Module):
    """Positional tensors in, a tuple out."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (self.denoiser(sample, timestep=timestep, class_labels=class_labels, return_dict=False)[0],)


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a DiT; the null class is the row after the last label in the embedding table."""
    channels, given = kept_channels(CLASS_NAME, config)
    height, width = square_size(CLASS_NAME, config.get("sample_size"))
    count = int(config["num_embeds_ada_norm"])
    return Family(
        class_name=CLASS_NAME,
        sample_shape=(channels, height, width),
        wrap=FlatDiT,
        output_channels=given,
        classes=(ClassInput("class_labels", count=count, null=count, names=context.labels),),
    )
