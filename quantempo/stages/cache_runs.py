"""Runs of a model's graph variants while a cache is fitted: float, quantized, and quantized with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.trajectories import FIRST_SEED, CalibrationSet, ProgramChoice, TrajectoryBatch, plan_batches
from quantempo.contracts.cache import FULL, PROBE, Cut, Probe, SublayerCut, correction_inputs
from quantempo.contracts.engine import Buffer, Engine, EngineOptions
from quantempo.contracts.manifest import Manifest
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.variants import Variant
from quantempo.engines.registry import open_engine
from quantempo.recipe import Recipe
from quantempo.runtime.guidance import UNCONDITIONAL
from quantempo.runtime.loop import Loop, LoopRequest, Observation, PredictionHook
from quantempo.runtime.request import Request, resolve
from quantempo.stages.calibration import ENGINE
from quantempo.stages.model import Exported
from quantempo.stages.teacher import TEACHER, ShownEngine, TaughtEngine

if TYPE_CHECKING:
    from quantempo.export.variants import VariantSet
    from quantempo.export.weights import QuantizedWeight

Float32s = NDArray[np.float32]
Vectors = Mapping[str, Float32s]
Watch = Callable[[Observation, Mapping[str, Buffer]], None]
GROUP_INPUT = "scale_group"
Corrected = Literal["feature", "product", "history", "prediction", "noise", "latents"]
Scales = Literal["shared", "reuse", "apart"]
Corrections = Sequence[Literal["feature", "product"]]
"""Those that a reusing graph takes as inputs."""
Mode = Literal["float", "shown", "quantized", "taught", "probed"]


def fitted_corrections(cut: Cut, consumed: bool = False) -> tuple[Corrected, ...]:
    """The corrections that are tried for a cut, in the order in which they are fitted.

    A sublayer cut has many features; a gain and a bias for each would cost a good part of what reuse saves, and the
    history of predictions does what they would.

    Args:
        cut: where the graph is cut.
        consumed: whether one product alone reads a cached feature.
    """
    rest: tuple[Corrected, ...] = ("history", "prediction", "noise", "latents")
    if isinstance(cut, SublayerCut):
        return rest
    return ("feature", "product", *rest) if consumed else ("feature", *rest)


def graph_corrections(found: Iterable[str]) -> Corrections:
    """Those of some corrections that the reusing graph takes as inputs."""
    wanted = set(found)
    return tuple(name for name in _IN_GRAPH if name in wanted)


_IN_GRAPH: tuple[Literal["feature", "product"], ...] = ("feature", "product")


QUANTIZED_GRAPH = "ort-f32"
"""The graph that everything is fitted on, with the sites that a plan keeps in float there."""

CACHE_SEED = 2 * FIRST_SEED
"""Seeds of the fitting runs start this far above the calibration's, so that the two sets are disjoint."""


@dataclass(frozen=True)
class CacheSettings:
    """What to fit.

    Args:
        policy: `every:N`, `power:N` or `programmed:N`, with N the mean number of calls per refresh.
        cut: what a reusing call takes from the cache.
        corrections: which are fitted.
        guidance: scale of the fitting runs; corrections of the prediction depend on it.
        samples: trajectories to fit on.
        checks: further trajectories to judge corrections by.
        batch: that run together.
        labels: classes to run; empty to deal out all.
        scales: what has scales of its own, from its calls of the cached trajectory: nothing (`shared`: all have the
            model's), reusing calls, or both these and refreshing ones (`apart`).
    """

    policy: str
    cut: Cut
    corrections: tuple[Corrected, ...] = ("feature", "history", "prediction", "noise", "latents")
    guidance: float = 1.5
    samples: int = 64
    checks: int = 32
    batch: int = 32
    labels: tuple[int, ...] = ()
    scales: Scales = "reuse"


@dataclass(frozen=True, eq=False)
class CacheParts:
    """What caching is fitted on.

    Args:
        exported: the float model.
        plan, table, weights: of the uncached quantized model.
        statistics: that the table was made from.
        manifest: of the float model, for the arguments of a call.
        recipe: of the compile.
        arrays: conditioning by input name.
        module: loads the torch denoiser, which learned masks need.
    """

    exported: Exported
    plan: QuantPlan
    table: ScaleTable
    weights: Mapping[str, QuantizedWeight]
    statistics: StatsCollector
    manifest: Manifest
    recipe: Recipe
    arrays: Mapping[str, NDArray[Any]]
    module: Callable[[], Any] | None = None


class VariantBench:
    """The variants of one set of cuts, written to a folder, and loops over them.

    Args:
        parts: the model.
        folder: exists and is empty.
        cuts: by variant.
        corrections: what reusing variants take a gain and bias for; products only where the cut has any.
        probe: what the variant `probe` computes; `None` for none.
    """

    def __init__(
        self, parts: CacheParts, folder: Path, cuts: Mapping[str, Cut], corrections: Corrections = ("feature",),
        probe: Probe | None = None,
    ) -> None:
        from quantempo.export.graph_files import write_graphs
        from quantempo.export.variants import cut_variants

        self.parts, self._folder = parts, folder
        self.set: VariantSet = cut_variants(parts.exported.graph, cuts, probe, corrections)
        (folder / "float").mkdir(parents=True)
        write_graphs(folder / "float", {name: v.graph for name, v in self.set.variants.items()})
        self._engines: dict[str, Engine] = {}
        self._written = 0
        self._quantized: Path | None = None

    def quantize(self, tables: Mapping[str, ScaleTable]) -> None:
        """Lower the variants, each with its own scales; earlier quantized ones are closed."""
        from quantempo.export.graph_files import write_graphs
        from quantempo.export.lower_ort import lower_ort
        from quantempo.export.lower_variant import lower_variant

        self._close(lambda key: "quantized" in key)
        self._written += 1
        self._quantized = self._folder / f"quantized.{self._written}"
        self._quantized.mkdir()
        plan = self.parts.plan.for_graph(QUANTIZED_GRAPH)
        write_graphs(self._quantized, {
            name: lower_variant(v.graph, plan, tables[name], self.parts.weights, lower_ort)
            for name, v in self.set.variants.items()
        })  # fmt: skip

    def quantize_plainly(self) -> None:
        """Lower all variants with the model's own scales, where they are not lowered yet."""
        if self._quantized is None:
            self.quantize(dict.fromkeys(self.set.variants, self.parts.table))

    def tensors(self, variant: str) -> tuple[str, ...]:
        """The tensors of a variant that need scales."""
        from quantempo.export.lower_variant import variant_plan

        return variant_plan(self.parts.plan, self.set.variants[variant].graph).scaled_tensors()

    def identity_vectors(self, calls: int) -> dict[str, Float32s]:
        """Gains of 1 and biases of 0 for all vector inputs."""
        found: dict[str, Float32s] = {}
        for feature in self.set.features.values():
            for variant in self.set.variants.values():
                for name in variant.vectors:
                    if name.startswith(f"{feature.name}."):
                        fill = 1.0 if name.endswith(".gain") else 0.0
                        of_product = name in correction_inputs(feature.name, "product")
                        width = feature.product_channels if of_product else feature.channels
                        found[name] = np.full((calls, width), fill, np.float32)
        return found

    def loop(
        self, mode: Mode, vectors: Vectors, taps: Mapping[str, Sequence[str]] | None = None,
        teacher_taps: Sequence[str] = (),
    ) -> Loop:
        """A loop over all variants.

        Args:
            mode: which graphs; `taught` runs the float `full` beside each quantized call, `probed` the probe, `shown`
                is `float` with inputs shown as outputs.
            vectors: all that the program names.
            taps: by variant, inner tensors to hand to the observer.
            teacher_taps: likewise, of the teacher.
        """
        engines: dict[str, Engine] = {}
        variants: dict[str, Variant] = {}
        denoiser = self.parts.manifest.denoiser
        for name, graph in self.set.variants.items():
            kind = "float" if mode in ("float", "shown") else "quantized"
            engine = self._open(kind, name, tuple((taps or {}).get(name, ())))
            variants[name] = Variant(tuple(engine.inputs), tuple(engine.outputs), graph.reads, graph.writes)
            engines[name] = engine
            if mode == "taught":
                shown = (*graph.reads, denoiser.sample_input)
                engines[name] = TaughtEngine(engine, self._open("float", FULL, tuple(teacher_taps)), shown)
            elif mode == "shown":
                engines[name] = ShownEngine(engine)
            elif mode == "probed":
                engines[name] = TaughtEngine(engine, self._open("quantized", PROBE, ()))
        if mode in ("float", "shown"):
            return Loop(engines, denoiser, None, variants, vectors)
        return Loop(engines, replace(denoiser, group_input=GROUP_INPUT), self.parts.table.partition, variants, vectors)

    def engine(self, mode: Literal["float", "quantized"], variant: str) -> Engine:
        """The engine of one graph."""
        return self._open(mode, variant, ())

    def _open(self, kind: str, variant: str, taps: tuple[str, ...]) -> Engine:
        key = "|".join((kind, variant, *taps))
        if key not in self._engines:
            folder = self._folder / "float" if kind == "float" else self._quantized
            assert folder is not None
            options = EngineOptions(threads=self.parts.recipe.threads, extra_outputs=taps)
            self._engines[key] = open_engine(ENGINE, folder / f"{variant}.onnx", options)
        return self._engines[key]

    def _close(self, which: Callable[[str], bool] = lambda key: True) -> None:
        for key in [key for key in self._engines if which(key)]:
            self._engines.pop(key).close()

    def close(self) -> None:
        """Close all engines."""
        self._close()

    def run(
        self, loop: Loop, program: StepProgram, batch: TrajectoryBatch, watch: Watch | None = None,
        on_prediction: PredictionHook | None = None,
    ) -> Float32s:
        """Run a batch and return its final latents.

        Args:
            loop: from `loop`.
            program: whose variants and vectors the loop has.
            batch: seeds, labels and guidance.
            watch: sees each engine call.
            on_prediction: see `LoopRequest`.
        """
        rows = np.array(batch.seeds) % 1_000_000
        given = {name: values[rows % len(values)] for name, values in self.parts.arrays.items()}
        request = Request(
            class_labels=list(batch.labels) or None, guidance_scale=batch.guidance, seed=list(batch.seeds),
            batch_size=len(batch.seeds), arrays=given, guidance_mode="batched" if batch.guidance > 1 else None,
        )  # fmt: skip
        r = resolve(request, self.parts.manifest)

        result = loop.run(program, LoopRequest(
            batch=r.batch, guidance=r.guidance, noise=r.noise, latents=r.latents, conditioning=r.conditioning,
            rescale=r.rescale, mode=r.mode, seeds=r.seed_per_sample, observer=watch,
            on_prediction=on_prediction,
        ))  # fmt: skip
        return result.latents


def fitting_batches(settings: CacheSettings, steps: int, classes: int | None) -> tuple[TrajectoryBatch, ...]:
    """The trajectories that everything is fitted on."""
    return plan_batches(
        CalibrationSet(
            samples=settings.samples, batch=settings.batch, guidance=(settings.guidance,), labels=settings.labels,
            seeds=tuple(range(CACHE_SEED, CACHE_SEED + settings.samples)), programs=(ProgramChoice(steps),),
        ),
        classes=classes,
    )


def fitting_runs(
    bench: VariantBench, settings: CacheSettings, loop: Loop, program: StepProgram, watch: Watch
) -> None:
    """Run all fitting batches of a program under an observer."""
    for batch in program_batches(bench, settings, program):
        bench.run(loop, program, batch, watch)


def check_batches(
    bench: VariantBench, settings: CacheSettings, program: StepProgram
) -> tuple[TrajectoryBatch, ...]:
    """Trajectories that nothing is fitted on, to judge by."""
    return _later(bench, settings, program, settings.samples)


def audit_batches(
    bench: VariantBench, settings: CacheSettings, program: StepProgram
) -> tuple[TrajectoryBatch, ...]:
    """As many more, that nothing is fitted on or judged by, to compare policies."""
    return _later(bench, settings, program, settings.samples + settings.checks)


def _later(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, after: int
) -> tuple[TrajectoryBatch, ...]:
    few = replace(settings, samples=settings.checks)
    return tuple(
        replace(batch, seeds=tuple(after + seed for seed in batch.seeds))
        for batch in program_batches(bench, few, program)
    )


def program_batches(
    bench: VariantBench, settings: CacheSettings, program: StepProgram
) -> tuple[TrajectoryBatch, ...]:
    """The trajectories that a program is fitted on."""
    denoiser = bench.parts.manifest.denoiser
    return fitting_batches(settings, program.steps, denoiser.classes[0].count if denoiser.classes else None)


def guided(seen: Observation, prediction: Float32s, guidance: float) -> Float32s:
    """The prediction after guidance, (samples, …), from all rows of a call."""
    branches = np.array(seen.branches)
    combined = prediction[branches != UNCONDITIONAL].astype(np.float64)
    if guidance > 1:
        other = prediction[branches == UNCONDITIONAL].astype(np.float64)
        combined = other + guidance * (combined - other)
    result: Float32s = combined.astype(np.float32)
    return result


def taught(outputs: Mapping[str, Buffer], name: str) -> Float32s:
    """What the teacher says of an output."""
    array: Float32s = outputs[TEACHER + name].array
    return array
