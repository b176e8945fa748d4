"""ONNX Runtime on an NVIDIA GPU: its CUDA, TensorRT and TensorRT-RTX providers, as engines of their own.

`ort-cuda` and `ort-tensorrt` are part of the package `onnxruntime-gpu`, which takes the place of `onnxruntime`;
`ort-rtx` is a plug-in, `onnxruntime-ep-nv-tensorrt-rtx`, for either of them.  The providers compile a graph when it is
opened, or at its first call; the engines `tensorrt` and `tensorrt-rtx` run plans that were built, gated and checked
before.  The CUDA provider has no INT8 products that a quantized graph could use: it computes right numbers in float.

ONNX Runtime falls back to the CPU without a word where a provider does not start.  Here that is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Buffer, EngineOptions, dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines import onnx_file, ort
from quantempo.engines.cache import check_private
from quantempo.engines.host import HostEngine
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.shapes import check_array, shared_misfit
from quantempo.engines.trt_profiles import Profile, choose, complete, input_shapes, parse_profile
from quantempo.engines.trt_words import unknown_setting
from quantempo.errors import EngineError, MissingExtra

Array = NDArray[Any]
SETTINGS = {
    "device": ("an index",), "shapes": ("sizes, e.g. batch=1:2:8",), "cuda_graph": ("on", "off"),
    "cache": ("a folder",),
}
"""What `EngineOptions.settings` may hold: which GPU; the sizes that a compiling provider builds for (without it, those
of the first call, and every other size is another build); whether calls are captured as CUDA graphs; and where compiled
code is kept (empty: nowhere)."""
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Args:
        name: as ONNX Runtime calls it.
        prefix: of its options about shapes; empty where it compiles nothing.
        keep: its options for kept code, `{folder}` standing for the folder.
        graphs: its option for CUDA graphs.
        fallback: providers for the nodes that it does not take.
    """

    name: str
    prefix: str
    keep: Mapping[str, str] = field(default_factory=dict)
    graphs: str = "enable_cuda_graph"
    fallback: tuple[str, ...] = (ort.CPU,)


PROVIDERS = {
    "ort-cuda": Provider("CUDAExecutionProvider", ""),
    "ort-tensorrt": Provider(
        "TensorrtExecutionProvider", "trt",
        {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": "{folder}", "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": "{folder}",
        },
        "trt_cuda_graph_enable", ("CUDAExecutionProvider", ort.CPU),
    ),
    "ort-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "nv", {"nv_runtime_cache_path": "{folder}"}, "enable_cuda_graph",
    ),
}  # fmt: skip


def _open(graph: Path, options: EngineOptions, backend: str) -> OrtGpuEngine:
    settings = {"device": "0", "shapes": "", "cuda_graph": "off", "cache": "", **options.settings}
    provider = PROVIDERS[backend]
    _check_settings(graph, settings, provider)
    if not graph.is_file():
        raise EngineError(
            str(graph), found="no such file", wanted="an ONNX graph file", cause="a wrong path",
            remedy="look at the path again",
        )
    onnx_file.check_external_files(graph)
    profiles: tuple[Profile, ...] = ()
    if settings["shapes"]:
        profiles = complete(graph.name, read_graph(graph).inputs, [parse_profile(settings["shapes"])], {})
    chosen = provider_options(provider, settings, profiles, graph)
    configured = ort.session_options(ort.DEFAULTS | {"integers": "fast"}, options.threads)
    if backend == "ort-rtx":
        configured.add_provider_for_devices([_plugin_device(provider, int(settings["device"]))], chosen)
        session = ort.open_session(graph, options, configured, ())
    else:
        _require(provider)
        session = ort.open_session(graph, options, configured, [(provider.name, chosen), *provider.fallback])
    _require_started(backend, provider, session)
    # The plug-in's memory is not that of the package that it plugs into: its tensors stay on the host.
    memory = "cpu" if backend == "ort-rtx" else "cuda"
    return OrtGpuEngine(f"{backend} {graph.name}", session, profiles, memory, int(settings["device"]))


open_cuda = partial(_open, backend="ort-cuda")
open_tensorrt = partial(_open, backend="ort-tensorrt")
open_rtx = partial(_open, backend="ort-rtx")


def _check_settings(graph: Path, settings: Mapping[str, str], provider: Provider) -> None:
    for key, value in settings.items():
        known = SETTINGS.get(key)
        legal = value in known if known is not None and len(known) > 1 else known is not None
        if not legal or (key == "device" and not value.isdecimal()):
            raise unknown_setting(graph.name, f"{key}={value}", known or tuple(SETTINGS))
    for key in ("shapes", "cache"):
        if settings[key] and not provider.prefix:
            raise EngineError(
                f"{graph.name}: settings", found=f"{key}={settings[key]}", wanted=f"no {key}",
                cause=f"{provider.name} compiles nothing", remedy="leave it out, or take ort-tensorrt or ort-rtx",
            )
    if settings["cache"]:
        # What lies there is run as code.
        check_private(Path(settings["cache"]))


def provider_options(
    provider: Provider, settings: Mapping[str, str], profiles: tuple[Profile, ...], graph: Path
) -> dict[str, str]:
    """The provider's own options."""
    found = {"device_id": settings["device"]} if provider.name != PROVIDERS["ort-rtx"].name else {}
    if settings["cuda_graph"] == "on":
        found[provider.graphs] = "1"
    if settings["cache"]:
        found |= {key: value.format(folder=settings["cache"]) for key, value in provider.keep.items()}
    for profile in profiles:
        shapes = input_shapes(read_graph(graph).inputs, profile)
        for index, end in enumerate(("min", "opt", "max")):
            parts = (f"{name}:{'x'.join(map(str, ends[index]))}" for name, ends in shapes.items())
            found[f"{provider.prefix}_profile_{end}_shapes"] = ",".join(parts)
    return found


def _require(provider: Provider) -> None:
    """Refuse where the installed ONNX Runtime was built without a provider."""
    there = ort.library().get_available_providers()
    if provider.name not in there:
        raise EngineError(
            f"ONNX Runtime {ort.version()}", found=f"the providers {', '.join(there)}", wanted=provider.name,
            cause="the package for CPUs is installed; that for GPUs takes its place",
            remedy="run: pip uninstall -y onnxruntime && pip install 'quantempo[gpu]'",
        )


def _plugin_device(provider: Provider, index: int) -> Any:
    """Load the plug-in and find its GPU."""
    library = ort.library()
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise MissingExtra("engine 'ort-rtx'", package=PLUGIN.replace("_", "-"), extra="ort-rtx") from error
    if not any(device.ep_name == provider.name for device in library.get_ep_devices()):
        try:
            library.register_execution_provider_library(provider.name, plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this one
            raise EngineError(
                f"ONNX Runtime {ort.version()}, plug-in {plugin.__version__}", wanted="a plug-in that it loads",
                found=" ".join(str(error).split()), cause="the machine has no NVIDIA driver, or the plug-in needs "
                "another version of ONNX Runtime", remedy="look at `nvidia-smi`, and at the plug-in's requirements",
            ) from error
    devices = [device for device in library.get_ep_devices() if device.ep_name == provider.name]
    if index >= len(devices):
        raise EngineError(
            "ONNX Runtime's devices", found=f"{len(devices)} GPUs for {provider.name}", wanted=f"GPU {index}",
            cause="no GPU of the RTX line from Ampere on, or an index that is too high",
            remedy="choose another `device`, or the engine ort-tensorrt",
        )
    return devices[index]


def _require_started(backend: str, provider: Provider, session: Any) -> None:
    """Refuse a session that fell back to other providers."""
    there = session.get_providers()
    if provider.name not in there:
        raise EngineError(
            f"engine {backend!r}", found=f"a session on {', '.join(there)}", wanted=provider.name,
            cause="the provider did not start: no GPU, no driver, or CUDA, cuDNN or TensorRT libraries of another "
            "version than this ONNX Runtime was built for",
            remedy="import onnxruntime and call onnxruntime.print_debug_info(); it lists what it looked for",
        )


class OrtGpuEngine(HostEngine):
    """A graph opened by a GPU provider; its buffers are on the device unless `memory` is `cpu`."""

    host = False

    def __init__(
        self, name: str, session: Any, profiles: tuple[Profile, ...] = (), memory: str = "cuda", device: int = 0
    ) -> None:
        super().__init__(name, ort.specs(name, session.get_inputs()), ort.specs(name, session.get_outputs()))
        self.session, self.profiles = session, profiles
        self.memory, self.device = memory, device

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> OrtGpuBinding:
        """See `quantempo.contracts.engine.Engine.bind`; sizes outside the setting `shapes` are refused."""
        self._check_bind(sizes, share)
        if self.profiles:
            choose(self.name, self.profiles, sizes)
        return OrtGpuBinding(self, sizes, share)

    def _release(self) -> None:
        self.session = None


class OrtGpuBuffer:
    """A tensor that ONNX Runtime owns; several bindings may hold the same one."""

    def __init__(self, engine: OrtGpuEngine, spec: TensorSpec, shape: tuple[int, ...], value: Any = None) -> None:
        self.spec, self.shape = spec, shape
        self._where = engine.name
        if value is None:
            make = ort.library().OrtValue.ortvalue_from_shape_and_type
            value = make(list(shape), dtype_of(spec).type, engine.memory, engine.device)
            value.update_inplace(np.zeros(shape, dtype_of(spec)))
        self.value = value

    @property
    def array(self) -> Array:
        """Refused: the memory may be on a device."""
        raise EngineError(
            f"{self._where}: buffer {self.spec.name!r}", found="a request for host memory",
            wanted="upload or download", cause="this engine's buffers live on its device",
            remedy="look at Engine.host first",
        )

    def upload(self, values: Array) -> None:
        """Copy host values in; type and shape must be the buffer's."""
        check_array(self._where, self.spec, values, self.shape)
        self.value.update_inplace(np.ascontiguousarray(values))

    def download(self) -> Array:
        """A copy that the caller owns."""
        return np.array(self.value.numpy())


class OrtGpuBinding:
    """Memory for one set of shapes, bound once."""

    def __init__(self, engine: OrtGpuEngine, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None) -> None:
        self._engine = engine
        self._io = engine.session.io_binding()

        def buffers(specs: Mapping[str, TensorSpec]) -> dict[str, OrtGpuBuffer]:
            return {name: _buffer(engine, spec, spec.resolve(dict(sizes)), share) for name, spec in specs.items()}

        inputs, outputs = buffers(engine.inputs), buffers(engine.outputs)
        for name, buffer in inputs.items():
            self._io.bind_ortvalue_input(name, buffer.value)
        for name, buffer in outputs.items():
            self._io.bind_ortvalue_output(name, buffer.value)
        self.inputs: Mapping[str, Buffer] = dict(inputs)
        self.outputs: Mapping[str, Buffer] = dict(outputs)

    def run(self) -> None:
        """Evaluate once; returns when the outputs are readable."""
        self._engine._check_open()
        try:
            self._io.synchronize_inputs()
            self._engine.session.run_with_iobinding(self._io)
            self._io.synchronize_outputs()
        except Exception as error:
            raise ort.refusal(self._engine.name, "inputs that the graph can compute", error) from error


def _buffer(
    engine: OrtGpuEngine, spec: TensorSpec, shape: tuple[int, ...], share: Mapping[str, Buffer] | None
) -> OrtGpuBuffer:
    """A fresh buffer, or another binding's."""
    other = (share or {}).get(spec.name)
    if other is None:
        return OrtGpuBuffer(engine, spec, shape)
    if not isinstance(other, OrtGpuBuffer) or other.shape != shape or other.spec.dtype != spec.dtype:
        raise shared_misfit(engine.name, spec, shape, other.spec.dtype, other.shape, "of this engine")
    return OrtGpuBuffer(engine, spec, shape, other.value)
