"""Feature caching across calls: where the graph is cut, which call runs which variant, and what that was fitted for.

`full` computes everything and writes the cached features; a variant `reuse.k` reads some of them instead of computing
them.  A feature has one name, `cache.N`, in all variants that write or read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar, Literal, Union

from quantempo.contracts.program import FITTED_GUIDANCE, Decide, StepProgram
from quantempo.errors import DataError, nearest

CACHE_PLAN_VERSION = 1
FULL = "full"
PROBE = "probe"
FEATURE_STEM = "cache."
GUIDANCE = "guidance"
"""Among a plan's parameters: the guidance scale of the runs that schedules and corrections were fitted on."""
_REUSE = re.compile(r"reuse\.(0|[1-9]\d*)")


def reuse_name(index: int) -> str:
    """Name of the reuse variant with an index."""
    return f"reuse.{index}"


def feature_name(index: int) -> str:
    """Name of the cached feature with an index: an output where it is written, an input where it is read."""
    return f"{FEATURE_STEM}{index}"


def correction_inputs(feature: str, of: Literal["feature", "product"]) -> tuple[str, str]:
    """Graph inputs of a feature's gain and bias, float32 [channels].

    Args:
        feature: its name.
        of: the cached feature itself, or the product that consumes it.
    """
    stem = feature if of == "feature" else f"{feature}.product"
    return f"{stem}.gain", f"{stem}.bias"


@dataclass(frozen=True)
class FeatureCut:
    """Values are kept as they are, and fed back (DeepCache: the deep input of an up-branch's concatenation).

    Args:
        tensors: value names in the float graph.
    """

    kind: ClassVar[str] = "feature"
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class DeltaCut:
    """What a range of blocks adds to the hidden state is kept, and added to the fresh one (Delta-DiT).

    Args:
        first, last: the blocks that a reusing call leaves out, both included.
        depth: how many blocks the model has.
        blocks: module path of the list of blocks.
    """

    kind: ClassVar[str] = "delta"
    first: int
    last: int
    depth: int
    blocks: str = "transformer_blocks"


@dataclass(frozen=True)
class SublayerCut:
    """Outputs of attention and MLP layers before their gates are kept (FORA; Learning-to-Cache).

    Args:
        mask: per block one flag per sublayer in the order of the graph (attention, MLP): whether it is reused.
        blocks: module path of the list of blocks.
    """

    kind: ClassVar[str] = "sublayers"
    mask: tuple[tuple[bool, ...], ...]
    blocks: str = "transformer_blocks"

    @property
    def depth(self) -> int:
        """How many blocks the mask is for."""
        return len(self.mask)


CorrectionName = Literal["feature", "product", "prediction", "latents"]
Cut = Union[FeatureCut, DeltaCut, SublayerCut]


@dataclass(frozen=True)
class Probe:
    """What the variant `probe` computes as `indicator`.

    Args:
        of: what the first block's first layer reads that depends on timestep or condition (TeaCache's modulated input),
            or what the first block adds to the hidden state (first-block caching).
        blocks: module path of the list of blocks.
    """

    of: Literal["modulated_input", "first_block"]
    blocks: str = "transformer_blocks"


@dataclass(frozen=True)
class Schedule:
    """Which call of a program runs which variant.

    Args:
        calls: variant by call (not by step: a two-call method has two per step).
        decide: at each call that names a reuse variant, the choice at run time; `None` for a fixed schedule.
        row: the vectors of call `i` lie in row `row + i` of the bundle's vectors.
    """

    calls: tuple[str, ...]
    decide: Decide | None = None
    row: int = 0


@dataclass(frozen=True)
class CachePlan:
    """How a bundle caches; replayed by its programs.

    Args:
        model: digest of the float graph that the cuts refer to.
        scheduler: class name, as in `ProgramIndex`.
        config: digest of the scheduler's configuration, as in `ProgramIndex`.
        policy: name of what chose the schedules.
        parameters: the policy's numbers, and `GUIDANCE`.
        cuts: by variant name, `reuse.0` and so on.
        schedules: by number of steps (a decimal string).
        probe: what dynamic decisions look at.
        corrections: which are in it: `feature` and `product` on graph inputs, `prediction` and `latents` in programs.
    """

    model: str
    scheduler: str
    config: str
    policy: str
    cuts: Mapping[str, Cut]
    schedules: Mapping[str, Schedule]
    parameters: Mapping[str, float] = field(default_factory=dict)
    probe: Probe | None = None
    corrections: tuple[CorrectionName, ...] = ()
    version: int = CACHE_PLAN_VERSION


def check_cache_plan(plan: CachePlan, where: str) -> None:
    """Refuse a plan that cannot be followed.

    Args:
        plan: from a file, or just made.
        where: the plan's file, for messages.

    Raises:
        DataError: names the place: a schedule whose first call reuses, an unknown variant, a threshold out of range,
            masks of different depths, a block range outside the model, or another version.
    """
    if plan.version != CACHE_PLAN_VERSION:
        raise _refuse(f"{where}: version", str(plan.version), str(CACHE_PLAN_VERSION), "compile the bundle again")
    for name, cut in plan.cuts.items():
        if not _REUSE.fullmatch(name):
            raise _refuse(f"{where}: cuts", f"a variant {name!r}", "names like 'reuse.0'", "rename the variant")
        check_cut(cut, f"{where}: cuts.{name}")
    depths: dict[str, int] = {}
    for name, cut in plan.cuts.items():
        if not isinstance(cut, FeatureCut) and depths.setdefault(cut.blocks, cut.depth) != cut.depth:
            raise _refuse(
                f"{where}: cuts.{name}", f"depth {cut.depth}", f"{depths[cut.blocks]}, as in the variants before it",
                "fit the plan anew for this model",
            )
    for steps, schedule in plan.schedules.items():
        if not steps.isdecimal() or int(steps) < 1:
            raise _refuse(f"{where}: schedules", f"the key {steps!r}", "a number of steps", "correct the key")
        _check_schedule(schedule, plan, f"{where}: schedules.{steps}")


def check_cut(cut: Cut, where: str) -> None:
    """Refuse a cut that makes no sense for any graph.

    Raises:
        DataError: naming the field.
    """
    if isinstance(cut, FeatureCut):
        if not cut.tensors or len(set(cut.tensors)) != len(cut.tensors):
            raise _refuse(where, f"tensors {list(cut.tensors)}", "one or more, each once", "name the cached tensors")
    elif isinstance(cut, DeltaCut):
        if not 0 <= cut.first <= cut.last < cut.depth:
            raise _refuse(
                where, f"blocks {cut.first} to {cut.last} of {cut.depth}", f"a range within 0 to {cut.depth - 1}",
                "choose blocks that the model has",
            )
    elif len({len(row) for row in cut.mask}) != 1 or not any(map(any, cut.mask)):
        raise _refuse(
            where, f"a mask of {cut.depth} blocks, {sum(map(sum, cut.mask))} sublayers reused",
            "rows of one length with at least one reused sublayer", "run 'full' where nothing is reused",
        )


def _check_schedule(schedule: Schedule, plan: CachePlan, where: str) -> None:
    if not schedule.calls:
        raise _refuse(where, "no calls", "one variant per call", "fit the plan anew")
    if schedule.calls[0] != FULL:
        raise _refuse(
            f"{where}, call 0", f"the variant {schedule.calls[0]!r}", f"{FULL!r}: there are no features to reuse yet",
            "let the policy refresh at the first call",
        )
    for index, name in enumerate(schedule.calls):
        if name != FULL and name not in plan.cuts:
            raise _refuse(f"{where}, call {index}", f"the variant {name!r}", f"{FULL!r} or one of the cuts",
                          nearest(name, (FULL, *plan.cuts)))
    decide = schedule.decide
    if decide is None:
        return
    if not math.isfinite(decide.threshold) or decide.threshold < 0:
        raise _refuse(f"{where}.decide.threshold", str(decide.threshold), "a finite number of at least 0",
                      "0 refreshes at every call; larger ones reuse more")
    if decide.max_consecutive < 1:
        raise _refuse(f"{where}.decide.max_consecutive", str(decide.max_consecutive), "at least 1",
                      "take a fixed schedule of 'full' calls to turn caching off")
    if plan.probe is None:
        raise _refuse(f"{where}.decide", "a decision at run time", "a plan with a probe", "say what the probe computes")


def cached_program(
    program: StepProgram, plan: CachePlan, config: str, vectors: Mapping[str, Sequence[str]]
) -> StepProgram:
    """The program with the plan's variants, decisions and vector rows in its calls.

    Args:
        program: uncached.
        plan: checked.
        config: digest of the configuration that the program was traced from.
        vectors: by variant, the graph inputs that take a vector per call.

    Raises:
        DataError: the plan was fitted for another scheduler, step count or number of calls.
    """
    steps = str(program.steps)
    here = (program.scheduler, config)
    if here != (plan.scheduler, plan.config) or steps not in plan.schedules:
        raise _refuse(
            f"cache plan, program of {program.scheduler} with {steps} steps",
            f"a plan for {plan.scheduler} with {', '.join(sorted(plan.schedules, key=int)) or 'no'} steps"
            + (" and other settings" if program.scheduler == plan.scheduler and config != plan.config else ""),
            "one for this scheduler, its settings and this step count", "fit a plan for them, or run without caching",
        )
    schedule = plan.schedules[steps]
    if len(schedule.calls) != len(program.calls):
        raise _refuse(
            f"cache plan, schedules.{steps}", f"{len(schedule.calls)} calls",
            f"{len(program.calls)}, as in the program",
            "count calls of the denoiser, not steps: some schedulers make two calls per step",
        )
    calls = []
    for index, (call, name) in enumerate(zip(program.calls, schedule.calls, strict=True)):
        rows = dict.fromkeys(vectors.get(name, ()), schedule.row + index)
        decide = schedule.decide if name != FULL else None
        calls.append(replace(call, graph=name, vectors=rows, decide=decide))
    guidance = plan.parameters.get(GUIDANCE)
    options = program.options if guidance is None else {**program.options, FITTED_GUIDANCE: guidance}
    return replace(program, calls=tuple(calls), options=options)


def merge_masks(
    masks: Sequence[SublayerCut | None], bound: int
) -> tuple[dict[str, SublayerCut], tuple[str, ...]]:
    """At most `bound` variants that serve a list of masks, and the variant of each mask.

    Equal masks are one variant.  While there are too many, the two whose merger costs the fewest reused sublayers,
    counted over all calls, become one that reuses what both reuse: a call never reuses more than its mask allows.  A
    mask that is left with nothing to reuse becomes `full`.

    Args:
        masks: by call, of one depth; `None` for a refresh.
        bound: at least 1.
    """
    if bound < 1:
        raise ValueError(f"bound {bound} below 1")
    groups: dict[SublayerCut, list[int]] = {}
    for index, cut in enumerate(masks):
        if cut is not None:
            groups.setdefault(cut, []).append(index)
    while len(groups) > bound:
        def cost(pair: tuple[SublayerCut, SublayerCut]) -> int:
            common = _reused(_both(*pair))
            return sum((_reused(cut) - common) * len(groups[cut]) for cut in pair)

        a, b = min(combinations(groups, 2), key=cost)
        calls = groups.pop(a) + groups.pop(b)
        groups.setdefault(_both(a, b), []).extend(calls)
    names = [FULL] * len(masks)
    cuts: dict[str, SublayerCut] = {}
    for cut, calls in sorted(groups.items(), key=lambda item: min(item[1])):
        if _reused(cut):
            name = reuse_name(len(cuts))
            cuts[name] = cut
            for index in calls:
                names[index] = name
    return cuts, tuple(names)


def _both(a: SublayerCut, b: SublayerCut) -> SublayerCut:
    rows = zip(a.mask, b.mask, strict=True)
    return SublayerCut(tuple(tuple(x and y for x, y in zip(p, q, strict=True)) for p, q in rows), a.blocks)


def _reused(cut: SublayerCut) -> int:
    return sum(map(sum, cut.mask))


def _refuse(where: str, found: str, wanted: str, remedy: str) -> DataError:
    return DataError(
        where, found=found, wanted=wanted, cause="the cache plan was edited, or made for another model or program",
        remedy=remedy,
    )
