"""Linear prediction from what a run has at hand: a correction that a step program carries out by itself.

At a reusing call the program knows the prediction of the reusing graph, those of the last two refreshes, and what the
denoiser was fed.  What the prediction should be is regressed on these four by least squares, with one coefficient each
per call.  Reuse as it is, is the coefficients (1, 0, 0, 0); so a fit can only gain on its own samples, and steps
towards it are judged on held-out ones.  It costs one linear form per call and no change of a graph.

What it should be is for the caller to say.  The float prediction for the same input leaves all that went wrong before
as it is; the prediction that brings the latents back to the float run's takes part of it out again, as far as it shows
in the four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.corrections import FOLDS, STEPS
from quantempo.contracts.program import PREDICTION, Lin, Operation, StepProgram, Terms

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


def fit_call(
    terms: Sequence[NDArray[Any]], wanted: NDArray[Any], samples: Sequence[int], order: int = 1,
    steps: Sequence[float] = STEPS, folds: int = FOLDS,
) -> tuple[Floats, float, float]:
    """The coefficients of one call that generalise best; the identity where none of them beats it.

    Args:
        terms: arrays of `TERMS`, each (rows, …).
        wanted: what their sum should be, of the same shape.
        samples: number of each row's sample; sample number modulo folds is the fold.
        order: 0 leaves out the earlier refreshes, whose differences hold nothing but quantization noise.
        steps: how far from the identity to the fit a correction may go.
        folds: of the judgement on held-out samples.

    Returns:
        Coefficients of `TERMS`, and the mean squared errors on held-out samples without and with them.
    """
    rows = np.stack([np.asarray(v, np.float64).reshape(len(wanted), -1) for v in (*terms, wanted)], axis=1)
    dealt = np.asarray(samples) % folds
    used = [rows[dealt == fold] for fold in np.unique(dealt)]
    parts = [np.einsum("nkp,nlp->kl", part, part) for part in used]
    count, neutral = rows.shape[0] * rows.shape[2], identity()
    total = sum(parts[1:], start=parts[0])
    best, error = neutral, sum(squared_error(part, neutral) for part in parts) / count
    before = error
    if len(parts) > 1:
        whole = least_squares(total, order)
        rest = [least_squares(total - part, order) for part in parts]
        for step in steps:
            pairs = zip(parts, rest, strict=True)
            held_out = sum(squared_error(part, neutral + step * (other - neutral)) for part, other in pairs) / count
            if held_out < error:
                best, error = neutral + step * (whole - neutral), held_out
    return best, before, error


def least_squares(moments: Floats, order: int = 1) -> Floats:
    """Least squares of the last entry on the others, ridged towards the identity; order 0 uses no earlier refresh."""
    gram, cross = moments[:-1, :-1], moments[:-1, -1]
    kept = [index for index, name in enumerate(TERMS) if order or name not in (LAST, BEFORE)]
    ridge = np.diag(RIDGE * np.maximum(np.diag(gram), np.finfo(np.float64).tiny))
    residual = cross - gram @ identity()
    found = identity()
    found[kept] += np.linalg.solve((gram + ridge)[np.ix_(kept, kept)], residual[kept])
    return found


def squared_error(moments: Floats, coefficients: Floats) -> float:
    """Summed squared error of the last entry, as a linear form of the others."""
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
            terms = history_terms(correction.coefficients[index], call.inputs[sample])
            first = (Lin(PREDICTION, terms),) if terms != ((PREDICTION, 1.0),) else ()
        calls.append(replace(call, update=(*first, *call.update)))
    return replace(program, calls=tuple(calls))


def history_terms(coefficients: Floats, fed: Terms) -> Terms:
    """The linear form of one call.

    Args:
        coefficients: of `TERMS`.
        fed: the linear form that the denoiser's sample is fed from.
    """
    own, last, before, given = (float(c) for c in coefficients)
    found: dict[str, float] = {PREDICTION: own, LAST: last, BEFORE: before}
    for register, weight in fed:
        found[register] = found.get(register, 0.0) + given * weight
    return tuple((register, value) for register, value in found.items() if value != 0.0)


def report_of(correction: HistoryCorrection) -> Mapping[str, Any]:
    """Plain data for a report."""
    return {"kept": correction.kept, "coefficients": correction.coefficients.tolist(), "terms": list(TERMS)}
