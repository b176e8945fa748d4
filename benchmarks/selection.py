"""Ways to choose calibration calls, compared on held-out calls.

    python benchmarks/selection.py --json docs/selection.json

The demo DiT at W8A6 with one scale for all timesteps, so that it matters which calls a range was taken from.  Float
trajectories are run once per calibration seed, with statistics of every call of every batch apart; a selection then
adds up those that it chooses.  Every method has the budget of a single timestep: one call in twenty, from all batches.

The rival, a calibration on a single timestep, is not one number: which timestep?  Five of the twenty are measured,
evenly spread, and the one in the middle.  A method has to beat their mean (a timestep taken without knowing better); it
is shown against the one in the middle and against the best, too, which nobody knows beforehand.

Held-out float trajectories on other seeds give inputs; the error of a method is the mean squared error of the quantized
prediction on them against the float one, over all calls.  The answer depends on how ranges are clipped, so it is given
for two range methods; `minmax` ranges only grow with the number of calls looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.selection import Selection, Visit, select
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.table import ScaleTable
from quantempo.demo import MODEL
from quantempo.engines.registry import open_engine
from quantempo.export.graph_files import load_graph, write_graphs
from quantempo.export.weights import stored_weights
from quantempo.pipeline import compile_model, lower_graphs, scale_table, trajectory_batches
from quantempo.progress import console_progress
from quantempo.recipe import Recipe
from quantempo.report.measure import Subject, open_subject
from quantempo.runtime.session import Session
from quantempo.stages.calibration import Taps, calibrate, call_features, sample_request
from quantempo.stages.dialects import GraphChoice
from quantempo.stages.programs import calibration_programs

RANGES = ("minmax", "mse")
METHODS = ("uniform:0.05", "normal:0.05", "density:0.05", "all")
RECIPE = Recipe(
    samples=32, batch=4, steps=(20,), guidance=(1.5, 4.0), activation_bits=6, groups="single", max_steps=20,
    weight_method="mse", centre=False,
)
STEPS, GUIDANCE, HELD_OUT, SINGLES = 20, 1.5, 6, 5
Feeds = dict[str, NDArray[Any]]
Calls = list[tuple[Feeds, NDArray[np.float32]]]


def held_out_calls(subject: Subject, threads: int) -> Calls:
    """Inputs and float predictions of every call of float trajectories, both branches of guidance."""
    found: Calls = []
    reference = subject.reference

    def recording(path: Path, options: EngineOptions) -> Any:
        engine: Any = open_engine("ort", path, options)
        bind = engine.bind

        def bound(sizes: Any, share: Any = None) -> Any:
            binding = bind(sizes, share)
            run = binding.run

            def recorded() -> None:
                run()
                inputs = {name: buffer.array.copy() for name, buffer in binding.inputs.items()}
                found.append((inputs, binding.outputs[reference.manifest.denoiser.prediction].array.copy()))

            binding.run = recorded
            return binding

        engine.bind = bound
        return engine

    with Session(reference, recording, EngineOptions(threads=threads)) as session:
        labels = [i % 10 for i in range(HELD_OUT)]
        session(class_labels=labels, seed=20, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
    return found


class Seen:
    """What calibration sees of the trajectories of one seed: statistics of every batch and timestep apart."""

    def __init__(self, subject: Subject, recipe: Recipe, threads: int) -> None:
        reference, self._seed = subject.reference, recipe.seed
        programs = calibration_programs(recipe, reference.program)
        batches = trajectory_batches(reference.manifest.denoiser, recipe, programs, {})
        taps = Taps.of(subject.plan)
        self.batches: dict[int, StatsCollector] = {}
        self.visits: list[Visit] = []
        for batch in batches:
            found = calibrate(reference, taps, recipe, programs=programs, batches=[batch])
            self.batches[batch.index] = found.statistics
            calls = programs[batch.program].calls
            self.visits += [Visit(batch.index, index, call.key) for index, call in enumerate(calls)]
        self._keys = {(visit.batch, visit.call): visit.key for visit in self.visits}
        options = EngineOptions(threads=threads, extra_outputs=taps.tensors)
        with Session(reference, lambda path, given: open_engine("ort", path, given), options) as session:
            self._features = call_features(batches[0], taps, lambda batch, observer: session.sample(
                sample_request(batch, reference.manifest.denoiser, {}), programs[batch.program],
                output_type="latent", observer=observer,
            ))  # fmt: skip

    def timesteps(self) -> list[float]:
        """The group keys of the calls."""
        return sorted({visit.key for visit in self.visits})

    def chosen(self, words: str) -> StatsCollector:
        """The statistics that a selection would have gathered."""
        return self._only(select(words, self.visits, seed=self._seed, features=self._features))

    def single(self, key: float) -> StatsCollector:
        """The statistics of one timestep, from all batches."""
        return self._only(frozenset((v.batch, v.call) for v in self.visits if v.key == key))

    def _only(self, selection: Selection) -> StatsCollector:
        keys: dict[int, list[float]] = defaultdict(list)
        for batch, call in sorted(selection):
            keys[batch].append(self._keys[batch, call])
        parts = [self.batches[batch].at(own) for batch, own in keys.items()]
        return reduce(lambda a, b: a.merge(b), parts)


def error(subject: Subject, table: ScaleTable, calls: Calls, threads: int) -> float:
    """Mean squared error of the quantized prediction over held-out calls."""
    reference, bundle = subject.reference, subject.bundle
    denoiser = bundle.manifest.denoiser
    made = load_graph(bundle.path(bundle.manifest.graphs["full.ort-f32"].file))
    source = load_graph(reference.path(reference.manifest.graphs["full.float-f32"].file))
    graphs = lower_graphs(source, subject.plan, table, stored_weights(made, subject.plan), GraphChoice(("ort-f32",)))
    assert denoiser.group_input is not None
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        (written,) = write_graphs(Path(folder), graphs).values()
        engine = open_engine("ort", Path(folder) / written.file, EngineOptions(threads=threads))
        found = []
        for feeds, wanted in calls:
            outputs = engine.run({**feeds, denoiser.group_input: np.array(0)})
            found.append(float(np.mean((outputs[denoiser.prediction].astype(np.float64) - wanted) ** 2)))
        engine.close()
    return float(np.mean(found))


def errors(subject: Subject, seen: Seen, ranges: str, calls: Calls, threads: int) -> dict[str, Any]:
    """The error of every method, and those of single timesteps by timestep."""

    def of(statistics: StatsCollector) -> float:
        return error(subject, scale_table(statistics, subject.plan, "single", ranges), calls, threads)

    keys = seen.timesteps()
    tried = [keys[i] for i in np.linspace(0, len(keys) - 1, SINGLES).round().astype(int)]
    middle = keys[len(keys) // 2]
    found: dict[str, Any] = {name: of(seen.chosen(name)) for name in METHODS}
    return {**found, "single": {f"{key:g}": of(seen.single(key)) for key in sorted({*tried, middle})},
            "middle": f"{middle:g}"}  # fmt: skip


def rows(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over calibration seeds, and gains in dB over the three single-timestep rivals."""

    def single(one: Mapping[str, Any], which: str) -> float:
        values = dict(one["single"])
        if which == "middle":
            return float(values[one["middle"]])
        return float(np.mean(list(values.values())) if which == "mean" else min(values.values()))

    shown = {}
    for name in METHODS:
        values = [float(one[name]) for one in found]
        row = {"mse": float(np.mean(values)), "least": min(values), "largest": max(values)}
        for which in ("mean", "middle", "best"):
            rival = np.mean([single(one, which) for one in found])
            row[f"gain_db_{which}"] = round(float(10 * np.log10(rival / np.mean(values))), 3)
        shown[name] = row
    return shown


def main() -> None:
    """Calibrate, add up, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="calibrations, each on other trajectories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {ranges: [] for ranges in RANGES}
    with tempfile.TemporaryDirectory(prefix="quantempo-selection-") as folder:
        first = dataclasses.replace(RECIPE, samples=8, threads=args.threads)  # its scales are not used
        compile_model(MODEL, Path(folder) / "bundle", first, guard="off", progress=console_progress())
        subject = open_subject(Path(folder) / "bundle")
        calls = held_out_calls(subject, args.threads)
        for seed in range(args.seeds):
            seen = Seen(subject, dataclasses.replace(RECIPE, seed=seed, threads=args.threads), args.threads)
            for ranges in RANGES:
                found[ranges].append(errors(subject, seen, ranges, calls, args.threads))
                print(f"seed {seed}, {ranges}: {found[ranges][-1]}", flush=True)
    shown = {ranges: rows(one) for ranges, one in found.items()}
    for ranges, table in shown.items():
        print(f"| selection, `{ranges}` | per-call MSE | against single: mean | middle | best |")
        print("| --- | --- | --- | --- | --- |")
        for name, row in table.items():
            gains = " | ".join(f"{row[f'gain_db_{which}']:+.2f} dB" for which in ("mean", "middle", "best"))
            print(f"| `{name}` | {row['mse']:.3e} | {gains} |")
    if args.json:
        facts = {"seeds": args.seeds, "steps": STEPS, "guidance": GUIDANCE, "held_out": HELD_OUT, "rows": shown,
                 "runs": found, "command": "python benchmarks/selection.py --json docs/selection.json"}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
