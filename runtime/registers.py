"""Registers of a step program and the arithmetic on them, as `quantempo.contracts.program` defines it.

Everything is allocated once: float32 arrays for the registers, two float64 arrays as scratch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.program import Clamp, Correct, Lin, Noise, Operation, State, Terms
from quantempo.runtime.rng import NoiseSource

Float32s = NDArray[np.float32]


def draw_initial(state: State, given: Float32s | None, noise: NoiseSource, out: Float32s) -> None:
    """Fill `out` with a state's start: the given standard normals, or drawn ones, times its initial scale."""
    if given is None:
        noise.draw(0, out)
    else:
        np.copyto(out, given)
    np.copyto(out, out.astype(np.float64) * state.initial_scale, casting="same_kind")


class Registers:
    """Named float32 tensors of one shape.

    Args:
        names: all registers of a program, `prediction` apart.
        shape: with the batch dimension.
        vectors: per-call vectors by name, (rows, channels), for `Correct`.
    """

    def __init__(
        self, names: Iterable[str], shape: tuple[int, ...], vectors: Mapping[str, Float32s] | None = None
    ) -> None:
        self.shape = shape
        self._vectors = vectors or {}
        self._arrays: dict[str, Float32s] = {name: np.zeros(shape, np.float32) for name in names}
        self._sum = np.empty(shape, np.float64)
        self._product = np.empty(shape, np.float64)

    def __getitem__(self, name: str) -> Float32s:
        """The array of a register; it stays the same object."""
        return self._arrays[name]

    def place(self, name: str, array: Float32s) -> None:
        """Let a register be foreign memory (the prediction is the engine's own output where no guidance runs)."""
        self._arrays[name] = array

    def copied(self) -> Registers:
        """The same registers with arrays of their own, for a look ahead."""
        other = Registers((), self.shape, self._vectors)
        other._arrays = {name: array.copy() for name, array in self._arrays.items()}
        return other

    def lin(self, terms: Terms, out: Float32s) -> None:
        """`out = Σ coefficient · register`: float64 in the written order, rounded once to float32; empty is zero."""
        if not terms:
            out.fill(0.0)
            return
        name, coefficient = terms[0]
        if len(terms) == 1 and coefficient == 1.0:
            np.copyto(out, self._arrays[name])
            return
        # Converting first and multiplying in place is faster than one mixed multiplication, which numpy buffers.
        np.copyto(self._sum, self._arrays[name])
        np.multiply(self._sum, coefficient, out=self._sum)
        for name, coefficient in terms[1:]:
            np.copyto(self._product, self._arrays[name])
            np.multiply(self._product, coefficient, out=self._product)
            np.add(self._sum, self._product, out=self._sum)
        np.copyto(out, self._sum, casting="same_kind")

    def correct(self, operation: Correct, out: Float32s) -> None:
        """`out = gain · source + bias` per channel: float64, product then sum, rounded once to float32."""
        along = (1, -1, *(1,) * (len(self.shape) - 2))
        gain, bias = (self._vectors[name][operation.row].reshape(along) for name in (operation.gain, operation.bias))
        np.copyto(self._sum, self._arrays[operation.source])
        np.multiply(self._sum, gain, out=self._sum)
        np.add(self._sum, bias, out=self._sum)
        np.copyto(out, self._sum, casting="same_kind")

    def apply(self, operation: Operation, noise: NoiseSource) -> None:
        """Run one operation of a program."""
        out = self._arrays[operation.to]
        if isinstance(operation, Lin):
            self.lin(operation.terms, out)
        elif isinstance(operation, Clamp):
            low, high = np.float32(operation.low), np.float32(operation.high)
            np.clip(self._arrays[operation.source], low, high, out=out)
        elif isinstance(operation, Noise):
            noise.draw(operation.draw, out)
        else:
            self.correct(operation, out)
