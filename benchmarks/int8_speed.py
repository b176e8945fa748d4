"""Speed of INT8 with looked-up scales against float32 and torch, side by side in one process.

All variants take turns, round by round; each round's figure is the median of its calls.  Ratios are taken within each
round, so that a change of the machine's speed hits both sides alike, and the median over rounds is reported.  Weights
are random: speed does not depend on them.

    python benchmarks/int8_speed.py --json docs/speed.json        # adds a run to the file, or renews this machine's
    python benchmarks/int8_speed.py --model unet --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = 20
BATCH = 2
Feeds = Mapping[str, np.ndarray]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit-s2": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "patch_size": 2, "in_channels": 4,
            "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000,
        },
    ),
    "unet": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 768, "attention_head_dim": 8,
            "sample_size": 32,
        },
    ),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    models: tuple[str, ...]
    rounds: int
    seconds: float
    threads: int
    eager: bool
    profile: bool
    keep: Path | None
    json: Path | None


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.6, help="per variant and round")
    parser.add_argument("--threads", type=int, default=1, help="threads, pinned to as many cores")
    parser.add_argument("--no-eager", action="store_true", help="leave torch out")
    parser.add_argument("--profile", action="store_true", help="also print the time per operator")
    parser.add_argument("--keep", type=Path, help="folder for the graphs; they are made anew where absent")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    models = tuple(MODELS) if a.model == "all" else (a.model,)
    return Options(models, a.rounds, a.seconds, a.threads, not a.no_eager, a.profile, a.keep, a.json)


def main() -> None:
    options = parse()
    cores = sorted(os.sched_getaffinity(0))[-options.threads :]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    models: dict[str, Any] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            models[name] = measure(name, options.keep / name if options.keep else Path(scratch), options)
        print_table(name, models[name])
    if options.json is not None:
        facts = {"machine": machine(), "threads": options.threads, "batch": BATCH, "groups": GROUPS}
        add_run(options.json, facts, models)


def add_run(path: Path, facts: dict[str, Any], models: Mapping[str, Any]) -> None:
    """Add figures to a results file: one run per machine and number of threads, whose newest figures count."""
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for run in runs:
        if run["machine"] == facts["machine"] and run["threads"] == facts["threads"]:
            run["models"].update(models)
            break
    else:
        runs.append({**facts, "models": dict(models)})
    path.write_text(json.dumps({"runs": runs}, indent=1, sort_keys=True) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import onnxruntime
    import torch

    from quantempo.engines.cpu import cpu_features

    cpu = cpu_features()
    return {
        "cpu": cpu.model, "features": list(cpu.features),
        "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
    }


def measure(name: str, folder: Path, options: Options) -> dict[str, Any]:
    """All variants of one model: milliseconds per call, ratios, and how close INT8 is to float."""
    module, feeds, facts = prepare(name, folder)
    group = {"scale_group": np.array(GROUPS // 2)}
    sessions = {
        "ort-float32": (open_session(folder / "float.onnx", options), feeds),
        "ort-int8": (open_session(folder / "int8.onnx", options), {**feeds, **group}),
        "ort-int8-constant-scales": (open_session(folder / "constant.onnx", options), feeds),
    }
    outputs = {key: session.run(None, feed)[0] for key, (session, feed) in sessions.items()}
    variants: dict[str, Callable[[], object]] = {
        key: partial(session.run, None, feed) for key, (session, feed) in sessions.items()
    }
    if options.eager:
        variants |= eager(module, feeds, options.threads)
    times = alternate(variants, options)
    result: dict[str, Any] = {
        "ms_per_call": {key: round(statistics.median(values), 3) for key, values in times.items()},
        "ms_by_round": {key: [round(v, 3) for v in values] for key, values in times.items()},
        "sqnr_db": round(sqnr_db(outputs["ort-float32"], outputs["ort-int8"]), 2),
        **facts,
    }
    result["speedup_of_int8_over"] = {
        key: round(paired_ratio(times[key], times["ort-int8"]), 3) for key in times if not key.startswith("ort-int8")
    }
    look_up = paired_ratio(times["ort-int8"], times["ort-int8-constant-scales"])
    result["group_look_up_percent"] = round(100 * (look_up - 1), 2)
    if options.profile:
        for key in ("float", "int8"):
            feed = {**feeds, **(group if key == "int8" else {})}
            print_profile(f"{name} {key}", folder / f"{key}.onnx", feed, options)
    return result


def prepare(name: str, folder: Path) -> tuple[Any, Feeds, dict[str, Any]]:
    """The torch module, its feeds, and the three graphs on disk."""
    import diffusers
    import torch

    from quantempo.export.families import family_of_module

    torch.manual_seed(0)
    class_name, config = MODELS[name]
    module = getattr(diffusers, class_name)(**config).eval()
    family = family_of_module(module)
    facts_file = folder / "facts.json"
    if not facts_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        facts_file.write_text(json.dumps(make_graphs(module, family, folder)))
    return family.wrap(module), family.example(BATCH), json.loads(facts_file.read_text())


def make_graphs(module: Any, family: Any, folder: Path) -> dict[str, Any]:
    import onnx_ir as ir

    from quantempo.export.for_ort import for_onnxruntime
    from quantempo.export.graph_files import write_graphs
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lowering import LoweringOptions
    from quantempo.export.sites import default_plan
    from quantempo.export.trace import trace_module
    from quantempo.export.weights import quantize_weights

    graph = trace_module(module, family, folder, "traced")
    model = ir.load(graph.path)
    plan = default_plan(model, graph.digest, sites=graph.sites)
    table = min_max_table(model, plan, [family.example(BATCH, seed) for seed in (0, 1)])
    weights = quantize_weights(model, plan, "minmax")
    constant = LoweringOptions(group=GROUPS // 2)
    write_graphs(
        folder,
        {
            "float": for_onnxruntime(model),
            "int8": lower_ort(model, plan, table, weights),
            "constant": lower_ort(model, plan, table, weights, constant),
        },
    )
    return {"sites": len(plan.sites), "quantized": len(plan.quantized())}


def min_max_table(model: Any, plan: Any, inputs: Sequence[Feeds]) -> Any:
    """Scales from the extremes over a few inputs; the groups differ by a few percent, as they would."""
    from quantempo.contracts.partition import Partition
    from quantempo.contracts.table import ScaleTable, TensorScales

    names = plan.scaled_tensors()
    runs = tap(model, names, inputs)
    drift = np.linspace(1.0, 1.1, GROUPS)
    tensors = {}
    for name in names:
        centre = None
        if name in plan.centred:
            channels = [run[name].reshape(-1, run[name].shape[-1]) for run in runs]
            ends = np.stack([np.min([c.min(0) for c in channels], 0), np.max([c.max(0) for c in channels], 0)])
            middle = ends.mean(0)
            centre = (drift[:, None] * middle).astype(np.float32)
            low, high = float((ends[0] - middle).min()), float((ends[1] - middle).max())
        else:
            low = min(0.0, *(float(run[name].min()) for run in runs))
            high = max(0.0, *(float(run[name].max()) for run in runs))
        scale = (drift * (high - low) / 255).astype(np.float32)
        point = np.full(GROUPS, round(-low / (high - low) * 255), np.int32)
        tensors[name] = TensorScales(scale, point, (drift * max(high, -low) / 127).astype(np.float32), centre)
    return ScaleTable(Partition(tuple(float(i) for i in range(1, GROUPS)), 0.0, float(GROUPS)), tensors)


def tap(model: Any, names: Sequence[str], inputs: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    """The values of these tensors, and the inputs, for each of the inputs."""
    import onnx_ir as ir
    import onnxruntime as ort

    tapped = model.clone()
    values = {value.name: value for node in tapped.graph for value in node.outputs}
    borders = {value.name for value in tapped.graph.inputs}
    tapped.graph.outputs.clear()
    tapped.graph.outputs.extend(values[name] for name in names if name not in borders)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tapped.onnx"
        ir.save(tapped, path, external_data="tapped.data")
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        written = [output.name for output in session.get_outputs()]
        return [dict(zip(written, session.run(None, feed), strict=True)) | dict(feed) for feed in inputs]


def largest(model: Any, names: Sequence[str], inputs: Sequence[Feeds]) -> dict[str, float]:
    """The largest magnitude of each tensor."""
    runs = tap(model, names, inputs)
    return {name: max(float(np.abs(run[name]).max()) for run in runs) for name in names}


def open_session(graph: Path, options: Options, profile: Path | None = None) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    return ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])


def eager(module: Any, feeds: Feeds, threads: int) -> dict[str, Callable[[], object]]:
    """The diffusers module in float32 and bfloat16."""
    import copy

    import torch

    torch.set_num_threads(threads)
    calls: dict[str, Callable[[], object]] = {}
    for key, dtype in (("eager-float32", torch.float32), ("eager-bfloat16", torch.bfloat16)):
        cast = (copy.deepcopy(module) if dtype != torch.float32 else module).to(dtype)
        tensors = [torch.from_numpy(np.asarray(value)) for value in feeds.values()]
        args = [t.to(dtype) if t.is_floating_point() else t for t in tensors]

        def call(cast: Any = cast, args: Any = args) -> object:
            with torch.inference_mode():
                return cast(*args)

        calls[key] = call
    return calls


def alternate(variants: Mapping[str, Callable[[], object]], options: Options) -> dict[str, list[float]]:
    """Milliseconds per call, one figure per variant and round."""
    times: dict[str, list[float]] = {key: [] for key in variants}
    for call in variants.values():
        call()
    for _ in range(options.rounds):
        for key, call in variants.items():
            # The first call refills the caches that the previous variant has emptied.
            call()
            samples: list[float] = []
            while sum(samples) < options.seconds or len(samples) < 3:
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            times[key].append(1e3 * statistics.median(samples))
    return times


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    noise = np.square(reference.astype(np.float64) - other).mean()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).mean() / noise))


def print_table(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}: {result['quantized']} of {result['sites']} sites quantized, SQNR {result['sqnr_db']} dB")
    for key, ms in result["ms_per_call"].items():
        ratio = result["speedup_of_int8_over"].get(key)
        print(f"  {key:26s} {ms:9.2f} ms" + (f"   INT8 is {ratio:.2f}x as fast" if ratio else ""))
    print(f"  group look-up: {result['group_look_up_percent']:+.2f} % of the time with constant scales", flush=True)


def print_profile(title: str, graph: Path, feeds: Feeds, options: Options, calls: int = 10) -> None:
    """Time per operator over a few calls, from ONNX Runtime's own profiler."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(graph, options, Path(scratch) / "profile")
        for _ in range(calls + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1e3 / (calls + 1)
            seen[event["args"]["op_name"]] += 1
    print(f"\n{title}: {sum(spent.values()):.1f} ms")
    for operator, ms in spent.most_common(14):
        print(f"  {operator:30s} {seen[operator] // (calls + 1):5d} nodes {ms:8.2f} ms")


if __name__ == "__main__":
    main()
