"""Decisions at run time, fitted on the quantized model: polynomial, threshold, and the cap on consecutive reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantempo.calib.cache.dynamic import IndicatorRecord, PolynomialFit, Rule, fit_polynomial, threshold_for
from quantempo.contracts import cache as contract
from quantempo.contracts.cache import FULL, PROBE, CachePlan, Probe, cached_program, check_cache_plan
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import INDICATOR, Decide, StepProgram
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import CacheParts, CacheSettings, VariantBench, fitting_runs, taught
from quantempo.stages.policy_words import parse_share

POLICIES: Mapping[str, Literal["modulated_input", "first_block"]] = {
    "teacache": "modulated_input", "firstblock": "first_block",
}
WARM_UP = 2
"""The first call computes everything without a decision, and the first decision has nothing to compare with."""


@dataclass(frozen=True, eq=False)
class DynamicFit:
    """A policy that decides at run time.

    Args:
        plan: with a probe.
        programs: by number of steps.
        record: what it was fitted on, by number of steps.
        report: plain data: polynomial, threshold, expected share of skipped calls.
    """

    plan: CachePlan
    programs: Mapping[int, StepProgram]
    record: Mapping[int, IndicatorRecord]
    report: Mapping[str, Any]


def fit_dynamic(
    parts: CacheParts, settings: CacheSettings, folder: Path, steps: tuple[int, ...] = (), max_consecutive: int = 4
) -> DynamicFit:
    """Fit `teacache:SHARE` or `firstblock:SHARE` on quantized runs; the share is that of calls that should reuse.

    Corrections are not fitted: a row of vectors is for a call with a known refresh, and here each sample has its own.

    Raises:
        RequestError: a policy that is unknown, or a share that cap and warm-up do not allow.
        ExportError: the cut or the probe does not fit the model.
    """
    name, share = parse_dynamic(settings.policy)
    reuse, probe = contract.reuse_name(0), probe_of(settings.policy, settings.cut)
    assert probe is not None
    counts = steps or parts.recipe.steps
    bench = VariantBench(parts, folder, {reuse: settings.cut}, (), probe)
    try:
        bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
        records = {n: indicator_record(bench, settings, parts.exported.program(n)) for n in counts}
    finally:
        bench.close()
    schedules, report = {}, {}
    for n, record in records.items():
        decide, fitted, reached = decision(name, record, share, max_consecutive)
        schedules[str(n)] = contract.Schedule((FULL, *[reuse] * (record.calls - 1)), decide)
        report[str(n)] = {"polynomial": list(decide.polynomial), "threshold": decide.threshold, "skipped": reached,
                          "fit_error": None if fitted is None else fitted.error}  # fmt: skip
    plan = CachePlan(
        parts.exported.graph_digest, parts.exported.scheduler, parts.exported.scheduler_digest, settings.policy,
        {reuse: settings.cut}, schedules, {"share": share, "max_consecutive": float(max_consecutive)}, probe,
    )
    check_cache_plan(plan, "cache plan")
    programs = {n: cached_program(parts.exported.program(n), plan, plan.config, {}) for n in counts}
    return DynamicFit(plan, programs, records, report)


def probe_of(policy: str, cut: contract.Cut) -> Probe | None:
    """What a policy looks at while it runs; `None` for one that is fixed beforehand."""
    name = policy.partition(":")[0]
    if name not in POLICIES:
        return None
    return Probe(POLICIES[name]) if isinstance(cut, contract.FeatureCut) else Probe(POLICIES[name], cut.blocks)


def parse_dynamic(text: str) -> tuple[str, float]:
    """Name and wanted share of skipped calls.

    Raises:
        RequestError: not such a word.
    """
    return parse_share(
        text, tuple(POLICIES), "teacache:SHARE or firstblock:SHARE, with a share in 0 to 1",
        lambda share: 0 <= share < 1, example="0.5",
    )


def indicator_record(bench: VariantBench, settings: CacheSettings, program: StepProgram) -> IndicatorRecord:
    """How indicator and prediction of the quantized model move along uncached runs."""
    record = IndicatorRecord(len(program.calls))
    prediction = bench.parts.manifest.denoiser.prediction
    loop = bench.loop("probed", {})

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        record.observe(seen.index, taught(outputs, INDICATOR), outputs[prediction].array)

    fitting_runs(bench, settings, loop, program, watch)
    return record


def decision(
    name: str, record: IndicatorRecord, share: float, max_consecutive: int
) -> tuple[Decide, PolynomialFit | None, float]:
    """The rule that skips a share of the calls, the polynomial that it uses, and the share that it reaches."""
    changes, fitted = record.changes, None
    accumulate, reference = False, "last_refresh"
    polynomial: tuple[float, ...] = (1.0, 0.0)
    if name == "teacache":
        fitted = fit_polynomial(changes[:, 1:, 1], record.outputs[:, 1:])
        accumulate, reference, polynomial = True, "previous_call", fitted.coefficients

    def rule(threshold: float) -> Rule:
        return Rule(threshold, polynomial, accumulate, reference, max_consecutive, WARM_UP)

    threshold, reached = threshold_for(changes, rule, share)
    kind: Literal["previous_call", "last_refresh"] = "previous_call" if accumulate else "last_refresh"
    decide = Decide(PROBE, threshold, FULL, polynomial, accumulate, kind, max_consecutive)
    return decide, fitted, reached
