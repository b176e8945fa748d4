"""Backends by name.  A new backend is one file in this folder and one line in the table below."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.engines.cache import KeyParts
from quantempo.errors import EngineError, MissingExtra, nearest


@dataclass(frozen=True)
class Backend:
    """Where a backend lives.

    Args:
        module: has a function `open_engine(graph, options)`.
        package: the library that must be importable; `None` where none is needed.
        extra: the extra of quantempo that installs it.
        dialects: the denoiser graphs that suit it, best first.
        compiles: whether it has the setting `cache` for what it makes of a graph.
        opener: name of the module's function; two backends of one module have different ones.
        holds: a file that the package must hold (a pattern from its folder), where not every build of it does.
        instead_of: a package that has to go before the extra is installed.
    """

    module: str
    package: str | None = None
    extra: str = ""
    dialects: tuple[str, ...] = ("ort", "portable", "unfold", "fp8", "float")
    compiles: bool = False
    opener: str = "open_engine"
    holds: str = ""
    instead_of: str = ""

    @property
    def installed(self) -> bool:
        """Whether the library can be imported (it is not imported to find out)."""
        if self.package is None:
            return True
        spec = importlib.util.find_spec(self.package)
        if spec is None or not self.holds:
            return spec is not None
        return any(any(Path(folder).glob(self.holds)) for folder in spec.submodule_search_locations or ())


_BACKENDS = {
    "echo": Backend("quantempo.engines.echo"),
    "openvino": Backend(
        "quantempo.engines.openvino", "openvino", "openvino", ("portable", "fp8", "float"), compiles=True
    ),
    "ort": Backend("quantempo.engines.ort", "onnxruntime", "cpu", compiles=True),
    "ort-cuda": Backend(
        "quantempo.engines.ort_gpu", "onnxruntime", "gpu", ("float", "portable", "unfold", "fp8"), opener="open_cuda",
        holds="capi/*onnxruntime_providers_cuda.*", instead_of="onnxruntime",
    ),
    "ort-rtx": Backend(
        "quantempo.engines.ort_gpu", "onnxruntime_ep_nv_tensorrt_rtx", "ort-rtx", ("fp8", "portable", "float"),
        opener="open_rtx",
    ),
    "ort-tensorrt": Backend(
        "quantempo.engines.ort_gpu", "onnxruntime", "gpu", ("fp8", "portable", "float"), opener="open_tensorrt",
        holds="capi/*onnxruntime_providers_tensorrt.*", instead_of="onnxruntime",
    ),
    "tensorrt": Backend("quantempo.engines.tensorrt", "tensorrt", "tensorrt", ("fp8", "portable", "float")),
    "tensorrt-rtx": Backend(
        "quantempo.engines.tensorrt", "tensorrt_rtx", "tensorrt-rtx", ("fp8", "portable", "float"),
        opener="open_rtx_engine",
    ),
}


def backends() -> tuple[str, ...]:
    """All backend names, installed or not."""
    return tuple(sorted(_BACKENDS))


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is there."""
    return tuple(name for name in backends() if _BACKENDS[name].installed)


def compiles(backend: str) -> bool:
    """Whether a backend has the setting `cache`; `False` for an unknown one."""
    known = _BACKENDS.get(backend)
    return known is not None and known.compiles


def preferred_dialect(backend: str, there: Iterable[str]) -> str | None:
    """The dialect that suits a backend best among those that a bundle has; `None` leaves the choice to the reader."""
    available = set(there)
    known = _BACKENDS.get(backend)
    return next((dialect for dialect in known.dialects if dialect in available), None) if known else None


def open_engine(backend: str, graph: Path, options: EngineOptions | None = None) -> Engine:
    """Open a graph file with a backend.

    Args:
        backend: a name among `backends()`.
        graph: the file; `.onnx`, or `.json` for `echo`.
        options: see `EngineOptions`.

    Raises:
        EngineError: unknown backend, or the engine refuses the graph (with the engine's own words).
        MissingExtra: the backend's library is not installed.
    """
    module = _module(backend)
    engine: Engine = getattr(module, _BACKENDS[backend].opener)(Path(graph), options or EngineOptions())
    return engine


def cache_key(
    backend: str, graph: Path, options: EngineOptions, sizes: Mapping[str, int] | None = None
) -> KeyParts | None:
    """What a compiled engine of this graph depends on; `None` for a backend that compiles nothing.

    Raises:
        EngineError, MissingExtra: as `open_engine`.
    """
    find = getattr(_module(backend), "key_parts", None)
    parts: KeyParts | None = find(Path(graph), options, sizes) if find is not None else None
    return parts


def _module(backend: str) -> ModuleType:
    known = _BACKENDS.get(backend)
    if known is None:
        raise EngineError(
            "engine", found=f"backend {backend!r}", wanted=f"one of {', '.join(backends())}",
            cause="a misspelling, or a backend of a newer version", remedy=nearest(backend, backends()),
        )
    if not known.installed:
        raise MissingExtra(
            f"engine {backend!r}", package=str(known.package).replace("_", "-") + ("-gpu" if known.holds else ""),
            extra=known.extra, instead_of=known.instead_of,
        )
    return importlib.import_module(known.module)
