"""What `caching.py --part tap` measures: calibration samples chosen by TAP against uniform draws."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from caching_results import interval_of, read, write
from numpy.typing import NDArray

from quantempo.calib.cache.schedules import every
from quantempo.calib.cache.tap import select
from quantempo.calib.collect import StatsCollector
from quantempo.calib.tables import build_table
from quantempo.contracts.cache import FULL
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import StepProgram
from quantempo.engines.registry import open_engine
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_ort import lower_ort
from quantempo.runtime.guidance import CONDITIONAL
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import GROUP_INPUT
from quantempo.stages.cache_schedules import scheduled
from quantempo.stages.quantizers import activation_bits
from quantempo.stages.teacher import GIVEN


def tap_effect(subject: Any, args: argparse.Namespace) -> None:
    """Scales from samples chosen by TAP against scales from uniform draws of equal size, on held-out cached calls.

    The pool is every call of the even N = 3 trajectories of the float model; scales are min-max, in four groups of
    timesteps, of the graph that computes everything; the error is that of its prediction at each held-out call.
    """
    plain = subject.parts.exported.program(20)
    bench = subject.bench
    program = scheduled(bench, plain, every(20, 3))
    pool = capture(subject, program, subject.settings.samples)
    held = capture(subject, program, 8, offset=1000)
    keys = np.array([point.key for point in pool])
    features = np.stack([point.feeds["sample"][0] for point in pool])
    count = args.count
    found: dict[str, list[float]] = {"tap": [], "uniform": []}
    for seed in range(args.draws):
        picks = {
            "tap": select(features, np.array([point.call for point in pool]), count, seed=seed),
            "uniform": np.random.default_rng(seed).choice(len(pool), count, replace=False),
        }
        for name, indices in picks.items():
            found[name].append(call_error(subject, [pool[i] for i in indices], held, keys))
    differences = np.array(found["uniform"]) - np.array(found["tap"])
    row = {
        "pool": len(pool), "selected": count, "draws": args.draws, "held_out_calls": len(held),
        "mse": {name: float(np.mean(values)) for name, values in found.items()},
        "uniform - tap": interval_of(differences),
        "relative": float(differences.mean() / np.mean(found["uniform"])),
    }
    results = read(args.json)
    results.setdefault("tap", {})[subject.name] = row
    write(args.json, results)
    print(row)


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


def call_error(
    subject: Any, chosen: Sequence[Point], held: Sequence[Point], keys: NDArray[np.float64]
) -> float:
    """Mean squared error of the quantized prediction at held-out calls, with scales from the chosen points."""
    parts = subject.parts
    borders = tuple(float(b) for b in np.quantile(keys, [0.25, 0.5, 0.75]))
    partition = Partition(borders, float(keys.min()), float(keys.max()))
    tensors = parts.plan.scaled_tensors()
    plan = replace(parts.plan, centred=())
    collector = StatsCollector(FULL, tensors)
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        tapped_at, quantized_at = Path(folder) / "tapped", Path(folder) / "quantized"
        tapped_at.mkdir()
        quantized_at.mkdir()
        write_graphs(tapped_at, {"float": parts.exported.graph})
        options = EngineOptions(threads=1, extra_outputs=tensors)
        tapped = open_engine("ort", tapped_at / "float.onnx", options)
        for call in sorted({point.call for point in chosen}):
            rows = [point for point in chosen if point.call == call]
            seen = tapped.run({n: np.concatenate([p.feeds[n] for p in rows]) for n in tapped.inputs})
            collector.observe(rows[0].key, seen, seeds=range(len(rows)))
        tapped.close()
        table = build_table(collector.stats(), partition, "minmax", activation_bits(plan))
        write_graphs(quantized_at, {"int8": lower_ort(parts.exported.graph, plan, table, parts.weights)})
        engine = open_engine("ort", quantized_at / "int8.onnx", EngineOptions(threads=1))
        total = 0.0
        for call in sorted({point.call for point in held}):
            rows = [point for point in held if point.call == call]
            feeds = {n: np.concatenate([p.feeds[n] for p in rows]) for n in engine.inputs if n != GROUP_INPUT}
            group = np.array(partition.group_of(rows[0].key))
            made = engine.run({**feeds, GROUP_INPUT: group})[parts.manifest.denoiser.prediction]
            total += float(np.sum((made - np.concatenate([p.wanted for p in rows])) ** 2)) / made[0].size
        engine.close()
    return total / len(held)
