from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import quantempo.demo
from quantempo.calib.cache.tap import SMALLEST, embedding, mean_cosine, select, similarity
from quantempo.calib.tuning.router import SublayerBlend
from quantempo.errors import RequestError

Floats = NDArray[np.float64]


def _modes(sizes: list[int], seed: int = 0) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Samples in a few tight groups of very different sizes, each at a step of its own."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((len(sizes), 32))
    label = np.repeat(np.arange(len(sizes)), sizes)
    return centres[label] + 0.1 * rng.standard_normal((len(label), 32)), label, label.astype(np.float64)


def test_similarity_by_hand() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    found = similarity(features, np.array([0.0, 1.0, 0.0]), np.array([0]), alpha=0.5)
    np.testing.assert_allclose(found[:, 0], [1.0, 0.5 * np.exp(-1.0), SMALLEST], atol=1e-9)


def test_embedding_is_that_of_the_normalised_matrix_with_rows_of_length_one() -> None:
    a = np.random.default_rng(0).uniform(0.1, 1, (7, 4))
    normal = np.diag(a.sum(1) ** -0.5) @ a @ np.diag(a.sum(0) ** -0.5)
    found = embedding(a, 3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-12)
    left = np.linalg.svd(normal)[0][:, :3]
    np.testing.assert_allclose(found @ found.T, _cosines(left), atol=1e-12)  # whatever the signs


def _cosines(points: Floats) -> Floats:
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    found: Floats = unit @ unit.T
    return found


def test_selection_is_deterministic_and_distinct() -> None:
    features, _, steps = _modes([60, 30, 10])
    first = select(features, steps, 20, seed=3, k=4)
    np.testing.assert_array_equal(first, select(features, steps, 20, seed=3, k=4))
    assert len(set(first.tolist())) == 20
    assert np.all(np.diff(first) > 0)
    assert not np.array_equal(first, select(features, steps, 20, seed=4, k=4))


def test_rare_samples_are_drawn_more_often_than_by_chance() -> None:
    features, label, steps = _modes([300, 60, 20, 10])
    chosen = label[select(features, steps, 40, k=4)]
    rare = np.mean(chosen >= 2)
    assert rare > 2 * (30 / 390)
    assert len(np.unique(chosen)) == 4


def test_selected_samples_are_less_alike_than_a_uniform_draw() -> None:
    features, _, steps = _modes([300, 60, 20, 10])
    rng = np.random.default_rng(0)
    uniform = np.mean([mean_cosine(features[rng.choice(390, 40, replace=False)]) for _ in range(20)])
    assert mean_cosine(features[select(features, steps, 40, k=8)]) < uniform


def test_all_samples_may_be_selected() -> None:
    features, _, steps = _modes([6, 4])
    np.testing.assert_array_equal(select(features, steps, 10), np.arange(10))


def test_mean_cosine_is_over_pairs_of_different_samples() -> None:
    x = np.random.default_rng(0).standard_normal((5, 7))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs))


def test_bad_selections_are_refused() -> None:
    features, _, steps = _modes([6, 4])
    with pytest.raises(RequestError, match="11 of 10"):
        select(features, steps, 11)
    with pytest.raises(RequestError, match="alpha 2"):
        select(features, steps, 5, alpha=2)


# ------------------------------------------------------------------------------------------------- on real trajectories

STEPS, SAMPLES = 12, 16


@functools.cache
def _captured(interval: int) -> Floats:
    """What leaves the demo DiT's last block on its own trajectories, (steps, samples, size)."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    folder = Path(quantempo.demo.__file__).parent / "dit"
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    seen: list[NDArray[np.float32]] = []
    hook = model.transformer_blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out.numpy()))
    x = torch.randn((SAMPLES, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    labels, blend = torch.arange(SAMPLES) % 10, SublayerBlend(model)
    with torch.no_grad(), blend.active():
        for index, t in enumerate(scheduler.timesteps):
            feed = {"hidden_states": x, "timestep": t.expand(SAMPLES), "class_labels": labels}
            fresh = index % interval == 0
            out = blend.record(model, feed) if fresh else blend.reuse(model, feed, torch.zeros(len(blend.layers)))
            x = scheduler.step(out, t, x).prev_sample
    hook.remove()
    return np.stack(seen).reshape(STEPS, SAMPLES, -1).astype(np.float64)


def test_caching_makes_captured_samples_more_alike() -> None:
    plain, cached = (_captured(interval) for interval in (1, 3))
    alike = [np.mean([mean_cosine(run[:, s]) for s in range(SAMPLES)]) for run in (plain, cached)]
    assert alike[1] > alike[0]


def test_selection_from_cached_trajectories_is_less_alike_than_uniform_draws() -> None:
    pool = _captured(3).reshape(STEPS * SAMPLES, -1)
    steps = np.repeat(np.arange(STEPS), SAMPLES)
    rng = np.random.default_rng(0)
    draws = [mean_cosine(pool[rng.choice(len(pool), 40, replace=False)]) for _ in range(40)]
    chosen = [mean_cosine(pool[select(pool, steps, 40, seed=seed)]) for seed in range(5)]
    assert np.mean(chosen) < np.mean(draws)


def test_ranges_of_selected_samples_cover_more_at_every_stage_than_those_of_uniform_draws() -> None:
    """Min-max ranges in four groups of steps, as shares of what the whole pool reaches in that group."""
    pool = _captured(3).reshape(STEPS * SAMPLES, -1)
    steps = np.repeat(np.arange(STEPS), SAMPLES)
    low, high, group = pool.min(axis=1), pool.max(axis=1), 4 * steps // STEPS
    reach = [high[group == g].max() - low[group == g].min() for g in range(4)]

    def covered(chosen: NDArray[np.intp]) -> float:
        parts = [chosen[group[chosen] == g] for g in range(4)]
        return float(np.mean([(high[p].max() - low[p].min()) / r if len(p) else 0.0
                              for p, r in zip(parts, reach, strict=True)]))  # fmt: skip

    rng = np.random.default_rng(0)
    uniform = [covered(rng.choice(len(pool), 16, replace=False)) for _ in range(200)]
    chosen = [covered(select(pool, steps, 16, seed=seed)) for seed in range(60)]
    assert np.mean(chosen) > np.mean(uniform)
    assert np.std(chosen) < np.std(uniform) / 2  # and it depends less on luck
