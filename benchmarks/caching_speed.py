"""Speed and memory of feature caching over whole trajectories, on the shapes of `int8_speed.py` with random weights.

The cuts are the ones that `compile` takes by default, so they lie at the same relative depth as those of the demo
models in `caching.py`.  Variants take turns, and so do trajectories; ratios are taken within a round.

    python benchmarks/caching_speed.py --model dit-s2 --keep graphs --prepare      # slow, not timed
    python benchmarks/caching_speed.py --model dit-s2 --keep graphs --json docs/caching_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from int8_speed import BATCH, GROUPS, MODELS, alternate, eager, machine, min_max_table, paired_ratio

CASES = ((20, 2), (20, 3), (50, 5))
"""Steps and interval of the trajectories."""
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the graphs; made anew where absent")
    parser.add_argument("--prepare", action="store_true", help="make the graphs and stop")
    parser.add_argument("--memory", action="store_true", help="measure memory and nothing else")
    parser.add_argument("--cut", default="", help="as compile --cache-cut")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="rounds of whole trajectories")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--no-eager", action="store_true", help="leave torch out")
    parser.add_argument("--cases", nargs="+", default=[f"{s}:{n}" for s, n in CASES], help="STEPS:N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="results of other models and cuts in it stay")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    folder = args.keep / "-".join(filter(None, (args.model, args.cut.replace(":", ""))))
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "facts.json").write_text(json.dumps(make_graphs(args.model, folder, args.cut)))
    if args.prepare:
        return
    facts = json.loads((folder / "facts.json").read_text())
    found = memory(folder, facts) if args.memory else {**speed(args, folder, facts), "machine": machine()}
    print(json.dumps({k: v for k, v in found.items() if k != "ms_by_round"}, indent=1))
    if args.json is not None:
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        key = f"{args.model} {args.cut}".strip()
        before = results.get(key, {})
        if "trajectories" in found:
            found["trajectories"] = {**before.get("trajectories", {}), **found["trajectories"]}
        results[key] = {**before, **found, "cut": facts["cut"], "threads": args.threads}
        args.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def make_graphs(name: str, folder: Path, cut_text: str) -> dict[str, Any]:
    """Float, uncached INT8, and the INT8 variants; what a trajectory needs to know about them."""
    import diffusers
    import onnx_ir as ir
    import torch

    from quantempo.contracts.codec import to_data
    from quantempo.export.families import family_of_module
    from quantempo.export.for_ort import for_onnxruntime
    from quantempo.export.graph_files import write_graphs
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lower_variant import lower_variant
    from quantempo.export.sites import default_plan
    from quantempo.export.trace import trace_module
    from quantempo.export.weights import quantize_weights
    from quantempo.recipe import Recipe
    from quantempo.stages.cache_cuts import cut_for_caching

    torch.manual_seed(0)
    class_name, config = MODELS[name]
    module = getattr(diffusers, class_name)(**config).eval()
    family = family_of_module(module)
    traced = trace_module(module, family, folder, "traced")
    model = ir.load(traced.path)
    cut = cut_for_caching(model, Recipe(cache="every:2", cache_cut=cut_text))
    assert cut is not None
    plan = cut.keep_free(default_plan(model, traced.digest, sites=traced.sites))
    table = min_max_table(model, plan, [family.example(BATCH, seed) for seed in (0, 1)])
    weights = quantize_weights(model, plan, "minmax")
    variants = {
        key: lower_variant(v.graph, plan, table, weights, lower_ort) for key, v in cut.set.variants.items()
    }
    (folder / "variants").mkdir(exist_ok=True)
    write_graphs(folder / "variants", variants)
    write_graphs(folder, {"float": for_onnxruntime(model), "int8": lower_ort(model, plan, table, weights)})
    return {
        "cut": {"kind": cut.cut.kind, **to_data(cut.cut)}, "denoiser": to_data(family.denoiser()),
        "partition": to_data(table.partition),
        "variants": {key: {"reads": v.reads, "writes": v.writes, "vectors": v.vectors}
                     for key, v in cut.set.variants.items()},
        "channels": {
            **{f.name: f.channels for f in cut.set.features.values()},
            **{f"{f.name}.product": f.product_channels for f in cut.set.features.values()},
        },
        "products": {key: sum(n.op_type in ("MatMul", "Conv", "Gemm") for n in v.graph.graph)
                     for key, v in cut.set.variants.items()},
    }  # fmt: skip


class Trajectories:
    """Whole runs over the graphs of a folder, one guided sample each."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], threads: int) -> None:
        import diffusers

        from quantempo.contracts.codec import from_data
        from quantempo.contracts.engine import EngineOptions
        from quantempo.contracts.manifest import Denoiser
        from quantempo.contracts.partition import Partition
        from quantempo.contracts.variants import Variant
        from quantempo.engines.registry import open_engine
        from quantempo.export.sampler import trace_program
        from quantempo.runtime.loop import Loop

        denoiser = from_data(Denoiser, facts["denoiser"], "denoiser")
        partition = from_data(Partition, facts["partition"], "partition")
        options = EngineOptions(threads=threads)
        files = {"full": folder / "int8.onnx"}
        cached = {key: folder / "variants" / f"{key}.onnx" for key in facts["variants"]}
        calls = max(steps for steps, _ in CASES)
        vectors = {}
        for described in facts["variants"].values():
            for name in described["vectors"]:
                width = facts["channels"][name.rsplit(".", 1)[0]]
                vectors[name] = np.full((calls, width), float(name.endswith(".gain")), np.float32)
        quantized = replace(denoiser, group_input="scale_group")
        self.engines = {key: open_engine("ort", file, options) for key, file in cached.items()}
        variants = {
            key: Variant(tuple(e.inputs), tuple(e.outputs), tuple(facts["variants"][key]["reads"]),
                         tuple(facts["variants"][key]["writes"]))
            for key, e in self.engines.items()
        }  # fmt: skip
        self.loops = {
            "float": Loop({"full": open_engine("ort", folder / "float.onnx", options)}, denoiser),
            "int8": Loop({"full": open_engine("ort", files["full"], options)}, quantized, partition),
            "cached": Loop(self.engines, quantized, partition, variants, vectors),
        }
        self.vectors = {key: tuple(v["vectors"]) for key, v in facts["variants"].items()}
        self.denoiser = denoiser
        scheduler = diffusers.DDIMScheduler(**SCHEDULER)
        self.programs = {steps: trace_program(scheduler, steps) for steps, _ in CASES}

    def cached_program(self, steps: int, interval: int) -> Any:
        """With history corrections, as a bundle has them; the coefficients do not matter for the time."""
        from quantempo.calib.cache.history import HistoryCorrection, correct_by_history
        from quantempo.calib.cache.schedules import every

        plain, refreshes = self.programs[steps], every(steps, interval)
        calls = [
            call if i in refreshes
            else replace(call, graph="reuse.0", vectors=dict.fromkeys(self.vectors["reuse.0"], i))
            for i, call in enumerate(plain.calls)
        ]  # fmt: skip
        coefficients = np.tile([1.0, 0.1, -0.1, 0.01], (steps, 1))
        history = HistoryCorrection(coefficients, np.ones(steps), np.ones(steps))
        return correct_by_history(replace(plain, calls=tuple(calls)), history, refreshes, self.denoiser.sample_input)

    def run(self, kind: str, program: Any) -> Any:
        """One guided run."""
        from quantempo.runtime.loop import LoopRequest
        from quantempo.runtime.rng import PhiloxNoise

        conditioning: dict[str, Any] = {
            c.name: (np.array([1]), np.array([c.null])) for c in self.denoiser.classes
        }
        rng = np.random.default_rng(0)
        for array in self.denoiser.arrays:
            pair = [rng.standard_normal((1, *map(int, array.shape))).astype(array.dtype) for _ in range(2)]
            conditioning[array.name] = tuple(pair)
        request = LoopRequest(1, (1.5,), PhiloxNoise.from_seeds(0, 1), conditioning=conditioning)
        return self.loops[kind].run(program, request)


def eager_float32(model: str, threads: int) -> Callable[[], object]:
    """A call of the diffusers module."""
    import diffusers

    from quantempo.export.families import family_of_module

    class_name, config = MODELS[model]
    module = getattr(diffusers, class_name)(**config).eval()
    family = family_of_module(module)
    return eager(family.wrap(module), family.example(BATCH), threads)["eager-float32"]


def speed(args: argparse.Namespace, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Calls, then trajectories: predicted from the calls, and measured."""
    bench = Trajectories(folder, facts, args.threads)
    bindings = {
        "ort-float32": bench.loops["float"]._model.engines["full"].bind({"batch": BATCH}),
        "ort-int8": bench.loops["int8"]._model.engines["full"].bind({"batch": BATCH}),
        **{key: engine.bind({"batch": BATCH}) for key, engine in bench.engines.items()},
    }
    rng = np.random.default_rng(0)
    for binding in bindings.values():
        for name, buffer in binding.inputs.items():
            if buffer.array.dtype == np.float32:
                buffer.array[...] = rng.standard_normal(buffer.array.shape)
            elif name == "scale_group":
                buffer.array[...] = GROUPS // 2
    calls: dict[str, Callable[[], object]] = {key: binding.run for key, binding in bindings.items()}
    if not args.no_eager:
        calls["eager-float32"] = eager_float32(args.model, args.threads)
    options: Any = SimpleNamespace(rounds=args.rounds, seconds=args.seconds)
    by_round = alternate(calls, options)
    times = {key: statistics.median(values) for key, values in by_round.items()}
    result: dict[str, Any] = {
        "ms_per_call": {k: round(v, 3) for k, v in times.items()},
        "ms_by_round": {k: [round(v, 3) for v in values] for k, values in by_round.items()},
        "full_over_uncached": round(paired_ratio(by_round["full"], by_round["ort-int8"]), 4),
        "reuse_over_full": round(paired_ratio(by_round["reuse.0"], by_round["full"]), 4),
        "trajectories": {},
    }
    if not args.no_eager:
        result["int8_over_eager_float32"] = round(paired_ratio(by_round["eager-float32"], by_round["ort-int8"]), 3)
    for steps, interval in (map(int, case.split(":")) for case in args.cases):
        name = f"{steps} steps, every:{interval}"
        result["trajectories"][name] = trajectory(bench, times, steps, interval, args.runs)
    return result


def trajectory(
    bench: Trajectories, times: Mapping[str, float], steps: int, interval: int, rounds: int
) -> dict[str, float]:
    """One case: predicted, measured, and over INT8 without caching and eager float32."""
    from quantempo.calib.cache.cost import predicted_ms

    plain, cached = bench.programs[steps], bench.cached_program(steps, interval)
    runs = [(bench.run("int8", plain), bench.run("cached", cached)) for _ in range(rounds + 1)][1:]
    overhead = statistics.median(r.overhead_per_call for _, r in runs) * 1e3
    ms = [[1e3 * r.total_seconds for r in pair] for pair in runs]
    uncached, made = (statistics.median(values) for values in zip(*ms, strict=True))
    predicted = predicted_ms(cached, times, overhead)
    found = {
        "predicted_ms": round(predicted, 2), "measured_ms": round(made, 2), "uncached_ms": round(uncached, 2),
        "measured_over_predicted": round(made / predicted, 4),
        "over_int8": round(statistics.median(a / b for a, b in ms), 3),
        "loop_overhead_ms_per_call": round(overhead, 4),
    }
    if "eager-float32" in times:
        found["over_eager_float32"] = round(steps * times["eager-float32"] / made, 3)
        found["precision_factor"] = round(steps * times["eager-float32"] / uncached, 3)
    return found


def memory(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes on disk and, in processes of their own, resident with and without the reusing graph."""
    weights = sum(f.stat().st_size for f in folder.glob("variants/*") if f.suffix != ".onnx")
    graphs = {f.stem: f.stat().st_size for f in folder.glob("variants/*.onnx")}
    alone, both = (_resident(folder, names) for names in (("full",), ("full", "reuse.0")))
    return {"memory": {
        "weights_bytes": weights, "reuse_graph_bytes": graphs["reuse.0"], "full_graph_bytes": graphs["full"],
        "disk_share": round(graphs["reuse.0"] / weights, 5),
        "resident_full": alone, "resident_both": both,
        "added": {key: both[key] - alone[key] for key in alone},
        "reuse_weights_bytes": referenced_bytes(folder / "variants" / "reuse.0.onnx"),
        "full_weights_bytes": referenced_bytes(folder / "variants" / "full.onnx"),
    }}  # fmt: skip


def referenced_bytes(graph: Path) -> int:
    """Bytes of the weights that a graph refers to."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    total = 0
    for tensor in model.graph.initializer:
        length = next((int(e.value) for e in tensor.external_data if e.key == "length"), None)
        total += len(tensor.SerializeToString()) if length is None else length
    return total


CHILD = """
import sys
from pathlib import Path
from quantempo.contracts.engine import EngineOptions
from quantempo.engines.registry import open_engine

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024

import onnxruntime
start = anonymous()
engines = [open_engine("ort", Path(p), EngineOptions(threads=1, settings={"arena": "shared"})) for p in sys.argv[1:]]
opened = anonymous() - start
bindings, buffers = [], {}
for e in engines:  # tensors are shared by name, as the runtime does
    known = {n: b for n, b in buffers.items() if n in e.inputs or n in e.outputs}
    bindings.append(e.bind({"batch": 2}, known))
    buffers.update({**bindings[-1].inputs, **bindings[-1].outputs})
for b in bindings: b.run()
print(opened, anonymous() - start)
"""


def _resident(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    paths = [str(folder / "variants" / f"{name}.onnx") for name in names]
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], check=True, capture_output=True, text=True)
    opened, ran = map(int, done.stdout.split())
    return {"opened": opened, "after_a_call": ran}


if __name__ == "__main__":
    main()
