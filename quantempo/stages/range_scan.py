"""The largest magnitude of inner tensors: what float16 can hold, and attention's scales.

What attention is quantized with by default is watched by the calibration proper (`Taps.ranges`) and costs no further
run.  A float16 graph asks for every tensor; then this scan keeps one number of each.  It runs few samples and steps,
and in parts, so that the taps of one part fit into memory.  What it misses is made up for by a margin: a quarter of
what float16 holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.contracts.codec import canonical_json, digest, parse_json
from quantempo.contracts.engine import Buffer, EngineOptions
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.errors import NonFiniteActivation
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session
from quantempo.stages.calibration import ENGINE, large_weights
from quantempo.stages.conditioning import arrays_digest
from quantempo.stages.store import StageStore
from quantempo.stages.versions import code, libraries

RANGES = "ranges.json"
SAMPLES = 2
STEPS = 8
TAPPED_BYTES = 1 << 30
"""Size of the tensors that are watched in one run."""


def ranges_stage(
    store: StageStore, bundle: OpenBundle, tensors: Mapping[str, int], program: StepProgram, recipe: Recipe,
    arrays: Mapping[str, NDArray[Any]], seen: StatsCollector,
) -> dict[str, float]:
    """The largest magnitude of each tensor: from the calibration, or else from a scan or its earlier result.

    Args:
        store: results of earlier scans.
        bundle: float.
        tensors: elements per row, by value name.
        program: the way to sample.
        recipe: guidance, classes, selection and threads.
        arrays: conditioning by input name.
        seen: what the calibration observed; where it looked at a part of the calls alone, it is not relied on.
    """
    known = seen.largest() if recipe.selection == "all" else {}
    missing = {name: size for name, size in tensors.items() if name not in known}
    found = {name: known[name] for name in tensors if name in known}
    if not missing:
        return found
    labels, guidance = scan_labels(bundle.manifest.denoiser, recipe), max(recipe.guidance)

    def make(folder: Path, advance: Advance) -> None:
        ranges = scan_ranges(bundle, missing, program, recipe, arrays, advance)
        (folder / RANGES).write_text(canonical_json(ranges))

    result = store.run("ranges", {
        "denoiser": bundle.manifest.provenance["float_graph"], "tensors": list(missing), "guidance": guidance,
        "labels": labels, "step program": digest(canonical_json(program)), "arrays": arrays_digest(arrays),
        "threads": recipe.threads, "libraries": libraries("numpy", "onnxruntime"),
        "code": code("quantempo.runtime", "quantempo.contracts", "quantempo.engines.ort", "quantempo.engines.host",
                     "quantempo.stages.range_scan"),
    }, make)  # fmt: skip
    where = result.path(RANGES)
    return {**found, **parse_json(where.read_bytes(), str(where))}


def scan_ranges(
    bundle: OpenBundle,
    tensors: Mapping[str, int],
    program: StepProgram,
    recipe: Recipe,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    advance: Advance | None = None,
) -> dict[str, float]:
    """Largest magnitude of each tensor over the calls of a few samples, at the recipe's largest guidance.

    Args:
        bundle: float.
        tensors: elements per row, by value name.
        program: the way to sample.
        recipe: guidance, classes and threads.
        arrays: conditioning by input name.
        advance: told the number of denoiser calls done and in all.

    Raises:
        NonFiniteActivation: a tensor held NaN or infinity; names tensor, timestep and seed.
    """
    found: dict[str, float] = {}
    request = _request(bundle.manifest.denoiser, recipe, arrays or {})
    parts, calls = tuple(_parts(tensors)), len(program.calls)
    for index, part in enumerate(parts):
        options = EngineOptions(threads=recipe.threads, extra_outputs=part, settings=large_weights(bundle))
        with Session(bundle, lambda path, given: open_engine(ENGINE, path, given), options) as session:

            def observe(
                seen: Observation, outputs: Mapping[str, Buffer], part: tuple[str, ...] = part, index: int = index
            ) -> None:
                for name in part:
                    found[name] = max(found.get(name, 0.0), _largest(name, seen, outputs[name].array))
                if advance is not None:
                    advance(index * calls + seen.index + 1, len(parts) * calls)

            session.sample(request, program, output_type="latent", observer=observe)
    return found


def _largest(name: str, seen: Observation, array: NDArray[Any]) -> float:
    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
    if not np.isfinite(largest):
        raise _non_finite(name, seen, array)
    return largest


def _non_finite(name: str, seen: Observation, array: NDArray[Any]) -> NonFiniteActivation:
    """Name the samples whose rows are not finite; an inner tensor may have other rows than the call."""
    guilty = sorted(set(seen.seeds))
    if array.ndim and len(array) == len(seen.seeds):
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        guilty = sorted({seed for seed, fine in zip(seen.seeds, finite, strict=True) if not fine})
    who = ("seed " if len(guilty) == 1 else "seeds ") + ", ".join(map(str, guilty))
    bad = array[~np.isfinite(array)]
    return NonFiniteActivation(
        f"range scan, tensor {name!r} at timestep {seen.call.key:g}, {who}",
        found=f"{'NaN' if np.isnan(bad).any() else 'infinity'} in {bad.size} of {array.size} values",
        wanted="finite activations", cause="the float model itself overflows or is damaged",
        remedy="sample this seed with the float model and look at this layer",
    )


def scan_steps(recipe: Recipe) -> int:
    """How many steps the scan's trajectories take, among those that were traced."""
    return min(STEPS, max(recipe.max_steps, 1))


def _parts(tensors: Mapping[str, int], budget: int = TAPPED_BYTES) -> Iterator[tuple[str, ...]]:
    """The names in parts of at most `budget` bytes; a tensor that is larger alone is a part of its own."""
    part: list[str] = []
    used = 0
    for name, elements in tensors.items():
        size = 2 * SAMPLES * 4 * elements  # both branches, float32
        if part and used + size > budget:
            yield tuple(part)
            part, used = [], 0
        part.append(name)
        used += size
    if part:
        yield tuple(part)


def scan_labels(denoiser: Denoiser, recipe: Recipe) -> list[int]:
    """The class of each sample that the scan runs; empty for a model without classes."""
    if not denoiser.classes:
        return []
    known = recipe.classes or tuple(range(denoiser.classes[0].count))
    return [known[(7 * index) % len(known)] for index in range(SAMPLES)]


def _request(denoiser: Denoiser, recipe: Recipe, arrays: Mapping[str, NDArray[Any]]) -> Request:
    given = {name: values[np.arange(SAMPLES) % len(values)] for name, values in arrays.items()}
    return Request(
        class_labels=scan_labels(denoiser, recipe) or None, guidance_scale=max(recipe.guidance),
        seed=list(range(SAMPLES)), batch_size=SAMPLES, arrays=given,
    )
