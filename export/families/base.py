"""What a model family has to say about itself: the things that its graph cannot tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantempo.contracts.manifest import ArrayInput, ClassInput, Denoiser
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import UnsupportedModel

SAMPLE, TIMESTEP, PREDICTION, BATCH = "sample", "timestep", "prediction", "batch"
Feeds = Mapping[str, torch.Tensor]
"""Graph inputs by name."""
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class FamilyContext:
    """What a family may need beside the denoiser's configuration.

    Args:
        labels: class names by label.
        tokens: prompt length that the user asked for; `None` for the family's usual one.
        encoder_tokens: prompt length that the configuration of `text_encoder/` names.
        size: latent height and width, or frames, height and width; `None` for what the configuration says.
        extra: configurations of further networks that run before the denoiser in the same graph, such as a ControlNet.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    tokens: int | None = None
    encoder_tokens: int | None = None
    size: tuple[int, ...] | None = None
    extra: tuple[Mapping[str, Any], ...] = ()


def first_tensor(output: Any, _feeds: Feeds) -> torch.Tensor:
    """The first tensor of what a denoiser returns; a list with one tensor per sample is stacked.

    Raises:
        TypeError: it returns something else, such as a dictionary of several tensors.
    """
    first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if isinstance(first, (tuple, list)):
        return torch.stack(list(first))
    if not isinstance(first, torch.Tensor):
        keys = f" with {', '.join(map(str, first))}" if isinstance(first, Mapping) else ""
        raise TypeError(f"forward returns a {type(first).__name__}{keys}, and output_select does not say which part")
    return first


@dataclass(frozen=True)
class Family:
    """How to feed one denoiser.

    Graph inputs are `sample` [batch, ...] float32, `timestep` [batch] float32, then the class inputs [batch] int64,
    then the array inputs [batch, ...]; the one output is `prediction`, of the sample's shape.

    Args:
        class_name: diffusers class.
        sample_shape: shape of one sample: (C, H, W) of an image, (C, F, H, W) of a video, (tokens, C) of a sequence.
        arguments: graph inputs to the keyword arguments of the denoiser's `forward`, in torch operations.
        output_channels: channels (axis 1) that the prediction has before those after the sample's C are cut; `None`
            where nothing is to cut.
        classes, arrays: the conditioning inputs.
        timesteps: the range that example inputs are drawn from.
        prediction: what `forward` returned to the prediction, in torch operations.
        border: inputs and output, where they are not those above; see `family_of_example`.
        sets: input sets, instead of random ones.
        pinned: contents of inputs that are part of the graph instead; see `quantempo.export.specialise`.
        tracing: entered while the module runs in a trace.
    """

    class_name: str
    sample_shape: tuple[int, ...]
    arguments: Callable[[Feeds], Mapping[str, Any]]
    output_channels: int | None = None
    classes: tuple[ClassInput, ...] = ()
    arrays: tuple[ArrayInput, ...] = ()
    timesteps: tuple[float, float] = (0.0, 999.0)
    prediction: Callable[[Any, Feeds], torch.Tensor] = first_tensor
    border: tuple[tuple[TensorSpec, ...], TensorSpec] | None = None
    sets: tuple[Arrays, ...] = ()
    pinned: Arrays = field(default_factory=dict)
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext

    def wrap(self, denoiser: nn.Module) -> Flat:
        """The denoiser as a module that takes the graph inputs in order and returns `(prediction,)`."""
        return Flat(denoiser, self)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph inputs in order."""
        return tuple(spec for spec in self.all_inputs() if spec.name not in self.pinned)

    def all_inputs(self) -> tuple[TensorSpec, ...]:
        """The same with those that are pinned."""
        if self.border is not None:
            return self.border[0]
        return (
            TensorSpec(SAMPLE, "float32", (BATCH, *self.sample_shape)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            *(TensorSpec(c.name, "int64", (BATCH,)) for c in self.classes),
            *(TensorSpec(a.name, a.dtype, (BATCH, *a.shape)) for a in self.arrays),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph output."""
        if self.border is not None:
            return (self.border[1],)
        return (TensorSpec(PREDICTION, "float32", (BATCH, *self.sample_shape)),)

    @property
    def kept_channels(self) -> int | None:
        """How many channels of the prediction stay; `None` for all."""
        if self.output_channels is None or self.output_channels == self.sample_shape[0]:
            return None
        return self.sample_shape[0]

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
            feeds[array.name] = _example_array(rng, array, batch)
        return feeds

    def examples(self) -> tuple[Arrays, ...]:
        """The input sets on which a graph is compared with the module; they differ in batch size."""
        return self.sets or (self.example(2, seed=1), self.example(3, seed=2))


def _example_array(rng: np.random.Generator, array: ArrayInput, batch: int) -> NDArray[Any]:
    shape = (batch, *map(int, array.shape))
    if np.dtype(array.dtype).kind in "bi":  # masks and lengths
        flags = rng.integers(0, 2, shape)
        flags[..., :1] = 1  # a mask that hides everything has no softmax
        return flags.astype(array.dtype)
    return rng.standard_normal(shape).astype(array.dtype)


def single(family: Family) -> Family:
    """The family with a fixed batch of one, for models whose Python loops over the samples of a batch."""

    def fixed(spec: TensorSpec) -> TensorSpec:
        sizes = (_rows(size) if isinstance(size, str) else size for size in spec.shape)
        return dataclasses.replace(spec, shape=tuple(sizes))

    specs = family.all_inputs()

    def first(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
        return array[tuple(slice(_rows(size)) if isinstance(size, str) else slice(None) for size in spec.shape)]

    sets = tuple({spec.name: first(given[spec.name], spec) for spec in specs} for given in family.examples())
    return dataclasses.replace(
        family, border=(tuple(map(fixed, specs)), fixed(family.outputs()[0])), sets=sets,
    )


def _rows(size: str) -> int:
    """What `batch` or `K*batch` is for one sample."""
    return int(size.partition("*")[0]) if "*" in size else 1


class Flat(nn.Module):
    """A denoiser with flat tensors in, in the order of the family's inputs, and `(prediction,)` out."""

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        super().__init__()
        # The name is the one that the passes strip from module paths.
        self.denoiser = denoiser
        self.family = family

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        feeds = {spec.name: tensor for spec, tensor in zip(self.family.inputs(), tensors, strict=True)}
        with self.family.tracing():
            return (self.family.prediction(self.denoiser(**self.family.arguments(feeds)), feeds),)


def renamed(names: Mapping[str, str], **constants: Any) -> Callable[[Feeds], Mapping[str, Any]]:
    """`arguments` of a denoiser that takes the graph inputs as they are.

    Args:
        names: `forward`'s argument by graph input.
        constants: further arguments; `return_dict=False` is among them.
    """

    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        return {names[name]: tensor for name, tensor in feeds.items()} | constants | {"return_dict": False}

    return arguments


def refuse(class_name: str, key: str, value: object, wanted: str) -> UnsupportedModel:
    """The error for a configuration key that the family cannot handle."""
    return UnsupportedModel(
        f"{class_name} config.json, key {key!r}", found=repr(value), wanted=wanted,
        cause="this variant of the architecture takes inputs or returns outputs that quantempo does not know yet",
        remedy="use a model without it, or extend the family's file in export/families",
    )


def sample_size(
    class_name: str, context: FamilyContext, configured: tuple[int, ...] | None, rank: int
) -> tuple[int, ...]:
    """The size of a sample: what the user asked for, else what the configuration says.

    Raises:
        UnsupportedModel: neither says it, or for another number of axes.
    """
    size = context.size or configured
    axes = "height and width" if rank == 2 else "frames, height and width"
    if size is None or len(size) != rank:
        raise UnsupportedModel(
            f"denoiser of class {class_name}", found="no size" if size is None else f"a size of {len(size)} numbers",
            wanted=f"{axes} of a sample", cause="this architecture runs at any resolution, and a graph at one",
            remedy=f"add --size with {axes}, such as {'1024x1024' if rank == 2 else '81x480x832'}",
        )
    return size


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


SAMPLE_CONDITION = "sample_condition"


def conditioned_sample(
    class_name: str, config: Mapping[str, Any], size: tuple[int, ...]
) -> tuple[int, int, tuple[ArrayInput, ...]]:
    """(channels of a sample, channels returned, the array that is concatenated to the sample).

    Inpainting, image-to-video and the like take more channels than they return: a mask, latents of an image.
    """
    taken = int(config["in_channels"])
    given = taken if config.get("out_channels") is None else int(config["out_channels"])
    if given < taken:
        return given, given, (ArrayInput(SAMPLE_CONDITION, "float32", (taken - given, *size), guided=False),)
    return *kept_channels(class_name, config), ()


def with_condition(feeds: Feeds) -> torch.Tensor:
    """The sample with what `conditioned_sample` says is concatenated to it."""
    if SAMPLE_CONDITION in feeds:
        return torch.cat([feeds[SAMPLE], feeds[SAMPLE_CONDITION]], dim=1)
    return feeds[SAMPLE]
