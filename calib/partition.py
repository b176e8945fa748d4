"""Partitions of the group key: which calls share a row of the scale table.

Every partition is chosen on one quantity, the *loss* of an interval of calibrated keys: what its calls lose when they
share one quantizer per tensor.  For one tensor and quantizer `q`,

    loss(a, b) = min over q of  sum over keys s in [a, b) of  MSE(s, q) / power(s)

which is the sum of the inverse signal-to-quantization-noise ratios of the calls, and the loss of an interval is the sum
over tensors.  `power(s)` is the tensor's mean square at key `s`, but no less than `POWER_FLOOR` of its largest one: a
call that is silent beside the others may be noisy.

The quantizers `q` compete on a list per tensor: the best range of each calibrated key alone, and of runs of 2, 4, 8, …
neighbours merged (the `clip` method).  `MSE(s, q)` is the model of `ranges.Moments`.  Sums over keys are differences of
prefix sums, so all S²/2 intervals cost S² · candidates additions per tensor.  Because each term is a minimum of sums,
splitting an interval never raises the loss: more groups, nested or optimal, never lose.

To add a partition, write one function from `Evidence` and a number of groups, and add one line to `PARTITIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.ranges import Moments, clip, ends, quantizer_for
from quantempo.calib.tables import Cells, cells_by_tensor
from quantempo.contracts.partition import Partition
from quantempo.contracts.stats import TensorStats
from quantempo.errors import CalibrationError, RequestError, nearest

Floats = NDArray[np.float64]

MAX_GROUPS = 64
MERGE_LOSS_DB = 0.0005
"""Predicted on tensors: far below the 0.1 dB that may be lost end to end, since the prediction leaves out how errors
add up over sites and calls."""
MIN_SAMPLES = 8
"""A group of its own needs this many samples; a key that fewer visited joins the next one."""
POWER_FLOOR = 1e-4
MAX_CANDIDATES = 256


@dataclass(frozen=True)
class Evidence:
    """What a partition is chosen on.

    Args:
        stats: one cell per (graph, tensor, key, branch).
        bits_of: the tensors that share the partition, with their number of bits.
        samples: how many samples visited each key; empty where unknown, and then no key counts as rare.
        graph: the graph variant; `None` where the cells hold only one.
        unit: what the key is.
    """

    stats: Cells
    bits_of: Mapping[str, int]
    samples: Mapping[float, int] | None = None
    graph: str | None = None
    unit: str = "timestep"

    @cached_property
    def tensors(self) -> Mapping[str, Mapping[float, TensorStats]]:
        """Cells by tensor and ascending key, branches merged."""
        return cells_by_tensor(self.stats, sorted(self.bits_of), self.graph)

    @cached_property
    def keys(self) -> tuple[float, ...]:
        """The calibrated keys, ascending.

        Raises:
            CalibrationError: there is none, or the tensors were seen at different keys.
        """
        found = {tuple(cells) for cells in self.tensors.values()}
        if len(found) != 1:
            raise CalibrationError(
                "partition",
                found=f"tensors with {len(found)} different sets of keys" if found else "no tensor",
                wanted="every tensor at every key",
                cause="statistics of different runs were mixed up",
                remedy="calibrate again, in one run",
            )
        return next(iter(found))

    @cached_property
    def losses(self) -> Floats:
        """`losses[a, b]` of the interval of keys `a .. b - 1`; infinite where it is empty.  `[S + 1, S + 1]`."""
        total = np.zeros((len(self.keys) + 1,) * 2)
        for tensor, cells in self.tensors.items():
            total += interval_losses(tuple(cells.values()), self.bits_of[tensor])
        total[np.tril_indices(len(total))] = math.inf
        return total


Partitioner = Callable[[Evidence, int], Partition]


def interval_losses(cells: Sequence[TensorStats], bits: int) -> Floats:
    """The loss of every interval of one tensor's cells: see the module's text.  `[S + 1, S + 1]`, zero where empty."""
    n = len(cells)
    ranges = _candidates(cells, bits)
    quantizers = sorted({quantizer_for(low, high, bits, False) for low, high in ranges})
    scale = np.array([float(s) for s, _ in quantizers])
    low, high = ends(scale, np.array([float(z) for _, z in quantizers]), bits)
    power = np.array([cell.total_square / cell.count for cell in cells])
    power = np.maximum(power, max(power.max() * POWER_FLOOR, np.finfo(np.float64).tiny))
    prefix = np.zeros((n + 1, len(scale)))
    for s, cell in enumerate(cells):
        prefix[s + 1] = prefix[s] + Moments.of(cell).errors(low, high, scale) / power[s]
    losses = np.zeros((n + 1, n + 1))
    for a in range(n):
        losses[a, a + 1 :] = (prefix[a + 1 :] - prefix[a]).min(axis=1)
    return losses


def _candidates(cells: Sequence[TensorStats], bits: int) -> list[tuple[float, float]]:
    """The best range of each cell, of each pair, of each four, … and of all together."""
    found: list[tuple[float, float]] = []
    level = list(cells)
    while level:
        stride = -(-2 * len(level) // MAX_CANDIDATES)
        found += [clip(cell, bits, False) for cell in level[::stride]]
        if len(level) == 1:
            break
        level = [a if b is None else a.merge(b) for a, b in zip(level[::2], [*level[1::2], None], strict=False)]
    return found


def solve(losses: Floats, borders: Sequence[int], groups: int) -> list[tuple[float, tuple[int, ...]]]:
    """The best partitions of a line into 1, 2, … `groups` intervals, by exact dynamic programming.

    Args:
        losses: of the interval `[a, b)`, as `Evidence.losses`.
        borders: the indices at which a border may lie, first and last included, ascending.
        groups: the largest number of intervals; at most `len(borders) - 1`.

    Returns:
        For each number of intervals its loss and its borders.
    """
    place = np.asarray(borders)
    cost = losses[np.ix_(place, place)]
    best = cost[0].copy()
    came: list[NDArray[np.intp]] = []
    found = []
    for count in range(1, groups + 1):
        if count > 1:
            ways = best[:, None] + cost
            came.append(np.argmin(ways, axis=0))
            best = ways[came[-1], np.arange(len(place))]
        path = [len(place) - 1]
        for step in reversed(came):
            path.append(int(step[path[-1]]))
        path.append(0)
        found.append((float(best[-1]), tuple(int(place[i]) for i in reversed(path))))
    return found


def predicted_loss(evidence: Evidence, partition: Partition) -> float:
    """The loss of a partition on the calibration data: inverse SQNR, summed over calls and tensors."""
    groups = [partition.group_of(key) for key in evidence.keys]
    borders = [0, *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]), len(groups)]
    return float(sum(evidence.losses[a, b] for a, b in pairwise(borders)))


# ------------------------------------------------------------------------------------------------------- the partitions


def single(evidence: Evidence, groups: int = 1) -> Partition:
    """One group for everything."""
    return Partition((), evidence.keys[0], evidence.keys[-1], evidence.unit)


def uniform(evidence: Evidence, groups: int) -> Partition:
    """Intervals of equal width over the calibrated range.

    Raises:
        RequestError: an interval would hold no calibrated key.
    """
    keys = evidence.keys
    _check_groups(groups, len(keys))
    edges = tuple(keys[0] + (keys[-1] - keys[0]) * i / groups for i in range(1, groups))
    partition = Partition(edges, keys[0], keys[-1], evidence.unit)
    if len({partition.group_of(key) for key in keys}) < groups:
        raise _too_many(groups, len(keys), "an interval of equal width holds no calibrated key")
    return partition


def optimal(evidence: Evidence, groups: int) -> Partition:
    """The partition into `groups` intervals with the least loss, edges midway between neighbouring keys.

    Raises:
        RequestError: more groups than calibrated keys.
    """
    _check_groups(groups, len(evidence.keys))
    borders = range(len(evidence.keys) + 1)
    return _at(evidence, solve(evidence.losses, borders, groups)[-1][1])


def auto(evidence: Evidence, groups: int = MAX_GROUPS) -> Partition:
    """One interval per calibrated key, merged where that costs next to nothing.

    A key that fewer than `MIN_SAMPLES` samples visited first joins its successor (the last one its predecessor).  Then
    the smallest number of groups is taken, at most `groups`, whose best partition is predicted to lose less than
    `MERGE_LOSS_DB` against one interval per key.
    """
    borders = _well_sampled(evidence.keys, evidence.samples)
    _check_groups(groups, max(groups, 1))
    found = solve(evidence.losses, borders, min(groups, len(borders) - 1))
    finest = sum(evidence.losses[a, b] for a, b in pairwise(borders))
    for loss, chosen in found:
        if loss <= finest * 10 ** (MERGE_LOSS_DB / 10):
            return _at(evidence, chosen)
    return _at(evidence, found[-1][1])


def _well_sampled(keys: Sequence[float], samples: Mapping[float, int] | None) -> list[int]:
    borders, seen = [0], 0
    for i, key in enumerate(keys):
        seen += MIN_SAMPLES if not samples else samples.get(key, 0)
        if seen >= MIN_SAMPLES:
            borders.append(i + 1)
            seen = 0
    if len(borders) == 1:
        borders.append(len(keys))
    borders[-1] = len(keys)
    return borders


def _at(evidence: Evidence, borders: Sequence[int]) -> Partition:
    keys = evidence.keys
    edges = tuple((keys[i - 1] + keys[i]) / 2.0 for i in borders[1:-1])
    return Partition(edges, keys[0], keys[-1], evidence.unit)


PARTITIONS: Mapping[str, Partitioner] = {
    "auto": auto,
    "single": single,
    "uniform": uniform,
    "optimal": optimal,
}


def choose_partition(spec: str | int, evidence: Evidence) -> Partition:
    """The partition that a user's word means: `auto`, `single`, `uniform:8`, `optimal:8`, or `8` for the latter.

    Raises:
        RequestError: not such a word, or a number of groups that the calibrated keys do not allow.
    """
    name, groups = parse_groups(spec)
    return PARTITIONS[name](evidence, groups)


def parse_groups(spec: str | int) -> tuple[str, int]:
    """The method and the number of groups that a user's word means; to be checked before hours of work, too.

    Raises:
        RequestError: not such a word.
    """
    name, _, number = str(spec).partition(":")
    if name.isdecimal() and not number:
        name, number = "optimal", name
    if name not in PARTITIONS or (number and not number.isdecimal()) or (name in ("uniform", "optimal") and not number):
        raise RequestError(
            "groups",
            found=repr(spec),
            wanted="auto, single, a number, uniform:NUMBER or optimal:NUMBER",
            cause="a misspelling" if name not in PARTITIONS else "the number of groups is missing or not a number",
            remedy=nearest(name, PARTITIONS) if name not in PARTITIONS else f"write for example {name}:8",
        )
    return name, int(number) if number else 1 if name == "single" else MAX_GROUPS


def _check_groups(groups: int, keys: int) -> None:
    if not 1 <= groups <= keys:
        raise _too_many(groups, keys, "each group needs at least one calibrated timestep")


def _too_many(groups: int, keys: int, cause: str) -> RequestError:
    return RequestError(
        "groups",
        found=f"{groups} groups for {keys} calibrated timesteps",
        wanted=f"1 to {keys}",
        cause=cause,
        remedy="use fewer groups or optimal:NUMBER, or calibrate with more steps",
    )
