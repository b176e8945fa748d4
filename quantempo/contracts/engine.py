"""What the runtime asks of an inference engine.

An engine opens one graph.  `bind` fixes the shapes and allocates every input and output once; after that a call is
`binding.run()` with no allocation and no copy that the caller did not ask for.  Register operations run where the
buffers live: an engine whose buffers are host memory says so (`host`), and the loop works on `Buffer.array` directly.
An engine with memory of its own may bring the arithmetic for it (`BufferMath`, see `math_of`); without it the loop
copies what it needs to the host and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.tensors import TensorSpec

Array = NDArray[Any]


class Buffer(Protocol):
    """Memory of one bound tensor, owned by the engine, at a fixed address for the life of its binding."""

    spec: TensorSpec
    shape: tuple[int, ...]

    @property
    def array(self) -> Array:
        """A writable view; only for engines with `host = True`."""

    def upload(self, values: Array) -> None:
        """Copy host values in."""

    def download(self) -> Array:
        """A host copy."""


class Binding(Protocol):
    """A graph with all shapes fixed and all buffers allocated."""

    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]

    def run(self) -> None:
        """Evaluate once: reads every input buffer, fills every output buffer; returns when outputs are readable."""


class BufferMath(Protocol):
    """Register operations and guidance on an engine's own buffers, with the bits that `contracts.program` defines.

    All tensors are float32 unless told otherwise.  Operations may be queued: each sees what was queued before it, and
    so do `Buffer.upload` and `Buffer.download` of buffers that `allocate` made; before an engine runs, call `wait`.
    An operation may write to one of its own sources, `guide` apart.
    """

    most_terms: int
    """The longest linear form that `lin` takes."""

    def prepare(self) -> None:
        """Do what must be done once (compile kernels), when a run is planned.

        Raises:
            EngineError, MissingExtra: it cannot be done here.
        """

    def allocate(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """A fresh tensor of zeros, freed with its last reference."""

    def rows(self, buffer: Buffer, first: int, count: int) -> Buffer:
        """A view of some of a tensor's rows (axis 0), which keeps the memory alive."""

    def copy(self, source: Buffer, out: Buffer) -> None:
        """`out = source`, of the same shape."""

    def lin(self, terms: Sequence[tuple[Buffer, float]], out: Buffer) -> None:
        """`out = Σ coefficient · source` in the written order; no terms make zeros."""

    def clamp(self, source: Buffer, low: float, high: float, out: Buffer) -> None:
        """`out = min(max(source, low), high)`; the bounds are rounded to float32 first."""

    def correct(self, source: Buffer, gain: Buffer, bias: Buffer, out: Buffer) -> None:
        """`out = gain · source + bias` per channel (axis 1); `gain` and `bias` hold one element for each."""

    def guide(
        self, conditional: Buffer, unconditional: Buffer, null_rows: Buffer, scales: Buffer, rescale: float, out: Buffer
    ) -> None:
        """Classifier-free guidance, `u + g·(c - u)`, rescaled where `rescale` is above 0.

        Args:
            conditional: (samples, …).
            unconditional: (guided samples, …).
            null_rows: int32 per sample, its row in `unconditional`; -1 where it is not guided.
            scales: float64 per sample.
            rescale: factor, 0 for none.
            out: (samples, …), not the memory of a branch.
        """

    def wait(self) -> None:
        """Return when everything that was queued is done."""


class Engine(Protocol):
    """One opened graph.  It may also have an attribute `math`, which `math_of` reads."""

    name: str
    host: bool
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        """Fix the symbolic dimensions and allocate.

        Args:
            sizes: value of each symbolic dimension.
            share: buffers of another binding to use as this binding's inputs or outputs of that name (cached features).
        """

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate on host arrays and return host arrays that the caller owns; a convenience over `bind`."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""


@dataclass(frozen=True)
class EngineOptions:
    """How to open a graph.

    Args:
        threads: intra-op threads; 0 lets the engine choose.
        extra_outputs: names of inner tensors that the caller wants as outputs (calibration taps), where supported.
        settings: engine-specific strings, checked by the engine.
    """

    threads: int = 0
    extra_outputs: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


class EngineFactory(Protocol):
    """Opens a graph file with one backend."""

    def __call__(self, graph: Path, options: EngineOptions) -> Engine:
        """Open; raises `EngineError` with the engine's own words where it refuses."""


def math_of(engine: Engine) -> BufferMath | None:
    """The arithmetic that an engine brings for its buffers; `None` where the loop computes on the host."""
    return None if engine.host else cast("BufferMath | None", getattr(engine, "math", None))


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The numpy type of a spec."""
    return np.dtype(spec.dtype)
