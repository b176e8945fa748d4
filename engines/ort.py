"""ONNX Runtime on the CPU.

Buffers are numpy arrays that ONNX Runtime reads and writes in place: `OrtValue.ortvalue_from_numpy` wraps host memory
without a copy and keeps it alive.  A binding is bound once; a call is one `run_with_iobinding`.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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

_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int16)": "int16", "tensor(int8)": "int8", "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64", "tensor(bool)": "bool",
}
_LEVELS = {
    "all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL",
}
_SWITCH = {"on": "0", "off": "1"}
SETTINGS = {
    "optimization": tuple(_LEVELS),
    "prepacking": tuple(_SWITCH),
    "spinning": ("on", "off"),
    "integers": ("auto", "fast", "precise"),
    "cache": ("a folder",),
    "arena": ("own", "shared"),
}
"""What `EngineOptions.settings` may hold, and the values: graph optimization level, packing of weights at load (faster,
one more copy in memory), whether idle threads spin (faster, but they burn a core), what happens to 8-bit weights on a
CPU whose integer products saturate (`auto` takes the precise mode there, with a notice), where optimized graphs are
kept (empty: nowhere), and whether the activations of all graphs that ask for it come from one pool of memory, which
suits graphs that run in turns (the pool stays when they are closed)."""

DEFAULTS = {
    "optimization": "all", "prepacking": "on", "spinning": "on", "integers": "auto", "cache": "", "arena": "own",
}
CPU = "CPUExecutionProvider"
PRECISE = "session.x64quantprecision"
OPTIMIZED, OPTIMIZED_WEIGHTS = "graph.onnx", "weights.bin"
"""Files of an entry in the engine cache."""


def library() -> Any:
    """The module onnxruntime.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("engine 'ort'", package="onnxruntime", extra="cpu") from error
    return onnxruntime


def open_engine(graph: Path, options: EngineOptions) -> OrtEngine:
    """Open an ONNX file.

    Extra outputs need no second file: the changed graph is handed over as bytes, and weight files are looked up in
    the folder of the original.

    Raises:
        EngineError: ONNX Runtime refuses the graph (in its own words), an option is unknown, or the library is outside
            the range of the target `cpu`.
        UnsafePath: the graph refers to weights outside its folder, or through a link.
        MissingExtra: onnxruntime is not installed.
    """
    require_version(target("cpu"), version())
    if not graph.is_file():
        raise EngineError(
            f"{graph}", found="no such file", wanted="an ONNX graph file", cause="a wrong path",
            remedy="look at the path again",
        )
    settings = _settings(graph, options)
    onnx_file.check_external_files(graph)
    if not settings["cache"]:
        return OrtEngine(graph, open_session(graph, options, session_options(settings, options.threads)))

    def build(folder: Path) -> None:
        save_optimized(graph, options, settings, folder)

    entry = EngineCache(Path(settings["cache"])).folder_for(_key_parts(graph, options, settings), build)
    # What was optimized is opened as it is: a hit costs no optimizer pass.
    configured = session_options({**settings, "optimization": "none"}, options.threads)
    return OrtEngine(graph, open_session(entry / OPTIMIZED, EngineOptions(), configured))


def version() -> str:
    """The version of the installed library."""
    return str(library().__version__)


def key_parts(graph: Path, options: EngineOptions, sizes: Mapping[str, int] | None = None) -> KeyParts:
    """What an optimized graph depends on; the sizes of symbolic dimensions do not matter here."""
    return _key_parts(graph, options, _settings(graph, options))


def _key_parts(graph: Path, options: EngineOptions, settings: Mapping[str, str]) -> KeyParts:
    weights = {name: file_digest(graph.parent / name) for name in onnx_file.external_files(graph)}
    return KeyParts(
        graph=file_digest(graph), weights=weights, backend="ort", version=version(),
        device=cpu_features().fingerprint,
        flags={
            "optimization": settings["optimization"], "integers": settings["integers"],
            "extra_outputs": ",".join(options.extra_outputs),
        },
    )


def save_optimized(graph: Path, options: EngineOptions, settings: Mapping[str, str], folder: Path) -> Path:
    """Let ONNX Runtime optimize a graph for this CPU and save the result in a folder.

    Raises:
        EngineError: as `open_engine`.
    """
    configured = session_options({**settings, "prepacking": "off"}, options.threads)
    saved = folder / OPTIMIZED
    configured.optimized_model_filepath = str(saved)
    # Weights go to a file of their own, so that a model above protobuf's 2 GiB can be saved too.
    configured.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", OPTIMIZED_WEIGHTS
    )
    configured.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    open_session(graph, options, configured)
    return saved


def executed_operators(graph: Path, options: EngineOptions | None = None) -> Counter[str]:
    """The operators that ONNX Runtime really runs, counted in the graph that it saves after its optimizations.

    Contrib operators are written `com.microsoft.Type`.

    Raises:
        EngineError: as `open_engine`.
    """
    options = options or EngineOptions()
    onnx_file.check_external_files(graph)
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        saved = read_graph(save_optimized(graph, options, _settings(graph, options), Path(folder)))
        return Counter(node.operator for node in saved.nodes)


def optimized_graph(graph: Path, options: EngineOptions | None = None) -> OnnxGraph:
    """The structure of the graph that ONNX Runtime really runs; what the fusion gate judges.

    Raises:
        EngineError: as `open_engine`.
    """
    options = options or EngineOptions()
    onnx_file.check_external_files(graph)
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        return read_graph(save_optimized(graph, options, _settings(graph, options), Path(folder)))


def _settings(graph: Path, options: EngineOptions) -> dict[str, str]:
    """All settings, with `integers` decided for this CPU; tells where that costs speed."""
    settings = {**DEFAULTS, **options.settings}
    for key, value in settings.items():
        if key not in SETTINGS or (key != "cache" and value not in SETTINGS[key]):
            legal = SETTINGS.get(key, tuple(SETTINGS))
            raise EngineError(
                f"{graph.name}: settings", found=f"{key}={value}", wanted=f"one of {', '.join(legal)}",
                cause="a setting of another engine, or a misspelling",
                remedy=nearest(value if key in SETTINGS else key, legal),
            )
    simulated = simulation_notice(graph)
    if simulated:
        warnings.warn(f"{graph.name}: {simulated}", SimulatedNotice, stacklevel=4)
        # Its fusions of quantizers make integer operators, which refuse FP8.
        if settings["optimization"] in ("all", "extended"):
            settings["optimization"] = "basic"
    if settings["integers"] == "auto":
        reason = unsafe_reason(graph, cpu_features())
        settings["integers"] = "precise" if reason else "fast"
        if reason:
            warnings.warn(
                f"{graph.name} runs in the precise mode of ONNX Runtime, which is slower: {reason}", SaturationNotice,
                stacklevel=4,
            )
    return settings


def session_options(settings: Mapping[str, str], threads: int) -> Any:
    """A `SessionOptions` object from all of `SETTINGS`."""
    ort = library()
    made = ort.SessionOptions()
    if settings["arena"] == "shared":
        _register_arena()
        made.add_session_config_entry("session.use_env_allocators", "1")
    if settings["integers"] == "precise":
        made.add_session_config_entry(PRECISE, "1")
    made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[settings["optimization"]])
    made.add_session_config_entry("session.disable_prepacking", _SWITCH[settings["prepacking"]])
    made.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings["spinning"] == "on" else "0")
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 3  # errors only: they come back as exceptions with the same words
    return made


@functools.cache
def _register_arena() -> None:
    """Give the process one arena for all sessions that want it; where another library did, theirs is used."""
    ort = library()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # ONNX Runtime's words for "there is one already"
        ort.create_and_register_allocator(place, None)


def open_session(graph: Path, options: EngineOptions, configured: Any, providers: Sequence[Any] = (CPU,)) -> Any:
    """An `InferenceSession`.

    Args:
        graph: ONNX file.
        options: for the extra outputs.
        configured: from `session_options`.
        providers: as ONNX Runtime takes them; empty where `configured` names devices.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    source: str | bytes = str(graph)
    if options.extra_outputs:
        source = onnx_file.with_outputs(graph, options.extra_outputs)
        configured.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.parent.resolve())
        )
    try:
        return library().InferenceSession(source, configured, providers=list(providers) or None)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this one
        raise refusal(f"ort {graph.name}", "a graph that ONNX Runtime opens", error) from error


def specs(where: str, nodes: Iterable[Any]) -> dict[str, TensorSpec]:
    """The contract of a session's inputs or outputs by name."""
    return {node.name: _spec(where, node) for node in nodes}


def refusal(where: str, wanted: str, error: Exception) -> EngineError:
    """An `EngineError` that quotes ONNX Runtime's own words."""
    return EngineError(
        where, found=f"{type(error).__name__}: {' '.join(str(error).split())}", wanted=wanted,
        cause="the graph and this version of ONNX Runtime do not fit, or the inputs are out of range",
        remedy="look at the message above; `pip list` shows the version of onnxruntime",
    )


def _spec(where: str, node: Any) -> TensorSpec:
    if node.type not in _TYPES:
        raise EngineError(
            f"{where}: tensor {node.name!r}", found=f"type {node.type}", wanted=f"one of {', '.join(_TYPES.values())}",
            cause="numpy has no such type", remedy="cast to float32 inside the graph",
        )
    # An unnamed dimension gets a name of its own, so that it never equals another one by accident.
    shape = tuple(d if isinstance(d, (int, str)) else f"{node.name}.{i}" for i, d in enumerate(node.shape))
    return TensorSpec(node.name, _TYPES[node.type], shape)


class OrtEngine(HostEngine):
    """An ONNX graph opened by ONNX Runtime's CPU provider."""

    def __init__(self, graph: Path, session: Any) -> None:
        name = f"ort {graph.name}"
        super().__init__(name, specs(name, session.get_inputs()), specs(name, session.get_outputs()))
        self._session = session

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> OrtBinding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        self._check_bind(sizes, share)
        return OrtBinding(self, sizes, share)

    def _release(self) -> None:
        self._session = None


class OrtBinding:
    """Memory for one set of shapes, bound once.

    Where an output's shape does not follow from the inputs' symbols (inner tensors as extra outputs), the graph runs
    once on zeros to learn it.
    """

    def __init__(self, engine: OrtEngine, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None) -> None:
        self._engine = engine
        self._ort = library()
        self._io = engine._session.io_binding()
        inputs = allocate(engine.name, engine.inputs, sizes, share)
        self._values = {name: self._ort.OrtValue.ortvalue_from_numpy(b.memory) for name, b in inputs.items()}
        for name, value in self._values.items():
            self._io.bind_ortvalue_input(name, value)
        known = {n: s for n, s in engine.outputs.items() if all(isinstance(d, int) or d in sizes for d in s.shape)}
        outputs = allocate(engine.name, known, sizes, share)
        if len(known) < len(engine.outputs):
            outputs = {**outputs, **self._learn(engine, [n for n in engine.outputs if n not in known])}
        for name in engine.outputs:
            self._values[name] = self._ort.OrtValue.ortvalue_from_numpy(outputs[name].memory)
            self._io.bind_ortvalue_output(name, self._values[name])
        self.inputs: Mapping[str, Buffer] = dict(inputs)
        self.outputs: Mapping[str, Buffer] = {name: outputs[name] for name in engine.outputs}

    def _learn(self, engine: OrtEngine, names: list[str]) -> dict[str, HostBuffer]:
        feeds = {name: np.zeros(self._values[name].shape(), dtype_of(s)) for name, s in engine.inputs.items()}
        try:
            arrays = engine._session.run(names, feeds)
        except Exception as error:
            wanted = "a graph that runs on zeros, to learn the shapes of its extra outputs"
            raise refusal(engine.name, wanted, error) from error
        return {
            name: HostBuffer(engine.outputs[name], aligned_zeros(a.shape, a.dtype), engine.name)
            for name, a in zip(names, arrays, strict=True)
        }

    def run(self) -> None:
        """Evaluate once, in place."""
        self._engine._check_open()
        try:
            self._engine._session.run_with_iobinding(self._io)
        except Exception as error:
            raise refusal(self._engine.name, "inputs that the graph can compute", error) from error
