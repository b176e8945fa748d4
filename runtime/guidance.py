"""Classifier-free guidance: which rows a call has, and how their predictions become one.

Rows are in a fixed order: first the conditional row of every sample, then the unconditional rows of the guided
samples.  A sample with a guidance scale of 1 or less costs no unconditional row, also in a mixed batch.

`combined = u + g · (c - u)` in float64, rounded once to float32.  With a rescale factor `r`, the standard deviation of
the result is pulled towards that of the conditional prediction (Lin et al., arXiv 2305.08891, section 3.4):
`combined · (r · std(c) / std(combined) + (1 - r))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONDITIONAL = "conditional"
UNCONDITIONAL = "unconditional"
Mode = Literal["batched", "split"]
Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """The rows of one engine call.

    Args:
        samples: the sample of each row.
        branches: the branch of each row.
    """

    samples: tuple[int, ...]
    branches: tuple[str, ...]

    def __len__(self) -> int:
        """How many rows."""
        return len(self.samples)

    def pick(self, rows: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(tuple(self.samples[row] for row in rows), tuple(self.branches[row] for row in rows))


def plan_rows(scales: Sequence[float], mode: Mode) -> tuple[Rows, ...]:
    """The engine calls of one denoiser evaluation: one when batched (or when nothing is guided), else two."""
    batch = len(scales)
    guided = tuple(i for i, scale in enumerate(scales) if scale > 1.0)
    conditional = Rows(tuple(range(batch)), (CONDITIONAL,) * batch)
    if not guided:
        return (conditional,)
    unconditional = Rows(guided, (UNCONDITIONAL,) * len(guided))
    if mode == "split":
        return (conditional, unconditional)
    return (Rows(conditional.samples + guided, conditional.branches + unconditional.branches),)


class Combine:
    """Guidance over one batch, with its scratch memory.

    Args:
        scales: one per sample.
        rescale: 0 switches rescaling off.
        shape: of one sample.
    """

    def __init__(self, scales: Sequence[float], rescale: float, shape: tuple[int, ...]) -> None:
        self.guided = tuple((i, float(scale)) for i, scale in enumerate(scales) if scale > 1.0)
        self.rescale = rescale
        self._wide = [np.empty(shape, np.float64) for _ in range(3)]
        self._rows = (np.empty(math.prod(shape), np.float64), np.empty(math.prod(shape), np.float64))
        self.batch = len(scales)

    def __call__(self, conditional: Float32s, unconditional: Float32s, out: Float32s) -> None:
        """Fill `out`.

        Args:
            conditional: (batch, …).
            unconditional: (guided samples, …).
            out: (batch, …).
        """
        if len(self.guided) < self.batch:
            np.copyto(out, conditional)
        cond, null, result = self._wide
        for row, (sample, scale) in enumerate(self.guided):
            np.copyto(cond, conditional[sample])
            np.copyto(null, unconditional[row])
            np.subtract(cond, null, out=result)
            np.multiply(result, scale, out=result)
            np.add(null, result, out=result)
            if self.rescale:
                factor = self.rescale * (self._deviation(cond) / self._deviation(result)) + (1.0 - self.rescale)
                np.multiply(result, factor, out=result)
            np.copyto(out[sample], result, casting="same_kind")

    def _deviation(self, values: Float64s) -> float:
        """Standard deviation with `n - 1`, summed strictly from first to last so that every runtime agrees."""
        centred, running = self._rows
        flat = values.reshape(-1)
        mean = float(np.add.accumulate(flat, out=running)[-1]) / flat.size
        np.subtract(flat, mean, out=centred)
        np.multiply(centred, centred, out=centred)
        return math.sqrt(float(np.add.accumulate(centred, out=running)[-1]) / (flat.size - 1))
