"""Feature caching, fitted on the quantized model.

The order matters, because each part is fitted with all earlier ones active: the policy on features of the float model;
scales of the reusing variant on its own calls of the cached trajectory; the correction of the cached features, then of
the prediction, then of the latents, each on the trajectory of the quantized, cached model as corrected so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantempo.calib.cache.cost import predicted_ms
from quantempo.calib.cache.noise_floor import NoiseFloor, judge
from quantempo.calib.cache.schedules import Schedule
from quantempo.calib.collect import StatsCollector
from quantempo.calib.tables import build_table
from quantempo.contracts import cache as contract
from quantempo.contracts.cache import FULL, CachePlan, cached_program, check_cache_plan
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import Correct, StepProgram
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.contracts.table import ScaleTable
from quantempo.errors import RequestError, nearest
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_corrections import StepsFit, fit_corrections
from quantempo.stages.cache_runs import (
    CacheParts,
    CacheSettings,
    Corrected,
    Float32s,
    VariantBench,
    fitting_runs,
    graph_corrections,
)
from quantempo.stages.cache_schedules import ScheduleSearch
from quantempo.stages.cache_times import call_times
from quantempo.stages.quantizers import activation_bits

POLICIES = ("every", "power", "dps", "programmed")


@dataclass(frozen=True, eq=False)
class CacheFit:
    """All artefacts of caching.

    Args:
        plan: the cache plan.
        programs: cached, by number of steps.
        vectors: for the bundle's vectors file.
        tables: scales by variant.
        fits: by number of steps.
        report: plain data.
    """

    plan: CachePlan
    programs: Mapping[int, StepProgram]
    vectors: Mapping[str, Float32s]
    tables: Mapping[str, ScaleTable]
    fits: Mapping[int, StepsFit]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A policy's choice for one program.

    Args:
        refreshes: calls that compute everything.
        calls: variant by call.
        floor: what quantization noise says about it.
    """

    refreshes: Schedule
    calls: tuple[str, ...]
    floor: NoiseFloor | None = None


def fit_cache(parts: CacheParts, settings: CacheSettings, folder: Path, steps: Sequence[int] = ()) -> CacheFit:
    """Fit a policy of fixed schedules, its scales and its corrections.

    Args:
        parts: the quantized model.
        settings: what to fit.
        folder: an empty folder for graphs; it may be deleted afterwards.
        steps: numbers of steps; default: those of the recipe.

    Raises:
        RequestError: a policy that is unknown or out of range.
        ExportError: the cut does not fit the model.
    """
    name, interval = parse_policy(settings.policy)
    reuse = contract.reuse_name(0)
    bench = VariantBench(parts, folder, {reuse: settings.cut}, graph_corrections(settings.corrections))
    try:
        chosen = {}
        for n in tuple(steps) or parts.recipe.steps:
            program = parts.exported.program(n)
            search = ScheduleSearch(bench, settings, program)
            refreshes = search.schedule(name, interval)
            calls = tuple(FULL if i in refreshes else reuse for i in range(len(program.calls)))
            chosen[n] = Chosen(refreshes, calls, judge(refreshes, search.floor_facts(interval)))
        return fit_chosen(bench, settings, {reuse: settings.cut}, chosen, {"interval": float(interval)})
    finally:
        bench.close()


def fit_chosen(
    bench: VariantBench, settings: CacheSettings, cuts: Mapping[str, contract.Cut], chosen: Mapping[int, Chosen],
    parameters: Mapping[str, float],
) -> CacheFit:
    """Scales and corrections for schedules that were chosen.

    Args:
        bench: with these cuts; the caller closes it.
        settings: what to fit.
        cuts: by variant.
        chosen: by number of steps.
        parameters: of the policy, for the plan.
    """
    parts, counts = bench.parts, sorted(chosen)
    plain = {n: parts.exported.program(n) for n in counts}
    plan = _plan(parts, settings, cuts, chosen, parameters)
    cached = {n: cached_program(p, _alone(plan, n), plan.config, bench.set.vectors()) for n, p in plain.items()}
    tables = variant_tables(bench, settings, cached)
    bench.quantize(tables)
    fits = {}
    for n in counts:
        fits[n] = fit_corrections(bench, settings, plain[n], cached[n], chosen[n].refreshes, chosen[n].floor)
    plan = replace(plan, corrections=kept_corrections(fits.values()))
    fits = {n: _without(fit, plan) for n, fit in fits.items()}
    programs = {n: _shifted(fits[n].program, plan.schedules[str(n)].row) for n in counts}
    check_cache_plan(plan, "cache plan")
    times = call_times(bench, settings)
    steps = {str(n): {**fit.report(), "predicted_ms": predicted_ms(fit.program, times)} for n, fit in fits.items()}
    report = {"policy": settings.policy, "ms_per_call": times, "steps": steps}
    return CacheFit(plan, programs, stacked_vectors([fits[n] for n in counts]), tables, fits, report)


def kept_corrections(fits: Iterable[StepsFit]) -> tuple[contract.CorrectionName, ...]:
    """What the guard kept at any number of steps, as a plan lists it."""
    kept = {name for fit in fits for name in fit.kept}
    words: dict[Corrected, contract.CorrectionName] = {
        "feature": "feature", "product": "product", "history": "prediction", "prediction": "prediction",
        "noise": "prediction", "latents": "latents",
    }
    return tuple(sorted({words[name] for name in kept}))


def _without(fit: StepsFit, plan: CachePlan) -> StepsFit:
    """The fit without vectors of graph corrections that the plan has not kept: its graphs do not take them."""
    dropped = {
        name for name in fit.vectors if name.startswith(contract.FEATURE_STEM)
        and ("product" if ".product." in name else "feature") not in plan.corrections
    }  # fmt: skip
    calls = [
        replace(call, vectors={n: row for n, row in call.vectors.items() if n not in dropped})
        for call in fit.program.calls
    ]
    vectors = {name: values for name, values in fit.vectors.items() if name not in dropped}
    return replace(fit, program=replace(fit.program, calls=tuple(calls)), vectors=vectors)


def stacked_vectors(fits: Sequence[StepsFit]) -> dict[str, Float32s]:
    """The arrays of several step counts, one below the other, with identity rows where a correction was not kept.

    Args:
        fits: in the order of the rows in the plan.
    """
    widths = {name: values.shape[1] for fit in fits for name, values in fit.vectors.items()}
    found: dict[str, Float32s] = {}
    for name, width in sorted(widths.items()):
        fill = 1.0 if name.endswith(".gain") else 0.0
        rows = [
            fit.vectors.get(name, np.full((len(fit.program.calls), width), fill, np.float32)) for fit in fits
        ]
        found[name] = np.concatenate(rows)
    return found


def parse_policy(text: str) -> tuple[str, int]:
    """Name and interval of a static policy.

    Raises:
        RequestError: not such a word.
    """
    name, _, number = text.partition(":")
    if name not in POLICIES or not number.isdecimal() or int(number) < 1:
        raise RequestError(
            "cache policy", found=repr(text), wanted="every:N, power:N, dps:N or programmed:N, with N of at least 1",
            cause="a misspelling" if name not in POLICIES else "the interval is missing or not a number",
            remedy=nearest(name, POLICIES) if name not in POLICIES else f"write for example {name}:2",
        )
    return name, int(number)


def variant_tables(
    bench: VariantBench, settings: CacheSettings, programs: Mapping[int, StepProgram]
) -> dict[str, ScaleTable]:
    """Scales by variant: a reusing one has its own, from its calls of the cached float runs.

    `full` keeps the model's unless it is asked for `apart`: a bundle runs it in uncached runs as well, and at other
    guidance scales and step counts than the fit's.  Groups in which a variant is never called take the statistics of
    `full` there.
    """
    parts, base = bench.parts, bench.parts.statistics.stats()
    tables = {FULL: parts.table}
    if settings.scales == "shared":
        return dict.fromkeys(bench.set.variants, parts.table)
    reusing = [name for name in bench.set.variants if name != FULL or settings.scales == "apart"]
    taps = {name: bench.tensors(name) for name in reusing}
    collectors = {name: StatsCollector(name, taps[name], [t for t in parts.plan.centred if t in taps[name]])
                  for name in reusing if taps[name]}  # fmt: skip

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        collector = collectors.get(seen.graph)
        if collector is not None:
            values = {tensor: outputs[tensor].array for tensor in taps[seen.graph]}
            collector.observe(seen.call.key, values, seeds=seen.seeds)

    for program in programs.values():
        loop = bench.loop("float", bench.identity_vectors(len(program.calls)), taps)
        fitting_runs(bench, settings, loop, program, watch)
    bits = activation_bits(parts.plan)
    for name in reusing:
        if name not in collectors or not collectors[name].samples():
            tables[name] = parts.table  # nothing of it is quantized, or no call runs it
            continue
        cells = _with_gaps_filled(collectors[name].stats(), base, parts.table)
        chosen = {tensor: bits[tensor] for tensor in taps[name]}
        centred = [t for t in parts.plan.centred if t in chosen]
        tables[name] = build_table(cells, parts.table.partition, parts.recipe.range_method, chosen, centred=centred)
    return tables


def _with_gaps_filled(
    own: Mapping[StatsKey, TensorStats], base: Mapping[StatsKey, TensorStats], table: ScaleTable
) -> dict[StatsKey, TensorStats]:
    """A variant's cells; in groups that it never visits, those of the base under the variant's name."""
    graph = next(iter(own)).graph
    tensors = {key.tensor for key in own}
    visited = {(key.tensor, table.partition.group_of(key.key)) for key in own}
    filled = dict(own)
    for key, stats in base.items():
        if key.tensor in tensors and (key.tensor, table.partition.group_of(key.key)) not in visited:
            filled[replace(key, graph=graph)] = stats
    return filled


def _plan(
    parts: CacheParts, settings: CacheSettings, cuts: Mapping[str, contract.Cut], chosen: Mapping[int, Chosen],
    parameters: Mapping[str, float],
) -> CachePlan:
    row, made = 0, {}
    for n, choice in sorted(chosen.items()):
        made[str(n)] = contract.Schedule(choice.calls, row=row)
        row += len(choice.calls)
    return CachePlan(
        model=parts.exported.graph_digest, scheduler=parts.exported.scheduler, config=parts.exported.scheduler_digest,
        policy=settings.policy, cuts=dict(cuts), schedules=made,
        parameters={**parameters, contract.GUIDANCE: settings.guidance},
    )


def _alone(plan: CachePlan, steps: int) -> CachePlan:
    """The plan of one number of steps, with vectors from row 0 on."""
    return replace(plan, schedules={str(steps): replace(plan.schedules[str(steps)], row=0)})


def _shifted(program: StepProgram, rows: int) -> StepProgram:
    """The program with all vector rows moved."""
    calls = []
    for call in program.calls:
        update = tuple(replace(op, row=op.row + rows) if isinstance(op, Correct) else op for op in call.update)
        vectors = {name: row + rows for name, row in call.vectors.items()}
        calls.append(replace(call, update=update, vectors=vectors))
    return replace(program, calls=tuple(calls))
