from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quantempo.calib.selection import (
    METHODS,
    Visit,
    allocate,
    importance,
    needs_features,
    parse_selection,
    select,
)
from quantempo.errors import RequestError

KEYS = tuple(float(50 * (20 - i) - 49) for i in range(20))
VISITS = tuple(Visit(batch, call, key) for batch in range(12) for call, key in enumerate(KEYS))
FEATURES = {key: np.array([np.cos(key / 300), np.sin(key / 300), 1.0]) for key in KEYS}


def key_counts(words: str, seed: int = 0) -> Counter[float]:
    chosen = select(words, VISITS, seed=seed, features=FEATURES)
    return Counter(KEYS[call] for _, call in chosen)


@pytest.mark.parametrize("name", ["uniform", "normal", "density"])
def test_a_method_spends_its_budget_exactly_and_always_in_the_same_way(name: str) -> None:
    words = f"{name}:0.3"
    chosen = select(words, VISITS, features=FEATURES)
    assert len(chosen) == round(0.3 * len(VISITS))
    assert chosen == select(words, VISITS, features=FEATURES)
    assert chosen != select(words, VISITS, seed=1, features=FEATURES)
    assert {batch for batch, _ in chosen} == set(range(12))
    assert select(f"{name}:1", VISITS, features=FEATURES) == select("all", VISITS)


def test_uniform_takes_the_same_share_of_every_batch() -> None:
    assert set(Counter(batch for batch, _ in select("uniform:0.25", VISITS)).values()) == {5}


def test_normal_prefers_the_middle() -> None:
    counts = sum((key_counts("normal:0.3", seed) for seed in range(40)), Counter())
    middle = sum(counts[key] for key in KEYS[7:13]) / 6
    ends = (counts[KEYS[1]] + counts[KEYS[-2]]) / 2
    assert middle > 1.3 * ends


def test_single_takes_one_timestep_of_every_batch() -> None:
    assert key_counts("single") == {KEYS[9]: 12}


def test_density_gives_more_to_timesteps_that_are_many_and_unlike_the_rest() -> None:
    rows = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]] + [[0.7, 0.7]] * 3)
    dense = importance(rows, diversity=0.0, radius=0.01)
    assert dense[0] == 1.0
    assert dense[6] == 0.0
    weights = importance(rows, diversity=1.2, radius=0.01)
    assert weights.argmax() == 0 or weights[6] > weights[7]
    assert importance(rows, diversity=50.0, radius=0.01).argmax() == 6


def test_shares_add_up_and_stay_below_their_limits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 12))
        weights, limits = rng.random(size) * (rng.random(size) > 0.2), rng.integers(0, 9, size)
        budget = int(rng.integers(0, 60))
        counts = allocate(weights, limits.tolist(), budget)
        assert sum(counts) == min(budget, limits.sum())
        assert all(0 <= n <= limit for n, limit in zip(counts, limits, strict=True))
    assert allocate(np.array([3.0, 1.0]), [100, 100], 8) == [6, 2]


def test_every_batch_is_looked_at_even_with_a_tiny_budget() -> None:
    for name in ("uniform", "normal", "density"):
        chosen = select(f"{name}:0.01", VISITS, features=FEATURES)
        assert {batch for batch, _ in chosen} == set(range(12))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("unifrom:0.5", "did you mean 'uniform'"), ("uniform", "write uniform:0.25"), ("uniform:0", "above 0"),
        ("normal:1.5", "at most 1"), ("density:x", "write density:0.25"), ("all:0.5", "all"), ("", "a misspelling"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: str, said: str) -> None:
    with pytest.raises(RequestError, match="selection: found") as caught:
        parse_selection(words)
    assert said in str(caught.value)


def test_only_density_needs_features() -> None:
    assert [name for name in METHODS if needs_features(name if name in ("all", "single") else f"{name}:0.5")] == [
        "density"
    ]
