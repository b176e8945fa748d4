"""Which calls of the trajectories calibration looks at.

All trajectories are run whole, since a call needs the state that the calls before it left.  A *visit* is one call of
one batch; a selection is the set of visits whose tensors are observed.  Methods that share a budget (a share of all
visits) differ in how they spread it over the timesteps:

| word | visits |
| --- | --- |
| `all` | every one |
| `uniform:F` | the share F, evenly over the calls of each batch |
| `normal:F` | the share F, timesteps drawn from a normal distribution with mean T/2 and standard deviation 0.35 T |
| `density:F` | the share F, a timestep's part by density and diversity of its features |
| `single` | the visits of the one timestep in the middle, for comparison |

`normal` is the timestep prior of PTQ4DM (Shang et al. 2023; the constants are those of its published code), which PQD
takes up.  `density` is the allocation of EDA-DM (Liu et al. 2024): a timestep's density is the number of timesteps
whose features lie within a radius, its diversity the sum of its cosine distances to all others; both are scaled to
[0, 1], and the weight is density + 1.2 · diversity.  Its radius belongs to one model there; here it is the median of
all distances.

To add a method, write a function `(visits, budget, rng, features)` and add one line to `METHODS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import RequestError, nearest

MEAN, SPREAD = 0.5, 0.35
DIVERSITY = 1.2
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Visit:
    """One denoiser call of one batch: their indices, and the call's group key."""

    batch: int
    call: int
    key: float


Features = Mapping[float, NDArray[Any]]
"""By group key, a vector that describes the calls at it."""
Method = Callable[[Sequence[Visit], int, np.random.Generator, Features], list[Visit]]
Selection = frozenset[tuple[int, int]]
"""(batch, call) of each visit that is observed."""


def parse_selection(words: str) -> tuple[str, float]:
    """The method and the share of all visits that a user's words mean; to be checked before hours of work, too.

    Raises:
        RequestError: not such words.
    """
    name, _, share = words.partition(":")
    try:
        value = float(share) if share else 1.0
    except ValueError:
        value = 0.0
    if name not in METHODS or not 0 < value <= 1 or (name not in BUDGETED) != (not share):
        known, example = name in METHODS, f"{name}:0.25" if name in BUDGETED else name
        raise RequestError(
            "selection", found=repr(words), wanted=", ".join(f"{n}:F" if n in BUDGETED else n for n in METHODS),
            cause="F is a share of the calls, above 0 and at most 1" if known else "a misspelling",
            remedy=f"write {example}" if known else nearest(name, METHODS),
        )
    return name, value


def select(words: str, visits: Sequence[Visit], *, seed: int = 0, features: Features | None = None) -> Selection:
    """The visits that are observed; always the same for the same arguments.

    Every batch keeps at least one visit, so that no sample is run for nothing.

    Args:
        words: `all`, `uniform:0.25`, …
        visits: all of them, in order.
        seed: of the draws.
        features: for `density`; see `needs_features`.

    Raises:
        RequestError: not such words.
    """
    name, share = parse_selection(words)
    budget = max(1, round(share * len(visits)))
    chosen = set(METHODS[name](visits, budget, np.random.Generator(np.random.Philox(seed)), features or {}))
    for batch in sorted({visit.batch for visit in visits} - {visit.batch for visit in chosen}):
        # In exchange for a visit of the batch that has most, of the same timestep where there is one.
        most = max(_by(sorted(chosen, key=_place), lambda visit: visit.batch).values(), key=len)
        own = [visit for visit in visits if visit.batch == batch]
        given = next((v for v in most if v.key in {visit.key for visit in own}), most[0])
        chosen.add(min(own, key=lambda visit: (abs(given.key - visit.key), visit.call)))
        if len(most) > 1:
            chosen.remove(given)
    return frozenset((visit.batch, visit.call) for visit in chosen)


def _place(visit: Visit) -> tuple[int, int]:
    return visit.batch, visit.call


def needs_features(words: str) -> bool:
    """Whether a method has to see features first."""
    return parse_selection(words)[0] == "density"


def everything(visits: Sequence[Visit], budget: int, rng: np.random.Generator, features: Features) -> list[Visit]:
    """All visits."""
    return list(visits)


def single(visits: Sequence[Visit], budget: int, rng: np.random.Generator, features: Features) -> list[Visit]:
    """The visits of the key in the middle."""
    keys = sorted({visit.key for visit in visits})
    return [visit for visit in visits if visit.key == keys[len(keys) // 2]]


def uniform(visits: Sequence[Visit], budget: int, rng: np.random.Generator, features: Features) -> list[Visit]:
    """The same share of every batch, drawn without replacement."""
    batches = _by(visits, lambda visit: visit.batch)
    found: list[Visit] = []
    for index, (_, own) in enumerate(sorted(batches.items())):
        # What is left is spread over the batches that are left, so the counts add up.
        left = sum(len(v) for b, v in sorted(batches.items())[index:])
        count = round((budget - len(found)) * len(own) / left)
        found += [own[i] for i in sorted(rng.permutation(len(own))[:count])]
    return found


def normal(visits: Sequence[Visit], budget: int, rng: np.random.Generator, features: Features) -> list[Visit]:
    """Visits nearest to timesteps drawn from `N(T/2, (0.35 T)²)`, clipped to `[0, T]`, each visit at most once."""
    top = max(visit.key for visit in visits)
    left = {key: list(own) for key, own in _by(visits, lambda visit: visit.key).items()}
    found = []
    for wanted in np.clip(rng.normal(MEAN * top, SPREAD * top, budget), 0.0, top):
        key = min(left, key=lambda k: (abs(k - wanted), k))
        found.append(left[key].pop(int(rng.integers(len(left[key])))))
        if not left[key]:
            del left[key]
    return found


def density(visits: Sequence[Visit], budget: int, rng: np.random.Generator, features: Features) -> list[Visit]:
    """Visits of each key in the numbers that `allocate` gives, drawn without replacement."""
    own = _by(visits, lambda visit: visit.key)
    keys = sorted(own)
    # A key without features (another program's) counts as its nearest neighbour that has some.
    rows = np.stack([features[min(features, key=lambda f: (abs(f - key), f))].reshape(-1) for key in keys])
    counts = allocate(importance(rows), [len(own[key]) for key in keys], budget)
    return [own[key][i] for key, n in zip(keys, counts, strict=True) for i in rng.permutation(len(own[key]))[:n]]


def importance(features: NDArray[Any], diversity: float = DIVERSITY, radius: float | None = None) -> Floats:
    """Density plus weighted diversity of each row of features `[T, D]`, at least 0.

    Args:
        features: one row per timestep.
        diversity: the weight; 0 leaves density alone.
        radius: mean squared distance below which two rows are neighbours; `None` for the median of all pairs.
    """
    rows = np.asarray(features, np.float64)
    distance = np.array([((rows - row) ** 2).mean(axis=1) for row in rows])
    pairs = distance[np.triu_indices(len(rows), 1)]
    limit = (float(np.median(pairs)) if pairs.size else 0.0) if radius is None else radius
    near = (distance <= limit).sum(axis=1).astype(np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    far = (1.0 - unit @ unit.T).sum(axis=1)
    weights: Floats = _scaled(near) + diversity * _scaled(far)
    return weights


def _scaled(values: Floats) -> Floats:
    span = values.max() - values.min()
    found: Floats = (values - values.min()) / span if span > 1e-12 else np.ones_like(values)
    return found


def allocate(weights: Floats, limits: Sequence[int], budget: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to `budget`, none above its limit.

    What rounding leaves over goes to the largest weights that have room.
    """
    room = np.asarray(limits)
    total = weights.sum()
    shares = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
    counts = np.minimum(np.rint(shares * budget).astype(int), room)
    order = np.argsort(-weights, kind="stable")
    budget = min(budget, int(room.sum()))
    while counts.sum() != budget:
        step = 1 if counts.sum() < budget else -1
        for index in order:
            if counts.sum() != budget and 0 <= counts[index] + step <= room[index]:
                counts[index] += step
    return [int(n) for n in counts]


def _by(visits: Sequence[Visit], key: Callable[[Visit], Any]) -> dict[Any, list[Visit]]:
    found: dict[Any, list[Visit]] = defaultdict(list)
    for visit in visits:
        found[key(visit)].append(visit)
    return dict(found)


METHODS: Mapping[str, Method] = {
    "all": everything,
    "uniform": uniform,
    "normal": normal,
    "density": density,
    "single": single,
}
BUDGETED = ("uniform", "normal", "density")
"""Methods that take a share."""
