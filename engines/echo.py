"""A fake engine: deterministic, seeded, numpy alone.

Planning, bundles, caching, the loop and the command line are tested with it in milliseconds.  Its "graph" is a small
JSON file that lists inputs and outputs.  Each output is a smooth function of all inputs: rows are independent of each
other, tensors of rank 2 and more are resampled to the output's size and mixed, scalars and per-row values (timestep,
class label, scale group) turn a phase.

    mix_i   = Σ_t weight(t) · resample(tensor t, row i)
    phase_i = seed + Σ_s rate(s) · value(s, row i)
    out_i   = cos(phase_i) · tanh(mix_i) + 0.3 · sin(ramp + phase_i)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.contracts.engine import Buffer, EngineOptions, dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.host import HostBuffer, HostEngine, allocate
from quantempo.engines.shapes import symbols
from quantempo.errors import EngineError, nearest

Array = NDArray[Any]


@dataclass(frozen=True)
class EchoGraph:
    """The content of an echo graph file.

    Args:
        inputs, outputs: the contract.
        seed: another seed is another function.
        inner: tensors that may be asked for as extra outputs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    seed: int = 0
    inner: tuple[TensorSpec, ...] = ()


def write_echo_graph(path: Path, graph: EchoGraph) -> None:
    """Write a graph file (the name should end in `.json`)."""
    path.write_text(canonical_json(graph))


def open_engine(graph: Path, options: EngineOptions) -> EchoEngine:
    """Open an echo graph.

    Raises:
        EngineError: no such file, an unknown setting, or an extra output that the file does not list.
        DataError: the file is not an echo graph.
    """
    if not graph.is_file():
        raise EngineError(
            f"{graph}", found="no such file", wanted="an echo graph (JSON)", cause="a wrong path",
            remedy="look at the path again",
        )
    content = from_data(EchoGraph, parse_json(graph.read_bytes(), str(graph)), str(graph))
    for key in options.settings:
        if key != "host":
            raise EngineError(
                f"{graph}: settings", found=f"{key!r}", wanted="only 'host'", cause="a setting of another engine",
                remedy=nearest(key, ["host"]),
            )
    inner = {spec.name: spec for spec in content.inner}
    for name in options.extra_outputs:
        if name not in inner:
            raise EngineError(
                f"{graph}: extra output {name!r}", found="no such tensor", wanted="a tensor of the graph",
                cause="the name belongs to another graph", remedy=nearest(name, inner),
            )
    outputs = (*content.outputs, *(inner[name] for name in options.extra_outputs))
    return EchoEngine(graph, content, outputs, options.settings.get("host", "true") == "true")


class EchoEngine(HostEngine):
    """An opened echo graph; with the setting `host=false` it behaves as if its buffers were on a device."""

    def __init__(self, path: Path, graph: EchoGraph, outputs: tuple[TensorSpec, ...], host: bool) -> None:
        super().__init__(f"echo {path.name}", {s.name: s for s in graph.inputs}, {s.name: s for s in outputs})
        self.host = host
        self.seed = graph.seed

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> EchoBinding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        self._check_bind(sizes, share)
        return EchoBinding(self, sizes, share)


class EchoBinding:
    """Buffers of one set of shapes."""

    def __init__(self, engine: EchoEngine, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None) -> None:
        self._engine = engine
        missing = [s for s in symbols(engine.outputs) if s not in sizes]
        if missing:
            raise EngineError(
                engine.name, found=f"an output of size {missing[0]!r}", wanted="sizes that the inputs have",
                cause="the echo graph was written by hand", remedy="use only symbols of the inputs",
            )
        inputs, outputs = (allocate(engine.name, s, sizes, share) for s in (engine.inputs, engine.outputs))
        for buffer in (*inputs.values(), *outputs.values()):
            buffer._exposed = engine.host
        self._inputs, self._outputs = inputs, outputs
        self.inputs: Mapping[str, Buffer] = dict(inputs)
        self.outputs: Mapping[str, Buffer] = dict(outputs)

    def run(self) -> None:
        """Evaluate once."""
        self._engine._check_open()
        values = {name: buffer.memory for name, buffer in self._inputs.items()}
        for buffer in self._outputs.values():
            buffer.memory[...] = _evaluate(self._engine.seed, buffer, values)


def _evaluate(seed: int, out: HostBuffer, values: Mapping[str, Array]) -> Array:
    name = out.spec.name
    rows = out.shape[0] if out.shape else 1
    size = math.prod(out.shape) // rows
    mix: NDArray[np.float64] = np.zeros((rows, size))
    phase = np.full(rows, 6.0 * _fraction(seed, name, ""))
    for source, value in values.items():
        weight = 0.3 + 0.6 * _fraction(seed, name, source)
        if value.ndim >= 2 and value.shape[0] == rows:
            flat = value.reshape(rows, -1).astype(np.float64)
            mix += weight * flat[:, (np.arange(size) * flat.shape[1]) // size]
        elif value.ndim <= 1:
            rate = weight if np.issubdtype(value.dtype, np.integer) else weight * 0.003
            phase = phase + rate * value.astype(np.float64)
    ramp = np.linspace(0.0, 6.0, size)
    result: Array = np.cos(phase)[:, None] * np.tanh(mix) + 0.3 * np.sin(ramp[None, :] + phase[:, None])
    return result.reshape(out.shape).astype(dtype_of(out.spec))


def _fraction(seed: int, output: str, source: str) -> float:
    """A number in [0, 1) that depends on the three words alone."""
    text = hashlib.sha256(f"{seed}|{output}|{source}".encode()).digest()
    return int.from_bytes(text[:4], "little") / 2.0**32
