"""The sampler tracer: what a program looks like, what is refused and why, and that nothing stays patched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from support.reference_loop import relative_error, replay, stock_loop

from quantempo.contracts.codec import canonical_json, from_data
from quantempo.contracts.program import LATENTS, Clamp, Lin, Noise, StepProgram
from quantempo.errors import DataError, NotAModelDirectory, RequestError, SchedulerRefused
from quantempo.export.sampler import load_scheduler, scheduler_identity, trace_program, trace_programs
from quantempo.export.sampler_noise import BrownianPath

GOLDEN = Path(__file__).parents[1] / "golden"


def ddim(**options: object) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **options})


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddim_4_steps", ddim()),
        ("dpmsolver_2m_4_steps", diffusers.DPMSolverMultistepScheduler()),
        ("ddpm_clipped_3_steps", diffusers.DDPMScheduler()),
        ("heun_3_steps", diffusers.HeunDiscreteScheduler()),
    ],
)
def test_program_text_is_the_committed_one_up_to_the_last_bits(name: str, scheduler: object) -> None:
    program = trace_program(scheduler, int(name.split("_")[-2]))
    expected = from_data(StepProgram, json.loads((GOLDEN / f"{name}.json").read_text()), name)
    assert canonical_json(_rounded(program)) == canonical_json(_rounded(expected))


def _rounded(program: StepProgram) -> StepProgram:
    """Coefficients to 5 digits: another build of torch may round a float32 schedule differently in its last bits."""

    def walk(data: object) -> object:
        if isinstance(data, dict):
            return {k: walk(v) for k, v in data.items()}
        if isinstance(data, list):
            return [walk(v) for v in data]
        return float(f"{data:.5g}") if isinstance(data, float) else data

    return from_data(StepProgram, walk(json.loads(canonical_json(program))), "rounded")


def test_ddim_is_one_lin_per_call() -> None:
    program = trace_program(ddim(), 20)
    assert [len(call.update) for call in program.calls] == [1] * 20
    assert all(
        isinstance(op, Lin) and op.to == LATENTS and len(op.terms) == 2 for c in program.calls for op in c.update
    )
    assert program.registers() == (LATENTS,)
    assert [call.timestep for call in program.calls] == list(range(950, -1, -50))
    assert [call.step for call in program.calls] == list(range(20))


def test_eta_adds_one_draw_per_call_but_the_noiseless_last_and_is_recorded() -> None:
    program = trace_program(ddim(), 10, eta=1.0)
    assert program.eta == 1.0
    assert [op.draw for c in program.calls for op in c.update if isinstance(op, Noise)] == list(range(1, 10))
    assert trace_program(ddim(), 10).eta == 0.0


def test_clip_becomes_a_clamp_with_the_configured_range() -> None:
    program = trace_program(ddim(clip_sample=True, clip_sample_range=1.5), 5)
    clamps = [op for c in program.calls for op in c.update if isinstance(op, Clamp)]
    assert [(op.low, op.high) for op in clamps] == [(-1.5, 1.5)] * 5


def test_two_calls_of_a_two_call_method_share_a_step() -> None:
    program = trace_program(diffusers.HeunDiscreteScheduler(), 3)
    assert [call.step for call in program.calls] == [0, 0, 1, 1, 2]


def test_warm_up_calls_of_pndm_belong_to_the_first_step() -> None:
    program = trace_program(diffusers.PNDMScheduler(skip_prk_steps=True), 5)
    assert [call.step for call in program.calls] == [0, 0, 1, 2, 3, 4]


def test_scaled_model_input_and_initial_scale_are_in_the_program() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    program = trace_program(scheduler, 8)
    scheduler.set_timesteps(8)
    sigma = float(scheduler.sigmas[0])
    assert program.state[0].initial_scale == pytest.approx(float(scheduler.init_noise_sigma))
    assert program.calls[0].inputs["sample"] == ((LATENTS, pytest.approx(1 / math.sqrt(sigma**2 + 1))),)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(diffusers.UniPCMultistepScheduler(solver_order=3), 30), (diffusers.SASolverScheduler(), 30)],
)
def test_registers_stay_few_however_long_the_loop(scheduler: object, steps: int) -> None:
    program = trace_program(scheduler, steps)
    assert len(program.registers()) <= 8
    assert max(len(op.terms) for c in program.calls for op in c.update if isinstance(op, Lin)) <= 7


def test_the_callers_scheduler_and_torch_are_untouched() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(7)
    before, randn, clamp = dict(vars(scheduler)), torch.randn, torch.Tensor.clamp
    trace_program(scheduler, 10)
    assert dict(vars(scheduler)) == before
    assert torch.randn is randn
    assert torch.Tensor.clamp is clamp
    assert type(torch.randn(2)) is torch.Tensor


def test_a_refusal_leaves_no_mode_behind() -> None:
    with pytest.raises(SchedulerRefused):
        trace_program(ddim(thresholding=True), 5)
    assert bool(torch.ones(1).abs() > 0)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (ddim(thresholding=True), ["DDIMScheduler with thresholding=True", "'abs'", "quantile"]),
        (diffusers.DDPMScheduler(variance_type="learned"), ["variance_type='learned'", "predict the variance"]),
        (diffusers.RePaintScheduler(), ["RePaintScheduler", "original_image, mask"]),
        (diffusers.VQDiffusionScheduler(num_vec_classes=8), ["integer tokens"]),
        (diffusers.KarrasVeScheduler(), ["sigma_hat, sigma_prev, sample_hat"]),
        (diffusers.ScoreSdeVeScheduler(), ["no method 'step'", "step_pred"]),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            ["`mu` must be passed", "options={'mu'"],
        ),
        (diffusers.LCMScheduler(rescale_betas_zero_snr=True), ["not finite"]),
    ],
)
def test_a_refusal_names_class_option_and_reason(scheduler: object, words: list[str]) -> None:
    with pytest.raises(SchedulerRefused) as caught:
        trace_program(scheduler, 10)
    for word in words:
        assert word in str(caught.value)


class _Peculiar(diffusers.DDIMScheduler):  # type: ignore[misc]
    """DDIM with a step that a test replaces."""

    effect = staticmethod(lambda sample, model_output: sample)

    def step(self, model_output, timestep, sample, return_dict=True):  # type: ignore[no-untyped-def]
        return (self.effect(sample, model_output),)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (lambda x, e: x * e, "product"),
        (lambda x, e: x / (e + e), "product or quotient"),
        (lambda x, e: 1.0 / x, "divides by|not a linear"),
        (lambda x, e: x + 0.5, "adds a constant"),
        (lambda x, e: x * x.std(), "'std'"),
        (lambda x, e: x - x.mean(dim=-1, keepdim=True), "'mean'"),
        (lambda x, e: x if x.sum(dim=-1) > 0 else e, "mixes the elements"),
        (lambda x, e: x if (x > 0).any() else e, "depends on the data"),
        (lambda x, e: x * float(e.max()), "'max'"),
        (lambda x, e: torch.relu(x), "'relu'"),
        (lambda x, e: x + torch.rand(x.shape), "not standard normal"),
        (lambda x, e: x + torch.randn(3), "shape"),
        (lambda x, e: torch.clamp(x, -e, e), "bounds depend on the data"),
        (lambda x, e: x.flip(-1), "'flip'"),
        (lambda x, e: x * math.nan, "not finite"),
        (lambda x, e: x * torch.linspace(0, 1, x.shape[-1]), "element to element"),
        (lambda x, e: x[:, :1] * 1.0, "relative error|shape"),
        (lambda x, e: x - x.sum(dim=1, keepdim=True), "relative error"),
        (lambda x, e: x.numpy(), "'numpy'"),
    ],
)
def test_a_non_linear_step_is_refused(effect: object, words: str) -> None:
    scheduler = _Peculiar()
    scheduler.effect = effect
    with pytest.raises(SchedulerRefused, match=words):
        trace_program(scheduler, 3)


def test_hidden_state_is_caught_by_the_replay() -> None:
    box: list[torch.Tensor] = []

    def effect(sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        box.append(prediction)
        return sample + 0.1 * box[0]  # from the second call on a tensor that no register holds

    scheduler = _Peculiar()
    scheduler.effect = effect
    with pytest.raises(SchedulerRefused):
        trace_program(scheduler, 3)


def test_in_place_arithmetic_is_followed() -> None:
    def effect(sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        result = sample.clone()
        result *= 0.5
        result -= prediction
        return result.clamp_(-2, 2)

    scheduler = _Peculiar()
    scheduler.effect = effect
    update = trace_program(scheduler, 1).calls[0].update
    assert update == (Lin("r1", ((LATENTS, 0.5), ("prediction", -1.0))), Clamp(LATENTS, "r1", -2.0, 2.0))


def test_image_to_image_starts_with_the_schedulers_own_noising() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    program = trace_program(scheduler, 10, options={"start_index": 6})
    scheduler.set_timesteps(10)
    assert len(program.calls) == 4
    assert [call.step for call in program.calls] == [0, 1, 2, 3]
    assert program.options["image_scale"] == 1.0
    assert program.state[0].initial_scale == pytest.approx(float(scheduler.sigmas[6]))


def test_flow_match_shift_comes_in_as_an_option() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    low, high = (trace_program(scheduler, 10, options={"mu": mu}) for mu in (0.5, 1.15))
    assert low.options == {"mu": 0.5}
    assert low.calls[5].timestep < high.calls[5].timestep


def test_an_unknown_option_or_a_foreign_eta_is_an_error() -> None:
    with pytest.raises(RequestError, match="did you mean 'mu'"):
        trace_program(diffusers.FlowMatchEulerDiscreteScheduler(), 5, options={"muu": 1.0})
    with pytest.raises(RequestError, match="takes no eta"):
        trace_program(diffusers.EulerDiscreteScheduler(), 5, eta=0.5)
    with pytest.raises(RequestError, match="outside the schedule"):
        trace_program(ddim(), 5, options={"start_index": 5})


def test_many_step_counts_skip_those_that_the_scheduler_refuses() -> None:
    skipped: dict[int, str] = {}
    scheduler = diffusers.CMStochasticIterativeScheduler()
    programs = trace_programs(scheduler, [1, 2, 39, 41], on_skip=lambda count, why: skipped.update({count: why}))
    assert sorted(programs) == [1, 2, 39]
    assert list(skipped) == [41]
    assert "cannot be larger" in skipped[41]
    assert {n: p.steps for n, p in programs.items()} == {1: 1, 2: 2, 39: 39}


def test_when_every_step_count_fails_the_reason_is_raised() -> None:
    with pytest.raises(SchedulerRefused, match="thresholding"):
        trace_programs(ddim(thresholding=True), [1, 2])


def test_all_step_counts_of_the_common_schedulers_trace() -> None:
    for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        assert sorted(trace_programs(cls(), [*range(1, 101, 9)])) == [*range(1, 101, 9)]


def test_traced_twice_gives_the_same_text() -> None:
    texts = {canonical_json(trace_program(diffusers.SASolverScheduler(), 6)) for _ in range(2)}
    assert len(texts) == 1


def test_program_survives_json() -> None:
    program = trace_program(diffusers.DPMSolverSDEScheduler(), 4)
    assert from_data(StepProgram, json.loads(canonical_json(program)), "test") == program


def test_brownian_increments_have_the_covariance_of_brownian_motion() -> None:
    # The noise of an interval as a vector over the independent draws: covariances are then dot products, exactly.
    draws = iter(np.eye(16))
    path = BrownianPath(lambda: next(draws))
    intervals = [(10.0, 7.0), (10.0, 4.0), (9.0, 5.0), (4.0, 3.0), (4.0, 1.0), (3.5, 0.5)]
    noise = [path(a, b) for a, b in intervals]
    for i, (a, b) in enumerate(intervals):
        for j, (c, d) in enumerate(intervals):
            overlap = max(0.0, min(a, c) - max(b, d))
            assert noise[i] @ noise[j] == pytest.approx(overlap / math.sqrt((a - b) * (c - d)), abs=1e-12)


def test_brownian_path_refuses_what_it_has_forgotten() -> None:
    path = BrownianPath(lambda: 1.0)
    path(5.0, 4.0)
    path(4.0, 3.0)
    with pytest.raises(ValueError, match="cannot be drawn"):
        path(5.0, 3.0)


def test_brownian_noise_turns_its_sign_with_the_direction() -> None:
    down, up = (BrownianPath(lambda: 1.0)(*ends) for ends in ((2.0, 1.0), (1.0, 2.0)))
    assert down == -up == 1.0


def test_a_wrong_coefficient_would_be_seen_by_the_comparison() -> None:
    program = trace_program(ddim(), 10)
    call = program.calls[4]
    bent = Lin(LATENTS, tuple((r, c * (1 + 1e-4)) for r, c in call.update[0].terms))  # type: ignore[union-attr]
    calls = (*program.calls[:4], type(call)(call.timestep, call.inputs, (bent,), call.step), *program.calls[5:])
    stock = stock_loop(ddim(), 10)
    assert relative_error(replay(program), stock) < 1e-6
    assert relative_error(replay(StepProgram(program.scheduler, 10, calls)), stock) > 1e-5


def test_load_scheduler_reads_what_diffusers_writes(tmp_path: Path) -> None:
    saved = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    saved.save_pretrained(tmp_path)
    loaded = load_scheduler(tmp_path)
    assert type(loaded) is diffusers.DPMSolverMultistepScheduler
    assert scheduler_identity(loaded) == scheduler_identity(saved)
    assert scheduler_identity(loaded) != scheduler_identity(diffusers.DPMSolverMultistepScheduler())


def test_identity_sees_a_shift_that_was_set_later() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    before = scheduler_identity(scheduler)
    scheduler.set_shift(3.0)
    assert scheduler_identity(scheduler) != before


def test_load_scheduler_refuses_missing_broken_and_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    with pytest.raises(NotAModelDirectory, match="no such file"):
        load_scheduler(tmp_path)
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_scheduler(tmp_path)
    file.write_text("[]")
    with pytest.raises(DataError, match="_class_name"):
        load_scheduler(tmp_path)
    file.write_text('{"_class_name": "DDIMSheduler"}')
    with pytest.raises(SchedulerRefused, match="did you mean 'DDIMScheduler'"):
        load_scheduler(tmp_path)
    file.write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(SchedulerRefused, match="a scheduler class of diffusers"):
        load_scheduler(tmp_path)
