"""Speed of the portable dialect on OpenVINO beside ONNX Runtime and torch, side by side in one process.

All variants take turns, as in int8_speed.py, whose models and random weights these are.  INT8 runs with the unquantized
rest in float32 and in bfloat16; ratios are taken of the faster of the two.

    python benchmarks/openvino_speed.py --json docs/openvino_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import int8_speed
import numpy as np

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.engines import openvino
from quantempo.engines.cpu import cpu_features
from quantempo.engines.guard import library_versions, paired_ratio
from quantempo.engines.registry import open_engine
from quantempo.engines.shapes import sizes_of

GROUP = {"scale_group": np.array(int8_speed.GROUPS // 2)}
HINTS = ("f32", "bf16")
Feeds = Mapping[str, np.ndarray]
Call = Callable[[], object]
Times = Mapping[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    pin()
    report: dict[str, Any] = {
        "machine": machine(), "batch": int8_speed.BATCH, "groups": int8_speed.GROUPS, "command": command(),
    }
    for name in models(options):
        with tempfile.TemporaryDirectory() as scratch:
            report[name] = measure(name, options.keep / name if options.keep else Path(scratch), options)
        print_table(name, report[name])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks on OpenVINO have in common."""
    parser.add_argument("--model", choices=[*int8_speed.MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per variant and round")
    parser.add_argument("--keep", type=Path, help="folder for the graphs; they are made anew where absent")
    parser.add_argument("--json", type=Path)


def models(options: argparse.Namespace) -> tuple[str, ...]:
    """The names that the command line asks for."""
    return tuple(int8_speed.MODELS) if options.model == "all" else (options.model,)


def pin() -> None:
    """One thread on one core."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    os.environ["OMP_NUM_THREADS"] = "1"


def command() -> str:
    """How this was started."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cpu = cpu_features()
    versions = library_versions("ort", "openvino")
    return {"cpu": cpu.model, "features": list(cpu.features), "versions": {**versions, "torch": torch.__version__}}


def prepare(name: str, folder: Path) -> tuple[Any, Any]:
    """The torch module and its family; the graphs `float`, `portable`, `constant` and `ort` are in the folder then."""
    import diffusers
    import onnx_ir as ir
    import torch

    from quantempo.export.families import family_of_module
    from quantempo.export.graph_files import write_graphs
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lower_portable import lower_portable
    from quantempo.export.lowering import LoweringOptions
    from quantempo.export.passes import GeluAsSigmoid
    from quantempo.export.quantize_attention import attention_tensors, quantize_attention
    from quantempo.export.sites import default_plan
    from quantempo.export.trace import trace_module
    from quantempo.export.weights import quantize_weights

    torch.manual_seed(0)
    torch.set_num_threads(1)
    class_name, config = int8_speed.MODELS[name]
    module = getattr(diffusers, class_name)(**config).eval()
    family = family_of_module(module)
    ready = family.wrap(module), family
    if (folder / "portable.onnx").exists():
        return ready
    folder.mkdir(parents=True, exist_ok=True)
    traced = trace_module(module, family, folder, "traced")
    model = ir.load(traced.path)
    plan = default_plan(model, traced.digest, sites=traced.sites)
    inputs = [family.example(int8_speed.BATCH, seed) for seed in (0, 1)]
    table = int8_speed.min_max_table(model, plan, inputs)
    weights = quantize_weights(model, plan, "minmax")
    one = LoweringOptions(group=int8_speed.GROUPS // 2)
    portable, constant = (lower_portable(model, plan, table, weights, given) for given in (None, one))
    ranges = int8_speed.largest(model, attention_tensors(model, "int8", "scores"), inputs)
    for graph in (portable, constant):
        quantize_attention(graph, ranges, "int8", "scores")
        GeluAsSigmoid().apply(graph)
    write_graphs(
        folder,
        {"float": model, "portable": portable, "constant": constant, "ort": lower_ort(model, plan, table, weights)},
    )
    return ready


def open_variant(folder: Path, file: str, backend: str = "openvino", **settings: str) -> Engine:
    """An engine on one thread."""
    return open_engine(backend, folder / f"{file}.onnx", EngineOptions(threads=1, settings=settings))


def bound(engine: Engine, feeds: Feeds) -> Call:
    """The engine with its buffers filled, to be called again and again."""
    given = {**feeds, **(GROUP if "scale_group" in engine.inputs else {})}
    binding = engine.bind(sizes_of(engine.name, engine.inputs, given))
    for name, values in given.items():
        binding.inputs[name].upload(np.asarray(values, binding.inputs[name].array.dtype))
    return binding.run


def int8_variants(folder: Path, feeds: Feeds) -> dict[str, Call]:
    """INT8 on OpenVINO with groups and with constant scales, by name and type of the rest."""
    return {
        f"{name}, {hint} rest": bound(open_variant(folder, file, precision=hint), feeds)
        for name, file in (("int8", "portable"), ("int8 constant scales", "constant")) for hint in HINTS
    }


def alternate(calls: Mapping[str, Call], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds per call by round."""
    return int8_speed.alternate(
        calls, int8_speed.Options((), options.rounds, options.seconds, 1, True, False, None, None)
    )


def fastest(times: Times, start: str) -> str:
    """The name, among those that begin so, with the least median time."""
    return min((name for name in times if name.startswith(f"{start}, ")), key=lambda n: statistics.median(times[n]))


def ratio(times: Times, slow: str, fast: str) -> dict[str, float]:
    """Time of one over that of the other, median over rounds, with about three standard errors."""
    value, noise = paired_ratio(list(zip(times[fast], times[slow], strict=True)))
    return {"ratio": round(value, 3), "noise": round(noise, 3)}


def summary(times: Times) -> dict[str, dict[str, Any]]:
    """Medians by variant, and the single rounds."""
    return {
        "ms_per_call": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "ms_by_round": {name: [round(value, 2) for value in values] for name, values in times.items()},
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times of all variants, start-up, and how close INT8 is to float."""
    module, family = prepare(name, folder)
    feeds = family.example(int8_speed.BATCH)
    calls = int8_variants(folder, feeds)
    calls |= {f"float, {hint}": bound(open_variant(folder, "float", precision=hint), feeds) for hint in HINTS}
    calls["ort int8"] = bound(open_variant(folder, "ort", "ort"), feeds)
    calls |= int8_speed.eager(module, feeds, 1)
    times = alternate(calls, options)
    best = fastest(times, "int8")
    others = ("eager-float32", "eager-bfloat16", "float, f32", fastest(times, "float"), "ort int8")
    return {
        **summary(times),
        "best": best,
        "speedup_over": {other: ratio(times, other, best) for other in others},
        "groups_over_constant": ratio(times, best, fastest(times, "int8 constant scales")),
        "start_seconds": start_times(folder),
        "sqnr_db": closeness(folder, feeds),
        "in_float": list(openvino.sites_in_float(
            folder / "portable.onnx", EngineOptions(threads=1), {"batch": int8_speed.BATCH}
        )),
    }


def start_times(folder: Path) -> dict[str, float]:
    """Seconds to open and bind: compiled, and from the engine cache."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, settings in (("compiled", {}), ("first", {"cache": cache}), ("cached", {"cache": cache})):
            start = time.perf_counter()
            engine = open_variant(folder, "portable", **settings)
            engine.bind({"batch": int8_speed.BATCH})
            found[name] = round(time.perf_counter() - start, 2)
            engine.close()
    return found


def closeness(folder: Path, feeds: Feeds) -> dict[str, float]:
    """Signal to noise of the quantized graph against float, in decibels; with random weights no measure of quality."""

    def output(file: str, precision: str) -> np.ndarray:
        extra = GROUP if file == "portable" else {}
        engine = open_variant(folder, file, precision=precision)
        return next(iter(engine.run({**feeds, **extra}).values()))

    exact = output("float", "f32")
    return {
        f"{name}, {hint}": round(float(int8_speed.sqnr_db(exact, output(file, hint))), 2)
        for name, file, hint in (("int8", "portable", "f32"), ("int8", "portable", "bf16"), ("float", "float", "bf16"))
    }


def print_table(name: str, found: Mapping[str, Any]) -> None:
    """For people."""
    print(name)
    for variant, ms in found["ms_per_call"].items():
        print(f"  {variant:34s} {ms:8.2f} ms")
    for key in ("speedup_over", "groups_over_constant", "start_seconds", "sqnr_db"):
        print(f"  {key}: {found.get(key)}")


if __name__ == "__main__":
    main()
