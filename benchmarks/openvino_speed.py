"""Speed of the portable dialect on OpenVINO, each pair of variants in alternation on one pinned core.

Weights are random: speed does not depend on them, but the error to float does; it is no measure of image quality.

    python benchmarks/openvino_speed.py --model dit-s2 --json openvino.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import int8_speed
import numpy as np

from quantempo.contracts.codec import to_data
from quantempo.contracts.engine import EngineOptions
from quantempo.engines import openvino
from quantempo.engines.cpu import cpu_features
from quantempo.engines.guard import Timing, Variant, compare
from quantempo.engines.registry import open_engine

GROUP = {"scale_group": np.array(int8_speed.GROUPS // 2)}
Feeds = Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(int8_speed.MODELS), default="dit-s2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per variant and round")
    parser.add_argument("--keep", type=Path, help="folder for the graphs; they are made anew where absent")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep / options.model if options.keep else Path(scratch)
        report = measure(folder, prepare(options.model, folder), Timing(options.rounds, 2, options.seconds))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def prepare(name: str, folder: Path) -> Feeds:
    """The graphs of a model on disk (`float`, `portable`, `constant`, `ort`), and feeds for them."""
    import diffusers
    import onnx_ir as ir
    import torch

    from quantempo.export.families import family_of_module
    from quantempo.export.graph_files import write_graphs
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lower_portable import lower_portable
    from quantempo.export.lowering import LoweringOptions
    from quantempo.export.sites import default_plan
    from quantempo.export.trace import trace_module
    from quantempo.export.weights import quantize_weights

    torch.manual_seed(0)
    torch.set_num_threads(1)
    class_name, config = int8_speed.MODELS[name]
    module = getattr(diffusers, class_name)(**config).eval()
    family = family_of_module(module)
    feeds: Feeds = family.example(int8_speed.BATCH)
    if (folder / "portable.onnx").exists():
        return feeds
    folder.mkdir(parents=True, exist_ok=True)
    graph = trace_module(module, family, folder, "traced")
    model = ir.load(graph.path)
    plan = default_plan(model, graph.digest, sites=graph.sites)
    table = int8_speed.min_max_table(model, plan, [family.example(int8_speed.BATCH, seed) for seed in (0, 1)])
    weights = quantize_weights(model, plan, "minmax")
    one = LoweringOptions(group=int8_speed.GROUPS // 2)
    write_graphs(
        folder,
        {
            "float": model, "portable": lower_portable(model, plan, table, weights),
            "constant": lower_portable(model, plan, table, weights, one), "ort": lower_ort(model, plan, table, weights),
        },
    )
    return feeds


def measure(folder: Path, feeds: Feeds, timing: Timing) -> dict[str, Any]:
    """Verdicts of all pairs, start-up times, and how close INT8 is to float."""

    def variant(label: str, file: str, backend: str = "openvino", **settings: str) -> Variant:
        inputs = {**feeds, **(GROUP if file in ("portable", "ort") else {})}
        options = EngineOptions(threads=1, settings=settings)
        return Variant(label, backend, lambda: open_engine(backend, folder / f"{file}.onnx", options), inputs)

    narrow = {"precision": "bf16"}
    groups = variant("int8, bf16 rest", "portable", **narrow)
    pairs = [
        (variant("float32", "float"), variant("bfloat16", "float", **narrow)),
        (variant("float32", "float"), variant("int8, f32 rest", "portable")),
        (variant("bfloat16", "float", **narrow), groups),
        (variant("int8, constant scales", "constant", **narrow), groups),
        (variant("int8, free shapes", "portable", shapes="free", **narrow), groups),
        (variant("onnxruntime int8", "ort", backend="ort"), groups),
    ]
    report: dict[str, Any] = {"cpu": cpu_features().model, "verdicts": []}
    for baseline, candidate in pairs:
        verdict = compare(baseline, candidate, timing)
        print(verdict, flush=True)
        report["verdicts"].append(to_data(verdict))
    report["start_seconds"] = start_times(folder)
    report["sqnr_db"] = closeness(folder, feeds)
    report["executed"] = dict(
        openvino.executed_precisions(folder / "portable.onnx", EngineOptions(threads=1), {"batch": int8_speed.BATCH})
    )
    for key in ("start_seconds", "sqnr_db"):
        print(f"{key}: {report[key]}")
    return report


def start_times(folder: Path) -> dict[str, float]:
    """Seconds to open and bind: compiled, and from the engine cache."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, settings in (("compiled", {}), ("first", {"cache": cache}), ("cached", {"cache": cache})):
            start = time.perf_counter()
            engine = open_engine("openvino", folder / "portable.onnx", EngineOptions(threads=1, settings=settings))
            engine.bind({"batch": int8_speed.BATCH})
            found[name] = round(time.perf_counter() - start, 2)
            engine.close()
    return found


def closeness(folder: Path, feeds: Feeds) -> dict[str, float]:
    """Signal to noise of the quantized graph against float, in decibels."""

    def output(file: str, **settings: str) -> np.ndarray:
        extra = GROUP if file == "portable" else {}
        engine = open_engine("openvino", folder / f"{file}.onnx", EngineOptions(threads=1, settings=settings))
        return next(iter(engine.run({**feeds, **extra}).values()))

    exact = output("float")
    variants = {"f32 rest": output("portable"), "bf16 rest": output("portable", precision="bf16")}
    return {name: round(float(int8_speed.sqnr_db(exact, value)), 2) for name, value in variants.items()}


if __name__ == "__main__":
    main()
