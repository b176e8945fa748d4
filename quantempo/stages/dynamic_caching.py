"""Decisions at run time, fitted on the quantized model: polynomial, threshold, and the cap on consecutive reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quantempo.calib.cache.cost import predicted_ms
from quantempo.calib.cache.dynamic import IndicatorRecord, PolynomialFit, Rule, fit_polynomial, threshold_for
from quantempo.contracts import cache as contract
from quantempo.contracts.cache import FULL, PROBE, CachePlan, Probe, cached_program, check_cache_plan
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import INDICATOR, Decide, StepProgram
from quantempo.errors import RequestError
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import CacheParts, CacheSettings, VariantBench, fitting_runs, taught
from quantempo.stages.cache_schedules import floor_facts
from quantempo.stages.cache_times import call_times
from quantempo.stages.policy_words import parse_share

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph

POLICIES: Mapping[str, Literal["modulated_input", "first_block"]] = {
    "teacache": "modulated_input", "firstblock": "first_block",
}
WARM_UP, CAP = 2, 4
"""Calls at the start that refresh, and the most that may reuse in a row, unless a policy says otherwise.  The last of
the former decides, but has nothing to compare with; those before it do not look."""


class DynamicPolicy(NamedTuple):
    """A policy that decides at run time.

    Args:
        name: of `POLICIES`.
        share: of the calls that should reuse.
        warm_up: calls at the start that refresh, at least 2.
        cap: reuses in a row, at least 1.
    """

    name: str
    share: float
    warm_up: int = WARM_UP
    cap: int = CAP


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
    parts: CacheParts, settings: CacheSettings, folder: Path, steps: tuple[int, ...] = ()
) -> DynamicFit:
    """Fit `teacache:SHARE` or `firstblock:SHARE` on quantized runs; the share is that of calls that should reuse.

    The cap on consecutive reuse is the policy's, or less where the noise-floor rule says so.

    Corrections are not fitted: a row of vectors is for a call with a known refresh, and here each sample has its own.

    Raises:
        RequestError: a policy that is unknown, or a share that cap and warm-up do not allow.
        ExportError: the cut or the probe does not fit the model.
    """
    policy = parse_dynamic(settings.policy)
    reuse = contract.reuse_name(0)
    probe = probe_of(settings.policy, settings.cut, parts.exported.graph)
    assert probe is not None
    counts = steps or parts.recipe.steps
    bench = VariantBench(parts, folder, {reuse: settings.cut}, (), probe)
    try:
        bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
        records = {n: indicator_record(bench, settings, parts.exported.program(n)) for n in counts}
        facts = {n: floor_facts(bench, settings, parts.exported.program(n), policy.cap + 1) for n in counts}
        times = call_times(bench, settings)
    finally:
        bench.close()
    schedules, report = {}, {}
    for n, record in records.items():
        cap = min(policy.cap, facts[n].cap())
        decide, fitted, reached = decision(policy._replace(cap=cap), record)
        first = min(policy.warm_up - 1, record.calls)
        schedules[str(n)] = contract.Schedule((*[FULL] * first, *[reuse] * (record.calls - first)), decide)
        report[str(n)] = {"polynomial": list(decide.polynomial), "threshold": decide.threshold, "skipped": reached,
                          "fit_error": None if fitted is None else fitted.error, "max_consecutive": cap,
                          "noise": facts[n].noise.tolist(), "floor_cap": facts[n].cap()}  # fmt: skip
    plan = CachePlan(
        parts.exported.graph_digest, parts.exported.scheduler, parts.exported.scheduler_digest, settings.policy,
        {reuse: settings.cut}, schedules,
        {"share": policy.share, "warm_up": float(policy.warm_up), "cap": float(policy.cap),
         contract.GUIDANCE: settings.guidance}, probe,
    )  # fmt: skip
    check_cache_plan(plan, "cache plan")
    programs = {n: cached_program(parts.exported.program(n), plan, plan.config, {}) for n in counts}
    for n, program in programs.items():
        skipped, probed = report[str(n)]["skipped"], times[PROBE]
        report[str(n)]["predicted_ms"] = predicted_ms(program, times, probe_ms=probed, skipped=skipped)
    return DynamicFit(plan, programs, records, {"policy": settings.policy, "ms_per_call": times, "steps": report})


def probe_of(policy: str, cut: contract.Cut, graph: Graph) -> Probe | None:
    """What a policy looks at while it runs; `None` for one that is fixed beforehand.

    Raises:
        ExportError: the model has no first block to look at.
    """
    from quantempo.export.cut_points import first_block_list

    name = policy.partition(":")[0]
    if name not in POLICIES:
        return None
    return Probe(POLICIES[name], first_block_list(graph) if isinstance(cut, contract.FeatureCut) else cut.blocks)


def parse_dynamic(text: str) -> DynamicPolicy:
    """A policy from its words, such as `teacache:0.5` or `teacache:0.5,warmup=4,cap=3`.

    Raises:
        RequestError: not such a word.
    """
    first, *further = text.split(",")
    name, share = parse_share(
        first, tuple(POLICIES), "teacache:SHARE or firstblock:SHARE, with a share in 0 to 1",
        lambda share: 0 <= share < 1, example="0.5",
    )
    given: dict[str, int] = {}
    for word in further:
        key, _, number = word.partition("=")
        lowest = {"warmup": 2, "cap": 1}.get(key)
        if lowest is None or key in given or not number.isdecimal() or int(number) < lowest:
            raise RequestError(
                "cache policy", found=repr(word), wanted="warmup=CALLS of at least 2, or cap=CALLS of at least 1",
                cause="a misspelling, or a number out of range", remedy=f"write for example {first},warmup=4,cap=3",
            )
        given[key] = int(number)
    return DynamicPolicy(name, share, given.get("warmup", WARM_UP), given.get("cap", CAP))


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
    policy: DynamicPolicy, record: IndicatorRecord
) -> tuple[Decide, PolynomialFit | None, float]:
    """The rule that skips a share of the calls, the polynomial that it uses, and the share that it reaches."""
    changes, fitted = record.changes, None
    accumulate, reference = False, "last_refresh"
    polynomial: tuple[float, ...] = (1.0, 0.0)
    if policy.name == "teacache":
        fitted = fit_polynomial(changes[:, 1:, 1], record.outputs[:, 1:])
        accumulate, reference, polynomial = True, "previous_call", fitted.coefficients

    def rule(threshold: float) -> Rule:
        return Rule(threshold, polynomial, accumulate, reference, policy.cap, policy.warm_up)

    threshold, reached = threshold_for(changes, rule, policy.share)
    kind: Literal["previous_call", "last_refresh"] = "previous_call" if accumulate else "last_refresh"
    decide = Decide(PROBE, threshold, FULL, polynomial, accumulate, kind, policy.cap)
    return decide, fitted, reached
