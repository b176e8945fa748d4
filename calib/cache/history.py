"""Linear prediction from what a run has at hand: a correction that a step program carries out by itself.

At a reusing call the program knows the prediction of the reusing graph, those of the last two refreshes, and what the
denoiser was fed.  The float prediction is regressed on these four by least squares, with one coefficient each per call.
Reuse as it is, is the coefficients (1, 0, 0, 0); so a fit can only gain on its own samples, and steps towards it are
judged on held-out ones.  It costs one linear form per call and no change of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.corrections import FOLDS, STEPS
from quantempo.calib.cache.schedules import check_schedule
from quantempo.contracts.program import PREDICTION, Lin, Operation, StepProgram

Floats = NDArray[np.float64]
LAST, BEFORE = "cache.prediction.last", "cache.prediction.before"
"""Registers with the predictions of the last refresh and of the one before."""
TERMS = (PREDICTION, LAST, BEFORE, "input")
RIDGE = 1e-6
"""Relative to the regressors' mean square, towards the identity: the terms are nearly collinear."""


@dataclass(frozen=True, eq=False)
class HistoryCorrection:
    """Coefficients of `TERMS`, (calls, 4); errors are means of squares on held-out samples, per call."""

    coefficients: Floats
    before: Floats
    after: Floats

    @property
    def kept(self) -> float:
        """Share of calls that are corrected."""
        return float(np.mean(np.any(self.coefficients != identity(), axis=1)))


def identity() -> Floats:
    """Coefficients of `TERMS` that leave the prediction as it is."""
    first: Floats = np.eye(len(TERMS))[0]
    return first


class _Recent:
    """The registers of a run: predictions of the last two refreshes."""

    def __init__(self, refreshes: Sequence[int]) -> None:
        self._refreshes = frozenset(refreshes)
        self._last: NDArray[Any] = np.empty(0)
        self._before: NDArray[Any] = np.empty(0)

    def terms(self, call: int, prediction: NDArray[Any], fed: NDArray[Any]) -> tuple[NDArray[Any], ...] | None:
        """The four terms at a reusing call; `None` at a refresh, which is taken note of."""
        if call not in self._refreshes:
            return prediction, self._last, self._before, fed
        fresh = np.array(prediction, copy=True)
        self._before = fresh if call == 0 else self._last
        self._last = fresh
        return None


class HistoryReplay:
    """What a corrected program makes of the predictions of a run, call by call in order.

    Args:
        correction: as in the program.
        refreshes: the schedule.
    """

    def __init__(self, correction: HistoryCorrection, refreshes: Sequence[int]) -> None:
        self._coefficients, self._recent = correction.coefficients, _Recent(refreshes)

    def __call__(self, call: int, prediction: NDArray[Any], fed: NDArray[Any]) -> NDArray[np.float32]:
        """The corrected prediction."""
        terms = self._recent.terms(call, prediction, fed)
        if terms is None:
            return prediction.astype(np.float32)
        weighted = (c * np.asarray(term, np.float64) for c, term in zip(self._coefficients[call], terms, strict=True))
        result: NDArray[np.float32] = np.asarray(sum(weighted)).astype(np.float32)
        return result


class HistoryFit:
    """Streams second moments of the terms and the wanted prediction, per call and fold.

    Args:
        calls: of the program.
        refreshes: the schedule; these calls are not corrected.
        folds: see `CorrectionFit`.
    """

    def __init__(self, calls: int, refreshes: Sequence[int], folds: int = FOLDS) -> None:
        self.calls, self.folds = calls, folds
        self.refreshes = check_schedule(refreshes, calls)
        size = len(TERMS) + 1
        self._moments: Floats = np.zeros((calls, folds, size, size))
        self._count: Floats = np.zeros((calls, folds))
        self._recent = _Recent(self.refreshes)

    def observe(
        self, call: int, prediction: NDArray[Any], fed: NDArray[Any], wanted: NDArray[Any], samples: Sequence[int]
    ) -> None:
        """Add a call; those of a run come in order.

        Args:
            call: its index; 0 begins a new run.
            prediction: of the graph that ran, after guidance, (rows, …).
            fed: what the denoiser was fed.
            wanted: the float prediction for the same input.
            samples: number of each row's sample.
        """
        terms = self._recent.terms(call, prediction, fed)
        if terms is None:
            return
        rows = np.stack([np.asarray(v, np.float64).reshape(len(wanted), -1) for v in (*terms, wanted)], axis=1)
        folds = np.asarray(samples) % self.folds
        for row, fold in zip(rows, folds, strict=True):
            self._moments[call, fold] += row @ row.T
            self._count[call, fold] += row.shape[1]

    def fit(self, steps: Sequence[float] = STEPS) -> HistoryCorrection:
        """The coefficients that generalise best; the identity where none of them beats it."""
        coefficients = np.tile(identity(), (self.calls, 1))
        before, after = np.zeros(self.calls), np.zeros(self.calls)
        for call in range(self.calls):
            used = np.flatnonzero(self._count[call])
            if len(used) < 2:
                continue
            parts, count = self._moments[call][used], self._count[call].sum()
            whole = least_squares(parts.sum(axis=0))
            error = sum(squared_error(part, identity()) for part in parts) / count
            before[call] = error
            for step in steps:
                held_out = 0.0
                for part in parts:
                    rest = least_squares(parts.sum(axis=0) - part)
                    held_out += squared_error(part, identity() + step * (rest - identity()))
                if held_out / count < error:
                    error = held_out / count
                    coefficients[call] = identity() + step * (whole - identity())
            after[call] = error
        return HistoryCorrection(coefficients, before, after)


def least_squares(moments: Floats) -> Floats:
    """Least squares of the last entry on the others, ridged towards the identity."""
    gram, cross = moments[:-1, :-1], moments[:-1, -1]
    ridge = np.diag(RIDGE * np.maximum(np.diag(gram), np.finfo(np.float64).tiny))
    residual = cross - gram @ identity()
    found: Floats = identity() + np.linalg.solve(gram + ridge, residual)
    return found


def squared_error(moments: Floats, coefficients: Floats) -> float:
    extended = np.append(-coefficients, 1.0)
    return max(0.0, float(extended @ moments @ extended))


def correct_by_history(
    program: StepProgram, correction: HistoryCorrection, refreshes: Sequence[int], sample: str = "sample"
) -> StepProgram:
    """The program with the linear forms in its reusing calls, and the registers that they read in the others.

    They run before everything else; a per-channel correction of the prediction comes after them.

    Args:
        program: with the schedule's variants.
        correction: one row per call.
        refreshes: the schedule.
        sample: the graph input that the denoiser's sample is fed to.
    """
    calls = []
    for index, call in enumerate(program.calls):
        first: tuple[Operation, ...]
        if index in refreshes:
            shift = Lin(BEFORE, ((PREDICTION if index == 0 else LAST, 1.0),))
            first = (shift, Lin(LAST, ((PREDICTION, 1.0),)))
        else:
            terms = _terms(correction.coefficients[index], call.inputs[sample])
            first = (Lin(PREDICTION, terms),) if terms != ((PREDICTION, 1.0),) else ()
        calls.append(replace(call, update=(*first, *call.update)))
    return replace(program, calls=tuple(calls))


def _terms(coefficients: Floats, fed: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    own, last, before, given = (float(c) for c in coefficients)
    found: dict[str, float] = {PREDICTION: own, LAST: last, BEFORE: before}
    for register, weight in fed:
        found[register] = found.get(register, 0.0) + given * weight
    return tuple((register, value) for register, value in found.items() if value != 0.0)


def report_of(correction: HistoryCorrection) -> Mapping[str, Any]:
    """Plain data for a report."""
    return {"kept": correction.kept, "coefficients": correction.coefficients.tolist(), "terms": list(TERMS)}
