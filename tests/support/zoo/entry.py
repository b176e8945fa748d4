"""What the zoo says about one denoiser class: a tiny configuration, and how to draw its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]
MODULES = ("diffusers", "diffusers.models", "diffusers.models.transformers", "diffusers.models.unets")


class Draw:
    """Random inputs of one set, reproducible: every tensor but those of `shared` starts with the batch.

    Args:
        batch: samples in this set.
        seed: of all draws.
    """

    def __init__(self, batch: int, seed: int = 0) -> None:
        self.batch = batch
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """[batch, *shape] float32."""
        return torch.randn((self.batch, *shape), generator=self._generator)

    def shared(self, *shape: int) -> torch.Tensor:
        """`shape` float32, normal: the same for all samples."""
        return torch.randn(shape, generator=self._generator)

    def steps(self, high: float = 999.0) -> torch.Tensor:
        """[batch] float32 timesteps in (0, high)."""
        return high * (0.05 + 0.9 * torch.rand((self.batch,), generator=self._generator))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """[batch, *shape] int64 in 0..high-1."""
        return torch.randint(0, high, (self.batch, *shape), generator=self._generator)

    def mask(self, length: int, kept: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[batch, length]: ones, then zeros after the first `kept`."""
        mask = torch.ones((self.batch, length), dtype=dtype)
        mask[:, length if kept is None else kept :] = 0
        return mask

    def repeat(self, *values: float) -> torch.Tensor:
        """[batch, values] float32."""
        return torch.tensor([values] * self.batch, dtype=torch.float32)

    def samples(self, *shape: int) -> list[torch.Tensor]:
        """One `shape` tensor per sample, as a list."""
        return list(self.normal(*shape))


@dataclass(frozen=True)
class Entry:
    """One denoiser class.

    Args:
        class_name: diffusers class.
        config: constructor arguments of a tiny model.
        inputs: keyword arguments of `forward` for one set.
        batches: batch sizes of the two sets; equal where the class loops over samples in Python.
        module: where the class is, if diffusers does not export it.
        family: further arguments of `quantempo.export.families.family_of_example`.
        scales: factors of parameters, by name, where random ones make the model ill-conditioned.
    """

    class_name: str
    config: Mapping[str, Any]
    inputs: Callable[[Draw], Inputs]
    batches: tuple[int, int] = (2, 3)
    module: str | None = None
    family: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, every parameter drawn anew (layers that start at zero would hide the rest)."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = find_class(self.class_name, self.module)(**self.config)
        randomize(model, seed)
        with torch.no_grad():
            for name, factor in self.scales.items():
                model.get_parameter(name).mul_(factor)
        return model.eval()

    def examples(self) -> tuple[Inputs, Inputs]:
        """The two input sets."""
        first, second = self.batches
        return self.inputs(Draw(first, seed=1)), self.inputs(Draw(second, seed=2))


def find_class(name: str, module: str | None = None) -> Any:
    """A class by name.

    Raises:
        LookupError: this version of diffusers does not have it.
    """
    for place in MODULES if module is None else (module,):
        try:
            found = getattr(importlib.import_module(place), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    raise LookupError(f"diffusers has no class {name}")


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values: matrices keep the variance of what they multiply, vectors move by 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and len(parameter):
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.add_(0.1 * noise)
