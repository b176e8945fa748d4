"""Hard-case mining: a second round of calibration that draws more of what the first round quantizes worst.

Every calibration sample is run again, by the float graph and by the graph that the first round gives; its error is the
mean squared difference of the final latents.  The conditions (label or arrays, guidance, program) of the samples with
the largest errors are run with fresh noise, and their statistics are added to those of the first round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.gram import GramCollector
from quantempo.calib.trajectories import ProgramChoice, TrajectoryBatch
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import FileEntry
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.session import Session
from quantempo.stages.calibration import (
    Calibration,
    Taps,
    calibration_stage,
    open_with_default,
    sample_request,
    trajectory_batches,
)
from quantempo.stages.dialects import lower_graphs
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries
from quantempo.stages.writing import GROUP_INPUT, graph_entry

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight

SECOND_ROUND = 500_000
"""Added to a hard sample's seed for its fresh noise; calibration seeds are far fewer."""


@dataclass(frozen=True, eq=False)
class FirstRound:
    """What the first round of calibration led to."""

    graph: Graph
    view: OpenBundle
    plan: QuantPlan
    taps: Taps
    calibration: Calibration
    calibrated: StageResult
    table: ScaleTable
    weights: Mapping[str, QuantizedWeight]
    keys: Sequence[str]


@dataclass(frozen=True)
class Found:
    """The error of each sample by batch, and the batches of the second round."""

    errors: tuple[tuple[float, ...], ...]
    hard: tuple[TrajectoryBatch, ...]


def second_round(
    store: StageStore, first: FirstRound, recipe: Recipe, arrays: Mapping[str, NDArray[Any]],
    programs: Mapping[ProgramChoice, StepProgram],
) -> tuple[Calibration, StageResult]:
    """The calibration of both rounds together, and the stage of the second one."""
    batches = trajectory_batches(first.view.manifest.denoiser, recipe, programs, arrays)

    def make(folder: Path, advance: Advance) -> None:
        errors = sample_errors(folder / "graphs", first, batches, recipe, arrays, programs, advance)
        hard = hard_batches(batches, errors, recipe.hard_cases)
        (folder / "found.json").write_text(canonical_json(Found(tuple(errors), hard)))

    mined = store.run("mine", {
        "first round": first.calibrated.key, "scales and weights": list(first.keys), "hard cases": recipe.hard_cases,
        "libraries": libraries("numpy", "onnxruntime"), "threads": recipe.threads,
        "code": code("quantempo.export", "quantempo.runtime", "quantempo.engines.ort", "quantempo.stages.mining"),
    }, make)  # fmt: skip
    where = mined.path("found.json")
    found = from_data(Found, parse_json(where.read_bytes(), str(where)), str(where))
    extra, result = calibration_stage(store, first.view, first.taps, recipe, arrays, programs, batches=found.hard)
    grams = GramCollector(first.taps.products if recipe.weight_method == "gptq" else ())
    grams.add(first.calibration.grams)
    grams.add(extra.grams)
    # What both rounds saw has a key of its own: the second one's does not say what the first one saw.
    both = dataclasses.replace(result, key=digest(first.calibrated.key + result.key)[: len(result.key)])
    return Calibration(first.calibration.statistics.merge(extra.statistics), grams), both


def sample_errors(
    folder: Path, first: FirstRound, batches: Sequence[TrajectoryBatch], recipe: Recipe,
    arrays: Mapping[str, NDArray[Any]], programs: Mapping[ProgramChoice, StepProgram], advance: Advance,
) -> list[tuple[float, ...]]:
    """The mean squared error of each sample's final latents, by batch."""
    options = EngineOptions(threads=recipe.threads)
    found = []
    quantized = quantized_view(folder, first)
    with (
        Session(quantized, open_with_default, options, "ort") as ours,
        Session(first.view, open_with_default, options) as reference,
    ):
        for index, batch in enumerate(batches):
            request = sample_request(batch, first.view.manifest.denoiser, arrays)
            latents = [s.sample(request, programs[batch.program], "latent").latents for s in (ours, reference)]
            difference = np.subtract(*latents, dtype=np.float64).reshape(len(batch.seeds), -1)
            found.append(tuple(float(error) for error in (difference**2).mean(axis=1)))
            advance(index + 1, len(batches))
    return found


def quantized_view(folder: Path, first: FirstRound) -> OpenBundle:
    """The quantized graph of the first round in a folder, as a bundle to run."""
    from quantempo.export.graph_files import write_graphs

    folder.mkdir()
    graphs = lower_graphs(first.graph, first.plan, first.table, first.weights, ("ort-f32",))
    (name, written), = write_graphs(folder, graphs).items()
    names = (written.file, *written.data)
    entry = graph_entry(name, graphs[name], written.file, written.data)
    denoiser = dataclasses.replace(first.view.manifest.denoiser, group_input=GROUP_INPUT)
    manifest = dataclasses.replace(
        first.view.manifest, precision="int8", denoiser=denoiser, partition=first.table.partition,
        files={file: FileEntry("", (folder / file).stat().st_size) for file in names},
        graphs={name: dataclasses.replace(entry, file=written.file, data=written.data)},
    )
    return OpenBundle(folder, manifest, "")


def hard_batches(
    batches: Sequence[TrajectoryBatch], errors: Sequence[Sequence[float]], count: int
) -> tuple[TrajectoryBatch, ...]:
    """Batches with the conditions of the `count` samples with the largest errors, on fresh noise.

    Samples of one batch stay together, since they share guidance and program.
    """
    ranked = sorted(
        ((error, b, row) for b, found in enumerate(errors) for row, error in enumerate(found)),
        key=lambda item: (-item[0], item[1], item[2]),
    )[:count]
    made: list[TrajectoryBatch] = []
    for b in sorted({b for _, b, _ in ranked}):
        rows = sorted(row for _, batch, row in ranked if batch == b)
        batch = batches[b]
        made.append(dataclasses.replace(
            batch, index=len(made), seeds=tuple(batch.seeds[row] + SECOND_ROUND for row in rows),
            labels=tuple(batch.labels[row] for row in rows) if batch.labels else (),
        ))  # fmt: skip
    return tuple(made)
