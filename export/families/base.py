"""What a model family has to say about itself: the things that its graph cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from quantempo.contracts.manifest import ArrayInput, ClassInput, Denoiser
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import UnsupportedModel

SAMPLE, TIMESTEP, PREDICTION, BATCH = "sample", "timestep", "prediction", "batch"


@dataclass(frozen=True)
class FamilyContext:
    """What a family may need beside the denoiser's configuration.

    Args:
        labels: class names by label.
        tokens: prompt length.
    """

    labels: Mapping[str, str]
    tokens: int = 77


@dataclass(frozen=True)
class Family:
    """How to feed one denoiser.

    Graph inputs are `sample` [batch, C, H, W] float32, `timestep` [batch] float32, then the class inputs [batch] int64,
    then the array inputs [batch, ...]; the one output is `prediction` [batch, C, H, W].

    Args:
        class_name: diffusers class.
        sample_shape: (C, H, W) of one sample.
        wrap: puts a denoiser into a module that takes the graph inputs in order and returns `(prediction,)`; the
            denoiser must be its attribute `denoiser`.
        classes, arrays: the conditioning inputs.
        output_channels: channels that the denoiser itself returns; those after the first C are cut from the graph.
        timesteps: the range that example inputs are drawn from.
    """

    class_name: str
    sample_shape: tuple[int, int, int]
    wrap: Callable[[nn.Module], nn.Module]
    output_channels: int
    classes: tuple[ClassInput, ...] = ()
    arrays: tuple[ArrayInput, ...] = ()
    timesteps: tuple[float, float] = (0.0, 999.0)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph inputs in order."""
        return (
            TensorSpec(SAMPLE, "float32", (BATCH, *self.sample_shape)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            *(TensorSpec(c.name, "int64", (BATCH,)) for c in self.classes),
            *(TensorSpec(a.name, a.dtype, (BATCH, *a.shape)) for a in self.arrays),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph output."""
        return (TensorSpec(PREDICTION, "float32", (BATCH, *self.sample_shape)),)

    def denoiser(self) -> Denoiser:
        """The manifest's description of a float graph."""
        return Denoiser(latents_shape=self.sample_shape, classes=self.classes, arrays=self.arrays)

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Random inputs, reproducible."""
        rng = np.random.default_rng(seed)
        feeds: dict[str, NDArray[Any]] = {
            SAMPLE: rng.standard_normal((batch, *self.sample_shape)).astype(np.float32),
            TIMESTEP: rng.uniform(*self.timesteps, batch).astype(np.float32),
        }
        for label in self.classes:
            feeds[label.name] = rng.integers(0, label.count, batch).astype(np.int64)
        for array in self.arrays:
            feeds[array.name] = rng.standard_normal((batch, *map(int, array.shape))).astype(array.dtype)
        return feeds


def refuse(class_name: str, key: str, value: object, wanted: str) -> UnsupportedModel:
    """The error for a configuration key that the family cannot handle."""
    return UnsupportedModel(
        f"{class_name} config.json, key {key!r}", found=repr(value), wanted=wanted,
        cause="this variant of the architecture takes inputs or returns outputs that quantempo does not know yet",
        remedy="use a model without it, or extend the family's file in export/families",
    )


def square_size(class_name: str, value: object) -> tuple[int, int]:
    """(height, width) from a `sample_size` that is one number or two."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return int(value[0]), int(value[1])
    raise refuse(class_name, "sample_size", value, "a number of pixels, or height and width")


def kept_channels(class_name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """(channels of a sample, channels that the denoiser returns).

    A denoiser that returns twice its input's channels predicts a variance too; that half is cut.
    """
    taken = int(config["in_channels"])
    given = taken if config.get("out_channels") is None else int(config["out_channels"])
    if given not in (taken, 2 * taken):
        raise refuse(class_name, "out_channels", given, f"{taken}, or {2 * taken} with a predicted variance")
    return taken, given
