"""Quantized graphs of the variants: each is lowered with its part of the model's plan, and with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from quantempo.contracts.plan import Decision, QuantPlan, Share
from quantempo.contracts.table import ScaleTable
from quantempo.export.centring import check_centred
from quantempo.export.lowering import Lower
from quantempo.export.passes.name_values import is_site
from quantempo.export.weights import QuantizedWeight


def lower_variant(
    graph: ir.Model, plan: QuantPlan, table: ScaleTable, weights: Mapping[str, QuantizedWeight], lower: Lower
) -> ir.Model:
    """A variant's quantized graph.

    Args:
        graph: a variant's float graph.
        plan: of the whole model.
        table: scales of at least the variant's tensors (refreshing and reusing calls may have their own).
        weights: of the whole model, so that all variants hold the same bytes.
        lower: `lower_ort` or `lower_portable`.

    Raises:
        ScaleMissing: the table lacks a tensor of the variant.
    """
    part = variant_plan(plan, graph)
    if not part.quantized():
        return graph.clone()
    return lower(graph, part, variant_table(table, part), weights)


def variant_plan(plan: QuantPlan, graph: ir.Model) -> QuantPlan:
    """The part of a plan that concerns the sites of a variant.

    A site that shared its scale with one that is gone takes over its settings.

    Raises:
        PlanError: the plan centres a tensor that is cached: a feature is kept as it is, not shifted per group.
    """
    there = {str(value.name) for node in graph.graph if is_site(node) for value in node.outputs}
    sites = tuple(site for site in plan.sites if site.output in there)
    left = {site.id for site in sites}
    decisions: dict[str, Decision] = {}
    heirs: dict[str, str] = {}
    for site in sites:
        decision = plan.decisions[site.id]
        if isinstance(decision, Share) and decision.site not in left:
            heir = heirs.setdefault(decision.site, site.id)
            decision = plan.decisions[decision.site] if heir == site.id else Share(heir)
        decisions[site.id] = decision
    part = replace(plan, sites=sites, decisions=decisions)
    scaled = set(part.scaled_tensors())
    part = replace(part, centred=tuple(name for name in plan.centred if name in scaled))
    check_centred(part, graph, "plan of a graph variant")
    return part


def variant_table(table: ScaleTable, plan: QuantPlan) -> ScaleTable:
    """The part of a table that a plan uses.

    Raises:
        ScaleMissing: it lacks a tensor.
    """
    return replace(table, tensors={name: table.of(name) for name in plan.scaled_tensors()})
