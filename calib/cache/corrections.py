"""Corrections of a quantized, cached run: one gain and one bias per denoiser call and channel.

All of them regress a *wanted* tensor `y` (float, or without cache) on the *given* one `x` that the run has:

- DEC `a1, b1`: the features of a call on the cached features that serve it; `a2, b2`: the float output of the layer
  that consumes them on its quantized output (CacheQuant, Liu et al. 2025).  `estimate_affine`.
- PTQD: the float prediction on the quantized one, one gain for all channels and a bias each (He et al. 2023).
  `estimate_prediction`; its residual may be absorbed in the sampler's own noise (`absorb_noise`).
- VC: the reference latents on the run's latents about their mean (Q&C, Ding et al. 2025), by weighted least squares
  or by matching the variance.  `VarianceFit`.

A least-squares fit can lose on samples that it has not seen.  Samples are therefore dealt out to folds; each
candidate, and each of several steps from the identity towards it, is fitted without a fold and judged on it.  A channel
keeps the best candidate, and the identity wherever none beats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.moments import PairedMoments, merged
from quantempo.errors import CalibrationError

Floats = NDArray[np.float64]
Estimate = Callable[[PairedMoments], tuple[Floats, Floats]]
"""From moments to (gain, bias), each of shape (channels,)."""

FOLDS = 4
STEPS = (0.25, 0.5, 0.75, 1.0)
"""How far from the identity (0) to the fit (1) a correction may go."""


def estimate_affine(m: PairedMoments) -> tuple[Floats, Floats]:
    """Least squares `y ≈ gain·x + bias`; a constant `x` gets gain 1.  Covariance and variance share their divisor."""
    gain = np.divide(m.xy, m.xx, out=np.ones_like(m.xx), where=m.xx > 0)
    return gain, m.mean_y - gain * m.mean_x


def estimate_offset(m: PairedMoments) -> tuple[Floats, Floats]:
    """The best bias alone."""
    return np.ones_like(m.xx), m.mean_y - m.mean_x


def estimate_prediction(m: PairedMoments) -> tuple[Floats, Floats]:
    """PTQD: `x = (1 + k)·y + b` with one `k` for all channels, solved for `y`; `x` is the quantized prediction.

    A joint fit of slope and intercept.  A negative `k` is noise in the fit, as quantization noise that is uncorrelated
    with the signal can only add to it, and counts as 0.
    """
    pooled = m.pooled()
    k = max(0.0, float(pooled.xy[0] / pooled.yy[0]) - 1.0) if pooled.yy[0] > 0 else 0.0
    gain = np.full_like(m.xx, 1.0 / (1.0 + k))
    return gain, m.mean_y - gain * m.mean_x


def estimate_match(m: PairedMoments) -> tuple[Floats, Floats]:
    """The gain that gives `x` the variance of `y`, about the mean of `x`."""
    gain = np.sqrt(np.divide(m.yy, m.xx, out=np.ones_like(m.xx), where=m.xx > 0))
    return gain, (1.0 - gain) * m.mean_x


@dataclass(frozen=True, eq=False)
class Correction:
    """A fitted correction `y ≈ gain·x + bias`.

    Args:
        gain, bias: float32, (calls, channels); 1 and 0 where nothing is corrected.
        before, after: mean squared error per call on samples that were held out of the fit, without and with it.
        chosen: name of the estimate that each call and channel took; `identity` where none helped.
    """

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    before: Floats
    after: Floats
    chosen: NDArray[np.str_]

    @property
    def kept(self) -> float:
        """Share of (call, channel) pairs that are corrected."""
        return float(np.mean(self.chosen != "identity"))

    def identity(self, call: int) -> bool:
        """Whether a call is not corrected at all."""
        return bool(np.all(self.gain[call] == 1) and np.all(self.bias[call] == 0))


class CorrectionFit:
    """Streams pairs of tensors into moments per call, fold and channel, and fits corrections from them.

    Memory: 6 · calls · folds · channels float64, whatever the number of samples.

    Args:
        calls: of the program; a call that is never observed is not corrected.
        channels: of the tensors.
        axis: of the channels in the tensors.
        folds: at least 2; sample number modulo folds is the fold.
    """

    def __init__(self, calls: int, channels: int, axis: int = 1, folds: int = FOLDS) -> None:
        if folds < 2:
            raise CalibrationError(
                "correction", found=f"{folds} folds", wanted="at least 2", cause="one fold leaves nothing to judge on",
                remedy=f"use {FOLDS}",
            )
        self.calls, self.channels, self.axis, self.folds = calls, channels, axis, folds
        self._cells: dict[tuple[int, int], PairedMoments] = {}

    def observe(
        self, call: int, given: NDArray[Any], wanted: NDArray[Any], samples: Sequence[int],
        weights: Floats | None = None,
    ) -> None:
        """Add a batch of one call.

        Args:
            call: its index.
            given: what the run has, (rows, …).
            wanted: what it should have, of the same shape.
            samples: number of the sample of each row; rows of one sample (its branches) never part.
            weights: of the tensors' shape.

        Raises:
            CalibrationError: a value is not finite.
        """
        if not (np.isfinite(given).all() and np.isfinite(wanted).all()):
            raise CalibrationError(
                f"correction, call {call}", found="NaN or infinity", wanted="finite tensors",
                cause="the quantized or the float run overflowed", remedy="look at the quality report",
            )
        folds = np.asarray(samples) % self.folds
        for fold in np.unique(folds):
            rows = folds == fold
            part = PairedMoments.of(given[rows], wanted[rows], self.axis, None if weights is None else weights[rows])
            key = (call, int(fold))
            self._cells[key] = self._cells[key].merge(part) if key in self._cells else part

    def merge(self, other: CorrectionFit) -> CorrectionFit:
        """What both have seen."""
        both = CorrectionFit(self.calls, self.channels, self.axis, self.folds)
        both._cells = dict(self._cells)
        for key, part in other._cells.items():
            both._cells[key] = both._cells[key].merge(part) if key in both._cells else part
        return both

    def moments(self, call: int) -> PairedMoments | None:
        """All moments of a call; `None` where it was never observed."""
        parts = self._parts(call)
        return merged(parts) if parts else None

    def _parts(self, call: int) -> list[PairedMoments]:
        return [self._cells[call, f] for f in range(self.folds) if (call, f) in self._cells]

    def fit(self, estimates: Mapping[str, Estimate], steps: Sequence[float] = STEPS) -> Correction:
        """The correction that generalises best, per call and channel.

        Args:
            estimates: candidates by name; among equals the earlier one wins, and the identity before all.
            steps: see `STEPS`.
        """
        gain, bias = np.ones((self.calls, self.channels)), np.zeros((self.calls, self.channels))
        before, after = np.zeros(self.calls), np.zeros(self.calls)
        chosen = np.full((self.calls, self.channels), "identity", dtype=f"<U{max(map(len, [*estimates, 'identity']))}")
        for call in range(self.calls):
            parts = self._parts(call)
            if len(parts) < 2:
                continue
            weight = sum(part.weight for part in parts)
            error = _held_out(parts, None, 0.0) / weight
            before[call] = error.mean()
            whole = merged(parts)
            for name, estimate in estimates.items():
                full = estimate(whole)
                for step in steps:
                    candidate = _held_out(parts, estimate, step) / weight
                    better = candidate < error
                    error = np.where(better, candidate, error)
                    moved = _towards(full, step)
                    gain[call] = np.where(better, moved[0], gain[call])
                    bias[call] = np.where(better, moved[1], bias[call])
                    chosen[call][better] = name
            after[call] = error.mean()
        return Correction(gain.astype(np.float32), bias.astype(np.float32), before, after, chosen)


def joined(parts: Sequence[Correction | None], channels: int) -> Correction:
    """One correction of the rows of several that have one call each; `None` is a call that is left as it is."""
    neutral = Correction(
        np.ones((1, channels), np.float32), np.zeros((1, channels), np.float32), np.zeros(1), np.zeros(1),
        np.full((1, channels), "identity"),
    )
    rows = [neutral if part is None else part for part in parts]
    return Correction(
        np.concatenate([r.gain for r in rows]), np.concatenate([r.bias for r in rows]),
        np.concatenate([r.before for r in rows]), np.concatenate([r.after for r in rows]),
        np.concatenate([r.chosen for r in rows]),
    )


def _towards(fit: tuple[Floats, Floats], step: float) -> tuple[Floats, Floats]:
    return (fit[0], fit[1]) if step == 1.0 else (1.0 + step * (fit[0] - 1.0), step * fit[1])


def _held_out(parts: list[PairedMoments], estimate: Estimate | None, step: float) -> Floats:
    """Summed squared error per channel, each part judged by a fit on all others."""
    total: Floats = np.zeros_like(parts[0].xx)
    for index, part in enumerate(parts):
        if estimate is None:
            total += part.squared_error(np.ones_like(total), np.zeros_like(total))
        else:
            rest = merged(parts[:index] + parts[index + 1 :])
            total += part.squared_error(*_towards(estimate(rest), step))
    return total


class VarianceFit:
    """Q&C's variance correction of latents, `x~ = mu + K·(x - mu)` with `mu` the mean of the run's latents.

    `lsq` minimises `MSE + rQNSR²`, a least squares with weight `1 + 1/(y² + eps)`; `match` takes the ratio of the
    standard deviations.  Any least squares shrinks; which of the two is better is decided on held-out samples, with
    K = 1 where neither helps.

    Args:
        reference_variance: (calls, channels) variance of the reference latents; eps is a hundredth of it, as the bare
            weight explodes near zero.
        axis: of the channels.
        folds: see `CorrectionFit`.
    """

    def __init__(self, reference_variance: Floats, axis: int = 1, folds: int = FOLDS) -> None:
        calls, channels = reference_variance.shape
        self._axis = axis
        self._eps = 1e-2 * reference_variance
        self._plain = CorrectionFit(calls, channels, axis, folds)
        self._weighted = CorrectionFit(calls, channels, axis, folds)

    def observe(self, call: int, given: NDArray[Any], reference: NDArray[Any], samples: Sequence[int]) -> None:
        """Add a batch of one call: the run's latents, and the reference's for the same noise."""
        shape = [1] * given.ndim
        shape[self._axis] = -1
        eps = self._eps[call].reshape(shape)
        weights = 1.0 + 1.0 / np.maximum(reference.astype(np.float64) ** 2 + eps, np.finfo(np.float64).tiny)
        self._plain.observe(call, given, reference, samples)
        self._weighted.observe(call, given, reference, samples, weights)

    def gains(self, call: int, method: str) -> Floats:
        """K of one call on all samples, `lsq` or `match`."""
        plain, weighted = self._plain.moments(call), self._weighted.moments(call)
        assert plain is not None
        assert weighted is not None
        return _variance_gain(plain, weighted) if method == "lsq" else estimate_match(plain)[0]

    def fit(self, method: str = "auto") -> Correction:
        """The correction.

        Args:
            method: `lsq` or `match` on all samples, unguarded; `auto` chooses per call and channel by held-out error.
        """
        plain = self._plain
        calls, channels = plain.calls, plain.channels
        gain, bias = np.ones((calls, channels)), np.zeros((calls, channels))
        before, after = np.zeros(calls), np.zeros(calls)
        chosen = np.full((calls, channels), "identity", dtype="<U8")
        for call in range(calls):
            parts, weighted = plain._parts(call), self._weighted._parts(call)
            if len(parts) < 2:
                continue
            weight = sum(part.weight for part in parts)
            error = _held_out(parts, None, 0.0) / weight
            before[call] = error.mean()
            mean = merged(parts).mean_x
            for name in ("lsq", "match") if method == "auto" else (method,):
                candidate = _held_out_variance(parts, weighted, name) / weight
                better = candidate < error if method == "auto" else np.ones(channels, bool)
                k = self.gains(call, name)
                gain[call] = np.where(better, k, gain[call])
                bias[call] = np.where(better, (1.0 - k) * mean, bias[call])
                error = np.where(better, candidate, error)
                chosen[call][better] = name
            after[call] = error.mean()
        return Correction(gain.astype(np.float32), bias.astype(np.float32), before, after, chosen)


def _variance_gain(plain: PairedMoments, weighted: PairedMoments) -> Floats:
    """Σ w (y - mu)(x - mu) / Σ w (x - mu)², with `mu` the unweighted mean of `x`."""
    gap_x, gap_y = weighted.mean_x - plain.mean_x, weighted.mean_y - plain.mean_x
    over = weighted.xy + weighted.weight * gap_x * gap_y
    under = weighted.xx + weighted.weight * gap_x * gap_x
    result: Floats = np.divide(over, under, out=np.ones_like(under), where=under > 0)
    return result


def _held_out_variance(parts: list[PairedMoments], weighted: list[PairedMoments], name: str) -> Floats:
    total: Floats = np.zeros_like(parts[0].xx)
    for index, part in enumerate(parts):
        rest = merged(parts[:index] + parts[index + 1 :])
        if name == "lsq":
            k = _variance_gain(rest, merged(weighted[:index] + weighted[index + 1 :]))
        else:
            k = estimate_match(rest)[0]
        total += part.squared_error(k, (1.0 - k) * rest.mean_x)
    return total
