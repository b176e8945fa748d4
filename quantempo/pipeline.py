"""Model in, bundle out: the one place that composes export, calibration, engines and runtime."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantempo.calib.partition import parse_groups
from quantempo.calib.ranges import method_named
from quantempo.errors import PlanError
from quantempo.progress import Progress, SilentProgress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.bundle_writer import BundleWriter, check_target
from quantempo.stages.calibration import ENGINE, Calibration, calibrate, scale_table, trajectory_batches
from quantempo.stages.model import Exported, export_model, make_plan, trace_scheduler
from quantempo.stages.writing import check_fused, lower_graphs, round_weights, write_float, write_quantized

__all__ = [
    "ENGINE", "STATISTICS", "Calibration", "CompileSummary", "Exported", "calibrate", "check_fused", "compile_model",
    "lower_graphs", "scale_table", "trace_scheduler", "trajectory_batches",
]

STATISTICS = "report/statistics.safetensors"
"""Sidecar with the calibration statistics, from which other scale tables can be made without another run."""


@dataclass(frozen=True)
class CompileSummary:
    """What a compile made."""

    bundle: OpenBundle
    sites: int
    quantized: int
    groups: int

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
        overwrite: replace an older bundle.
        progress: where stages are shown.

    Raises:
        QuantempoError: bad input, before the work starts; nothing is written then.
    """
    recipe, progress, out = recipe or Recipe(), progress or SilentProgress(), Path(out).absolute()
    check_target(out, overwrite)
    method_named(recipe.range_method)
    parse_groups(recipe.groups)
    if plan_file is not None and not plan_file.is_file():
        raise PlanError(
            f"plan {plan_file}", found="no such file", wanted="a plan.json", cause="the path is misspelt",
            remedy="give the plan.json of a bundle of this model, as it is or edited",
        )
    # Beside the output where its folder exists, so that moving is cheap; else above it: an error leaves no folder.
    nearby = next(parent for parent in out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.work-", dir=nearby) as folder:
        work = Path(folder)
        exported = export_model(Path(model), scheduler, recipe, work, progress, arrays or {})
        if recipe.precision == "float32":
            bundle = write_float(exported, recipe, out, overwrite)
            return CompileSummary(bundle, 0, 0, 0)
        plan = make_plan(exported, recipe, plan_file)
        reference = write_float(exported, recipe, work / "reference", overwrite=False)
        with progress.stage("calibrate") as advance:
            collected = calibrate(reference, plan, recipe, arrays=arrays, progress=advance)
        with progress.stage("scales"):
            table = scale_table(collected.statistics, plan, recipe.groups, recipe.range_method)
        with progress.stage("lower and write"), BundleWriter(out, overwrite=overwrite) as writer:
            weights = round_weights(exported, plan, recipe, collected, table)
            manifest = write_quantized(writer, exported, plan, table, weights, recipe)
            if recipe.reference:
                shutil.move(work / "reference", writer.root / "reference")
                (writer.root / STATISTICS).parent.mkdir()
                collected.statistics.save(writer.root / STATISTICS)
            bundle = writer.finish(manifest)
    return CompileSummary(bundle, len(plan.sites), len(plan.quantized()), table.partition.groups)
