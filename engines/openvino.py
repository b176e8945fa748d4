"""OpenVINO on the CPU: float graphs and the `portable` dialect.

Buffers are numpy arrays that OpenVINO reads and writes in place.  A graph with symbolic sizes is compiled once per set
of bound sizes: with fixed shapes OpenVINO fuses the rescaling, the bias and the next quantizer into one kernel, which
it does not do with free ones (docs/openvino.md has the figures).
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from quantempo.contracts.engine import Buffer, EngineOptions, dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines import onnx_file
from quantempo.engines.cache import EngineCache, KeyParts, file_digest
from quantempo.engines.cpu import cpu_features
from quantempo.engines.host import HostBuffer, HostEngine, aligned_zeros, allocate
from quantempo.engines.onnx_graph import OnnxGraph
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.saturation import SaturationNotice, unsafe_reason
from quantempo.engines.simulation import SimulatedNotice, simulation_notice
from quantempo.engines.targets import require_version, target
from quantempo.errors import EngineError, MissingExtra, nearest

SETTINGS = {
    "precision": ("f32", "bf16", "f16", "auto"),
    "shapes": ("fixed", "free"),
    "streams": ("a number of at least 1",),
    "cache": ("a folder",),
}
"""What `EngineOptions.settings` may hold: the type of what is not quantized (`auto` is the narrowest float type that
the CPU computes natively), whether shapes are fixed at `bind`, parallel streams, and where compiled graphs are kept."""

DEFAULTS = {"precision": "f32", "shapes": "fixed", "streams": "1", "cache": ""}
INTEGERS = ("i8", "u8")
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
_FUSED = "Subgraph"
"""What attention becomes: its products, scaling and softmax in one kernel."""
_KEPT = 4
"""Compiled sizes that an engine remembers; bindings keep theirs alive themselves."""

_TYPES = {
    "f32": "float32", "f64": "float64", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "boolean": "bool",
}


@cache
def _openvino() -> Any:
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingExtra("engine 'openvino'", package="openvino", extra="openvino") from error
    return openvino


@contextmanager
def without_telemetry() -> Iterator[None]:
    """`import openvino` reports the import to its vendor unless its telemetry package cannot be imported."""
    name = "openvino_telemetry"
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = before  # type: ignore[assignment]


@cache
def _core() -> Any:
    return _openvino().Core()


def version() -> str:
    """The version of the installed library."""
    return str(_openvino().__version__)


def open_engine(graph: Path, options: EngineOptions) -> OpenVinoEngine:
    """Open an ONNX file.

    Raises:
        EngineError: OpenVINO refuses the graph (in its own words), an option is unknown, or the library is outside
            the range of the target `openvino`.
        UnsafePath: the graph refers to weights outside its folder, or through a link.
        MissingExtra: openvino is not installed.
    """
    require_version(target("openvino"), version())
    if not graph.is_file():
        raise EngineError(
            f"{graph}", found="no such file", wanted="an ONNX graph file", cause="a wrong path",
            remedy="look at the path again",
        )
    settings = _settings(graph, options)
    onnx_file.check_external_files(graph)
    if simulated := simulation_notice(graph):
        warnings.warn(f"{graph.name}: {simulated}", SimulatedNotice, stacklevel=3)
    if reason := unsafe_reason(graph, cpu_features()):
        warnings.warn(
            f"{graph.name}: OpenVINO has no mode that avoids saturation, results may be wrong ({reason}); "
            "use the engine 'ort'", SaturationNotice, stacklevel=3,
        )
    return OpenVinoEngine(graph, options, settings)


def key_parts(graph: Path, options: EngineOptions, sizes: Mapping[str, int] | None = None) -> KeyParts:
    """What a compiled graph depends on; `sizes` as for `bind`.

    Raises:
        EngineError: as `open_engine`.
    """
    engine = open_engine(graph, options)
    try:
        return engine.key_parts(sizes)
    finally:
        engine.close()


def executed_precisions(
    graph: Path, options: EngineOptions | None = None, sizes: Mapping[str, int] | None = None
) -> Counter[str]:
    """What OpenVINO really runs: how many operations of each type compute in which precision.

    Args:
        graph: an ONNX file.
        options: as for `open_engine`.
        sizes: of the symbolic dimensions; without them the graph is compiled with free shapes.

    Returns:
        Counts by `LAYER:PRECISION`, e.g. `FullyConnected:i8` or `Convolution:u8`.

    Raises:
        EngineError: as `open_engine`.
    """
    layers = _layers(graph, options or EngineOptions(), sizes)
    return Counter(f"{layer.kind}:{layer.precision}" for layer in layers if layer.kind not in ("Const", "Input"))


def integer_layers(
    graph: Path, options: EngineOptions | None = None, sizes: Mapping[str, int] | None = None
) -> frozenset[str]:
    """Names of the graph's nodes that went into products with integer activations; what the fusion gate judges.

    Raises:
        EngineError: as `open_engine`.
    """
    layers = _layers(graph, options or EngineOptions(), sizes)
    return frozenset(name for layer in layers if layer.multiplies_integers for name in (*layer.originals, layer.weight))


def sites_in_float(
    graph: Path, options: EngineOptions | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """The quantized products of a graph that OpenVINO computes in float after all; empty is what one wants.

    Raises:
        EngineError: as `open_engine`.
    """
    integer = integer_layers(graph, options, sizes)
    # OpenVINO names a fused layer after its parts, with suffixes such as `/DequantizationMultiply`.
    return tuple(
        node.name or node.outputs[0]
        for node in read_graph(graph).quantized_products()
        if not any(_stems_from(name, node.name or node.outputs[0]) for name in integer)
    )


def _stems_from(name: str, node: str) -> bool:
    return name == node or name.startswith(f"{node}/")


class _Layer:
    """One operation of the compiled graph."""

    def __init__(self, operation: Any) -> None:
        info = operation.get_rt_info()

        def word(key: str) -> str:
            return str(info[key].astype(str)) if key in info else ""

        self.kind, self.precision = word("layerType"), word("runtimePrecision")
        if self.kind in _PRODUCTS:
            # The runtime precision also says `i8` where only the weights are stored so; the activation decides.
            self.precision = _input_type(operation, 0)
        self.originals = tuple(word("originalLayersNames").split(",")) or (str(operation.get_friendly_name()),)
        # With one scale for all groups a product forgets its own name; its weight goes on as `NODE/transpose_b`.
        self.weight = _input_name(operation, 1) if self.kind == "FullyConnected" else ""
        both = operation.get_input_size() > 1 and {_input_type(operation, 0), _input_type(operation, 1)} <= {*INTEGERS}
        multiplies = self.kind in _PRODUCTS or (self.kind == _FUSED and both)
        self.multiplies_integers = multiplies and self.precision in INTEGERS


def _input_type(operation: Any, index: int) -> str:
    return str(operation.get_input_element_type(index).get_type_name())


def _input_name(operation: Any, index: int) -> str:
    if operation.get_input_size() <= index:
        return ""
    return str(operation.input(index).get_source_output().get_node().get_friendly_name())


def _layers(graph: Path, options: EngineOptions, sizes: Mapping[str, int] | None) -> list[_Layer]:
    engine = open_engine(graph, options)
    try:
        compiled = engine.compiled(sizes)
        return [_Layer(operation) for operation in compiled.get_runtime_model().get_ordered_ops()]
    finally:
        engine.close()


def _settings(graph: Path, options: EngineOptions) -> dict[str, str]:
    settings = {**DEFAULTS, **options.settings}
    for key, value in settings.items():
        legal = SETTINGS.get(key)
        if legal is None:
            raise _bad_setting(graph, f"{key}={value}", tuple(SETTINGS), nearest(key, SETTINGS))
        if key == "streams" and not (value.isdecimal() and int(value) >= 1):
            raise _bad_setting(graph, f"{key}={value}", legal, "pass a number")
        if key in ("precision", "shapes") and value not in legal:
            raise _bad_setting(graph, f"{key}={value}", legal, nearest(value, legal))
    return settings


def _bad_setting(graph: Path, found: str, legal: tuple[str, ...], remedy: str) -> EngineError:
    return EngineError(
        f"{graph.name}: settings", found=found, wanted=f"one of {', '.join(legal)}",
        cause="a setting of another engine, or a misspelling", remedy=remedy,
    )


def _refusal(where: str, wanted: str, error: Exception) -> EngineError:
    """An `EngineError` that quotes OpenVINO's own words."""
    return EngineError(
        where, found=f"{type(error).__name__}: {' '.join(str(error).split())}", wanted=wanted,
        cause="the graph and this version of OpenVINO do not fit, or the inputs are out of range",
        remedy="look at the message above; `pip list` shows the version of openvino",
    )


def native_precision() -> str:
    """The narrowest float type that this CPU computes natively: `bf16`, `f16` or `f32`."""
    able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return next((word.lower() for word in ("BF16", "FP16") if word in able), "f32").replace("fp16", "f16")


class OpenVinoEngine(HostEngine):
    """An ONNX graph opened by OpenVINO's CPU plugin."""

    def __init__(self, graph: Path, options: EngineOptions, settings: Mapping[str, str]) -> None:
        name = f"openvino {graph.name}"
        self.graph, self._options, self._settings = graph, options, settings
        onnx_file.check_written(graph, options.extra_outputs)
        try:
            self._model = _core().read_model(str(graph))
            added = [self._model.add_outputs(tap)[0] for tap in options.extra_outputs]
        except Exception as error:
            raise _refusal(name, "a graph that OpenVINO opens", error) from error
        structure = read_graph(graph)
        inputs = {n: _spec(name, p, structure, n) for p in self._model.inputs for n in [_name(p, structure)]}
        outputs = {n: _spec(name, _port(self._model, n), structure, n) for n in structure.outputs}
        for wanted, port in zip(options.extra_outputs, added, strict=True):
            outputs[wanted] = _spec(name, port, structure, wanted)
        super().__init__(name, inputs, outputs)
        self._compiled: OrderedDict[tuple[tuple[str, int], ...], Any] = OrderedDict()

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> OpenVinoBinding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        self._check_bind(sizes, share)
        return OpenVinoBinding(self, sizes, share)

    def compiled(self, sizes: Mapping[str, int] | None) -> Any:
        """The compiled graph for these sizes; with free shapes where sizes are `None` or the settings say so."""
        fixed = sizes is not None and self._settings["shapes"] == "fixed"
        key = tuple(sorted(sizes.items())) if sizes is not None and fixed else ()
        if key not in self._compiled:
            self._compiled[key] = self._compile(dict(key) if fixed else None)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def properties(self) -> dict[str, Any]:
        """What OpenVINO is asked for."""
        precision = self._settings["precision"]
        wanted: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": int(self._settings["streams"]),
            "INFERENCE_PRECISION_HINT": native_precision() if precision == "auto" else precision,
            # Otherwise the activations of layers with INT8 weights alone are quantized without being asked.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if self._options.threads:
            wanted["INFERENCE_NUM_THREADS"] = self._options.threads
        return wanted

    def _compile(self, sizes: Mapping[str, int] | None) -> Any:
        if not self._settings["cache"]:
            return self._build(sizes)
        cache_folder = EngineCache(Path(self._settings["cache"]))
        blob = cache_folder.get_or_build(
            self.key_parts(sizes), lambda: bytes(self._build(sizes).export_model().getvalue())
        )
        try:
            # The blob holds the state of the compiled graph; what is asked at load time is asked again.
            return _core().import_model(blob, "CPU", self.properties())
        except Exception as error:
            raise _refusal(self.name, "a compiled graph that OpenVINO loads", error) from error

    def key_parts(self, sizes: Mapping[str, int] | None) -> KeyParts:
        """What the compiled graph for these sizes depends on."""
        weights = {n: file_digest(self.graph.parent / n) for n in onnx_file.external_files(self.graph)}
        return KeyParts(
            graph=file_digest(self.graph), weights=weights,
            shapes={key: str(size) for key, size in (sizes or {}).items()},
            flags={
                **{key: str(value) for key, value in self.properties().items()},
                "extra_outputs": ",".join(self._options.extra_outputs),
            },
            backend="openvino", version=version(), device=cpu_features().fingerprint,
        )

    def _build(self, sizes: Mapping[str, int] | None) -> Any:
        model = self._model
        try:
            if sizes is not None and any(spec.resolve(dict(sizes)) != spec.shape for spec in self.inputs.values()):
                model = model.clone()
                model.reshape({name: list(spec.resolve(dict(sizes))) for name, spec in self.inputs.items()})
            return self._compile_model(model)
        except Exception as error:
            raise _refusal(self.name, "a graph that OpenVINO compiles", error) from error

    def _compile_model(self, model: Any) -> Any:
        """The compiled model; without OpenVINO's fusion of elementwise chains where that has too few registers."""
        try:
            return _core().compile_model(model, "CPU", self.properties())
        except RuntimeError as error:
            if "snippets" not in str(error):
                raise
            return _core().compile_model(model, "CPU", {**self.properties(), "SNIPPETS_MODE": "DISABLE"})

    def _release(self) -> None:
        self._compiled.clear()
        self._model = None


def _name(port: Any, structure: OnnxGraph) -> str:
    """An input's name in the file: one that is read through copies alone has the names of the copies too."""
    names = port.get_names()
    return next((name for name in structure.inputs if name in names), str(port.get_any_name()))


def _port(model: Any, name: str) -> Any:
    return next(port for port in model.outputs if name in port.get_names())


def _spec(where: str, port: Any, structure: OnnxGraph, name: str) -> TensorSpec:
    """The contract of a tensor: type as OpenVINO has it, free sizes as the file names them."""
    kind = port.get_element_type().get_type_name()
    if kind not in _TYPES:
        raise EngineError(
            f"{where}: tensor {name!r}", found=f"type {kind}", wanted=f"one of {', '.join(_TYPES.values())}",
            cause="numpy has no such type", remedy="cast to float32 inside the graph",
        )
    partial = port.get_partial_shape()
    found = [None if d.is_dynamic else d.get_length() for d in partial] if partial.rank.is_static else []
    named = structure.shape(name) or ()
    if len(named) != len(found):
        named = tuple(f"{name}.{i}" for i in range(len(found)))
    # An unnamed dimension gets a name of its own, so that it never equals another one by accident.
    shape = tuple(
        size if size is not None else word if isinstance(word, str) else f"{name}.{i}"
        for i, (size, word) in enumerate(zip(found, named, strict=True))
    )
    return TensorSpec(name, _TYPES[kind], shape)


class OpenVinoBinding:
    """Memory for one set of shapes, bound once."""

    def __init__(self, engine: OpenVinoEngine, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None) -> None:
        self._engine = engine
        tensor = _openvino().Tensor
        compiled = engine.compiled(sizes)
        self._request = compiled.create_infer_request()
        inputs = allocate(engine.name, engine.inputs, sizes, share)
        # OpenVINO does not hold a reference to the memory of a shared tensor; the binding's buffers do.
        for name, buffer in inputs.items():
            self._request.set_tensor(name, tensor(buffer.memory, shared_memory=True))
        known = {n: s for n, s in engine.outputs.items() if all(isinstance(d, int) or d in sizes for d in s.shape)}
        outputs = allocate(engine.name, known, sizes, share)
        unknown = [name for name in engine.outputs if name not in known]
        if unknown:
            outputs = {**outputs, **self._learn(unknown)}
        for name, buffer in outputs.items():
            self._request.set_tensor(name, tensor(buffer.memory, shared_memory=True))
        self.inputs: Mapping[str, Buffer] = dict(inputs)
        self.outputs: Mapping[str, Buffer] = {name: outputs[name] for name in engine.outputs}

    def _learn(self, names: list[str]) -> dict[str, HostBuffer]:
        """Shapes that do not follow from the inputs' symbols (inner tensors): run once on what the buffers hold."""
        self.run()
        found = {}
        for name in names:
            shape = tuple(self._request.get_tensor(name).shape)
            spec = self._engine.outputs[name]
            found[name] = HostBuffer(spec, aligned_zeros(shape, dtype_of(spec)), self._engine.name)
        return found

    def run(self) -> None:
        """Evaluate once, in place."""
        self._engine._check_open()
        try:
            self._request.infer()
        except Exception as error:
            raise _refusal(self._engine.name, "inputs that the graph can compute", error) from error
