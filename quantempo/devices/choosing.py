"""The fastest installed engine for a bundle on this machine, found by measuring and then remembered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.contracts.engine import Engine
from quantempo.contracts.manifest import Denoiser, GraphEntry
from quantempo.devices.opening import AUTO, cache_folder, denoiser_graph, engine_options
from quantempo.engines.cache import EngineCache, KeyParts
from quantempo.engines.cpu import cpu_features
from quantempo.engines.guard import Choice, Timing, Variant, library_versions, pick_fastest
from quantempo.engines.registry import installed_backends, open_engine
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.bundle import OpenBundle

ROWS = 2
"""Rows of the timed call: one guided sample."""
FAKE = ("echo",)
"""Backends that no model runs on."""
KIND = "choice"
"""What the cache key calls a remembered choice instead of a backend."""


def candidates() -> tuple[str, ...]:
    """The installed backends that run models, the one that wins ties first."""
    return tuple(sorted((name for name in installed_backends() if name not in FAKE), key=lambda name: name != "ort"))


def example_feeds(denoiser: Denoiser, entry: GraphEntry, rows: int = ROWS, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of a denoiser graph: normal samples and embeddings, a timestep in the middle, legal labels, group 0.

    Args:
        denoiser: of the manifest.
        entry: the graph.
        rows: size of the batch; every other free size is taken from `denoiser.arrays`, or is 1.
        seed: same seed, same inputs.
    """
    random = np.random.Generator(np.random.Philox(seed))
    labels = {item.name: item.count for item in denoiser.classes}
    feeds: dict[str, NDArray[Any]] = {}
    for spec in entry.inputs:
        sizes = [rows if i == 0 else d if isinstance(d, int) else 1 for i, d in enumerate(spec.shape)]
        if spec.name == denoiser.group_input:
            feeds[spec.name] = np.zeros(sizes, spec.dtype)
        elif spec.name == denoiser.timestep_input:
            feeds[spec.name] = np.full(sizes, 500.0, spec.dtype)
        elif spec.name in labels:
            feeds[spec.name] = random.integers(0, labels[spec.name], sizes).astype(spec.dtype)
        else:
            feeds[spec.name] = random.standard_normal(sizes).astype(spec.dtype)
    return feeds


def choose_engine(
    bundle: OpenBundle,
    *,
    threads: int = 0,
    settings: Mapping[str, str] | None = None,
    cache: bool | str | Path = True,
    timing: Timing | None = None,
) -> Choice:
    """Time the installed engines in alternation on this bundle and take the fastest.

    The verdict is kept in the engine cache, by bundle, CPU, library versions and threads; a later call measures again
    only where one of them changed.

    Args:
        bundle: verified.
        threads: engine threads.
        settings: not allowed here: a setting belongs to one engine.
        cache: see `quantempo.devices.opening.cache_folder`.
        timing: see there.

    Raises:
        EngineError: no engine runs the bundle.
        RequestError: settings were given.
    """
    if settings:
        raise RequestError(
            "engine 'auto'", found=f"settings {', '.join(sorted(settings))}", wanted="no settings",
            cause="a setting belongs to one engine", remedy=f"name the engine: {' or '.join(candidates())}",
        )
    parts = choice_key(bundle, threads)

    def measured() -> bytes:
        return canonical_json(_measure(bundle, threads, cache, timing)).encode()

    folder = cache_folder(cache)
    text = EngineCache(folder).get_or_build(parts, measured) if folder is not None else measured()
    return from_data(Choice, parse_json(text, "remembered engine"), "remembered engine")


def engine_named(name: str, bundle: OpenBundle, threads: int = 0) -> str:
    """The backend that a name stands for: itself, or the fastest one for `auto`."""
    return choose_engine(bundle, threads=threads).label if name == AUTO else name


def choice_key(bundle: OpenBundle, threads: int) -> KeyParts:
    """What a remembered choice depends on."""
    versions = library_versions(*candidates())
    return KeyParts(
        graph=bundle.digest, backend=KIND, device=cpu_features().fingerprint,
        version=", ".join(f"{name} {number}" for name, number in versions.items()),
        flags={"threads": str(threads), "rows": str(ROWS)},
    )


def _measure(bundle: OpenBundle, threads: int, cache: bool | str | Path, timing: Timing | None) -> Choice:
    variants = []
    reasons = []
    for name in candidates():
        try:
            entry = denoiser_graph(name, bundle)
        except RequestError as error:
            reasons.append(str(error).split("\n")[0])
            continue
        variants.append(
            Variant(name, name, _opener(name, bundle.path(entry.file), threads, cache),
                    example_feeds(bundle.manifest.denoiser, entry))
        )
    if not variants:
        raise EngineError(
            "choice of an engine", found="; ".join(reasons) or "no installed engine", wanted="an engine for the bundle",
            cause="no engine library is installed", remedy="run: pip install 'quantempo[cpu]'",
        )
    return pick_fastest(variants, timing)


def _opener(name: str, graph: Path, threads: int, cache: bool | str | Path) -> Any:
    def opened() -> Engine:
        return open_engine(name, graph, engine_options(name, threads, cache=cache))

    return opened
