"""The largest magnitude of every inner tensor, over a few trajectories: what float16 can hold, and attention's scales.

Quantizers get their scales from the calibration proper, which keeps histograms of few tensors.  This scan keeps one
number of every tensor; it runs few samples and steps, and in parts, so that the taps of one part fit into memory.
What it misses is made up for by margins: a quarter of what float16 holds, an octave in FP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Buffer, EngineOptions
from quantempo.contracts.manifest import Denoiser
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.errors import NonFiniteActivation
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.loop import Observation
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session
from quantempo.stages.calibration import ENGINE, large_weights

SAMPLES = 2
STEPS = 8
TAPPED_BYTES = 1 << 30
"""Size of the tensors that are watched in one run."""


def scan_ranges(
    bundle: OpenBundle,
    tensors: Mapping[str, int],
    program: StepProgram,
    recipe: Recipe,
    arrays: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, float]:
    """Largest magnitude of each tensor over the calls of a few samples, at the recipe's largest guidance.

    Args:
        bundle: float.
        tensors: elements per row, by value name.
        program: the way to sample.
        recipe: guidance, seed and threads.
        arrays: conditioning by input name.

    Raises:
        NonFiniteActivation: a tensor held NaN or infinity.
    """
    found: dict[str, float] = {}
    request = _request(bundle.manifest.denoiser, recipe, arrays or {})
    for part in _parts(tensors):
        options = EngineOptions(threads=recipe.threads, extra_outputs=part, settings=large_weights(bundle))
        with Session(bundle, lambda path, given: open_engine(ENGINE, path, given), options) as session:

            def observe(seen: Observation, outputs: Mapping[str, Buffer], part: tuple[str, ...] = part) -> None:
                for name in part:
                    array = outputs[name].array
                    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
                    if not np.isfinite(largest):
                        raise NonFiniteActivation(
                            f"range scan, tensor {name!r}, timestep {seen.call.key:g}", found="NaN or infinity",
                            wanted="finite activations", cause="the float model itself overflows or is damaged",
                            remedy="run the float bundle and look at this layer",
                        )
                    found[name] = max(found.get(name, 0.0), largest)

            session.sample(request, program, output_type="latent", observer=observe)
    return found


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


def _request(denoiser: Denoiser, recipe: Recipe, arrays: Mapping[str, NDArray[Any]]) -> Request:
    labels: Iterable[int] = ()
    if denoiser.classes:
        known = recipe.classes or tuple(range(denoiser.classes[0].count))
        labels = [known[(7 * index) % len(known)] for index in range(SAMPLES)]
    given = {name: values[np.arange(SAMPLES) % len(values)] for name, values in arrays.items()}
    return Request(
        class_labels=list(labels) or None, guidance_scale=max(recipe.guidance), seed=list(range(SAMPLES)),
        batch_size=SAMPLES, arrays=given,
    )
