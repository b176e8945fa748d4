from __future__ import annotations

import numpy as np
import pytest

from quantempo.calib.cache.corrections import Correction
from quantempo.calib.cache.program_rows import absorb_noise, correct_latents, correct_prediction, latent_coefficients
from quantempo.contracts.program import (
    LATENTS,
    PREDICTION,
    Call,
    Clamp,
    Correct,
    Lin,
    Noise,
    StepProgram,
    check_program,
)
from quantempo.errors import CalibrationError

S, C = 0.3, -0.5


def _program(calls: int = 3, sigma: float = S) -> StepProgram:
    update = (Noise("noise", 1), Lin(LATENTS, ((LATENTS, 0.9), (PREDICTION, C), ("noise", sigma))))
    made = (Call(float(i), {"sample": ((LATENTS, 1.0),)}, update, i) for i in range(calls))
    return StepProgram("DDIMScheduler", calls, tuple(made))


def _correction(calls: int = 3, identity: tuple[int, ...] = ()) -> Correction:
    gain = np.full((calls, 2), 1.1, np.float32)
    gain[list(identity)] = 1
    return Correction(gain, gain - 1, np.ones(calls), np.zeros(calls), np.full((calls, 2), "affine"))


def test_prediction_is_corrected_before_anything_reads_it() -> None:
    program = correct_prediction(_program(), _correction(identity=(1,)), row=10)
    check_program(program, "test")
    assert program.calls[0].update[0] == Correct(PREDICTION, PREDICTION, "prediction.gain", "prediction.bias", 10)
    assert program.calls[2].update[0] == Correct(PREDICTION, PREDICTION, "prediction.gain", "prediction.bias", 12)
    assert program.calls[1] == _program().calls[1]


def test_latents_are_corrected_after_they_are_written() -> None:
    program = correct_latents(_program(), _correction())
    check_program(program, "test")
    assert [call.update[-1] for call in program.calls] == [
        Correct(LATENTS, LATENTS, "latents.gain", "latents.bias", i) for i in range(3)
    ]
    silent = StepProgram("Heun", 1, (Call(0.0, {}, (Lin("other", ((PREDICTION, 1.0),)),), 0),))
    assert correct_latents(silent, _correction(1)) == silent


def test_a_correction_of_another_program_is_refused() -> None:
    with pytest.raises(CalibrationError, match="3 rows for 4 calls"):
        correct_prediction(_program(4), _correction(3))


def test_noise_is_taken_back_so_that_the_variance_stays() -> None:
    program, shares = absorb_noise(_program(), [0.0, 0.2, 9.0])
    assert program.calls[0] == _program().calls[0]
    noise = program.calls[1].update[1]
    assert isinstance(noise, Lin)
    absorbed = dict(noise.terms)["noise"]
    assert absorbed**2 + (C * 0.2) ** 2 == pytest.approx(S**2, rel=1e-12)
    assert dict(noise.terms)[PREDICTION] == C
    last = program.calls[2].update[1]
    assert isinstance(last, Lin)
    assert dict(last.terms)["noise"] == 0.0  # more noise than the sampler would add
    assert shares == (0.0, pytest.approx((C * 0.2 / S) ** 2), 1.0)


def test_variance_of_the_next_latents_is_that_of_the_float_sampler() -> None:
    rng = np.random.default_rng(0)
    deviation, n = 0.4, 200_000
    clean, disturbance, noise = rng.standard_normal((3, n))
    program, _ = absorb_noise(_program(1), [deviation])
    lin = program.calls[0].update[1]
    assert isinstance(lin, Lin)
    absorbed = dict(lin.terms)["noise"]
    wanted = C * clean + S * noise
    quantized = C * (clean + deviation * disturbance)
    assert (quantized + absorbed * noise).var() == pytest.approx(wanted.var(), rel=0.01)
    assert (quantized + S * noise).var() > 1.05 * wanted.var()


def test_a_deterministic_program_is_left_alone() -> None:
    update = (Lin(LATENTS, ((LATENTS, 0.9), (PREDICTION, C))),)
    program = StepProgram("DDIMScheduler", 1, (Call(0.0, {}, update, 0),))
    assert absorb_noise(program, [1.0]) == (program, (0.0,))


def test_coefficients_are_followed_through_registers_and_clamps() -> None:
    update = (
        Correct(PREDICTION, PREDICTION, "g", "b", 0),
        Lin("x0", ((LATENTS, 2.0), (PREDICTION, -0.5))),
        Clamp("x0c", "x0", -1.0, 1.0),
        Noise("n", 1),
        Lin(LATENTS, (("x0c", 0.8), (PREDICTION, 0.1), ("n", 0.2))),
    )
    prediction, noise = latent_coefficients(Call(0.0, {}, update, 0))
    assert prediction == pytest.approx(0.8 * -0.5 + 0.1)
    assert noise == {"n": 0.2}
