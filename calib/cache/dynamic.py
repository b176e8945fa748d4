"""Decisions at run time: polynomials and thresholds, fitted on calibration runs of the quantized model.

TeaCache (Liu et al. 2025) estimates how far the output moves from how far a cheap indicator moves, by a polynomial; it
sums the estimates since the last refresh and refreshes when the sum reaches a threshold.  First-block caching compares
the indicator with the one at the last refresh and takes the change itself.  Both are `Decide` in a step program;
`replay` is the same rule on recorded indicator changes, so that a threshold can be chosen without running the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import CalibrationError, RequestError

Floats = NDArray[np.float64]
MAX_DEGREE = 4


def relative_change(values: NDArray[Any], reference: NDArray[Any]) -> Floats:
    """`mean|values - reference| / mean|reference|` of each row, in float64."""
    rows = len(values)
    a, b = (np.asarray(v, np.float64).reshape(rows, -1) for v in (values, reference))
    result: Floats = np.abs(a - b).mean(axis=1) / np.maximum(np.abs(b).mean(axis=1), np.finfo(np.float64).tiny)
    return result


class IndicatorRecord:
    """How far indicator and output move, per sample: what polynomials and thresholds are fitted on.

    Observe uncached runs, the calls of each in order; a call 0 begins a new run.  Per row it keeps the indicators of
    the last `longest` - 1 calls while the run lasts, and one number per pair of calls.

    Args:
        calls: of the program.
        longest: the largest distance to a last refresh that is looked at, plus 1.
    """

    def __init__(self, calls: int, longest: int | None = None) -> None:
        self.calls = calls
        self.longest = min(longest or calls, calls)
        self._runs: list[tuple[Floats, Floats]] = []
        self._recent: deque[NDArray[Any]] = deque(maxlen=max(1, self.longest - 1))
        self._output: NDArray[Any] | None = None

    def observe(self, call: int, indicator: NDArray[Any], output: NDArray[Any]) -> None:
        """Add one call: both (rows, …)."""
        if call == 0:
            rows = len(indicator)
            self._runs.append((np.full((rows, self.calls, self.longest), np.nan), np.full((rows, self.calls), np.nan)))
            self._recent.clear()
            self._output = None
        elif not self._runs:
            raise CalibrationError(
                "indicators", found=f"a run that begins at call {call}", wanted="call 0 first",
                cause="calls were left out", remedy="observe every call of a run in order",
            )
        indicators, outputs = self._runs[-1]
        for distance, earlier in enumerate(reversed(self._recent), start=1):
            if distance < self.longest:
                indicators[:, call, distance] = relative_change(indicator, earlier)
        if self._output is not None:
            outputs[:, call] = relative_change(output, self._output)
        self._recent.append(np.array(indicator, copy=True))
        self._output = np.array(output, copy=True)

    @property
    def changes(self) -> Floats:
        """`[sample, call, k]`: relative change of the indicator from call - k to call; NaN where there is none."""
        return np.concatenate([indicators for indicators, _ in self._runs])

    @property
    def outputs(self) -> Floats:
        """`[sample, call]`: relative change of the output from the call before."""
        return np.concatenate([outputs for _, outputs in self._runs])


@dataclass(frozen=True)
class PolynomialFit:
    """A fitted polynomial.

    Args:
        coefficients: highest power first, as `Decide.polynomial`.
        low, high: the range of changes that it was fitted on.
        error: root mean square of the held-out residuals, relative to the spread of the output changes.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float
    error: float


def fit_polynomial(
    indicator_changes: Floats, output_changes: Floats, max_degree: int = MAX_DEGREE
) -> PolynomialFit:
    """The polynomial that maps an indicator's relative change to the output's.

    Candidates are all degrees from 1 to `max_degree` that the points support (three points per coefficient) and whose
    slope and value are nowhere negative on the observed range: a larger change of the indicator must never look safer.
    Leave-one-out error decides; a higher degree has to win by 2 %.  Where no candidate passes it is the line through
    the origin.

    Args:
        indicator_changes: any shape; pairs with NaN are left out.
        output_changes: of the same shape.
        max_degree: 1 to 4.

    Raises:
        RequestError: a degree out of range.
        CalibrationError: fewer than two pairs.
    """
    if not 1 <= max_degree <= MAX_DEGREE:
        raise RequestError(
            "polynomial", found=f"degree {max_degree}", wanted=f"1 to {MAX_DEGREE}",
            cause="higher degrees follow the noise of the calibration runs", remedy=f"use {MAX_DEGREE}",
        )
    valid = np.isfinite(indicator_changes) & np.isfinite(output_changes)
    x, y = indicator_changes[valid].astype(np.float64), output_changes[valid].astype(np.float64)
    if len(x) < 2:
        raise CalibrationError(
            "polynomial", found=f"{len(x)} pairs of changes", wanted="at least 2",
            cause="the calibration runs have too few calls", remedy="calibrate with more steps or samples",
        )
    low, high = float(x.min()), float(x.max())
    spread = float(y.std()) or 1.0
    slope = max(0.0, float(x @ y) / max(float(x @ x), np.finfo(np.float64).tiny))
    best: tuple[float, ...] = (slope, 0.0)
    lowest = math.inf
    for degree in range(1, max_degree + 1):
        if len(np.unique(x)) < 3 * (degree + 1):
            break
        coefficients, error = _least_squares(x, y, degree)
        if error < 0.98 * lowest and _rises(coefficients, low, high):
            best, lowest = coefficients, error
    if math.isinf(lowest):
        lowest = float(np.sqrt(np.mean((y - slope * x) ** 2)))
    return PolynomialFit(tuple(float(c) for c in best), low, high, lowest / spread)


def _least_squares(x: Floats, y: Floats, degree: int) -> tuple[tuple[float, ...], float]:
    """Coefficients, highest first, and the root mean square of the leave-one-out residuals."""
    scale = float(np.abs(x).max()) or 1.0
    matrix = np.vander(x / scale, degree + 1)
    q, r = np.linalg.qr(matrix)
    solved = np.linalg.lstsq(r, q.T @ y, rcond=None)[0]
    leverage = np.minimum((q * q).sum(axis=1), 1 - 1e-9)
    residual = (y - matrix @ solved) / (1 - leverage)
    powers = scale ** np.arange(degree, -1, -1.0)
    return tuple(float(c) for c in solved / powers), float(np.sqrt(np.mean(residual**2)))


def _rises(coefficients: Sequence[float], low: float, high: float) -> bool:
    grid = np.linspace(low, high, 257)
    values = np.polyval(coefficients, grid)
    slack = 1e-9 * max(1e-300, float(np.abs(values).max()))
    return bool(values[0] >= -slack and np.all(np.diff(values) >= -slack))


@dataclass(frozen=True)
class Rule:
    """The part of `Decide` that does not name graphs; see there."""

    threshold: float
    polynomial: tuple[float, ...] = (1.0, 0.0)
    accumulate: bool = True
    reference: str = "previous_call"
    max_consecutive: int = 1000
    warm_up: int = 1


def replay(changes: Floats, rule: Rule) -> NDArray[np.bool_]:
    """Which calls refresh, `[sample, call]`, each sample by itself.

    Args:
        changes: from `IndicatorRecord.changes`.
        rule: the decision; calls before `warm_up` always refresh.
    """
    samples, calls, longest = changes.shape
    refresh = np.zeros((samples, calls), bool)
    for sample in range(samples):
        total, since = 0.0, 0
        for call in range(calls):
            since += 1
            distance = 1 if rule.reference == "previous_call" else since
            must = call < rule.warm_up or since > rule.max_consecutive or distance >= longest
            if not must:
                estimate = max(0.0, float(np.polyval(rule.polynomial, changes[sample, call, distance])))
                total = total + estimate if rule.accumulate else estimate
                must = not total < rule.threshold
            if must:
                refresh[sample, call] = True
                total, since = 0.0, 0
    return refresh


def threshold_for(changes: Floats, rule_at: Callable[[float], Rule], skipped: float) -> tuple[float, float]:
    """The smallest threshold that skips at least a share of the calls, by bisection.

    Args:
        changes: from `IndicatorRecord.changes`.
        rule_at: the rule with a threshold.
        skipped: wanted share of calls that reuse, averaged over samples, 0 to 1.

    Returns:
        Threshold and the share that it skips.

    Raises:
        RequestError: a share out of range, or one that the rule's warm-up and cap do not allow.
    """
    if not 0 <= skipped < 1:
        raise RequestError(
            "cache threshold", found=f"a share {skipped:g} of skipped calls", wanted="0 or more, below 1",
            cause="the first call is never skipped", remedy="give, for example, 0.5",
        )

    def share(threshold: float) -> float:
        return 1.0 - float(replay(changes, rule_at(threshold)).mean())

    high = 1.0
    while share(high) < skipped:
        high *= 4.0
        if high > 1e12:
            raise RequestError(
                "cache threshold", found=f"a share {skipped:g} of skipped calls", wanted=f"at most {share(high):g}",
                cause="warm-up refreshes, and the cap on consecutive reuse, which the noise floor may have lowered",
                remedy="ask for less, or raise the cap where it is the policy's",
            )
    low = 0.0
    if share(low) >= skipped:
        return low, share(low)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if share(middle) >= skipped else (middle, high)
    return high, share(high)


def averaged(refresh: NDArray[np.bool_], count: int | None = None) -> tuple[int, ...]:
    """A fixed schedule from decisions: the calls that most samples refresh.

    Args:
        refresh: `[sample, call]`, from `replay`.
        count: how many refreshes; default: the mean number, rounded.  Ties go to the earlier call.
    """
    share = refresh.mean(axis=0)
    share[0] = np.inf
    wanted = max(1, round(float(refresh.sum(axis=1).mean())) if count is None else count)
    order = np.argsort(-share, kind="stable")[:wanted]
    return tuple(sorted(int(i) for i in order))
