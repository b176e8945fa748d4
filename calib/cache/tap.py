"""Which captured samples to calibrate on, when caching makes most of them alike.

`select` is the temporal-aware parallel clustering of Q&C (Ding et al. 2025): a bipartite similarity between all samples
and a random subset, its leading singular vectors, clusters of these, and draws from every cluster.  The publication
leaves two things open.  The clusterings of several subsets are joined by putting their embeddings side by side and
clustering once.  And each sample's row of an embedding is brought to length 1, as is usual in spectral clustering (Ng,
Jordan and Weiss 2001).  A row is the longer the more its sample is like the subset, so without that the clusters follow
lengths: many lie among the early, noisy samples, and late steps are left out.  Draws go round the clusters, so each
of them is represented as evenly as its size allows.

A compile calibrates reusing calls on everything that it captures and selects nothing; this is for those who capture
more than they can calibrate on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import RequestError

Floats = NDArray[np.float64]
SUBSETS = 3
SUBSET_SHARE = 20
"""One in so many samples is in a subset."""
CLUSTERS = 100
SMALLEST = 1e-6
"""Similarities are clipped here: cosines may be negative, and degrees must not."""


def similarity(features: Floats, steps: Floats, subset: NDArray[np.intp], alpha: float = 0.5) -> Floats:
    """`alpha·cosine + (1 - alpha)·exp(-|difference of steps|)` of all samples with a subset, (N, n), clipped above 0.

    Args:
        features: (N, size).
        steps: (N,) in units of sampler steps.
        subset: indices of n samples.
        alpha: weight of the spatial part.
    """
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norm, np.finfo(np.float64).tiny)
    spatial = unit @ unit[subset].T
    temporal = np.exp(-np.abs(steps[:, None] - steps[subset][None, :]))
    clipped: Floats = np.maximum(alpha * spatial + (1 - alpha) * temporal, SMALLEST)
    return clipped


def embedding(similarities: Floats, size: int) -> Floats:
    """The leading left singular vectors of `Dr^-½ A Dc^-½`, signs fixed, rows of length 1, (N, at most `size`)."""
    degrees, columns = similarities.sum(axis=1), similarities.sum(axis=0)
    normal = similarities / np.sqrt(degrees)[:, None] / np.sqrt(columns)[None, :]
    left = np.linalg.svd(normal, full_matrices=False)[0][:, :size]
    sign = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    length = np.linalg.norm(left, axis=1, keepdims=True)
    rows: Floats = left * sign / np.maximum(length, np.finfo(np.float64).tiny)
    return rows


def clusters(points: Floats, count: int, seed: int) -> NDArray[np.intp]:
    """Labels of a k-means clustering, deterministic in the seed."""
    from scipy.cluster.vq import kmeans2

    rng = np.random.Generator(np.random.Philox(seed))
    _, labels = kmeans2(points, count, iter=25, minit="++", seed=rng, missing="warn")
    found: NDArray[np.intp] = np.asarray(labels, np.intp)
    return found


def select(
    features: NDArray[Any], steps: NDArray[Any], count: int, *, seed: int = 0, alpha: float = 0.5, k: int = CLUSTERS
) -> NDArray[np.intp]:
    """Indices of `count` samples, ascending, drawn evenly from clusters of similar ones.

    Args:
        features: (N, …), captured inputs of cached runs.
        steps: (N,) index of each sample's sampler step.
        count: how many; at most N.
        seed: of subsets, clusters and draws.
        alpha: weight of the spatial similarity.
        k: number of clusters and of singular vectors per subset; lowered where there are fewer samples.

    Raises:
        RequestError: more samples than there are, or an alpha out of range.
    """
    total = len(features)
    if not 0 < count <= total:
        raise _refuse(f"{count} of {total} samples", f"1 to {total}", "capture more trajectories, or select fewer")
    if not 0 <= alpha <= 1:
        raise _refuse(f"alpha {alpha:g}", "0 to 1", "use 0.5")
    flat = np.asarray(features, np.float64).reshape(total, -1)
    times = np.asarray(steps, np.float64)
    rng = np.random.Generator(np.random.Philox(seed))
    size = min(total, max(2, total // SUBSET_SHARE))
    parts = []
    for _ in range(SUBSETS):
        subset = np.sort(rng.choice(total, size, replace=False))
        parts.append(embedding(similarity(flat, times, subset, alpha), min(k, size)))
    labels = clusters(np.concatenate(parts, axis=1), max(1, min(k, count, total // 2)), seed)
    return _draw(labels, count, rng)


def _draw(labels: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """One sample from each cluster in turn, until there are enough."""
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    chosen: list[int] = []
    turn = 0
    while len(chosen) < count:
        for cluster in members:
            if turn < len(cluster) and len(chosen) < count:
                chosen.append(int(cluster[turn]))
        turn += 1
    return np.sort(np.array(chosen, np.intp))


def mean_cosine(features: NDArray[Any]) -> float:
    """Mean cosine similarity over all pairs of different samples, (N, …)."""
    flat = np.asarray(features, np.float64).reshape(len(features), -1)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    total = unit.sum(axis=0)
    n = len(flat)
    return float((total @ total - n) / (n * (n - 1)))


def _refuse(found: str, wanted: str, remedy: str) -> RequestError:
    return RequestError("sample selection", found=found, wanted=wanted, cause="the settings do not fit", remedy=remedy)
