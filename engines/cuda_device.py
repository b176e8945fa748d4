"""A CUDA device through `cuda-python`: memory, copies, one stream, graphs, and kernels compiled at run time.

This is the only file that imports it.  Everything goes through one stream per engine, so that uploads, engine calls
and register operations keep their order without waiting for each other.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import EngineError, MissingExtra

Array = NDArray[Any]
_THREADS = 256


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise MissingExtra("a CUDA device", package="cuda-python", extra="tensorrt") from error


class CudaDevice:
    """The first visible GPU."""

    def __init__(self) -> None:
        self._runtime, self._driver = _bindings("runtime"), _bindings("driver")
        self._kernels: dict[tuple[str, str], Any] = {}
        self._modules: dict[str, Any] = {}
        count = self._count()
        if not count:
            raise EngineError(
                "CUDA device", found="no NVIDIA GPU that this process can use", wanted="a GPU and its driver",
                cause="the machine has none, or the driver is missing or older than the CUDA libraries",
                remedy="run on the device; `nvidia-smi` shows what the driver sees",
            )
        self.check(self._runtime.cudaSetDevice(0))

    @staticmethod
    def open() -> CudaDevice:
        """The device.

        Raises:
            EngineError: there is none.
            MissingExtra: cuda-python is not installed.
        """
        return CudaDevice()

    def _count(self) -> int:
        status, count = self._runtime.cudaGetDeviceCount()
        return int(count) if int(status) == 0 else 0

    def check(self, result: tuple[Any, ...]) -> Any:
        """What a call returned, without its status.

        Raises:
            EngineError: the status is an error; CUDA's own word for it is quoted.
        """
        status, *values = result
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            room = "Memory" in name or "MEMORY" in name
            raise EngineError(
                "CUDA device", found=name, wanted="a call that succeeds",
                cause="the device is out of memory" if room else "a fault of the device, or of an earlier call",
                remedy="close other programs, or use a smaller batch" if room else "look at `nvidia-smi` and `dmesg`",
            )
        return values[0] if len(values) == 1 else tuple(values)

    @cached_property
    def capability(self) -> str:
        """Compute capability, e.g. `8.9`."""
        kinds = self._runtime.cudaDeviceAttr
        major, minor = (
            self.check(self._runtime.cudaDeviceGetAttribute(kind, 0))
            for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        )
        return f"{major}.{minor}"

    @cached_property
    def name(self) -> str:
        """The GPU's name."""
        raw = self.check(self._runtime.cudaGetDeviceProperties(0)).name
        return (raw.split(b"\0")[0].decode() if isinstance(raw, bytes) else str(raw)).strip()

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return int(self.check(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking)))

    def destroy_stream(self, stream: int) -> None:
        """Free a stream; what is queued in it is still done."""
        self.check(self._runtime.cudaStreamDestroy(stream))

    def wait(self, stream: int) -> None:
        """Wait until everything in a stream is done."""
        self.check(self._runtime.cudaStreamSynchronize(stream))

    def allocate(self, size: int) -> int:
        """Address of fresh memory, zeroed."""
        address = int(self.check(self._runtime.cudaMalloc(max(1, size))))
        self.check(self._runtime.cudaMemset(address, 0, max(1, size)))
        self.wait(0)  # zeros are written in the default stream, which others do not wait for
        return address

    def free(self, address: int) -> None:
        """Give memory back."""
        self.check(self._runtime.cudaFree(address))

    def upload(self, address: int, values: Array, stream: int) -> None:
        """Copy host values in, and wait: the caller may change them right after."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check(self._runtime.cudaMemcpyAsync(address, values.ctypes.data, values.nbytes, kind, stream))
        self.wait(stream)

    def download(self, values: Array, address: int, stream: int) -> None:
        """Fill a host array, after everything that was queued before."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check(self._runtime.cudaMemcpyAsync(values.ctypes.data, address, values.nbytes, kind, stream))
        self.wait(stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy within the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.check(self._runtime.cudaMemcpyAsync(to, source, size, kind, stream))

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """What `work` queues in a stream, as a graph that can be launched again and again."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check(runtime.cudaStreamBeginCapture(stream, mode))
        try:
            work()
        finally:
            graph = runtime.cudaStreamEndCapture(stream)
        made = self.check(graph)
        try:
            return self.check(runtime.cudaGraphInstantiate(made, 0))
        finally:
            runtime.cudaGraphDestroy(made)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Queue a captured graph."""
        self.check(self._runtime.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Free a captured graph."""
        self.check(self._runtime.cudaGraphExecDestroy(graph))

    def launch(self, source: str, kernel: str, count: int, arguments: Sequence[Any], stream: int) -> None:
        """Run a kernel of a CUDA source over `count` elements; compiled at the first use.

        Args:
            source: CUDA C++ with `extern "C"` kernels.
            kernel: name.
            count: elements, one thread each.
            arguments: ctypes values, in the kernel's order.
            stream: where it is queued.
        """
        function = self._function(source, kernel)
        cells = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        blocks = -(-count // _THREADS)
        self.check(
            self._driver.cuLaunchKernel(
                function, blocks, 1, 1, _THREADS, 1, 1, 0, stream, ctypes.addressof(cells), 0
            )
        )

    def prepare(self, source: str) -> None:
        """Compile a source and load it, unless that was done before; see `compile_cubin` for what it raises."""
        if source not in self._modules:
            binary = compile_cubin(source, "sm_" + self.capability.replace(".", ""))
            address = np.frombuffer(binary, np.uint8).ctypes.data
            self._modules[source] = self.check(self._driver.cuModuleLoadData(address))

    def _function(self, source: str, kernel: str) -> Any:
        self.prepare(source)
        if (source, kernel) not in self._kernels:
            module = self._modules[source]
            self._kernels[source, kernel] = self.check(self._driver.cuModuleGetFunction(module, kernel.encode()))
        return self._kernels[source, kernel]


def compile_cubin(source: str, architecture: str) -> bytes:
    """Machine code of a CUDA source; needs no GPU.

    Args:
        source: CUDA C++.
        architecture: e.g. `sm_89`.

    Raises:
        EngineError: the compiler's words.
        MissingExtra: cuda-python or NVRTC is not installed.
    """
    nvrtc = _bindings("nvrtc")
    try:
        status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"quantempo.cu", 0, [], [])
    except RuntimeError as error:  # the bindings are there, the library that they load is not
        raise MissingExtra("CUDA kernels", package="nvidia-cuda-nvrtc", extra="tensorrt") from error
    # No contraction: multiply and add round one after the other, as the step program defines it.
    options = [f"--gpu-architecture={architecture}".encode(), b"--fmad=false", b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise EngineError(
            "CUDA kernels", found=log.decode(errors="replace").strip() or str(status), wanted="kernels that compile",
            cause="this version of NVRTC does not know the device", remedy="install a newer nvidia-cuda-nvrtc",
        )
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    binary: bytes = b" " * size
    nvrtc.nvrtcGetCUBIN(program, binary)
    return binary
