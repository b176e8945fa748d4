"""Opens a bundle with an engine, with compiled engines kept in the user's cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import GraphEntry
from quantempo.engines.cache import EngineCache
from quantempo.engines.registry import compiles, preferred_dialect
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.session import DIALECTS

PLACE = "QUANTEMPO_CACHE"
"""Environment variable: the folder of the engine cache, or `off`."""
AUTO = "auto"
"""The engine name that stands for the fastest one on this machine."""
LARGEST = 16 << 30
"""Bytes that the engine cache keeps; beyond them, what was not used for longest goes."""


def cache_folder(cache: bool | str | Path = True) -> Path | None:
    """Where compiled engines are kept; `None` where they are not kept.

    A folder that is named (by the argument, or by the variable `QUANTEMPO_CACHE`) has to be usable.  The default place,
    `$XDG_CACHE_HOME/quantempo/engines` or `~/.cache/quantempo/engines`, may be missing on a read-only system: then
    nothing is kept.

    Args:
        cache: `False` for nowhere, a folder, or `True` for the usual place.

    Raises:
        EngineError: others can write to the folder, or it cannot be made.
    """
    named = os.environ.get(PLACE, "")
    if cache is False or (cache is True and named.lower() == "off"):
        return None
    if not isinstance(cache, bool):
        return EngineCache(Path(cache)).folder
    if named:
        return EngineCache(Path(named)).folder
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is invalid and has to be ignored (XDG base directory specification).
    place = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "quantempo" / "engines"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"compiled engines are not kept: {place} cannot be made ({error})", stacklevel=2)
        return None
    return EngineCache(place).folder


def engine_options(
    backend: str, threads: int = 0, settings: Mapping[str, str] | None = None, cache: bool | str | Path = True
) -> EngineOptions:
    """The options of a backend, with the cache folder where the backend has a use for it.

    Raises:
        EngineError: see `cache_folder`.
    """
    given = dict(settings or {})
    if compiles(backend) and "cache" not in given:
        folder = cache_folder(cache)
        if folder is not None:
            given["cache"] = str(folder)
    return EngineOptions(threads=threads, settings=given)


def bundle_dialect(backend: str, bundle: OpenBundle) -> str | None:
    """Which denoiser graphs of a bundle suit a backend best."""
    decoder = bundle.manifest.decoder.graph
    return preferred_dialect(backend, {g.dialect for n, g in bundle.manifest.graphs.items() if n != decoder})


def denoiser_graph(backend: str, bundle: OpenBundle, variant: str = "full") -> GraphEntry:
    """The denoiser graph that a backend runs.

    Raises:
        RequestError: the bundle has none for it.
    """
    dialect = bundle_dialect(backend, bundle)
    for entry in bundle.manifest.graphs.values():
        if entry.variant == variant and entry.dialect == dialect:
            return entry
    there = sorted({e.dialect for e in bundle.manifest.graphs.values() if e.variant == variant}, key=DIALECTS.index)
    raise RequestError(
        f"bundle {bundle.root}", found=f"graphs of the dialects {', '.join(there) or 'none'}",
        wanted=f"one that the engine {backend!r} reads", cause="it was compiled for other engines",
        remedy="choose another engine, or compile it again",
    )


def trim(folder: Path, keep_bytes: int = LARGEST) -> tuple[str, ...]:
    """Keep the cache below a size; returns the keys that went."""
    try:
        return EngineCache(folder).prune(keep_bytes)
    except (EngineError, OSError):
        return ()  # another process works on it; the next run tries again
