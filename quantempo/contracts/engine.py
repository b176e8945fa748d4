"""What the runtime asks of an inference engine.

An engine opens one graph.  `bind` fixes the shapes and allocates every input and output once; after that a call is
`binding.run()` with no allocation and no copy that the caller did not ask for.  Register operations run where the
buffers live: an engine whose buffers are host memory says so (`host`), and the loop works on `Buffer.array` directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


class Engine(Protocol):
    """One opened graph."""

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


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The numpy type of a spec."""
    return np.dtype(spec.dtype)
