"""The quantized graph's weights with float activations: the variant that a step policy's edge steps run.

Weights are the same INT8 bytes as in the quantized graphs, so the variant costs its graph file and no more on disk; in
memory an engine unfolds them to float32 when it loads it (ONNX Runtime folds `Cast` and `Mul`, four bytes a weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from quantempo.contracts.partition import Partition
from quantempo.contracts.plan import Decision, Keep, QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.errors import PlanError
from quantempo.export.for_ort import tune
from quantempo.export.lowering import Lowering, LoweringOptions
from quantempo.export.weights import QuantizedWeight

REASON = "float activations at the ends of a run"


def lower_float(
    model: ir.Model, plan: QuantPlan, weights: Mapping[str, QuantizedWeight], dialect: str
) -> ir.Model:
    """The graph in which every quantized site computes in float with its dequantized INT8 weight.

    Args:
        model: float graph in normal form; it is left as it is.
        plan: of the quantized graphs.
        weights: of the quantized graphs.
        dialect: `ort` or `portable`, which decides how a stored weight is written.

    Returns:
        A new model without the input `scale_group`.

    Raises:
        PlanError: a weight is missing.
    """
    decisions: dict[str, Decision] = dict(plan.decisions)
    for site in plan.quantized():
        if site.weight not in weights:
            raise PlanError(
                f"site {site.id!r}", found=f"no INT8 weight {site.weight!r}", wanted="one for each quantized site",
                cause="the weights were quantized for another plan", remedy="quantize the weights with this plan",
            )
        decisions[site.id] = Keep(REASON, "int8")
    kept = replace(plan, decisions=decisions, centred=())
    lowering = Lowering(model.clone(), kept, ScaleTable(Partition((), 0.0, 0.0), {}), weights, LoweringOptions())
    lowered = lowering.finish(dialect)
    if dialect == "ort":
        tune(lowered)
    return lowered
