"""What corrections change in a step program: operations that are added, and noise that is taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from quantempo.calib.cache.corrections import Correction
from quantempo.calib.cache.history import BEFORE, LAST
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Clamp, Correct, Lin, Noise, Operation, StepProgram
from quantempo.errors import CalibrationError

PREDICTION_VECTORS = ("prediction.gain", "prediction.bias")
LATENTS_VECTORS = ("latents.gain", "latents.bias")
"""Names of the arrays in the bundle's vectors file."""


OWN = (PREDICTION, LAST, BEFORE)
"""Registers that operations before the sampler's write."""


def own_part(update: Sequence[Operation]) -> int:
    """How many operations at the start prepare the prediction; what the sampler does comes after them."""
    for index, op in enumerate(update):
        if op.to not in OWN:
            return index
    return len(update)


SMALLEST_SHARE = 1e-6
"""What rounding leaves of coefficients that cancel."""


def correct_prediction(program: StepProgram, correction: Correction, row: int = 0) -> StepProgram:
    """The program with the prediction corrected before anything else reads it (PTQD's bias and gain).

    Args:
        program: as traced, or with other corrections.
        correction: one row per call; calls whose row is the identity stay as they are.
        row: index in the vectors file of the first call's row.
    """
    return _insert(program, correction, PREDICTION, PREDICTION_VECTORS, row)


def correct_latents(program: StepProgram, correction: Correction, row: int = 0) -> StepProgram:
    """The program with the latents corrected at the end of each call that writes them (variance correction)."""
    return _insert(program, correction, LATENTS, LATENTS_VECTORS, row)


def correct_every_call(program: StepProgram, register: str, names: tuple[str, str]) -> StepProgram:
    """The program with a correction of the prediction or the latents in every call, whatever the rows hold."""
    calls = [_corrected(call, register, names, index) for index, call in enumerate(program.calls)]
    return replace(program, calls=tuple(calls))


def _insert(
    program: StepProgram, correction: Correction, register: str, names: tuple[str, str], row: int
) -> StepProgram:
    if len(correction.gain) != len(program.calls):
        raise CalibrationError(
            f"correction of {register}", found=f"{len(correction.gain)} rows for {len(program.calls)} calls",
            wanted="one row per denoiser call", cause="it was fitted for another step count or scheduler",
            remedy="fit it for this program",
        )
    calls = [
        call if correction.identity(index) else _corrected(call, register, names, row + index)
        for index, call in enumerate(program.calls)
    ]
    return replace(program, calls=tuple(calls))


def _corrected(call: Call, register: str, names: tuple[str, str], row: int) -> Call:
    if register != PREDICTION and all(op.to != register for op in call.update):
        return call
    at = len(call.update) if register == LATENTS else own_part(call.update)
    return replace(call, update=(*call.update[:at], Correct(register, register, *names, row), *call.update[at:]))


def absorb_noise(program: StepProgram, deviations: Sequence[float]) -> tuple[StepProgram, tuple[float, ...]]:
    """Let quantization noise of the prediction stand in for a part of the noise that the sampler adds itself.

    With prediction noise of standard deviation `d` and the coefficients `c` of the prediction and `s` of the fresh
    noise in the new latents, the sampler draws with `s' = sign(s)·sqrt(max(0, s² - c²·d²))` (PTQD, He et al. 2023,
    section 4.2), so that the latents keep their variance.  Calls without noise (eta 0) stay as they are.

    Args:
        program: whose rows are changed.
        deviations: per call, what is left of the noise after bias and gain are taken out.

    Returns:
        The program, and per call the share of the sampler's noise variance that was taken over.
    """
    calls, shares = [], []
    for call, deviation in zip(program.calls, deviations, strict=True):
        factor = _noise_factor(call, deviation)
        shares.append(1.0 - factor * factor)
        calls.append(call if factor == 1.0 else replace(call, update=_scaled_noise(call.update, factor)))
    return replace(program, calls=tuple(calls)), tuple(shares)


def _noise_factor(call: Call, deviation: float) -> float:
    """What the coefficients of a call's fresh noise are multiplied by."""
    prediction, noise = latent_coefficients(call)
    variance = sum(s * s for s in noise.values())
    if not variance or not deviation:
        return 1.0
    return math.sqrt(max(0.0, 1.0 - (prediction * deviation) ** 2 / variance))


def latent_coefficients(call: Call) -> tuple[float, dict[str, float]]:
    """How much of the prediction, and of each fresh noise register, ends up in the latents of a call."""
    latents = dict(_sources(call).get(LATENTS, {}))
    prediction = latents.pop(PREDICTION, 0.0)
    return prediction, latents


def aim(call: Call) -> tuple[str, float] | None:
    """The register that a call's prediction is for, and how much of it ends up there; `None` where it goes nowhere.

    That is the latents, or the last written register that the prediction reaches, where a method makes several calls
    per step.
    """
    known = _sources(call)
    written = [op.to for op in call.update if op.to not in OWN]
    for register in (LATENTS, *reversed(written)):
        share = known.get(register, {}).get(PREDICTION, 0.0)
        if abs(share) > SMALLEST_SHARE:
            return register, share
    return None


def _sources(call: Call) -> dict[str, dict[str, float]]:
    """By register, what it holds after a call of the call's prediction and of fresh noise.

    Follows linear forms and corrections through the call's operations; a clamp passes its source on, as it does inside
    its bounds.
    """
    known: dict[str, dict[str, float]] = {PREDICTION: {PREDICTION: 1.0}}
    for op in call.update:
        if isinstance(op, Noise):
            known[op.to] = {op.to: 1.0}
        elif isinstance(op, Lin):
            total: dict[str, float] = {}
            for register, coefficient in op.terms:
                for source, weight in known.get(register, {}).items():
                    total[source] = total.get(source, 0.0) + coefficient * weight
            known[op.to] = total
        elif isinstance(op, (Clamp, Correct)):
            known[op.to] = dict(known.get(op.source, {}))
    return known


def _scaled_noise(update: tuple[Operation, ...], factor: float) -> tuple[Operation, ...]:
    fresh: set[str] = set()
    changed: list[Operation] = []
    for op in update:
        if isinstance(op, Noise):
            fresh.add(op.to)
        elif isinstance(op, Lin):
            op = replace(op, terms=tuple((r, c * factor if r in fresh else c) for r, c in op.terms))
            fresh.discard(op.to)
        changed.append(op)
    return tuple(changed)
