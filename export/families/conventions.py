"""What diffusers' pipelines do around their denoisers, which neither signature nor configuration says.

How the timestep is passed, the sign of the prediction, and arguments of `forward` that the pipelines leave alone.  A
bundle in which one of them is wrong samples nonsense, so a class that is not here gets no example call of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Convention:
    """Between a sampler and `forward`.

    Args:
        scale: what the sampler's timestep is multiplied by.
        scale_key: configuration key of a further factor.
        unused: arguments of `forward` that the pipelines leave out.
    """

    scale: float = 1.0
    scale_key: str = ""
    unused: tuple[str, ...] = ()

    def timestep(self, config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The sampler's timestep as `forward` gets it."""
        scale = self.scale * float(config.get(self.scale_key, 1.0))
        return lambda time: time if scale == 1.0 else time * scale


PLAIN = Convention()
MASK = "encoder_attention_mask"
CONVENTIONS: Mapping[str, Convention] = {
    "AuraFlowTransformer2DModel": Convention(scale=1e-3),
    "CogView3PlusTransformer2DModel": PLAIN,
    "CogView4Transformer2DModel": PLAIN,
    "DiTTransformer2DModel": PLAIN,
    "EasyAnimateTransformer3DModel": PLAIN,
    "HunyuanVideoTransformer3DModel": PLAIN,
    "Kandinsky3UNet": PLAIN,
    "LatteTransformer3DModel": Convention(unused=(MASK,)),
    "PixArtTransformer2DModel": PLAIN,
    "SD3Transformer2DModel": PLAIN,
    "SanaTransformer2DModel": Convention(scale_key="timestep_scale"),
    "SanaVideoTransformer3DModel": PLAIN,
    "SkyReelsV2Transformer3DModel": PLAIN,
    "UNet1DModel": PLAIN,
    "UNet2DConditionModel": Convention(unused=(MASK,)),
    "UNet2DModel": PLAIN,
    "UNet3DConditionModel": PLAIN,
    "WanTransformer3DModel": PLAIN,
}
"""By class of diffusers."""
DENOISERS = ("diffusers.models.", "diffusers.pipelines.")
"""Where diffusers keeps them, and mixins beside them."""


def convention_of(kind: type[nn.Module]) -> Convention | None:
    """The convention of a class, or of the class of diffusers that it derives from; `None` for others of diffusers.

    A class that derives from no denoiser of diffusers gets the sampler's timestep as it is.
    """
    for base in kind.__mro__:
        if base.__module__.startswith(DENOISERS) and not base.__name__.endswith("Mixin"):
            return CONVENTIONS.get(base.__name__)
    return PLAIN
