"""What engines with host buffers have in common: buffers are numpy arrays, and `run` is a convenience over `bind`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Buffer, dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.shapes import check_array, check_names, check_sizes, shared_misfit, sizes_of
from quantempo.errors import EngineError

Array = NDArray[Any]
ALIGNMENT = 64


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros that start on a cache line, which is what vector kernels like best."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


class HostBuffer:
    """A numpy array that an engine reads or writes in place.

    Args:
        spec: name, type and symbolic shape.
        array: the memory; it stays at its address.
        where: for messages.
        exposed: whether `array` may be touched from outside (see `echo`'s setting `host`).
    """

    def __init__(self, spec: TensorSpec, array: Array, where: str, exposed: bool = True) -> None:
        self.spec = spec
        self.shape: tuple[int, ...] = array.shape
        self.memory = array
        self._where = where
        self._exposed = exposed

    @property
    def array(self) -> Array:
        """A writable view of the memory."""
        if not self._exposed:
            raise EngineError(
                f"{self._where}: buffer {self.spec.name!r}", found="a request for host memory",
                wanted="upload or download", cause="this engine's buffers live on its device",
                remedy="look at Engine.host first",
            )
        return self.memory

    def upload(self, values: Array) -> None:
        """Copy host values in; type and shape must be the buffer's."""
        check_array(self._where, self.spec, values, self.shape)
        np.copyto(self.memory, values)

    def download(self) -> Array:
        """A copy that the caller owns."""
        return self.memory.copy()


def allocate(
    where: str, specs: Mapping[str, TensorSpec], sizes: Mapping[str, int], share: Mapping[str, Buffer] | None
) -> dict[str, HostBuffer]:
    """A buffer per tensor; a shared one takes over the other binding's memory.

    Raises:
        EngineError: a shared buffer of another type or shape.
    """
    buffers = {}
    for name, spec in specs.items():
        shape = spec.resolve(dict(sizes))
        other = (share or {}).get(name)
        if other is None:
            buffers[name] = HostBuffer(spec, aligned_zeros(shape, dtype_of(spec)), where)
            continue
        memory = other.memory if isinstance(other, HostBuffer) else other.array
        if memory.shape != shape or memory.dtype != dtype_of(spec):
            raise shared_misfit(where, spec, shape, memory.dtype, memory.shape)
        buffers[name] = HostBuffer(spec, memory, where)
    return buffers


class HostEngine:
    """Base of engines whose buffers are host memory; a backend adds `bind` and `_release`."""

    host: bool = True

    def __init__(self, name: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.name = name
        self.inputs: Mapping[str, TensorSpec] = dict(inputs)
        self.outputs: Mapping[str, TensorSpec] = dict(outputs)
        self._closed = False
        self._last: tuple[dict[str, int], Binding] | None = None

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        raise NotImplementedError

    def _check_bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None) -> None:
        self._check_open()
        check_sizes(self.name, self.inputs, sizes)
        known = {**self.inputs, **self.outputs}
        if share and not set(share) <= set(known):
            check_names(f"{self.name}: shared buffers", known, {**dict.fromkeys(known), **share})

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(
                self.name, found="a closed engine", wanted="an open one", cause="close() was called before",
                remedy="open the graph again",
            )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate on host arrays; the returned arrays are the caller's.

        Raises:
            EngineError: a missing or extra input, a wrong type or shape, or a failure of the engine.
        """
        self._check_open()
        feeds = {name: np.asarray(value) for name, value in feeds.items()}
        sizes = sizes_of(self.name, self.inputs, feeds)
        if self._last is None or self._last[0] != sizes:
            self._last = (sizes, self.bind(sizes))
        binding = self._last[1]
        for name, value in feeds.items():
            binding.inputs[name].upload(value)
        binding.run()
        return {name: buffer.download() for name, buffer in binding.outputs.items()}

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._last = None
            self._release()

    def _release(self) -> None:
        """Free what the backend holds."""
