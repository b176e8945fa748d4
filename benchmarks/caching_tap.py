"""What `caching.py --part tap` measures: calibration samples chosen by TAP against uniform draws."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from caching_results import interval_of, read, write
from numpy.typing import NDArray

from quantempo.calib.cache.schedules import every
from quantempo.calib.cache.tap import select
from quantempo.calib.tables import build_table
from quantempo.contracts.cache import FULL
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import StepProgram
from quantempo.contracts.stats import StatsKey, TensorStats
from quantempo.engines.registry import open_engine
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_ort import lower_ort
from quantempo.runtime.guidance import CONDITIONAL
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import GROUP_INPUT
from quantempo.stages.cache_schedules import scheduled
from quantempo.stages.quantizers import activation_bits
from quantempo.stages.teacher import GIVEN

HELD_OUT = 16
"""Trajectories, whose seeds begin that far behind those of the pool:"""
HELD_OUT_OFFSET = 1000
GROUPS = 4
Floats = NDArray[np.float64]


def tap_effect(subject: Any, args: argparse.Namespace) -> None:
    """Scales from samples chosen by TAP against scales from uniform draws of equal size, on held-out cached calls.

    The pool is every call of the even N = 3 trajectories of the float model; ranges are found as the recipe says, in
    four groups of timesteps, for the graph that computes everything; the error is that of its prediction, at each
    held-out call.
    """
    program = scheduled(subject.bench, subject.parts.exported.program(20), every(20, 3))
    pool = capture(subject, program, subject.settings.samples)
    held = capture(subject, program, HELD_OUT, HELD_OUT_OFFSET)
    judge = Judge(subject, pool, held)
    features = np.stack([point.feeds["sample"][0] for point in pool])
    calls = np.array([point.call for point in pool])
    row: dict[str, Any] = {
        "pool": len(pool), "draws": args.draws, "held_out_calls": len(held), "groups": GROUPS,
        "ranges": subject.parts.recipe.range_method, "counts": {},
        "mse_of_all": float(judge.errors(range(len(pool))).mean()),
    }
    for count in args.counts:
        chosen = [select(features, calls, count, seed=seed) for seed in range(args.draws)]
        drawn = [judge.uniform(count, seed) for seed in range(args.draws)]
        row["counts"][str(count)] = found = effect(*(np.stack([judge.errors(p) for p in ps]) for ps in (chosen, drawn)))
        print(subject.name, count, found, flush=True)
    results = read(args.json)
    results.setdefault("tap", {})[subject.name] = row
    write(args.json, results)


def effect(tap: Floats, uniform: Floats) -> dict[str, Any]:
    """What TAP saves, as a share of the uniform draws' error, with 95 % intervals over draws.

    `saved` is of the mean over calls, in which the last call outweighs all others; `saved_per_call` is of the geometric
    mean, in which every call counts alike.

    Args:
        tap: (draws, calls), mean squared errors.
        uniform: likewise.
    """
    shares = (uniform.mean(axis=1) - tap.mean(axis=1)) / uniform.mean()
    logs = np.log(tap).mean(axis=1) - np.log(uniform).mean(axis=1)
    middle, low, high = -np.expm1(interval_of(logs))
    return {
        "mse": {"tap": float(tap.mean()), "uniform": float(uniform.mean())},
        "by_call": {"tap": tap.mean(axis=0).tolist(), "uniform": uniform.mean(axis=0).tolist()},
        "saved": interval_of(shares),
        "saved_per_call": [float(middle), float(high), float(low)],
    }


@dataclass(frozen=True, eq=False)
class Point:
    """One row of one call: what it was fed, and the float prediction."""

    call: int
    key: float
    feeds: Mapping[str, NDArray[Any]]
    wanted: NDArray[np.float32]


def capture(subject: Any, program: StepProgram, samples: int, offset: int = 0) -> list[Point]:
    """The conditional rows of all calls of cached float runs, with what the full float graph says of them."""
    denoiser = subject.parts.manifest.denoiser
    loop = subject.bench.loop("shown", subject.bench.identity_vectors(len(program.calls)))
    full = subject.bench.engine("float", FULL)
    points = []

    def watch(seen: Observation, outputs: Any) -> None:
        feeds = {name: outputs[GIVEN + name].array.copy() for name in full.inputs}
        wanted = full.run(feeds)[denoiser.prediction]
        for row, branch in enumerate(seen.branches):
            if branch == CONDITIONAL:
                one = {name: values[row : row + 1] for name, values in feeds.items()}
                points.append(Point(seen.index, seen.call.key, one, wanted[row : row + 1]))

    batch = replace(subject, samples=samples, batch=samples).batches(program)[0]
    subject.bench.run(loop, program, replace(batch, seeds=tuple(s + offset for s in batch.seeds)), watch)
    return points


class Judge:
    """Errors of the quantized prediction at held-out calls, with scales from some points of a pool.

    Statistics of each point are collected once, so a selection costs a lowering and the held-out calls.

    Args:
        subject: the model.
        pool: points to select from.
        held: points to judge by.
    """

    def __init__(self, subject: Any, pool: Sequence[Point], held: Sequence[Point]) -> None:
        self._parts = subject.parts
        keys = [point.key for point in pool]
        borders = np.quantile(keys, np.arange(1, GROUPS) / GROUPS)
        self._partition = Partition(tuple(float(b) for b in borders), float(min(keys)), float(max(keys)))
        self._plan = replace(subject.parts.plan, centred=())
        self._bits = activation_bits(self._plan)
        self._keys = keys
        self._stats = self._statistics(pool)
        self._held = [self._joined([p for p in held if p.call == call]) for call in sorted({p.call for p in held})]

    def uniform(self, count: int, seed: int) -> NDArray[np.intp]:
        """A uniform draw; drawn again where it leaves a group without samples, since that would give no scales."""
        rng = np.random.default_rng(seed)
        while True:
            found: NDArray[np.intp] = rng.choice(len(self._keys), count, replace=False)
            if len({int(self._partition.group_of(self._keys[i])) for i in found}) == GROUPS:
                return found

    def errors(self, indices: Iterable[int]) -> Floats:
        """Mean squared error per call, (calls,)."""
        parts, plan = self._parts, self._plan
        merged: dict[StatsKey, TensorStats] = {}
        for index in indices:
            for tensor, stats in self._stats[index].items():
                key = StatsKey(FULL, tensor, self._keys[index], "")
                merged[key] = merged[key].merge(stats) if key in merged else stats
        table = build_table(merged, self._partition, parts.recipe.range_method, self._bits)
        with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
            write_graphs(Path(folder), {"int8": lower_ort(parts.exported.graph, plan, table, parts.weights)})
            engine = open_engine("ort", Path(folder) / "int8.onnx", EngineOptions(threads=1))
            found = []
            for feeds, wanted in self._held:
                fed = {name: values for name, values in feeds.items() if name in engine.inputs}
                made = engine.run(fed)[parts.manifest.denoiser.prediction]
                found.append(float(np.mean((made - wanted) ** 2, dtype=np.float64)))
            engine.close()
        return np.array(found)

    def _joined(self, points: Sequence[Point]) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
        """All points of one call as one batch, and what is wanted of them."""
        feeds = {name: np.concatenate([point.feeds[name] for point in points]) for name in points[0].feeds}
        feeds[GROUP_INPUT] = np.array(self._partition.group_of(points[0].key))
        return feeds, np.concatenate([point.wanted for point in points])

    def _statistics(self, pool: Sequence[Point]) -> list[dict[str, TensorStats]]:
        tensors = self._plan.scaled_tensors()
        with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
            write_graphs(Path(folder), {"float": self._parts.exported.graph})
            options = EngineOptions(threads=1, extra_outputs=tensors)
            engine = open_engine("ort", Path(folder) / "float.onnx", options)
            found = []
            for point in pool:
                seen = engine.run(point.feeds)
                found.append({tensor: TensorStats.of(seen[tensor]) for tensor in tensors})
            engine.close()
        return found
