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
from quantempo.engines.saturation import unsafe_reason
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.bundle import OpenBundle

ROWS = 2
"""Rows of the timed call: one guided sample."""
FAKE = ("echo",)
"""Backends that no model runs on."""
SATURATES = ("openvino",)
"""Backends that compute on the CPU and have no mode that avoids saturation."""
NARROW = {"precision": "auto"}
"""The setting of `auto` that lets float types be measured too."""
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
    only where one of them changed.  An engine on which the bundle's integers would saturate on this CPU is passed over.

    Args:
        bundle: verified.
        threads: engine threads.
        settings: `precision=auto` also times engines with the narrowest float type of this CPU for what is not
            quantized, which costs fidelity; other settings are not allowed here: a setting belongs to one engine.
        cache: see `quantempo.devices.opening.cache_folder`.
        timing: see there.

    Raises:
        EngineError: no engine runs the bundle.
        RequestError: settings were given.
    """
    narrow = dict(settings or {}) == NARROW
    if settings and not narrow:
        shown = ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
        raise RequestError(
            "engine 'auto'", found=f"settings {shown}", wanted="no settings, or precision=auto",
            cause="a setting belongs to one engine", remedy=f"name the engine: {' or '.join(candidates())}",
        )
    parts = choice_key(bundle, threads, narrow)

    def measured() -> bytes:
        return canonical_json(_measure(bundle, threads, cache, timing, narrow)).encode()

    folder = cache_folder(cache)
    text = EngineCache(folder).get_or_build(parts, measured) if folder is not None else measured()
    return from_data(Choice, parse_json(text, "remembered engine"), "remembered engine")


def engine_named(name: str, bundle: OpenBundle, threads: int = 0) -> str:
    """The backend that a name stands for: itself, or the fastest one for `auto`."""
    return chosen(choose_engine(bundle, threads=threads))[0] if name == AUTO else name


def chosen(choice: Choice) -> tuple[str, dict[str, str]]:
    """Backend and settings of the fastest candidate."""
    name, *pairs = choice.label.split(" ")
    return name, dict(pair.split("=", 1) for pair in pairs)


def choice_key(bundle: OpenBundle, threads: int, narrow: bool = False) -> KeyParts:
    """What a remembered choice depends on; `narrow` as `precision=auto` of `choose_engine`."""
    versions = library_versions(*candidates())
    return KeyParts(
        graph=bundle.digest, backend=KIND, device=cpu_features().fingerprint,
        version=", ".join(f"{name} {number}" for name, number in versions.items()),
        flags={"threads": str(threads), "rows": str(ROWS), **(NARROW if narrow else {})},
    )


def _measure(
    bundle: OpenBundle, threads: int, cache: bool | str | Path, timing: Timing | None, narrow: bool
) -> Choice:
    variants = []
    reasons = []
    for name in candidates():
        try:
            entry = denoiser_graph(name, bundle)
        except RequestError as error:
            reasons.append(str(error).split("\n")[0])
            continue
        feeds = example_feeds(bundle.manifest.denoiser, entry)
        for settings in ({}, *(_narrow_settings(name) if narrow else ())):
            label = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])
            opener = _opener(name, bundle.path(entry.file), threads, cache, settings)
            variants.append(Variant(label, name, opener, feeds))
    if not variants:
        raise EngineError(
            "choice of an engine", found="; ".join(reasons) or "no installed engine", wanted="an engine for the bundle",
            cause="no engine library is installed", remedy="run: pip install 'quantempo[cpu]'",
        )
    return pick_fastest(variants, timing)


def _narrow_settings(name: str) -> tuple[dict[str, str], ...]:
    """Further settings to time: the float type that the CPU computes natively, where the engine takes one."""
    if name != "openvino":
        return ()
    from quantempo.engines.openvino import native_precision

    kind = native_precision()
    return ({"precision": kind},) if kind != "f32" else ()


def _opener(name: str, graph: Path, threads: int, cache: bool | str | Path, settings: Mapping[str, str]) -> Any:
    def opened() -> Engine:
        reason = unsafe_reason(graph, cpu_features()) if name in SATURATES else ""
        if reason:
            raise EngineError(
                f"engine {name!r} on this CPU", found=reason, wanted="integers that it multiplies without loss",
                cause="the engine has no mode that avoids saturation", remedy="use the engine 'ort'",
            )
        return open_engine(name, graph, engine_options(name, threads, settings, cache))

    return opened
