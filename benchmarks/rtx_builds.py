"""TensorRT for RTX engines without a GPU: build time, plan size, kernels, fusion gate, for every device generation.

One entry per (model, graph, capability) goes into the JSON file as soon as it is built; a second run builds only what
is missing or was made from another graph or library version.  `--check` compares the file with the bars: everything
builds and passes the gate, FP8 is refused where the hardware lacks it, and groups cost no products.

Weights are random for the two large models: neither kernels nor sizes depend on them.  No time here is a run time.

    python benchmarks/rtx_builds.py --json docs/tensorrt.json
    python benchmarks/rtx_builds.py --models demo-dit --capabilities 8.9 --json sample.json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import int8_speed

from quantempo.building import key_parts
from quantempo.contracts.partition import Partition
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.engines import gate, trt_process
from quantempo.engines.kernels import plan_kernels
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.plan_store import pack, weight_sources
from quantempo.engines.targets import Target, target
from quantempo.engines.tensorrt import BuildJob, version
from quantempo.engines.trt_profiles import Profile, Range
from quantempo.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent
DEMO = {"demo-dit": ROOT / "quantempo/demo/dit/transformer", "demo-unet": ROOT / "tests/models/unet/unet"}
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
FP8_CAPABILITIES = ("8.9", "12.0", "12.1")
GRAPHS = ("float-f16", "int8-f16", "int8-one-scale-f16", "fp8-f16")
"""Float twin, INT8 with scale groups, INT8 with one scale per tensor, FP8."""
UNFOLDED = "-unfolded"
BATCH = Profile({"batch": Range(1, 2, 8)})
RESIDUAL_BLOCKS = {"demo-dit": 0, "demo-unet": 11, "dit-s2": 0, "unet": 22}
"""How many kernels more INT8 with groups may have than INT8 with one scale."""
TAPPED = 100
"""Tensors whose range is taken in one run."""
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """One build."""

    model: str
    graph: str
    capability: str

    @property
    def name(self) -> str:
        """Key in the JSON file."""
        return f"{self.model}/{self.graph}/sm{self.capability.replace('.', '')}"

    @property
    def file(self) -> str:
        """The graph: INT8 convolutions are unfolded for Turing, which has none."""
        return f"{self.graph}{UNFOLDED if self.capability == '7.5' and self.graph.startswith('int8') else ''}"


def main() -> int:
    """Build what is missing, then check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[*DEMO, *int8_speed.MODELS])
    parser.add_argument("--graphs", nargs="*", default=list(GRAPHS))
    parser.add_argument("--capabilities", nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--keep", type=Path, help="folder for the graphs; they are made where absent")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    options = parser.parse_args()
    report = json.loads(options.json.read_text()) if options.json.is_file() else {}
    builds: dict[str, Entry] = report.setdefault("builds", {})
    report["library"] = f"tensorrt_rtx {version('tensorrt_rtx')}"
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep / model if options.keep else Path(scratch)
            if not (folder / "facts.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "facts.json").write_text(json.dumps(make_graphs(model, folder)))
            for graph in options.graphs:
                for capability in options.capabilities:
                    choice = Choice(model, graph, capability)
                    builds[choice.name] = build(choice, folder / f"{choice.file}.onnx", builds.get(choice.name))
                    options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    failures = check(builds)
    print("\n".join(failures) or f"{len(builds)} builds, nothing unexpected")
    return 1 if failures and options.check else 0


def make_graphs(model: str, folder: Path) -> dict[str, Any]:
    """The graphs of a model as a bundle holds them, in float16 where the range scan says that it is safe."""
    import diffusers
    import onnx_ir as ir
    import torch

    from quantempo.export.families import family_of_module
    from quantempo.export.float_types import to_half
    from quantempo.export.fp8 import fp8_weights
    from quantempo.export.graph_files import write_graphs
    from quantempo.export.sites import default_plan
    from quantempo.export.trace import trace_module
    from quantempo.export.unfold import DIALECT, kept_when_unfolded
    from quantempo.export.weights import quantize_weights
    from quantempo.stages.dialects import GraphChoice, lower_graphs, scanned_tensors

    torch.manual_seed(0)
    if model in DEMO:
        kind = json.loads((DEMO[model] / "config.json").read_text())["_class_name"]
        module = getattr(diffusers, kind).from_pretrained(DEMO[model]).eval()
    else:
        kind, config = int8_speed.MODELS[model]
        module = getattr(diffusers, kind)(**config).eval()
    family = family_of_module(module)
    inputs = [family.example(int8_speed.BATCH, seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as scratch:
        traced = trace_module(module, family, Path(scratch), "traced")
        graph = ir.load(traced.path)
        plan = default_plan(graph, traced.digest, sites=traced.sites)
        plan = replace(plan, dialects={DIALECT: kept_when_unfolded(graph, plan)})
        table = int8_speed.min_max_table(graph, plan, inputs)
        scanned = tuple(scanned_tensors(graph, GraphChoice(("fp8-f16", "portable-f16", "unfold-f16"))))
        ranges: dict[str, float] = {}
        for start in range(0, len(scanned), TAPPED):
            ranges |= int8_speed.largest(graph, scanned[start : start + TAPPED], inputs)
        int8 = GraphChoice(("portable-f16", "unfold-f16"), ranges=ranges)
        weights = quantize_weights(graph, plan, "minmax")
        twin = graph.clone()
        to_half(twin, "float16", ranges)
        graphs = {"float-f16": twin}
        for name, scales in (("int8", table), ("int8-one-scale", one_group(table))):
            lowered = lower_graphs(graph, plan, scales, weights, int8)
            graphs[f"{name}-f16"] = lowered["full.portable-f16"]
            graphs[f"{name}-f16{UNFOLDED}"] = lowered["full.unfold-f16"]
        fp8 = GraphChoice(("fp8-f16",), ranges=ranges)
        graphs["fp8-f16"] = lower_graphs(graph, plan, table, fp8_weights(graph, plan), fp8)["full.fp8-f16"]
        write_graphs(folder, graphs)
    return {
        "sites": len(plan.sites), "quantized": len(plan.quantized()),
        "unfolded": len(plan.for_graph(DIALECT).quantized()),
    }


def one_group(table: ScaleTable) -> ScaleTable:
    """One scale per tensor for all timesteps: a group in the middle."""
    chosen = slice(int8_speed.GROUPS // 2, int8_speed.GROUPS // 2 + 1)
    partition = Partition.single(table.partition.low, table.partition.high)
    tensors = {
        name: TensorScales(t.scale[chosen], t.zero_point[chosen], t.symmetric_scale[chosen],
                           None if t.centre is None else t.centre[chosen])
        for name, t in table.tensors.items()
    }  # fmt: skip
    return ScaleTable(partition, tensors)


def build(choice: Choice, graph: Path, before: Entry | None) -> Entry:
    """One build in a process of its own, or the entry that is there already."""
    profile = replace(target("rtx-ada"), capability=choice.capability)
    job = BuildJob("tensorrt_rtx", str(graph), "", choice.capability, (BATCH,))
    key = key_parts(job, version("tensorrt_rtx"), f"sm_{choice.capability.replace('.', '')}").key
    if before is not None and before["key"] == key:
        return before
    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch) / "plan"
        before_build = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            built = trt_process.build(replace(job, plan=str(plan)))
        except EngineError as error:
            print(f"{choice.name}: refused: {error.found}", flush=True)
            return {"key": key, "refused": f"{error.found}; {error.cause}"}
        after_build = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = sum(getattr(after_build, kind) - getattr(before_build, kind) for kind in ("ru_utime", "ru_stime"))
        data = plan.read_bytes()
        # Other jobs may hold the machine: the builder's own time says more than the clock.
        entry = {"key": key, "cpu_seconds": round(spent, 2), "plan_bytes": built.size, "memory": built.reports}
        entry |= kernels(data, graph, profile)
        if choice.capability == "8.9":
            entry["packed_bytes"] = len(pack(data, weight_sources(graph)))
    size = f"{built.size / 1e6:.1f} MB"
    print(f"{choice.name}: {entry['cpu_seconds']} s of CPU time, {size}, gate {entry['gate']}", flush=True)
    return entry


def kernels(plan: bytes, graph: Path, profile: Target) -> dict[str, Any]:
    """What the fusion gate counts."""
    structure = read_graph(graph)
    report = gate.check_rtx(plan, structure, profile)
    facts: dict[str, Any] = {"kernels": report.kernels, "products": report.products, "sites": report.sites}
    facts["formats"] = dict(report.formats)
    listed = plan_kernels(plan)
    facts["attention"] = {
        "float": sum(kernel.attention and not kernel.inputs[0].narrow for kernel in listed),
        "quantized": sum(kernel.attention and kernel.inputs[0].narrow for kernel in listed),
    }
    facts["gate"] = "passed"
    if report.breaches:
        first = report.breaches[0]
        facts["gate"] = f"{len(report.breaches)} breaches, first: {first.where}: {first.found}"
    return facts


def check(builds: Mapping[str, Entry]) -> list[str]:
    """What falls short of the bars, as sentences; empty is what one wants."""
    failures = []
    for name, entry in builds.items():
        model, graph, capability = name.split("/")
        lacks = graph == "fp8-f16" and capability not in {"sm" + c.replace(".", "") for c in FP8_CAPABILITIES}
        if lacks != ("refused" in entry):
            failures.append(f"{name}: {entry.get('refused', 'built, although the hardware lacks FP8')}")
        elif not lacks and entry["gate"] != "passed":
            failures.append(f"{name}: {entry['gate']}")
        if "packed_bytes" in entry and entry["packed_bytes"] > 0.15 * entry["plan_bytes"]:
            failures.append(f"{name}: packed to {entry['packed_bytes'] / entry['plan_bytes']:.0%} of the plan")
        twin = builds.get(f"{model}/int8-one-scale-f16/{capability}", {})
        compared = graph == "int8-f16" and "products" in entry and "products" in twin
        if compared and entry["products"] > twin["products"]:
            failures.append(f"{name}: {entry['products']} products, {twin['products']} with one scale")
        if compared and entry["kernels"] > twin["kernels"] + RESIDUAL_BLOCKS.get(model, 0):
            failures.append(f"{name}: {entry['kernels']} kernels, {twin['kernels']} with one scale")
        if graph == "fp8-f16" and entry.get("attention", {}).get("float"):
            failures.append(f"{name}: {entry['attention']['float']} attentions in float")
    return failures


if __name__ == "__main__":
    sys.exit(main())
