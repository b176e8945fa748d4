"""Why the engine cache has a bundle's compiled engines, or has them not."""

from __future__ import annotations

from pathlib import Path

from quantempo.devices.choosing import KIND, choice_key
from quantempo.devices.opening import AUTO, cache_folder, denoiser_graph, engine_options
from quantempo.engines.cache import EngineCache
from quantempo.engines.registry import cache_key
from quantempo.engines.shapes import symbols
from quantempo.errors import EngineError
from quantempo.runtime.bundle import read_bundle


def explain_cache(
    path: Path, engine: str = "ort", *, rows: int = 2, threads: int = 0, folder: Path | None = None
) -> str:
    """Hit or miss of every graph that an engine would open, the parts of its key, and what changed on a miss.

    Args:
        path: bundle directory.
        engine: backend, or `auto` for the remembered choice.
        rows: of a denoiser call, for engines that compile for fixed sizes.
        threads: engine threads.
        folder: of the cache; `None` for the usual place.

    Raises:
        EngineError: caching is switched off, the folder is open to others, or the backend compiles nothing.
    """
    bundle = read_bundle(path)
    place = cache_folder(folder if folder is not None else True)
    if place is None:
        raise EngineError(
            "engine cache", found="no folder", wanted="a cache to look into",
            cause="QUANTEMPO_CACHE is off, or the home folder is read-only", remedy="set QUANTEMPO_CACHE to a folder",
        )
    cache = EngineCache(place)
    if engine == AUTO:
        return f"{place}\n{KIND} of an engine: {cache.explain(choice_key(bundle, threads))}"
    dialect = denoiser_graph(engine, bundle).dialect
    decoder = bundle.manifest.decoder.graph
    options = engine_options(engine, threads, cache=place)
    lines = [str(place)]
    for name, entry in bundle.manifest.graphs.items():
        if entry.dialect != dialect and name != decoder:
            continue
        sizes = dict.fromkeys(symbols({spec.name: spec for spec in entry.inputs}), rows)
        parts = cache_key(engine, bundle.path(entry.file), options, sizes)
        if parts is None:
            raise EngineError(
                f"engine {engine!r}", found="nothing that is compiled", wanted="an engine that keeps what it makes",
                cause="this backend reads graphs as they are", remedy="choose ort or openvino",
            )
        lines.append(f"{name}: {cache.explain(parts)}")
    return "\n".join(lines)
