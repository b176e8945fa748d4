"""Running the plans that `quantempo build` made: persistent device buffers, one CUDA graph per binding.

The library and the device are handed in, so that everything here that is not a call into them is tested without
either.  A binding holds one execution context, fixed shapes and fixed addresses; its first run is eager (the library
sets itself up then), the second is captured, and from then on a call is one graph launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Buffer, EngineOptions, dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.device_math import MOST_TERMS, DeviceMath
from quantempo.engines.host import HostEngine
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.shapes import check_array, shared_misfit, shown
from quantempo.engines.targets import parse_version
from quantempo.engines.trt_profiles import Profile, choose
from quantempo.engines.trt_record import (
    EngineRecord,
    bundle_of,
    choose_record,
    find_plan,
    load_plan,
    require_fit,
)
from quantempo.engines.trt_words import unknown_setting
from quantempo.errors import EngineError

Array = NDArray[Any]
SETTINGS = {
    "target": ("a target that was built",), "graphs": ("a kind that was built, e.g. portable-f16",),
    "cuda_graph": ("on", "off"), "registers": ("device", "host"), "lean_runtime": ("a file",),
}
"""What `EngineOptions.settings` may hold: whose engines to load, of which dialect and float type where several were
built, whether calls are captured as CUDA graphs, where registers and guidance are computed, and the lean runtime of the
version that built the plans, where another one is installed."""
_FREE = ("target", "graphs", "lean_runtime")


class Device(Protocol):
    """What a binding needs of a device; `quantempo.engines.cuda_device.CudaDevice` is one."""

    @property
    def capability(self) -> str:
        """Compute capability, e.g. `8.9`."""

    @property
    def name(self) -> str:
        """For people."""

    def stream(self) -> int:
        """A new stream."""

    def destroy_stream(self, stream: int) -> None:
        """Free a stream."""

    def wait(self, stream: int) -> None:
        """Wait for a stream."""

    def allocate(self, size: int) -> int:
        """Address of fresh memory."""

    def free(self, address: int) -> None:
        """Give it back."""

    def upload(self, address: int, values: Array, stream: int) -> None:
        """Host to device."""

    def download(self, values: Array, address: int, stream: int) -> None:
        """Device to host."""

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Within the device."""

    def prepare(self, source: str) -> None:
        """Compile kernels."""

    def launch(self, source: str, kernel: str, count: int, arguments: Sequence[Any], stream: int) -> None:
        """Queue a kernel."""

    def capture(self, stream: int, work: Any) -> Any:
        """A graph of what `work` queues."""

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Queue a graph."""

    def destroy_graph(self, graph: Any) -> None:
        """Free a graph."""


def open_plan(graph: Path, options: EngineOptions, library: str, trt: Any, device: Device | None = None) -> TrtEngine:
    """Open the plan of a bundle's graph.

    Args:
        graph: ONNX file in a bundle; its plan is looked up in `engines/`.
        options: see `SETTINGS`.
        library: `tensorrt` or `tensorrt_rtx`.
        trt: the library.
        device: by default the first GPU.

    Raises:
        EngineError: no plan, a plan of another version, device or bundle, or no GPU.
        DigestMismatch: the plan was damaged or exchanged.
    """
    if not graph.is_file():
        raise EngineError(
            str(graph), found="no such file", wanted="an ONNX graph file of a bundle", cause="a wrong path",
            remedy="look at the path again",
        )
    settings = {**dict.fromkeys(_FREE, ""), "cuda_graph": "on", "registers": "device", **options.settings}
    for key, value in settings.items():
        if key not in SETTINGS or (key not in _FREE and value not in SETTINGS[key]):
            raise unknown_setting(graph.name, f"{key}={value}", SETTINGS.get(key, tuple(SETTINGS)))
    if options.extra_outputs:
        raise EngineError(
            f"{graph.name}: extra output {options.extra_outputs[0]!r}", found="no such tensor in a compiled plan",
            wanted="outputs of the graph", cause="a plan has no inner tensors any more",
            remedy="calibrate with ONNX Runtime or OpenVINO",
        )
    bundle = bundle_of(graph)
    folder, record = choose_record(bundle, library, settings["target"], device.capability if device else None)
    require_fit(str(folder), record, str(trt.__version__), None, settings["lean_runtime"])
    name = find_plan(str(folder), record, graph.stem, settings["graphs"])
    data = load_plan(folder, record, name, bundle)
    if device is None:
        from quantempo.engines.cuda_device import CudaDevice

        device = CudaDevice.open()
    require_fit(str(folder), record, str(trt.__version__), device.capability, settings["lean_runtime"])
    return TrtEngine(trt, device, graph.parent / f"{name}.onnx", record, name, data, settings)


class TrtEngine(HostEngine):
    """One deserialized plan."""

    host = False

    def __init__(
        self, trt: Any, device: Device, graph: Path, record: EngineRecord, name: str, plan: bytes,
        settings: Mapping[str, str],
    ) -> None:
        structure = read_graph(graph)
        super().__init__(f"{record.backend} {name}", structure.inputs, structure.outputs)
        self.device, self.capture = device, settings["cuda_graph"] == "on"
        self._computes = settings["registers"] == "device"
        self.profiles: tuple[Profile, ...] = record.plans[name].profiles
        self.stream = device.stream()
        self._trt, self._runtime_cache = trt, None
        self._errors: list[str] = []
        self._runtime = trt.Runtime(_logger(trt, self._errors))
        if parse_version(record.library) != parse_version(str(trt.__version__)):
            self._runtime = self._runtime.load_runtime(settings["lean_runtime"])
            if self._runtime is None:
                raise self._failed(f"the lean runtime of {record.library}")
        self.plan: Any = self._runtime.deserialize_cuda_engine(plan)
        if self.plan is None:
            raise self._failed("a plan that the library loads")
        if record.plans[name].weights == "refit":
            self._refit(trt, graph)

    def _refit(self, trt: Any, graph: Path) -> None:
        refitter = trt.Refitter(self.plan, self._runtime.logger)
        parser = trt.OnnxParserRefitter(refitter, self._runtime.logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise self._failed("weights that fit the stripped plan")

    def _failed(self, wanted: str) -> EngineError:
        said = " ".join((self._errors[-1] if self._errors else "nothing").split())
        room = "memory" in said.lower()
        return EngineError(
            self.name, found=f"a refusal: {said}", wanted=wanted,
            cause="the device has too little free memory" if room
            else "the plan is for another device or library version",
            remedy="close what else uses the device, or run a smaller batch" if room
            else "run `quantempo build` on this device",
        )

    def context(self) -> Any:
        """A new execution context.

        TensorRT for RTX compiles kernels for the shapes of a context while it runs.  By default it does so in the
        background and runs general kernels meanwhile, and a CUDA graph that is captured then would keep those for good.
        Shapes are fixed here, so kernels are compiled at once, and one cache of them serves all contexts.
        """
        kinds = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            made = self.plan.create_execution_context()
        else:
            config = self.plan.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
            if self._runtime_cache is None:
                self._runtime_cache = config.create_runtime_cache()
            config.set_runtime_cache(self._runtime_cache)
            made = self.plan.create_execution_context(config)
        if made is None:
            raise self._failed("memory for an execution context")
        return made

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> TrtBinding:
        """See `quantempo.contracts.engine.Engine.bind`; sizes outside the profiles are refused."""
        self._check_bind(sizes, share)
        return TrtBinding(self, sizes, choose(self.name, self.profiles, sizes), share)

    @property
    def math(self) -> TrtMath | None:
        """Arithmetic on this engine's buffers, in its stream; `None` with the setting `registers=host`."""
        return TrtMath(self) if self._computes else None

    def _release(self) -> None:
        self.plan = None

    def __del__(self) -> None:
        # Bindings and buffers hold the engine, so nothing is queued in the stream any more.
        if hasattr(self, "stream"):
            self.device.destroy_stream(self.stream)


def _logger(trt: Any, errors: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(message)

    return Log()


class DeviceBuffer:
    """Device memory of one bound tensor."""

    def __init__(
        self, engine: TrtEngine, spec: TensorSpec, shape: tuple[int, ...], owner: DeviceBuffer | None = None,
        offset: int = 0,
    ) -> None:
        self.spec, self.shape = spec, shape
        self._engine, self._owner = engine, owner  # the owner lives as long as its memory is used
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype_of(spec).itemsize
        self.address: int = engine.device.allocate(self.nbytes) if owner is None else owner.address + offset

    def __del__(self) -> None:
        if self._owner is None and hasattr(self, "address"):
            self._engine.device.free(self.address)

    @property
    def array(self) -> Array:
        """Refused: the memory is on a device."""
        raise EngineError(
            f"{self._engine.name}: buffer {self.spec.name!r}", found="a request for host memory",
            wanted="upload or download", cause="this engine's buffers live on its device",
            remedy="look at Engine.host first",
        )

    def upload(self, values: Array) -> None:
        """Copy host values in; type and shape must be the buffer's."""
        check_array(self._engine.name, self.spec, values, self.shape)
        self._engine.device.upload(self.address, np.ascontiguousarray(values), self._engine.stream)

    def download(self) -> Array:
        """A copy that the caller owns."""
        values = np.empty(self.shape, dtype_of(self.spec))
        self._engine.device.download(values, self.address, self._engine.stream)
        return values


class TrtBinding:
    """An execution context with fixed shapes and addresses."""

    def __init__(
        self, engine: TrtEngine, sizes: Mapping[str, int], profile: int, share: Mapping[str, Buffer] | None
    ) -> None:
        self._engine = engine
        self._context = engine.context()
        self._set(self._context.set_optimization_profile_async(profile, engine.stream), f"profile {profile}")
        inputs = {
            name: _buffer(engine, spec, spec.resolve(dict(sizes)), share) for name, spec in engine.inputs.items()
        }
        for name, buffer in inputs.items():
            self._set(self._context.set_input_shape(name, buffer.shape), f"input {name!r} of {shown(buffer.shape)}")
        # An output may have a size that no input names; the engine knows it once its inputs are set.
        outputs = {
            name: _buffer(engine, spec, self._output_shape(name), share) for name, spec in engine.outputs.items()
        }
        for name, buffer in (*inputs.items(), *outputs.items()):
            self._set(self._context.set_tensor_address(name, buffer.address), f"memory for {name!r}")
        self.inputs: Mapping[str, Buffer] = dict(inputs)
        self.outputs: Mapping[str, Buffer] = dict(outputs)
        self._graph: Any = None
        self._runs = 0
        engine.device.wait(engine.stream)

    def _set(self, done: bool, wanted: str) -> None:
        """Every setter says whether it did."""
        if not done:
            raise self._engine._failed(wanted)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        self._set(min(shape, default=0) >= 0, f"a size for every dimension of {name!r}, not {shown(shape)}")
        return shape

    def run(self) -> None:
        """Evaluate once; returns when the outputs are readable."""
        self._engine._check_open()
        self.queue()
        self._engine.device.wait(self._engine.stream)

    def queue(self) -> None:
        """Evaluate once without waiting, in the engine's stream."""
        device, stream = self._engine.device, self._engine.stream
        if self._runs == 1 and self._engine.capture and self._capturable():
            self._graph = device.capture(stream, self._enqueue)
        self._runs += 1
        if self._graph is not None:
            device.launch_graph(self._graph, stream)
        else:
            self._enqueue()

    def _capturable(self) -> bool:
        """TensorRT for RTX knows whether a capture would hold everything that a call does; TensorRT's calls do."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._engine.stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._engine.stream):
            raise self._engine._failed("a call that runs")

    def __del__(self) -> None:
        if getattr(self, "_graph", None) is not None:
            self._engine.device.destroy_graph(self._graph)


def _buffer(
    engine: TrtEngine, spec: TensorSpec, shape: tuple[int, ...], share: Mapping[str, Buffer] | None
) -> DeviceBuffer:
    """A fresh buffer, or one at the address of another binding's."""
    other = (share or {}).get(spec.name)
    if other is None:
        return DeviceBuffer(engine, spec, shape)
    if not isinstance(other, DeviceBuffer) or other.shape != shape or other.spec.dtype != spec.dtype:
        raise shared_misfit(engine.name, spec, shape, other.spec.dtype, other.shape, "on the device")
    return DeviceBuffer(engine, spec, shape, other)


class TrtMath:
    """`quantempo.contracts.engine.BufferMath` over device buffers, in the stream of one engine."""

    most_terms = MOST_TERMS

    def __init__(self, engine: TrtEngine) -> None:
        self._engine = engine
        self._math = DeviceMath(engine.device, engine.stream)

    def prepare(self) -> None:
        """See `BufferMath.prepare`."""
        self._math.prepare()

    def allocate(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceBuffer:
        """See `BufferMath.allocate`."""
        return DeviceBuffer(self._engine, TensorSpec("register", dtype, shape), shape)

    def rows(self, buffer: Buffer, first: int, count: int) -> DeviceBuffer:
        """See `BufferMath.rows`."""
        owner = _on_device(buffer)
        shape = (count, *owner.shape[1:])
        return DeviceBuffer(self._engine, owner.spec, shape, owner, first * (owner.nbytes // owner.shape[0]))

    def copy(self, source: Buffer, out: Buffer) -> None:
        """See `BufferMath.copy`."""
        given = _on_device(source)
        self._engine.device.copy(_on_device(out).address, given.address, given.nbytes, self._engine.stream)

    def lin(self, terms: Sequence[tuple[Buffer, float]], out: Buffer) -> None:
        """See `BufferMath.lin`."""
        self._math.lin([(_on_device(b).address, weight) for b, weight in terms], _on_device(out).address, _count(out))

    def clamp(self, source: Buffer, low: float, high: float, out: Buffer) -> None:
        """See `BufferMath.clamp`."""
        self._math.clamp(_on_device(source).address, low, high, _on_device(out).address, _count(out))

    def correct(self, source: Buffer, gain: Buffer, bias: Buffer, out: Buffer) -> None:
        """See `BufferMath.correct`."""
        given, by, plus, to = (_on_device(each).address for each in (source, gain, bias, out))
        channels = out.shape[1]
        inner = _count(out) // (out.shape[0] * channels)
        self._math.correct(given, by, plus, channels, inner, to, _count(out))

    def guide(
        self, conditional: Buffer, unconditional: Buffer, null_rows: Buffer, scales: Buffer, rescale: float, out: Buffer
    ) -> None:
        """See `BufferMath.guide`."""
        given, null, rows, weights, to = (
            _on_device(each).address for each in (conditional, unconditional, null_rows, scales, out)
        )
        samples = out.shape[0]
        self._math.guide(given, null, rows, weights, to, (samples, _count(out) // samples), rescale)

    def wait(self) -> None:
        """See `BufferMath.wait`."""
        self._engine.device.wait(self._engine.stream)


def _on_device(buffer: Buffer) -> DeviceBuffer:
    if isinstance(buffer, DeviceBuffer):
        return buffer
    raise EngineError(
        f"device registers: buffer {buffer.spec.name!r}", found="memory of another engine",
        wanted="memory of the device",
        cause="graphs of one program were opened with different engines", remedy="open them all with one engine",
    )


def _count(buffer: Buffer) -> int:
    return int(np.prod(buffer.shape, dtype=np.int64))
