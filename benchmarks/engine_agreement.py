"""How close two engines come to each other on one bundle, and whether `--engine auto` finds the faster one.

Same-seed PSNR between ONNX Runtime, OpenVINO and the float reference on the demo models; they should part by no more
than 4 dB below what parts each of them from float.  `--choices` measures `auto` instead, that many times, each time
anew: only on a machine that does nothing else.

    python benchmarks/engine_agreement.py --json docs/engine_agreement.json
    python benchmarks/engine_agreement.py --choices 10 --json docs/engine_agreement.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import quality

from quantempo.devices.choosing import choose_engine
from quantempo.devices.comparing import CompareOptions, compare_engines
from quantempo.engines.cpu import cpu_features
from quantempo.engines.guard import library_versions
from quantempo.pipeline import compile_model
from quantempo.progress import console_progress
from quantempo.runtime.bundle import read_bundle

ENGINES = ("ort", "openvino")
GUIDANCE = (1.5, 4.0)
SLACK_DB = 4.0


def agreement(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Mean and worst PSNR of each pair, by guidance."""
    found = {}
    for guidance in GUIDANCE:
        asked = CompareOptions(options.samples, options.steps, guidance, 1, False, options.threads)
        pairs = compare_engines(bundle, ENGINES, asked).images
        found[f"{guidance:g}"] = {
            f"{pair.first}, {pair.second}": {"mean_db": pair.mean_db, "worst_db": pair.worst_db} for pair in pairs
        }
        print(bundle.name, guidance, {name: round(row["mean_db"], 2) for name, row in found[f"{guidance:g}"].items()})
    return found


def choices(bundle: Path, count: int) -> dict[str, Any]:
    """What `auto` chose, measured anew each time on one thread."""
    opened = read_bundle(bundle)
    made = [choose_engine(opened, threads=1, cache=False) for _ in range(count)]
    times = [{item.label: item.ms for item in choice.timed if not item.refused} for choice in made]
    return {"chosen": dict(Counter(choice.label for choice in made)), "ms_per_call": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(quality.SOURCES), default=list(quality.SOURCES))
    parser.add_argument("--samples", type=int, default=16, help="seeds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=0, help="calibration samples; 0 for the recipe's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choices", type=int, default=0, help="how often auto is measured, instead of the comparison")
    parser.add_argument("--bundles", type=Path, help="folder of compiled bundles; they are compiled where absent")
    parser.add_argument("--work", type=Path, help="folder for results of stages that another run reuses")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    report["machine"] = {
        "cpu": cpu_features().model, "features": list(cpu_features().features), "versions": library_versions(*ENGINES)
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            bundle = (options.bundles or Path(scratch)) / name
            if not bundle.exists():
                source, scheduler, recipe = quality.SOURCES[name]
                recipe = replace(recipe, threads=options.threads, samples=options.calibration or recipe.samples)
                summary = compile_model(
                    source, bundle, recipe, scheduler=scheduler, work=options.work, guard="off",
                    progress=console_progress(),
                )
                print(summary.text(), flush=True)
            facts = report.setdefault(name, {})
            if options.choices:
                facts["auto"] = choices(bundle, options.choices)
                print(name, facts["auto"]["chosen"], flush=True)
            else:
                facts["psnr"] = agreement(bundle, options)
                partition = read_bundle(bundle).manifest.partition
                facts["seeds"], facts["steps"] = options.samples, options.steps
                facts["groups"] = partition.groups if partition is not None else 0
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
