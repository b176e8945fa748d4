"""The quality gate of a compile: a short report, whose verdict decides where the bundle goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantempo.progress import Progress
from quantempo.recipe import Recipe
from quantempo.report.measure import ReportOptions
from quantempo.report.write import ReportSummary, write_report

SAMPLES, WORST, TIMING_ROUNDS = 32, 3, 3


def judge(
    bundle: Path, min_psnr_db: float, recipe: Recipe, arrays: Mapping[str, NDArray[Any]], progress: Progress
) -> ReportSummary:
    """Compare a bundle with its float reference on held-out seeds and write `BUNDLE/report/`.

    The headline is the mean same-seed PSNR of 32 samples at the recipe's default guidance and first step count.

    Args:
        bundle: with `reference/`.
        min_psnr_db: what the headline has to reach.
        recipe: of the compile.
        arrays: the conditioning of the calibration; rows are used in turn.
        progress: where stages are shown.
    """
    options = ReportOptions(
        samples=SAMPLES, guidance=(recipe.default_guidance,), steps=recipe.steps[0], threads=recipe.threads,
        single_scale=False, timing_rounds=TIMING_ROUNDS, worst=WORST, min_psnr_db=min_psnr_db, arrays=arrays,
    )
    return write_report(bundle, options, progress)
