"""`--cache auto`: policies are tried on the quantized model, and the best one within a budget is taken.

Every candidate is corrected, timed and compared with the float model.  The float model with fewer steps stands in the
same table: a plan that it beats in the same time is never taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.cost import Candidate, choose, loses_to_fewer_steps, pareto, predicted_ms
from quantempo.calib.cache.noise_floor import judge
from quantempo.contracts.cache import FULL, PROBE, reuse_name
from quantempo.contracts.program import StepProgram
from quantempo.errors import CalibrationError, ExportError, RequestError
from quantempo.progress import Advance
from quantempo.quality import Images, psnr_db
from quantempo.stages import dynamic_caching, mask_caching
from quantempo.stages.cache_corrections import fit_corrections
from quantempo.stages.cache_images import decoder_of
from quantempo.stages.cache_runs import (
    CacheParts,
    CacheSettings,
    Mode,
    VariantBench,
    audit_batches,
    graph_corrections,
)
from quantempo.stages.cache_schedules import ScheduleSearch, scheduled
from quantempo.stages.cache_times import call_times, median_ms, milliseconds
from quantempo.stages.caching import parse_policy, variant_tables

AUTO, NONE = "auto", "none"
CANDIDATES = (
    *(f"{name}:{interval}" for interval in (2, 3, 4, 5) for name in ("every", "programmed")),
    "dps:2", "teacache:0.4", "firstblock:0.4", "greedy:0.7",
)
"""Fixed schedules at four distances, and one of each further family; what a model does not allow is left out."""
SAMPLES, CHECKS = 16, 16
"""Trajectories that a candidate's corrections are fitted on and judged by, at most."""


@dataclass(frozen=True)
class Budget:
    """What a plan has to keep; `None` for no limit.

    Args:
        min_psnr_db: fidelity to the float model with the same number of steps.
        max_ms: time of a guided run of one sample.
    """

    min_psnr_db: float | None = None
    max_ms: float | None = None


@dataclass(frozen=True)
class Searched:
    """What was taken, `none` where every plan loses to the float model, and the table that it was taken from."""

    policy: str
    report: Mapping[str, Any]


def search(
    parts: CacheParts, settings: CacheSettings, folder: Path, steps: int, budget: Budget, advance: Advance
) -> Searched:
    """Try the candidates at one number of steps.

    Args:
        parts: the quantized model.
        settings: cut, corrections and guidance; the policy in it does not matter.
        folder: an empty folder for graphs.
        steps: of the runs.
        budget: to keep.
        advance: told after each candidate.

    Raises:
        RequestError: no policy keeps the budget; the nearest one is named.
    """
    few = replace(settings, samples=min(SAMPLES, settings.samples), checks=min(CHECKS, settings.checks))
    few = replace(few, batch=min(few.batch, few.samples))
    bench = VariantBench(parts, folder, {reuse_name(0): settings.cut}, graph_corrections(settings.corrections))
    try:
        trial = _Trial(bench, few, parts.exported.program(steps))
        known, left_out = list(CANDIDATES), {}
        plans = [trial.uncached()]
        for done, policy in enumerate(known):
            advance(done, len(known) + 1)
            try:
                plans.append(trial.candidate(policy, folder / policy.replace(":", "-")))
            except (ExportError, RequestError, CalibrationError) as refused:
                left_out[policy] = str(refused)
        rows = [*plans, *trial.fewer_steps([plan.milliseconds for plan in plans])]
        advance(len(known) + 1, len(known) + 1)
    finally:
        bench.close()
    limited = budget.min_psnr_db is not None or budget.max_ms is not None
    # Without a budget there is nothing that speaks for an uncached run but its fidelity.
    eligible = [row for row in rows if limited or row.name != NONE]
    try:
        policy = choose(eligible, min_psnr=budget.min_psnr_db, max_ms=budget.max_ms).name
    except RequestError:
        if limited:
            raise
        policy = NONE
    front = {row.name for row in pareto(rows)}
    table = [
        {**asdict(row), "pareto": row.name in front, "taken": row.name == policy,
         "loses_to_fewer_steps": row.kind == "plan" and loses_to_fewer_steps(row, rows)}
        for row in sorted(rows, key=lambda row: row.milliseconds)
    ]  # fmt: skip
    return Searched(policy, {
        "policy": policy, "steps": steps, "budget": asdict(budget), "guidance": few.guidance, "samples": few.checks,
        "ms_per_call": trial.times, "table": table,
        "left_out": left_out,
    })  # fmt: skip


class _Trial:
    """Candidates at one number of steps, on the same runs: none that anything was fitted on, chosen or judged by."""

    def __init__(self, bench: VariantBench, settings: CacheSettings, plain: StepProgram) -> None:
        self._bench, self._settings, self._plain = bench, settings, plain
        self._schedules = ScheduleSearch(bench, settings, plain)
        self._decode: Callable[[NDArray[Any]], Images] = decoder_of(bench.parts)
        bench.quantize(dict.fromkeys(bench.set.variants, bench.parts.table))
        self._wanted = self._images(bench, "float", plain, {})
        self.times = {
            "float": milliseconds(bench, settings, "float", FULL),
            **call_times(bench, settings),
        }

    def uncached(self) -> Candidate:
        """INT8 without caching."""
        return self._measured(NONE, self._bench, self._plain, {}, self.times)

    def candidate(self, policy: str, folder: Path) -> Candidate:
        """A policy with its corrections.

        Args:
            policy: a name of `CANDIDATES`.
            folder: for graphs of its own; made where it needs one.

        Raises:
            ExportError, RequestError, CalibrationError: the model does not allow it.
        """
        name = policy.partition(":")[0]
        if name in dynamic_caching.POLICIES:
            return self._dynamic(policy, folder)
        return self._masks(policy, folder) if name in mask_caching.POLICIES else self._fixed(policy)

    def _fixed(self, policy: str) -> Candidate:
        bench, settings, plain = self._bench, self._settings, self._plain
        name, interval = parse_policy(policy)
        refreshes = self._schedules.schedule(name, interval)
        cached = scheduled(bench, plain, refreshes)
        bench.quantize(variant_tables(bench, settings, {plain.steps: cached}))
        floor = judge(refreshes, self._schedules.floor_facts(interval))
        fit = fit_corrections(bench, settings, plain, cached, refreshes, floor)
        return self._measured(policy, bench, fit.program, fit.vectors, self.times)

    def _masks(self, policy: str, folder: Path) -> Candidate:
        parts, settings, steps = self._bench.parts, replace(self._settings, policy=policy), self._plain.steps
        (folder / "masks").mkdir(parents=True)
        (folder / "run").mkdir()
        fit = mask_caching.fit_masks(parts, settings, folder / "masks", (steps,))
        bench = VariantBench(parts, folder / "run", fit.plan.cuts, ())
        try:
            bench.quantize(fit.tables)
            return self._measured(policy, bench, fit.programs[steps], fit.vectors, fit.report["ms_per_call"])
        finally:
            bench.close()

    def _dynamic(self, policy: str, folder: Path) -> Candidate:
        parts, settings, steps = self._bench.parts, replace(self._settings, policy=policy), self._plain.steps
        (folder / "decisions").mkdir(parents=True)
        (folder / "run").mkdir()
        fit = dynamic_caching.fit_dynamic(parts, settings, folder / "decisions", (steps,))
        bench = VariantBench(parts, folder / "run", fit.plan.cuts, (), fit.plan.probe)
        try:
            bench.quantize_plainly()
            times = fit.report["ms_per_call"]
            skipped = fit.report["steps"][str(steps)]["skipped"]
            return self._measured(policy, bench, fit.programs[steps], {}, times, skipped)
        finally:
            bench.close()

    def fewer_steps(self, milliseconds: Sequence[float]) -> list[Candidate]:
        """The float model at the step counts whose times lie around given ones."""
        programs, steps = self._bench.parts.exported.programs, self._plain.steps
        counts = {int(ms / self.times["float"]) + more for ms in milliseconds for more in (0, 1)}
        found = []
        for count in sorted({min(max(count, 1), steps - 1) for count in counts} & set(programs)):
            program = self._bench.parts.exported.program(count)
            time_ms = len(program.calls) * self.times["float"]
            psnr = float(psnr_db(self._images(self._bench, "float", program, {}), self._wanted).mean())
            found.append(Candidate(f"float, {count} steps", "fewer_steps", time_ms, psnr))
        return found

    def _measured(
        self, name: str, bench: VariantBench, program: StepProgram, vectors: Mapping[str, Any],
        times: Mapping[str, float], skipped: float = 0.0,
    ) -> Candidate:
        """A program's fidelity and time; `skipped` is the share of its calls that decide for reuse at run time."""
        psnr = float(psnr_db(self._images(bench, "quantized", program, vectors), self._wanted).mean())
        predicted = predicted_ms(program, times, probe_ms=times.get(PROBE, 0.0), skipped=skipped)
        return Candidate(name, "plan", predicted, psnr, self._trajectory(bench, program, vectors))

    def _images(self, bench: VariantBench, mode: Mode, program: StepProgram, vectors: Mapping[str, Any]) -> Images:
        loop = bench.loop(mode, vectors or bench.identity_vectors(len(program.calls)))
        batches = audit_batches(bench, self._settings, program)
        return self._decode(np.concatenate([bench.run(loop, program, batch) for batch in batches]))

    def _trajectory(self, bench: VariantBench, program: StepProgram, vectors: Mapping[str, Any]) -> float:
        """Milliseconds of a run of one guided sample."""
        loop = bench.loop("quantized", vectors or bench.identity_vectors(len(program.calls)))
        batch = audit_batches(bench, self._settings, program)[0]
        one = replace(batch, seeds=batch.seeds[:1], labels=batch.labels[:1])
        bench.run(loop, program, one)
        return median_ms(lambda: bench.run(loop, program, one))
