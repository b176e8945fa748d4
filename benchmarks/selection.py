"""Ways to choose calibration calls, compared on held-out calls.

    python benchmarks/selection.py --json docs/selection.json

The demo DiT at W8A6 with one scale for all timesteps, so that it matters which calls a range was taken from.  Each
method spends the same share of the calls of 64 trajectories; `single` looks at one timestep of all of them.  Held-out
float trajectories on other seeds give inputs; the error of a method is the mean squared error of the quantized
prediction on them against the float one, over all calls.  The answer depends on how ranges are clipped, so it is given
for two range methods: `mse`, and `minmax`, whose ranges only grow with the number of calls looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import EngineOptions
from quantempo.demo import MODEL
from quantempo.engines.registry import open_engine
from quantempo.pipeline import compile_model
from quantempo.progress import console_progress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import Session

RANGES = ("mse", "minmax")
METHODS = ("single", "uniform:0.1", "normal:0.1", "density:0.1", "all")
RECIPE = Recipe(
    samples=64, batch=8, steps=(20,), guidance=(1.5, 4.0), activation_bits=6, groups="single", max_steps=20,
    weight_method="mse", centre=False,
)
STEPS, GUIDANCE, HELD_OUT = 20, 1.5, 20
Feeds = dict[str, NDArray[Any]]


def held_out_calls(reference: OpenBundle, threads: int) -> list[tuple[Feeds, NDArray[np.float32]]]:
    """Inputs and float predictions of every call of float trajectories, both branches of guidance."""
    found: list[tuple[Feeds, NDArray[np.float32]]] = []

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


def errors(bundle: OpenBundle, calls: list[tuple[Feeds, NDArray[np.float32]]], threads: int) -> NDArray[np.float64]:
    """Mean squared error of the quantized prediction at each call."""
    file = bundle.path(bundle.manifest.graphs["full.ort-f32"].file)
    engine = open_engine("ort", file, EngineOptions(threads=threads))
    denoiser, partition = bundle.manifest.denoiser, bundle.manifest.partition
    assert denoiser.group_input is not None
    assert partition is not None
    found = []
    for feeds, wanted in calls:
        group = np.array(partition.group_of(float(feeds[denoiser.timestep_input][0])))
        outputs = engine.run({**feeds, denoiser.group_input: group})
        found.append(float(np.mean((outputs[denoiser.prediction].astype(np.float64) - wanted) ** 2)))
    engine.close()
    return np.array(found)


def main() -> None:
    """Compile with every method and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="calibrations per method, each on other seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {ranges: {name: [] for name in METHODS} for ranges in RANGES}
    calls: list[tuple[Feeds, NDArray[np.float32]]] = []
    with tempfile.TemporaryDirectory(prefix="quantempo-selection-") as folder:
        for seed, name, ranges in itertools.product(range(args.seeds), METHODS, RANGES):
            recipe = dataclasses.replace(
                RECIPE, selection=name, seed=seed, threads=args.threads, range_method=ranges
            )
            out = Path(folder) / "bundle"
            made = compile_model(MODEL, out, recipe, work=Path(folder) / "work", guard="off", overwrite=True,
                                 progress=console_progress()).bundle  # fmt: skip
            calls = calls or held_out_calls(read_bundle(out / "reference"), args.threads)
            rows[ranges][name].append(float(errors(made, calls, args.threads).mean()))
    for ranges, found in rows.items():
        worst = float(np.mean(found["single"]))
        print(f"| selection, `{ranges}` | per-call MSE | least to largest | against a single timestep |")
        print("| --- | --- | --- | --- |")
        for name, values in found.items():
            mean = float(np.mean(values))
            gain = 10 * np.log10(worst / mean)
            print(f"| `{name}` | {mean:.3e} | {min(values):.3e} to {max(values):.3e} | {gain:+.2f} dB |")
    if args.json:
        facts = {"seeds": args.seeds, "steps": STEPS, "guidance": GUIDANCE, "held_out": HELD_OUT, "mse": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
