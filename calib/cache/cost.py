"""What a policy costs in time, and which one to take under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quantempo.contracts.program import StepProgram
from quantempo.errors import RequestError


@dataclass(frozen=True)
class Candidate:
    """One row of the table of policies.

    Args:
        name: of the policy, as a user would write it.
        kind: `fewer_steps` is the float model with fewer steps, the line that a plan has to beat.
        predicted_ms: time of a trajectory, from the variants' times.
        psnr_db: to the float model at the full number of steps.
        measured_ms: of a whole trajectory, where it was run.
    """

    name: str
    kind: Literal["plan", "fewer_steps"]
    predicted_ms: float
    psnr_db: float
    measured_ms: float | None = None

    @property
    def milliseconds(self) -> float:
        """Measured time where there is one."""
        return self.predicted_ms if self.measured_ms is None else self.measured_ms


def predicted_ms(
    program: StepProgram, times: Mapping[str, float], overhead_ms: float = 0.0, probe_ms: float = 0.0,
    skipped: float | None = None,
) -> float:
    """Time of a trajectory.

    Args:
        program: with the variants in its calls.
        times: milliseconds per call, by variant.
        overhead_ms: of the loop, per call.
        probe_ms: of a probe, per call that decides at run time.
        skipped: for decisions at run time, the expected share of deciding calls that reuse.

    Raises:
        RequestError: a variant without a time.
    """
    total = 0.0
    for call in program.calls:
        if call.graph not in times:
            raise RequestError(
                "cost of a policy", found=f"no measured time of {call.graph!r}", wanted="one per variant",
                cause="the variant was not timed", remedy="measure it: known are " + ", ".join(sorted(times)),
            )
        time = times[call.graph]
        if call.decide is not None:
            share = 0.0 if skipped is None else skipped
            time = probe_ms + share * time + (1 - share) * times[call.decide.refresh]
        total += time + overhead_ms
    return total


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other one beats in time and quality both, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.milliseconds, -c.psnr_db, c.name)):
        if not front or candidate.psnr_db > front[-1].psnr_db:
            front.append(candidate)
    return tuple(front)


def float_psnr_at(milliseconds: float, candidates: Sequence[Candidate]) -> float:
    """PSNR that the float model with fewer steps reaches in a time: linear between its rows, -infinity below them."""
    line = pareto([c for c in candidates if c.kind == "fewer_steps"])
    best = -math.inf
    if not line:
        return best
    for left, right in zip(line, (*line[1:], None), strict=True):
        if left.milliseconds > milliseconds:
            break
        best = left.psnr_db
        if right is not None and right.milliseconds > milliseconds:
            share = (milliseconds - left.milliseconds) / (right.milliseconds - left.milliseconds)
            best += share * (right.psnr_db - left.psnr_db)
    return best


def loses_to_fewer_steps(candidate: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Whether the float model with fewer steps is at least as good in the same time."""
    return float_psnr_at(candidate.milliseconds, candidates) >= candidate.psnr_db


def choose(
    candidates: Sequence[Candidate], *, min_psnr: float | None = None, max_ms: float | None = None
) -> Candidate:
    """The best plan under a budget.

    With `max_ms` the one of highest PSNR that is fast enough (and good enough, if both are given); with `min_psnr`
    alone the fastest that is good enough; without a budget the one that gains the most PSNR over the float model with
    fewer steps in the same time.  A plan that loses to that model is never taken.

    Raises:
        RequestError: no plan fits; names the nearest one.
    """
    plans = [c for c in candidates if c.kind == "plan" and not loses_to_fewer_steps(c, candidates)]
    front = pareto(plans)
    fitting = [
        c for c in front
        if (min_psnr is None or c.psnr_db >= min_psnr) and (max_ms is None or c.milliseconds <= max_ms)
    ]  # fmt: skip
    if not fitting:
        raise RequestError(
            "cache budget", found=_budget(min_psnr, max_ms), wanted="a budget that some policy keeps",
            cause="no measured policy is that fast and that good at once"
            if plans else "every policy loses to the float model with fewer steps",
            remedy=_nearest(front, min_psnr, max_ms),
        )
    if max_ms is not None:
        return max(fitting, key=lambda c: c.psnr_db)
    if min_psnr is not None:
        return min(fitting, key=lambda c: c.milliseconds)
    return max(fitting, key=lambda c: (_gain(c, candidates), -c.milliseconds))


def _gain(candidate: Candidate, candidates: Sequence[Candidate]) -> float:
    floor = float_psnr_at(candidate.milliseconds, candidates)
    return candidate.psnr_db - floor if math.isfinite(floor) else candidate.psnr_db


def _budget(min_psnr: float | None, max_ms: float | None) -> str:
    parts = [f"at least {min_psnr:g} dB"] if min_psnr is not None else []
    parts += [f"at most {max_ms:g} ms"] if max_ms is not None else []
    return " and ".join(parts) or "no budget"


def _nearest(front: Sequence[Candidate], min_psnr: float | None, max_ms: float | None) -> str:
    if not front:
        return "compile without caching"
    pick = front[0] if max_ms is not None and max_ms < front[0].milliseconds else front[-1]
    if max_ms is not None and min_psnr is not None and max_ms >= front[0].milliseconds:
        pick = max((c for c in front if c.milliseconds <= max_ms), key=lambda c: c.psnr_db)
    return f"the nearest policy is {pick.name}: {pick.psnr_db:.1f} dB in {pick.milliseconds:.1f} ms"
