"""TensorRT (10.3 and later) and TensorRT for RTX: one file, because both have the same interface.

Networks are strongly typed: every type stands in the ONNX graph, and no precision flag is set.  `build_here` makes a
plan in this process; `quantempo.engines.trt_process` calls it in a process of its own, because a refused build for
one compute capability leaves the library in a state in which the next build for another one fails.  `open_engine` runs
what `quantempo build` left in the bundle; it never builds.

TensorRT for RTX builds on a machine without a GPU, TensorRT does not.  Both need one to run.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from quantempo.contracts.engine import EngineOptions
from quantempo.engines import onnx_file
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.trt_profiles import Profile, input_shapes
from quantempo.engines.trt_record import Weights
from quantempo.engines.trt_words import ParserError, Tactics, build_failure, count_tactics, parser_refusal
from quantempo.errors import EngineError, MissingExtra

Library = Literal["tensorrt", "tensorrt_rtx"]
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_ERROR_LINES = 20
_OPTIONAL = ("EDITABLE_TIMING_CACHE",)
"""Builder flags that an older library may lack without harm."""


@dataclass(frozen=True)
class BuildJob:
    """What a plan is made from; plain data, so that it can be handed to another process.

    Args:
        library: which of the two builds.
        graph: ONNX file.
        plan: file to write.
        capability: compute capability, e.g. `8.9`; TensorRT builds for the device that it runs on.
        profiles: sizes, see `trt_profiles`.
        weights: `refit` leaves the weights out of the plan (STRIP_PLAN, REFIT_IDENTICAL); otherwise they are in it.
        memory_mib: limit of scratch memory; 0 for none.
        timing_cache: file of TensorRT's measurements, read and written; empty for none.
        level: builder optimization level; -1 for the library's own.
        version_compatible: let later versions of TensorRT run the plan, see `trt_record.version_loads`.
    """

    library: Library
    graph: str
    plan: str
    capability: str
    profiles: tuple[Profile, ...]
    weights: Weights = "plan"
    memory_mib: int = 0
    timing_cache: str = ""
    level: int = -1
    version_compatible: bool = False

    def flags(self) -> dict[str, str]:
        """What of it goes into the content key, next to graph, shapes and device."""
        stripped = "refit" if self.weights == "refit" else "plan"
        return {
            "level": str(self.level), "memory_mib": str(self.memory_mib), "stripped": stripped,
            "typing": "strong", "verbosity": "detailed", "version_compatible": str(self.version_compatible).lower(),
        }


@dataclass(frozen=True)
class Built:
    """What a build left behind, next to the plan.

    Args:
        library: version.
        seconds: parsing and building.
        size: bytes of the plan.
        tactics: see there.
        warnings: of the builder, without repetitions.
        inspector: JSON of the engine inspector; empty where no device could load the plan.
        device: what it was built on.
        reports: memory as the builder stated it, in bytes: weights, scratch, activations.
    """

    library: str
    seconds: float
    size: int
    tactics: Tactics = field(default_factory=Tactics)
    warnings: tuple[str, ...] = ()
    inspector: str = ""
    device: str = ""
    reports: Mapping[str, int] = field(default_factory=dict)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        backend = name.replace("_", "-")
        raise MissingExtra(f"engine {backend!r}", package=backend, extra=EXTRAS[name]) from error


def version(library: Library) -> str:
    """The installed version of a library.

    Raises:
        MissingExtra: it is not installed.
    """
    return str(_library(library).__version__)


def capabilities() -> tuple[str, ...]:
    """The compute capabilities that the installed TensorRT for RTX builds for without a device."""
    members = getattr(_library("tensorrt_rtx").ComputeCapability, "__members__", {})
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in members if re.fullmatch(r"SM\d+", name))


def build_here(job: BuildJob) -> Built:
    """Build a plan in this process and write it to `job.plan`.

    Raises:
        EngineError: the parser refuses the graph, or the builder fails.
        MissingExtra: the library is not installed.
    """
    trt, started = _library(job.library), time.perf_counter()
    graph, log = Path(job.graph), _logger(trt)
    where = f"{job.library} {graph.name}"
    onnx_file.check_external_files(graph)
    builder = _builder(trt, log, where)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = [ParserError(e.desc(), _call(e, "node_name"), _call(e, "node_operator")) for e in errors]
        raise parser_refusal(where, found, read_graph(graph))
    config = _config(trt, builder, job, where, log)
    inputs = read_graph(graph).inputs
    for profile in job.profiles:
        made = builder.create_optimization_profile()
        for name, (low, best, high) in input_shapes(inputs, profile).items():
            made.set_shape(name, low, best, high)
        config.add_optimization_profile(made)
    plan = builder.build_serialized_network(network, config)
    tactics = count_tactics(log.lines)
    if plan is None:
        memory = f"{job.memory_mib} MiB" if job.memory_mib else ""
        raise build_failure(where, log.errors, tactics, memory=memory, capability=job.capability)
    data = memoryview(plan)
    Path(job.plan).write_bytes(data)
    _save_timing_cache(config, job)
    return Built(
        str(trt.__version__), time.perf_counter() - started, data.nbytes, tactics,
        tuple(dict.fromkeys(log.warnings))[:_ERROR_LINES], _inspect(trt, log, job, data), _device_name(job),
        _memory_reports(log.lines),
    )


def _call(error: Any, name: str) -> str:
    """A word of a parser error; older versions lack some of them."""
    found = getattr(error, name, None)
    return str(found()) if callable(found) else ""


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # the library has no types
        """Keeps what later explains a failure: errors, warnings, and what the builder says of tactics and memory."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = trt.ILogger.Severity
            if severity in (level.ERROR, level.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == level.WARNING:
                self.warnings.append(message)
            if len(message) < 1000 and ("actic" in message or "emory" in message):
                self.lines.append(message)

    return Log()


def _builder(trt: Any, log: Any, where: str) -> Any:
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:
        # The bindings turn a null pointer into a TypeError.
        lines = [*log.errors, str(error)]
        raise build_failure(where, [*lines, "no CUDA-capable device"], Tactics(), memory="", capability="") from error


def _config(trt: Any, builder: Any, job: BuildJob, where: str, log: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.library == "tensorrt_rtx":
        name = "SM" + job.capability.replace(".", "")
        if name not in trt.ComputeCapability.__members__:
            raise EngineError(
                where, found=f"compute capability {job.capability}", wanted=f"one of {', '.join(capabilities())}",
                cause="TensorRT for RTX has no kernels for this GPU", remedy="use TensorRT on this device",
            )
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            raise build_failure(where, log.errors, Tactics(), memory="", capability=job.capability)
    for flag in _flags(job):
        if flag in trt.BuilderFlag.__members__:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        elif flag not in _OPTIONAL:
            raise EngineError(
                where, found=f"a request for {flag}", wanted="flags that the library has",
                cause=f"{job.library} {trt.__version__} is older than this option", remedy="leave the option out",
            )
    if job.memory_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.memory_mib << 20)
    if job.level >= 0:
        config.builder_optimization_level = job.level
    if job.timing_cache and job.library == "tensorrt":
        # TensorRT for RTX measures on the device at load time; its timing cache does nothing.
        path = Path(job.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return config


def _flags(job: BuildJob) -> tuple[str, ...]:
    """Builder flags; none of them is about precision, which stands in the graph."""
    flags: tuple[str, ...] = ()
    if job.weights == "refit":
        flags += ("STRIP_PLAN", "REFIT_IDENTICAL")
    if job.version_compatible:
        # The lean runtime inside the plan would be host code, which is not loaded from plans.
        flags += ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    if job.timing_cache and job.library == "tensorrt":
        flags += ("EDITABLE_TIMING_CACHE",)
    return flags


def _save_timing_cache(config: Any, job: BuildJob) -> None:
    if job.timing_cache and job.library == "tensorrt":
        cache = config.get_timing_cache()
        if cache is not None:
            Path(job.timing_cache).write_bytes(memoryview(cache.serialize()))


def _inspect(trt: Any, log: Any, job: BuildJob, plan: memoryview) -> str:
    """The engine inspector's JSON, which takes a device; TensorRT for RTX leaves its kernel list in the plan."""
    if job.library != "tensorrt":
        return ""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _device_name(job: BuildJob) -> str:
    if job.library != "tensorrt":
        return ""
    from quantempo.engines.cuda_device import CudaDevice

    try:
        return CudaDevice.open().name
    except MissingExtra:
        return ""  # a Jetson's own TensorRT comes without cuda-python; building does not need it


_MEMORY = re.compile(r"(Total Weights Memory|Max Scratch Memory|Total Activation Memory): (\d+) bytes")


def _memory_reports(lines: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        for name, count in _MEMORY.findall(line):
            word = name.split()[1].lower()
            found[word] = max(int(count), found.get(word, 0))
    return found


def _open(graph: Path, options: EngineOptions, library: Library) -> Any:
    from quantempo.engines.trt_engine import open_plan

    return open_plan(graph, options, library, _library(library))


open_engine = partial(_open, library="tensorrt")
open_rtx_engine = partial(_open, library="tensorrt_rtx")
