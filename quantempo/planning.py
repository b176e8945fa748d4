"""What a compile would do and cost, written down before it is done."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.gram import MAX_CHANNELS, panels_of
from quantempo.contracts.codec import canonical_json, to_data
from quantempo.contracts.engine import EngineOptions, dtype_of
from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.engines.registry import open_engine
from quantempo.errors import OutputExists
from quantempo.progress import Progress, SilentProgress
from quantempo.recipe import Recipe
from quantempo.stages.calibration import ENGINE, LARGE_BYTES, Taps, trajectory_batches
from quantempo.stages.model import Exported, export_model, open_model, plan_stage
from quantempo.stages.programs import calibration_programs
from quantempo.stages.store import StageRun, open_store

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph

BASE_BYTES = 450_000_000
"""Anonymous memory of a process that has imported torch, diffusers and the engine."""
CELL_BYTES = 2600
"""A cell of the statistics: a histogram of up to 512 counts in memory, and its sums."""
WORKING_SHARE = 1.5
"""Memory of a call with taps, over the tapped tensors: they are held while other values come and go, and copied."""
PROBE_ROWS = 2


@dataclass(frozen=True)
class Predictions:
    """What the compile will take; what it then takes will differ.

    Args:
        calls: denoiser calls of calibration.
        rows: rows of all of them together; guidance above 1 doubles a call's rows.
        calibration_seconds: of calibration alone, from a timed call of two rows on this machine.  Tracing (which a plan
            has done already), the rounding of weights, writing and the latency guard come on top.
        memory_bytes: peak anonymous memory up to the writing; pages of weight files that are mapped do not count.
        bundle_bytes: the bundle with its reference, where the recipe asks for one.
        work_bytes: results of stages.
    """

    calls: int
    rows: int
    calibration_seconds: float
    memory_bytes: int
    bundle_bytes: int
    work_bytes: int


@dataclass(frozen=True)
class PlanSummary:
    """A plan that was written."""

    path: Path
    plan: QuantPlan
    predictions: Predictions
    stages: tuple[StageRun, ...]

    def text(self) -> str:
        """Sites kept by reason, and the predictions."""
        reasons = Counter(d.reason for d in self.plan.decisions.values() if isinstance(d, Keep))
        p = self.predictions
        lines = [
            f"{len(self.plan.quantized())} of {len(self.plan.sites)} sites will be quantized",
            *(f"  kept: {count:3}  {reason}" for reason, count in sorted(reasons.items())),
            *(f"  kept in graphs {dialect}-*: {len(kept)}" for dialect, kept in sorted(self.plan.dialects.items())),
            f"calibration: {p.calls} calls, {p.rows} rows, about {_minutes(p.calibration_seconds)}; not counted: the "
            "rounding of weights, writing, the latency guard",
            f"memory: about {p.memory_bytes / 1e9:.1f} GB; disk: bundle {p.bundle_bytes / 1e6:.0f} MB, "
            f"results of stages {p.work_bytes / 1e6:.0f} MB",
            f"wrote {self.path}; edit it, then: quantempo compile MODEL --plan {self.path} -o OUT",
        ]
        return "\n".join(lines)


def write_plan(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    scheduler: Path | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    work: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PlanSummary:
    """Trace a model, decide for every site, and write the plan with predictions; nothing is calibrated.

    The traces are kept for the compile.  Arguments are those of `quantempo.pipeline.compile_model`.

    Raises:
        OutputExists: `out` is taken.
        QuantempoError: bad input.
    """
    recipe, progress, out = recipe or Recipe(), progress or SilentProgress(), Path(out)
    if out.exists() and not overwrite:
        raise OutputExists(
            f"plan {out}", found="an existing file", wanted="a free path", cause="an earlier run wrote it",
            remedy="choose another path or pass --overwrite",
        )
    opened = open_model(Path(model), scheduler, recipe, arrays or {})
    with open_store(work, progress) as store:
        exported = export_model(opened, store)
        plan, taps = plan_stage(store, exported, opened.recipe, None)
        with progress.stage("time a call"):
            predictions = predict(exported, plan, taps, opened.recipe, opened.arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(canonical_json({**to_data(plan), "predictions": dataclasses.asdict(predictions)}))
    return PlanSummary(out, plan, predictions, tuple(store.runs))


def predict(
    exported: Exported, plan: QuantPlan, taps: Taps, recipe: Recipe, arrays: Mapping[str, NDArray[Any]]
) -> Predictions:
    """Time, memory and disk of a compile of this plan."""
    programs = calibration_programs(recipe, exported.program, exported.boundary)
    calls = rows = 0
    keys: set[float] = set()
    batches = trajectory_batches(exported.denoiser, recipe, programs, arrays)
    for batch in batches:
        program = programs[batch.program]
        keys.update(call.key for call in program.calls)
        calls += len(program.calls)
        rows += len(program.calls) * len(batch.seeds) * (2 if batch.guidance > 1 else 1)
    weights, decoder = graph_bytes(exported.graph), 0
    experts = 1 if exported.second is None else 2
    if exported.decoder_graph is not None:
        decoder = graph_bytes(exported.decoder_graph)
    grams = gram_bytes(plan, taps) if recipe.weight_method == "gptq" else 0
    statistics = CELL_BYTES * len(keys) * len(taps.observed)
    quantized = {site.weight: site.n * site.k for site in plan.quantized()}
    integers, scales = sum(quantized.values()), 4 * sum(s.n for s in plan.quantized())
    programs_bytes = sum(path.stat().st_size for path in exported.programs.values())
    bundle = weights - 3 * integers + scales + decoder + programs_bytes
    if recipe.reference:
        bundle += weights + decoder + programs_bytes + statistics
    most = max(len(b.seeds) * (2 if b.guidance > 1 else 1) for b in batches)
    # Large weights are read where they lie in their file; of small ones the engine has a packed copy.
    packed = 0 if experts * weights > LARGE_BYTES else experts * weights
    tapped = round(WORKING_SHARE * most * _tapped_bytes_per_row(exported.graph, taps))
    memory = BASE_BYTES + packed + grams + statistics + tapped
    return Predictions(
        calls, rows, round(rows * _seconds_per_row(exported, recipe), 3), memory,
        bundle, weights + decoder + programs_bytes + grams + statistics + integers + scales,
    )


def gram_bytes(plan: QuantPlan, taps: Taps) -> int:
    """Bytes of the second moments of calibration: the upper triangles of their matrices, as panels."""
    products = {site.tensor: site.k for site in plan.sites if site.tensor in taps.products}
    return sum(8 * panels_of(k)[-1][1].stop for k in products.values() if k <= MAX_CHANNELS)


def graph_bytes(graph: Graph) -> int:
    """Bytes of a graph's weights."""
    return sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)


def _tapped_bytes_per_row(graph: Graph, taps: Taps) -> int:
    """Bytes of the tapped tensors for one row."""
    total, wanted = 0, set(taps.observed)
    for node in graph.graph:
        for value in node.outputs:
            if value.name in wanted and value.shape is not None:
                total += 4 * math.prod(d for d in value.shape if isinstance(d, int))
    return total


def _seconds_per_row(exported: Exported, recipe: Recipe) -> float:
    """Median of three calls after a warm one."""
    engine = open_engine(ENGINE, exported.graph_file, EngineOptions(threads=recipe.threads))
    try:
        feeds = {
            name: np.zeros([d if isinstance(d, int) else PROBE_ROWS for d in spec.shape], dtype_of(spec))
            for name, spec in engine.inputs.items()
        }
        times = []
        for _ in range(4):
            started = time.perf_counter()
            engine.run(feeds)
            times.append(time.perf_counter() - started)
        return sorted(times[1:])[1] / PROBE_ROWS
    finally:
        engine.close()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
