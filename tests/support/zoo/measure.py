"""One class, from the module to INT8 on two engines: what the sweep writes down and what the tests assert."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from support.zoo.entry import Draw, Entry
from torch import nn

from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.engines.registry import open_engine
from quantempo.export.families import Family, family_of_example
from quantempo.export.graph_files import load_graph, write_graphs
from quantempo.export.sites import PlanOptions, default_plan
from quantempo.export.trace import FloatGraph, first_rows, torch_reference, trace_module, verify_denoiser
from quantempo.export.variants import cut_variants
from quantempo.export.weights import quantize_weights
from quantempo.stages.cache_cuts import default_cuts
from quantempo.stages.dialects import lower_graphs
from quantempo.stages.quantizers import scale_table

Arrays = Mapping[str, NDArray[Any]]
TIMESTEP = "timestep"
GROUPS = 2
STEPS = 4
"""Timesteps that calibration sees, two in each group."""
ROWS = 24
"""Samples that it sees at each: with fewer, compensated rounding of the weights fits to these very samples."""
ENGINES = {"ort": "ort-f32", "openvino": "portable-f32"}
"""Engines, and the dialect that each runs."""
ENOUGH_DB = 20.0


@dataclass
class Finding:
    """What one class did.

    Args:
        status: `covered`; `partial` where the float graph is right but something after it is not; `float` where that
            was all that was asked for; else `refused`.
        stage: where it stopped, or `done`.
        float_error: relative error of the float graph against the module, the worse of two input sets.
        sqnr_db: by engine, the worst one-call SQNR of the INT8 graph against the module, in dB.
        groups: timestep groups of the INT8 graphs.
        quantized, kept: numbers of sites.
        cache: the cut that feature caching would take, or why there is none.
        cause: of a failure, in one line.
    """

    class_name: str
    status: str = "refused"
    stage: str = "build"
    float_error: float | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    groups: int = 0
    quantized: int = 0
    kept: int = 0
    cache: str = ""
    cause: str = ""
    seconds: float = 0.0


def measure(entry: Entry, folder: Path, float_only: bool = False) -> Finding:
    """Take one class all the way; a failure is a finding, not an exception.

    Args:
        entry: of the zoo.
        folder: for graphs.
        float_only: end once the float graph was compared with the module.
    """
    finding, start = Finding(entry.class_name), time.perf_counter()
    try:
        _measure(entry, folder, finding, float_only)
    except Exception as error:
        finding.cause = f"{type(error).__name__}: {first_line(error)}"
    finding.seconds = round(time.perf_counter() - start, 1)
    return finding


def _measure(entry: Entry, folder: Path, finding: Finding, float_only: bool) -> None:
    module = entry.build()
    finding.stage = "example inputs"
    family = family_of_example(module, list(entry.examples()), **entry.family)
    finding.stage = "trace"
    graph = trace_module(module, family, folder)
    finding.stage = "float graph"
    finding.float_error = verify_denoiser(graph, module, family, run_ort)
    if float_only:
        finding.status, finding.stage = "float", "done"
        return
    finding.status = "partial"
    model = load_graph(graph.path)
    finding.cache = cache_cut(model)
    finding.stage = "plan"
    plan = default_plan(model, graph.digest, PlanOptions(smallest=1), graph.sites)
    finding.quantized, finding.kept = len(plan.quantized()), len(plan.kept())
    finding.stage = "calibrate"
    table, weights = calibrate(calibration_calls(entry, module, keys_of(family), graph), graph, model, plan)
    finding.groups = table.partition.groups
    finding.stage = "lower"
    lowered = lower_graphs(model, plan, table, weights, tuple(ENGINES.values()))
    written = write_graphs(folder, lowered)
    reference = torch_reference(module, family)
    calls = held_out(entry, module, family)
    (output,) = graph.outputs
    wanted = [first_rows(reference(call)[output.name], output) for _, call in calls]
    causes = []
    for engine, dialect in ENGINES.items():
        finding.stage = f"INT8 on {engine}"
        try:
            path = folder / written[f"full.{dialect}"].file
            feeds = [(table.partition.group_of(key), taken(call, graph)) for key, call in calls]
            finding.sqnr_db[engine] = round(worst_sqnr(engine, path, feeds, wanted), 1)
        except Exception as error:
            causes.append(f"{finding.stage}: {type(error).__name__}: {first_line(error)}")
            continue
        if finding.sqnr_db[engine] < ENOUGH_DB:
            causes.append(f"{finding.stage}: {finding.sqnr_db[engine]} dB")
    finding.cause = "; ".join(causes)
    if not causes:
        finding.status, finding.stage = "covered", "done"


def warm_up() -> None:
    """Let the exporter read its tables, which it does on its first use."""
    torch.onnx.export(nn.Linear(2, 2), (torch.zeros(2, 2),), dynamo=True, verbose=False)
    for library in ("onnxruntime", "openvino"):
        importlib.import_module(library)


def run_ort(path: Path, feeds: Arrays) -> Arrays:
    """One call of a float graph."""
    return run(path, feeds, "ort")


def run(path: Path, feeds: Arrays, engine: str) -> Arrays:
    """One call of a graph, on one thread."""
    opened = open_engine(engine, path, EngineOptions(threads=1))
    try:
        return opened.run(feeds)
    finally:
        opened.close()


def cache_cut(model: ir.Model) -> str:
    """The first default cut that fits, or why none does."""
    refusal = "no long skip and no list of blocks"
    for cut in default_cuts(model):
        try:
            cut_variants(model, {"reuse0": cut}, None, ("feature",))
        except Exception as error:
            refusal = first_line(error)
            continue
        return repr(cut)
    return f"none: {refusal}"


def keys_of(family: Family) -> list[float]:
    """Timesteps over the range of the examples; one key where the class has no timestep per call."""
    found = [np.ravel(feeds[TIMESTEP]) for feeds in family.examples() if TIMESTEP in feeds]
    if not found:
        return [0.0]
    low, high = float(min(map(np.min, found))), float(max(map(np.max, found)))
    whole = all(np.issubdtype(values.dtype, np.integer) for values in found)
    keys = np.linspace(low, high, STEPS)
    return sorted({float(round(key)) if whole else float(np.float32(key)) for key in keys})


def at_timestep(feeds: Arrays, key: float) -> dict[str, NDArray[Any]]:
    """The same inputs at one timestep."""
    if TIMESTEP not in feeds:
        return dict(feeds)
    return {**feeds, TIMESTEP: np.full_like(feeds[TIMESTEP], key)}


def taken(feeds: Arrays, graph: FloatGraph) -> Arrays:
    """The feeds that a graph takes: inputs whose contents steer Python are pinned, and the batch may be fixed."""
    return {spec.name: np.array(first_rows(feeds[spec.name], spec)) for spec in graph.inputs}


def drawn(entry: Entry, module: nn.Module, seed: int, batch: int = 0) -> Arrays:
    """Inputs of another seed, as the graph takes them."""
    first, second = (batch, batch + 1) if batch else entry.batches
    sets = [entry.inputs(Draw(first, seed)), entry.inputs(Draw(second, seed + 1000))]
    return family_of_example(module, sets, **entry.family).examples()[0]


def calibration_calls(
    entry: Entry, module: nn.Module, keys: Sequence[float], graph: FloatGraph
) -> list[tuple[float, Arrays]]:
    """(timestep, inputs): one large call at each timestep, or many small ones where the batch is fixed."""
    (output,) = graph.outputs
    if isinstance(output.shape[0], str):
        return [(key, at_timestep(drawn(entry, module, 10 + i, ROWS), key)) for i, key in enumerate(keys)]
    fixed = entry.batches[0] if entry.batches[0] == entry.batches[1] else 1
    draws = [drawn(entry, module, 10 + i) for i in range(ROWS // fixed)]
    return [(key, at_timestep(feeds, key)) for key in keys for feeds in draws]


def held_out(entry: Entry, module: nn.Module, family: Family) -> list[tuple[float, Arrays]]:
    """(timestep, inputs) that calibration has not seen: one call in the first group, one in the last."""
    keys = keys_of(family)
    return [(key, at_timestep(drawn(entry, module, 90 + i), key)) for i, key in enumerate((keys[0], keys[-1]))]


def calibrate(
    calls: Sequence[tuple[float, Arrays]], graph: FloatGraph, model: ir.Model, plan: QuantPlan
) -> tuple[ScaleTable, Mapping[str, Any]]:
    """Scales for two groups of timesteps and weights in INT8, by the collectors of a compile."""
    products = tuple(sorted({site.tensor for site in plan.quantized() if site.op == "matmul"}))
    collector = StatsCollector("full", plan.scaled_tensors(), plan.centred)
    grams = GramCollector(products)
    given = {spec.name for spec in graph.inputs}
    inner = tuple(name for name in plan.scaled_tensors() if name not in given)
    engine = open_engine("ort", graph.path, EngineOptions(threads=1, extra_outputs=inner))
    try:
        for key, inputs in calls:
            feeds = taken(inputs, graph)
            outputs = engine.run(feeds)
            taps = {name: feeds[name] if name in given else outputs[name] for name in plan.scaled_tensors()}
            collector.observe(key, taps, seeds=range(ROWS))
            grams.observe(key, taps)
    finally:
        engine.close()
    groups = min(GROUPS, len({key for key, _ in calls}))
    table = scale_table(collector, plan, f"uniform:{groups}", "minmax")
    return table, quantize_weights(model, plan, "mse", grams.matrices(table))


def worst_sqnr(engine: str, path: Path, calls: list[tuple[int, Arrays]], wanted: list[NDArray[Any]]) -> float:
    """The least signal-to-noise ratio over calls, in dB."""
    opened = open_engine(engine, path, EngineOptions(threads=1))
    try:
        found = [
            next(iter(opened.run({**feeds, "scale_group": np.array(group, np.int64)}).values()))
            for group, feeds in calls
        ]
    finally:
        opened.close()
    return min(sqnr_db(a, b) for a, b in zip(wanted, found, strict=True))


def sqnr_db(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """Signal over noise in dB; minus infinity where the result is not finite."""
    noise = float(np.sum(np.square(found.astype(np.float64) - wanted)))
    signal = float(np.sum(np.square(wanted.astype(np.float64))))
    if not np.isfinite(noise):
        return float("-inf")
    return 10 * float(np.log10(signal / max(noise, 1e-30)))


def first_line(error: BaseException) -> str:
    """The first words of an error and of its root."""
    text = " ".join(str(error).split())[:300]
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if root is not error:
        text += f" <- {type(root).__name__}: {' '.join(str(root).split())[:200]}"
    return text
