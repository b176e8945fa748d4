"""Model in, bundle out: the one place that composes export, calibration, engines and runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quantempo.calib.partition import parse_groups
from quantempo.calib.ranges import method_named
from quantempo.calib.selection import parse_selection
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.devices.guarding import guard_mode, guard_stage
from quantempo.errors import PlanError, RequestError
from quantempo.inspection import STATISTICS
from quantempo.progress import Advance, Progress, SilentProgress
from quantempo.progress import parts as shares
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.bundle_writer import BundleWriter, aside, check_target, clean_up
from quantempo.stages.cache_cuts import CacheGraphs, cut_for_caching
from quantempo.stages.cache_runs import CacheParts
from quantempo.stages.cache_stage import CacheResult, cache_stage, check_cache_recipe
from quantempo.stages.calibration import (
    ENGINE,
    Calibration,
    CalibrationLoop,
    Taps,
    calibrate,
    calibration_stage,
    trajectory_batches,
)
from quantempo.stages.dialects import GraphChoice, chosen_graphs, lower_graphs, scanned_tensors
from quantempo.stages.mining import FirstRound, second_round
from quantempo.stages.model import Exported, Opened, export_model, open_model, plan_stage
from quantempo.stages.programs import calibration_programs, trace_scheduler
from quantempo.stages.quantizers import scale_table, scales_stage, weights_stage
from quantempo.stages.range_scan import ranges_stage, scan_steps
from quantempo.stages.store import StageRun, StageStore, open_store
from quantempo.stages.writing import float_view, write_float, write_quantized

if TYPE_CHECKING:
    from quantempo.export.weights import QuantizedWeight
    from quantempo.report.write import ReportSummary

__all__ = [
    "ENGINE", "Calibration", "CompileSummary", "Exported", "Taps", "calibrate", "compile_model",
    "lower_graphs", "scale_table", "trace_scheduler", "trajectory_batches",
]

WRITES = "a bundle is always written anew"
WRITE_SHARES = (1, 2, 1)
"""The work of writing: the quantized graphs, the float twin, digests and syncing."""


@dataclass(frozen=True)
class CompileSummary:
    """What a compile made."""

    bundle: OpenBundle
    sites: int
    quantized: int
    groups: int
    stages: tuple[StageRun, ...] = ()

    def text(self) -> str:
        """A few lines for people."""
        size = sum(entry.size for entry in self.bundle.manifest.files.values())
        return (
            f"wrote {self.bundle.root}: {size / 1e6:.1f} MB, {self.quantized} of {self.sites} sites quantized, "
            f"{self.groups} scale groups, programs for {len(self.bundle.steps)} step counts"
        )


def compile_model(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    scheduler: Path | None = None,
    plan_file: Path | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    loop: CalibrationLoop | None = None,
    work: Path | str | None = None,
    guard: str | None = None,
    min_psnr: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileSummary:
    """Compile a model directory to a bundle.

    Args:
        model: pipeline directory, or denoiser directory with `scheduler`.
        out: the bundle to be.
        recipe: settings.
        scheduler: scheduler directory; overrides the pipeline's own.
        plan_file: a plan to follow instead of the default one; it must belong to this model.
        arrays: conditioning to calibrate on, for models that take arrays: per input name (samples, …), and
            `negative_NAME` for the unconditional branch.
        loop: your own sampling loop to calibrate with; see `quantempo.stages.calibration.CalibrationLoop`.
        work: where results of stages are kept for the next compile; `None` for the user's cache folder, see
            `quantempo.stages.store`.
        guard: `off`, `record` or `revert`; see `quantempo.devices.guarding`.
        min_psnr: dB to float that a bundle has to reach, or it goes to `OUT.rejected`; see `quantempo.report.accept`.
        overwrite: replace an older bundle.
        progress: where stages are shown.

    Raises:
        QualityNotReached: `min_psnr` was not reached.
        QuantempoError: bad input, before the work starts; nothing is written then.
    """
    recipe, progress, out = recipe or Recipe(), progress or SilentProgress(), Path(out).absolute()
    _check(out, overwrite, recipe, plan_file, min_psnr)
    choice = chosen_graphs(recipe)
    mode = guard_mode(guard)
    if recipe.precision == "fp8":
        mode = "off"  # FP8 is simulated here: its time says nothing about a device
    opened = _check_experts(open_model(Path(model), scheduler, recipe, arrays or {}))
    recipe, given = opened.recipe, opened.arrays
    with open_store(work, progress) as store:
        exported = export_model(opened, store)
        view = float_view(exported, recipe)
        if recipe.precision == "float32":
            with progress.stage("write", WRITES) as advance:
                bundle = write_float(exported, recipe, out, overwrite, advance)
            return CompileSummary(bundle, 0, 0, 0, tuple(store.runs))
        cut = cut_for_caching(exported.graph, recipe)
        plan, taps = plan_stage(store, exported, recipe, plan_file)
        plan = cut.keep_free(plan) if cut else plan
        collected, table, weights, keys, second = _numbers(store, exported, view, plan, taps, opened, loop)
        choice = _with_ranges(store, choice, exported, view, opened, collected)
        guarded = guard_stage(exported, plan, table, weights, choice, mode, recipe.threads, progress)
        plan = guarded.plan
        parts = _parts(exported, plan, table, weights, collected, view, opened)
        cache = None if cut is None else cache_stage(store, parts, cut, keys)
        with BundleWriter(out, overwrite=overwrite) as writer:
            with progress.stage("write", WRITES) as advance:
                bundle = _fill(writer, parts, choice, cache, second, advance)
                guarded.write(writer.root, bundle.digest)
            judged = None if min_psnr is None else _judge(writer, min_psnr, recipe, given, progress)
    if judged is not None:
        judged.check(aside(out))
    return CompileSummary(bundle, len(plan.sites), len(plan.quantized()), table.partition.groups, tuple(store.runs))


def open_parts(
    store: StageStore, model: Path, scheduler: Path | None, recipe: Recipe
) -> tuple[CacheParts, CacheGraphs, tuple[str, ...]]:
    """What a cache is fitted from, without writing a bundle: for benchmarks of policies and corrections.

    Args:
        store: results are taken from it, or made and kept.
        model: pipeline directory, or denoiser directory with `scheduler`.
        scheduler: scheduler directory; `None` for the pipeline's own.
        recipe: asks for caching.

    Returns:
        The quantized model, its variants, and the keys of the stages behind it.
    """
    opened = open_model(model, scheduler, recipe, {})
    exported = export_model(opened, store)
    view = float_view(exported, opened.recipe)
    cut = cut_for_caching(exported.graph, opened.recipe)
    assert cut is not None, "the recipe asks for no caching"
    plan, taps = plan_stage(store, exported, opened.recipe, None)
    plan = cut.keep_free(plan)
    collected, table, weights, keys, _ = _numbers(store, exported, view, plan, taps, opened, None)
    return _parts(exported, plan, table, weights, collected, view, opened), cut, keys


def _parts(
    exported: Exported, plan: QuantPlan, table: ScaleTable, weights: Mapping[str, QuantizedWeight],
    collected: Calibration, view: OpenBundle, opened: Opened,
) -> CacheParts:
    """What the writing of a bundle and the fit of a cache are made from."""
    return CacheParts(
        exported, plan, table, weights, collected.statistics, view.manifest, opened.recipe, opened.arrays, opened.module
    )


def _fill(
    writer: BundleWriter, parts: CacheParts, choice: GraphChoice, cache: CacheResult | None,
    second: Mapping[str, QuantizedWeight] | None, advance: Advance,
) -> OpenBundle:
    """Write a quantized bundle, its float reference and what the report needs."""
    exported, recipe = parts.exported, parts.recipe
    quantized, twin, digests = shares(advance, *WRITE_SHARES) if recipe.reference else shares(advance, 1, 0, 1)
    fitted = None if cache is None else cache.fitted
    manifest = write_quantized(
        writer, exported, parts.plan, parts.table, parts.weights, recipe, choice, fitted, second, quantized
    )
    if recipe.reference:
        write_float(exported, recipe, writer.root / "reference", overwrite=False, advance=twin)
        (writer.root / STATISTICS).parent.mkdir()
        parts.statistics.save(writer.root / STATISTICS)
    if cache is not None:
        cache.write_report(writer.root)
    finished = writer.finish(manifest)
    digests(1, 1)
    return finished


def _judge(
    writer: BundleWriter, min_psnr: float, recipe: Recipe, arrays: Mapping[str, NDArray[Any]], progress: Progress
) -> ReportSummary:
    """Report on the bundle that is about to be published; one that fails will go to `aside(out)`."""
    from quantempo.report.accept import judge

    judged = judge(writer.root, min_psnr, recipe, arrays, progress)
    if not judged.passed:
        writer.set_aside()
    return dataclasses.replace(judged, folder=writer.target / judged.folder.name)


def _check(
    out: Path, overwrite: bool, recipe: Recipe, plan_file: Path | None, min_psnr: float | None = None
) -> None:
    """What can be refused before the model is opened."""
    if min_psnr is not None:
        check_target(aside(out), True)
        if recipe.precision == "float32" or not recipe.reference:
            raise RequestError(
                "min_psnr", found="a float bundle" if recipe.precision == "float32" else "a recipe without reference",
                wanted="a quantized bundle with its float reference",
                cause="quality is measured against the float model",
                remedy="leave out --min-psnr" if recipe.precision == "float32" else "compile with --reference",
            )
    clean_up(out)
    check_target(out, overwrite)
    method_named(recipe.range_method)
    parse_groups(recipe.groups)
    parse_selection(recipe.selection)
    check_cache_recipe(recipe)
    if plan_file is not None and not plan_file.is_file():
        raise PlanError(
            f"plan {plan_file}", found="no such file", wanted="a plan.json", cause="the path is misspelt",
            remedy="give the plan.json of a bundle of this model, as it is or edited",
        )


def _check_experts(opened: Opened) -> Opened:
    """Refuse what is made for one denoiser alone."""
    recipe = opened.recipe
    for field, value in (("cache", recipe.cache), ("hard_cases", recipe.hard_cases)):
        if opened.source.expert is not None and value not in ("none", 0):
            raise PlanError(
                f"recipe, {field}", found=repr(value), wanted="none for a model with two experts",
                cause="it is fitted to one denoiser", remedy=f"leave {field} out",
            )
    return opened


def _with_ranges(
    store: StageStore, choice: GraphChoice, exported: Exported, view: OpenBundle, opened: Opened, collected: Calibration
) -> GraphChoice:
    """The choice with the ranges that its graphs need."""
    scanned = scanned_tensors(exported.graph, choice)
    if not scanned:
        return choice
    recipe = opened.recipe
    program = exported.program(scan_steps(recipe))
    ranges = ranges_stage(store, view, scanned, program, recipe, opened.arrays, collected.statistics)
    return dataclasses.replace(choice, ranges=ranges)


def _numbers(
    store: StageStore, exported: Exported, view: OpenBundle, plan: QuantPlan, taps: Taps, opened: Opened,
    loop: CalibrationLoop | None,
) -> tuple[
    Calibration, ScaleTable, Mapping[str, QuantizedWeight], tuple[str, ...], Mapping[str, QuantizedWeight] | None
]:  # fmt: skip
    """Calibration, the scales and weights that follow from it, the keys of their stages, weights of a second expert.

    There is a second round where the recipe asks for it.
    """
    recipe, arrays = opened.recipe, opened.arrays
    programs = calibration_programs(recipe, exported.program, exported.boundary)
    collected, calibrated = calibration_stage(store, view, taps, recipe, arrays, programs, loop)
    table, scaled = scales_stage(store, collected, calibrated, plan, recipe)
    weights, rounded = weights_stage(store, exported, plan, recipe, collected, calibrated, table)
    if recipe.hard_cases:
        keys = (scaled.key, rounded.key)
        first = FirstRound(exported.graph, view, plan, taps, collected, calibrated, table, weights, keys)
        collected, calibrated = second_round(store, first, recipe, arrays, programs)
        table, scaled = scales_stage(store, collected, calibrated, plan, recipe)
        weights, rounded = weights_stage(store, exported, plan, recipe, collected, calibrated, table)
    second = None
    if exported.second is not None:
        second, _ = weights_stage(store, exported.second, plan, recipe, collected, calibrated, table)
    return collected, table, weights, (calibrated.key, scaled.key, rounded.key), second
