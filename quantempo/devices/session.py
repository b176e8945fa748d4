"""Opens a bundle with an engine that the caller names, or with the fastest one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.devices.choosing import choose_engine, chosen
from quantempo.devices.opening import AUTO, bundle_dialect, engine_options, trim
from quantempo.engines.registry import open_engine
from quantempo.runtime.bundle import read_bundle
from quantempo.runtime.session import Session


def open_session(
    path: str | Path,
    engine: str = "ort",
    threads: int = 0,
    dialect: str | None = None,
    settings: Mapping[str, str] | None = None,
    cache: bool | str | Path = True,
    feature_cache: str = "auto",
) -> Session:
    """Open a bundle; see `quantempo.load`."""
    bundle = read_bundle(path)
    given_settings = dict(settings or {})
    if engine == AUTO:
        engine, given_settings = chosen(choose_engine(bundle, threads=threads, settings=settings, cache=cache))
    if engine == "ort" and bundle.manifest.cache is not None:
        # The variants run in turns, so the activations of all can lie in the same memory.
        given_settings.setdefault("arena", "shared")
    options = engine_options(engine, threads, given_settings, cache)

    def opened(graph: Path, given: EngineOptions) -> Engine:
        return open_engine(engine, graph, given)

    session = Session(bundle, opened, options, dialect or bundle_dialect(engine, bundle), feature_cache)
    place = options.settings.get("cache", "")
    if place:
        trim(Path(place))
    return session
