from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantempo.demo
from quantempo.calib.tuning.router import (
    Router,
    RouterSettings,
    SublayerBlend,
    Trajectories,
    feed_of,
    mask_errors,
    predict,
    train_router,
)
from quantempo.errors import CalibrationError, RequestError

STEPS, SAMPLES = 6, 8
REFRESHES = (0, 2, 4)
SMALL = RouterSettings(rounds=8, batch=4, rate=0.5)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads of torch wait for each other by spinning, which takes minutes where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _demo() -> tuple[nn.Module, Any]:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    folder = Path(quantempo.demo.__file__).parent / "dit"
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    return model, DDIMScheduler.from_pretrained(folder / "scheduler")


@functools.cache
def _trajectories(seed: int) -> Trajectories:
    model, scheduler = _demo()
    scheduler.set_timesteps(STEPS)
    x = torch.randn((SAMPLES, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(SAMPLES) % 10
    seen = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen.append(x.numpy())
            feed = {"hidden_states": x, "timestep": t.expand(SAMPLES), "class_labels": labels}
            x = scheduler.step(predict(model, feed), t, x).prev_sample
    return Trajectories(np.stack(seen), [float(t) for t in scheduler.timesteps], {"class_labels": labels.numpy()})


@functools.cache
def _trained(penalty: float = 0.02) -> Router:
    settings = replace(SMALL, penalty=penalty)
    return train_router(_demo()[0], _trajectories(0), REFRESHES, settings)


def test_all_fresh_is_the_full_model_bit_for_bit() -> None:
    model, trajectories, rows = _demo()[0], _trajectories(1), np.arange(4)
    blend = SublayerBlend(model)
    with torch.no_grad():
        plain = predict(model, feed_of(trajectories, 3, rows))
        with blend.active():
            blend.record(model, feed_of(trajectories, 2, rows))
            blended = blend.reuse(model, feed_of(trajectories, 3, rows), torch.ones(12))
        assert torch.equal(plain, blended)
        assert torch.equal(plain, predict(model, feed_of(trajectories, 3, rows)))  # hooks are gone


def test_reuse_of_the_same_call_is_the_full_model() -> None:
    model, trajectories, rows = _demo()[0], _trajectories(1), np.arange(4)
    blend = SublayerBlend(model)
    with torch.no_grad(), blend.active():
        full = blend.record(model, feed_of(trajectories, 3, rows))
        assert torch.equal(full, blend.reuse(model, feed_of(trajectories, 3, rows), torch.zeros(12)))


def test_a_negative_threshold_reuses_nothing_and_refreshes_never_reuse() -> None:
    router = _trained()
    assert not router.reused(-1.0).any()
    assert not router.reused(2.0)[list(REFRESHES)].any()
    assert router.reused(2.0).sum() == 3 * 12
    assert mask_errors(_demo()[0], _trajectories(1), REFRESHES, router.reused(-1.0)).max() == 0


def test_training_leaves_the_model_as_it_was() -> None:
    model = _demo()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _trained()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_larger_penalty_computes_fewer_sublayers() -> None:
    fresh = [int((~_trained(penalty).reused()).sum()) for penalty in (0.0, 1.0)]
    assert fresh[0] > fresh[1]


def test_a_learned_mask_beats_random_ones_of_equal_count_on_other_samples() -> None:
    model, held_out = _demo()[0], _trajectories(1)
    masks = _trained().reused_count(18)
    assert masks.sum() == 18
    learned = mask_errors(model, held_out, REFRESHES, masks).sum()
    rng = np.random.default_rng(0)
    others = []
    for _ in range(6):
        random = np.zeros_like(masks)
        picks = rng.permutation(36)[:18]
        random[np.array([1, 3, 5])[picks // 12], picks % 12] = True
        others.append(mask_errors(model, held_out, REFRESHES, random).sum())
    assert learned < 0.6 * np.mean(others)
    assert sum(learned < other for other in others) >= len(others) - 1


def test_other_models_and_settings_are_refused() -> None:
    with pytest.raises(CalibrationError, match="Linear without attention"):
        SublayerBlend(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="penalty"):
        train_router(_demo()[0], _trajectories(0), REFRESHES, RouterSettings(penalty=-1))
    with pytest.raises(RequestError, match="first call that reuses"):
        train_router(_demo()[0], _trajectories(0), (1, 3), SMALL)
