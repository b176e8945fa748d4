"""From statistics to numbers: activation scales, and weights in integers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.partition import Evidence, choose_partition
from quantempo.calib.ranges import SCALE_FLOOR
from quantempo.calib.tables import build_table, floored
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json, to_data
from quantempo.contracts.partition import Partition
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensor_file import map_tensors, write_tensors
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.stages.calibration import Calibration
from quantempo.stages.model import Exported
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries

if TYPE_CHECKING:
    from quantempo.export.weights import QuantizedWeight

TABLES, PARTITION, WEIGHTS = "tables.safetensors", "partition.json", "weights.safetensors"


def scale_table(collector: StatsCollector, plan: QuantPlan, groups: str, method: str) -> ScaleTable:
    """Scales from statistics, for a partition and a range method."""
    stats = collector.stats()
    bits = activation_bits(plan)
    partition = choose_partition(groups, Evidence(stats, bits, samples=collector.samples()))
    return build_table(stats, partition, method, bits, centred=plan.centred)


def activation_bits(plan: QuantPlan) -> dict[str, int]:
    """The tensors that need scales, with their bits; outputs of convolutions have 8."""
    bits: dict[str, int] = {}
    for site in plan.quantized():
        settings = plan.settings(site)
        assert settings is not None
        bits[site.tensor] = settings.activation_bits
        if site.op == "conv":
            bits.setdefault(site.output, 8)
    return bits


def scales_stage(
    store: StageStore, calibration: Calibration, calibrated: StageResult, plan: QuantPlan, recipe: Recipe
) -> tuple[ScaleTable, StageResult]:
    """`scale_table`, or its earlier result."""

    def make(folder: Path, advance: Advance) -> None:
        table = scale_table(calibration.statistics, plan, recipe.groups, recipe.range_method)
        arrays = table.arrays()
        specs = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        write_tensors(folder / TABLES, specs, arrays.values())
        (folder / PARTITION).write_text(canonical_json(table.partition))

    result = store.run("scales", {
        "statistics": calibrated.key, "quantized tensors": activation_bits(plan), "centred tensors": plan.centred,
        "groups": recipe.groups, "range method": recipe.range_method, "libraries": libraries("numpy", "scipy"),
        "code": code("quantempo.calib", "quantempo.contracts", "quantempo.stages.quantizers"),
    }, make)  # fmt: skip
    where = result.path(PARTITION)
    partition = from_data(Partition, parse_json(where.read_bytes(), str(where)), str(where))
    table = ScaleTable.from_arrays(partition, map_tensors(result.path(TABLES)))
    say_floored(table)
    return table, result


class ScaleFloored(UserWarning):
    """An activation was zero throughout calibration: there is no range to take a scale from."""


def say_floored(table: ScaleTable) -> None:
    """Warn where tensors have the least scale; also for a table that an earlier compile made."""
    found = floored(table)
    if found:
        first, groups = next(iter(found.items()))
        warnings.warn(
            f"{len(found)} of {len(table.tensors)} quantized tensors were zero throughout calibration in some group, "
            f"such as {first} in {groups} of {table.partition.groups}: their scale is the least one, {SCALE_FLOOR:g}, "
            "and any other value would be clipped to zero; calibrate on inputs that reach them, or keep their layers "
            "in float",
            ScaleFloored, stacklevel=3,
        )


def weights_stage(
    store: StageStore, exported: Exported, plan: QuantPlan, recipe: Recipe, calibration: Calibration,
    calibrated: StageResult, table: ScaleTable,
) -> tuple[Mapping[str, QuantizedWeight], StageResult]:
    """The weights in INT8 or FP8, one after another into a file, or an earlier result; they stay in the file."""
    from quantempo.export.fp8 import each_fp8_weight, weight_bytes, weight_values
    from quantempo.export.weights import QuantizedWeight, each_weight, output_axis, wanted_weights

    wanted = wanted_weights(plan)
    compensated = recipe.weight_method == "gptq"
    inputs: dict[str, Any] = {
        "denoiser": exported.graph_digest, "weight method": recipe.weight_method, "precision": recipe.precision,
        "quantized weights": {name: (to_data(site), bits) for name, (site, bits) in wanted.items()},
        "libraries": libraries("numpy"), "code": code("quantempo.export", "quantempo.contracts"),
    }
    if compensated:
        # Second moments are taken around the centres, and the centres follow the groups.
        moved = {name: a for name, a in table.arrays().items() if name.endswith("|centre")}
        inputs["statistics"] = calibrated.key
        inputs["centres"] = [digest(a.tobytes()) for a in moved.values()]
        inputs["groups of the centres"] = to_data(table.partition) if moved else None

    def make(folder: Path, advance: Advance) -> None:
        grams = calibration.grams.matrices(table) if compensated else None
        method = "mse" if recipe.weight_method == "gptq" else recipe.weight_method

        def parts() -> Iterator[NDArray[Any]]:
            found = each_weight(exported.graph, plan, method, grams)
            if recipe.precision == "fp8":
                found = each_fp8_weight(exported.graph, plan, grams)
            for index, (_, weight) in enumerate(found):
                dead = np.zeros(len(weight.scale), np.bool_)
                dead[list(weight.dead)] = True
                yield from (weight_bytes(weight), weight.scale, dead)
                advance(index + 1, len(wanted))

        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, (site, _) in wanted.items():
            shape = tuple(exported.graph.graph.initializers[name].shape.numpy())  # type: ignore[union-attr]
            specs |= {f"{name}|values": ("int8", shape), f"{name}|scale": ("float32", (site.n,))}
            specs[f"{name}|dead"] = ("bool", (site.n,))
        write_tensors(folder / WEIGHTS, specs, parts())

    result = store.run("weights", inputs, make)
    flat, quantized = map_tensors(result.path(WEIGHTS)), {site.weight for site in plan.quantized()}
    weights = {
        name: QuantizedWeight(
            weight_values(flat[f"{name}|values"], recipe.precision == "fp8" and name in quantized),
            flat[f"{name}|scale"], output_axis(site),
            tuple(int(i) for i in np.flatnonzero(flat[f"{name}|dead"])),
        )
        for name, (site, _) in wanted.items()
    }
    return weights, result
