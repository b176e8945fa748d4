"""A tiny model and its inputs for every denoiser class of diffusers."""

from __future__ import annotations

import inspect

from support.zoo import images, packed, priors, unets, videos
from support.zoo.entry import Draw, Entry, Inputs, find_class, randomize
from torch import nn

__all__ = ["NOT_DENOISERS", "ZOO", "Draw", "Entry", "Inputs", "denoiser_classes", "find_class", "randomize"]

ZOO = {
    entry.class_name: entry
    for entry in (*unets.ENTRIES, *images.ENTRIES, *packed.ENTRIES, *videos.ENTRIES, *priors.ENTRIES)
}
NOT_DENOISERS = {
    "DreamLiteTransformer2DModel": "a block of DreamLiteUNetModel",
    "DualTransformer2DModel": "a block of older UNets",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of audio tokens",
    "MotionAdapter": "weights for UNetMotionModel, without a forward",
    "TransformerTemporalModel": "a block of video UNets",
}
"""Classes beside the denoisers that are none."""


def denoiser_classes() -> list[str]:
    """The classes of `diffusers.models.unets` and `diffusers.models.transformers`, by the library itself."""
    from diffusers.models import transformers
    from diffusers.models import unets as convolutional

    return sorted(
        name
        for package in (transformers, convolutional)
        for name, value in vars(package).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and name not in NOT_DENOISERS
    )
