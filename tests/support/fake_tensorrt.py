"""A stand-in for TensorRT's runtime and for a CUDA device: addresses are host memory, plans are little JSON programs.

It lets everything of `trt_engine` run that is not a call into the real libraries.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.host_kernels import host_kernels, launch

from quantempo.engines.device_math import SOURCE


class FakeDevice:
    """A device whose memory is the host's, and whose kernels are compiled for the host.

    Kernels and copies are queued until something in the same stream waits.  `log` holds what was asked about graphs;
    `kernels`, `uploads` and `downloads` what was launched and how many bytes went over.
    """

    def __init__(self, capability: str = "8.9") -> None:
        self.capability, self.name = capability, "a fake device"
        self.memory: dict[int, Any] = {}
        self.log: list[str] = []
        self.kernels: list[str] = []
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.queue: list[Callable[[], Any]] = []

    def stream(self) -> int:
        return 7

    def destroy_stream(self, stream: int) -> None:
        assert stream == 7
        self.log.append("destroy stream")

    def wait(self, stream: int) -> None:
        assert stream == 7
        queued, self.queue = self.queue, []
        for work in queued:
            work()

    def allocate(self, size: int) -> int:
        block = (ctypes.c_uint8 * max(1, size))()
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        self.wait(7)
        del self.memory[address]

    def upload(self, address: int, values: np.ndarray, stream: int) -> None:
        self.wait(stream)
        self.uploads.append(values.nbytes)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def download(self, values: np.ndarray, address: int, stream: int) -> None:
        self.wait(stream)
        self.downloads.append(values.nbytes)
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        assert stream == 7
        self.queue.append(lambda: ctypes.memmove(to, source, size))

    def prepare(self, source: str) -> None:
        assert source == SOURCE
        host_kernels()
        self.log.append("prepare")

    def launch(self, source: str, kernel: str, count: int, arguments: Sequence[Any], stream: int) -> None:
        assert stream == 7
        self.kernels.append(kernel)
        self.queue.append(lambda: launch(source, kernel, count, arguments))

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        return work

    def launch_graph(self, graph: Callable[[], None], stream: int) -> None:
        self.log.append("launch")
        graph()

    def destroy_graph(self, graph: Callable[[], None]) -> None:
        self.log.append("destroy")

    def view(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        count = int(np.prod(shape))
        raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


Compute = Callable[[dict[str, np.ndarray]], np.ndarray]
TYPES = {"sample": "float32", "timestep": "float32", "scale_group": "int64", "class_labels": "int64"}


class _Context:
    """Computes `prediction = sample * factor + scale_group`, or what it is given to compute.

    `refuses` names what fails.
    """

    def __init__(self, device: FakeDevice, factor: float, compute: Compute | None, refuses: Collection[str]) -> None:
        self.device, self.factor, self.compute, self.refuses = device, factor, compute, refuses
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.calls = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return "profile" not in self.refuses

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return "shape" not in self.refuses

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4) if "output" in self.refuses else self.shapes["sample"]

    def is_stream_capturable(self, stream: int) -> bool:
        return "capture" not in self.refuses

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return "address" not in self.refuses

    def execute_async_v3(self, stream: int) -> bool:
        self.device.wait(stream)
        self.calls += 1
        given = {n: self.device.view(self.addresses[n], s, TYPES[n]) for n, s in self.shapes.items()}
        made = self.compute(given) if self.compute else given["sample"] * self.factor + given["scale_group"]
        self.device.view(self.addresses["prediction"], self.shapes["sample"], "float32")[...] = made
        return self.factor != 0


class RuntimeConfig:
    """What TensorRT for RTX takes when a context is made."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: object = None

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self.cache = cache
        return True


class _Plan:
    def __init__(
        self, device: FakeDevice, factor: float, compute: Compute | None, library: FakeLibrary
    ) -> None:
        self.device, self.factor, self.compute, self.library = device, factor, compute, library

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig | None = None) -> _Context | None:
        self.library.configs.append(config)
        refuses = self.library.refuses
        return None if "context" in refuses else _Context(self.device, self.factor, self.compute, refuses)


class FakeLibrary:
    """What `trt_engine` uses of the module `tensorrt_rtx`, or, without `rtx`, of `tensorrt`."""

    def __init__(
        self, device: FakeDevice, version: str = "1.7.1.116", compute: Compute | None = None,
        refuses: Collection[str] = (), rtx: bool = True,
    ) -> None:
        self.__version__, self.refuses = version, refuses
        self.refitted: list[str] = []
        self.loaded: list[str] = []
        self.configs: list[RuntimeConfig | None] = []
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")
        library = self

        class ILogger:
            class Severity:
                ERROR, INTERNAL_ERROR = "error", "internal"

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def load_runtime(self, path: str) -> Runtime:
                library.loaded.append(path)
                return self

            def deserialize_cuda_engine(self, data: bytes) -> _Plan | None:
                if not data.startswith(b"{"):
                    self.logger.log("error", "magic tag does not match")
                    return None
                return _Plan(device, float(json.loads(data)["factor"]), compute, library)

        class Refitter:
            def __init__(self, plan: _Plan, logger: Any) -> None:
                self.complete = False

            def refit_cuda_engine(self) -> bool:
                return self.complete

        class OnnxParserRefitter:
            def __init__(self, refitter: Refitter, logger: Any) -> None:
                self.refitter = refitter

            def refit_from_file(self, path: str) -> bool:
                library.refitted.append(path)
                self.refitter.complete = True
                return True

        self.ILogger, self.Runtime, self.Refitter = ILogger, Runtime, Refitter
        self.OnnxParserRefitter = OnnxParserRefitter
