"""Which graphs a bundle holds, and how each is made.

A graph is named `VARIANT.DIALECT-TYPE`: the dialect says how quantization is written, the type what is not quantized
(docs/dialects.md).  All graphs of a bundle share one plan, one scale table and one set of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.engines.targets import SHORT, FloatType, Target, require_format, target
from quantempo.errors import PlanError, nearest
from quantempo.recipe import Recipe

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.quantize_attention import Products
    from quantempo.export.weights import QuantizedWeight

Attention = Literal["auto", "float", "quantized"]

FLOAT_TYPES: dict[str, FloatType] = {short: kind for kind, short in SHORT.items()}
BASE = {"int8": ("ort-f32", "portable-f32"), "fp8": ("fp8-f32",)}
"""Graphs that every bundle of a precision has: what runs, or is simulated, on a CPU."""
KNOWN = {
    "int8": (*BASE["int8"], "portable-f16", "portable-bf16", "unfold-f16"),
    "fp8": (*BASE["fp8"], "fp8-f16", "fp8-bf16"),
}
"""All graphs of a precision."""
OPENVINO = "portable-f32"
"""The graph that OpenVINO runs; every target of TensorRT has a half-precision one of its own."""
_DIALECTS = {"int8": ("ort", "portable", "unfold"), "fp8": ("fp8",)}


@dataclass(frozen=True)
class GraphChoice:
    """What to write.

    Args:
        names: `DIALECT-TYPE`, sorted, each once.
        attention: whether attention is quantized; `auto` as it pays on the engines (docs/dialects.md).
        old_parser: rewrite what TensorRT before 10.9 cannot read.
        ranges: calibrated abs-max of the float graph's values, for float16 and quantized attention.
    """

    names: tuple[str, ...]
    attention: Attention = "auto"
    old_parser: bool = False
    ranges: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs_ranges(self) -> bool:
        """Whether a range scan is needed."""
        return any(name.endswith("-f16") or attention_products(name, self.attention) for name in self.names)


def chosen_graphs(recipe: Recipe) -> GraphChoice:
    """The graphs that a recipe asks for.

    Raises:
        RequestError: an unknown target.
        PlanError: a target has no kernels for the recipe's precision, or there is no such graph.
    """
    if recipe.precision == "float32":
        return GraphChoice(())
    profiles = [target(name) for name in recipe.targets]
    names = {*BASE[recipe.precision], *(_best_graph(profile, recipe.precision) for profile in profiles)}
    for name in recipe.graphs:
        if name not in KNOWN[recipe.precision]:
            raise PlanError(
                "recipe, graphs", found=repr(name), wanted=f"one of {', '.join(KNOWN[recipe.precision])}",
                cause=f"a misspelling, or a graph of another precision than {recipe.precision}",
                remedy=nearest(name, KNOWN[recipe.precision]),
            )
    names.update(recipe.graphs)
    old = any(bad.rule == "group-norm" for profile in profiles for bad in profile.known_bad)
    return GraphChoice(tuple(sorted(names)), recipe.attention, old)


def _best_graph(profile: Target, precision: Literal["int8", "fp8"]) -> str:
    require_format(profile, precision)
    found = [pair for pair in profile.graphs if pair[0] in _DIALECTS[precision]]
    if not found:
        raise PlanError(
            f"target {profile.name!r}", found=f"no graph of precision {precision}",
            wanted=f"one of {', '.join(profile.kinds)}",
            cause="the target reads other dialects", remedy="choose another precision",
        )
    dialect, kind = found[0]
    return f"{dialect}-{SHORT[kind]}"


def split_name(name: str) -> tuple[str, FloatType]:
    """Dialect and float type of `DIALECT-TYPE`; a bare dialect is float32."""
    dialect, _, short = name.partition("-")
    return dialect, FLOAT_TYPES[short or "f32"]


def attention_products(name: str, attention: Attention) -> Products | None:
    """Which products inside the attention of a graph are quantized; `None` for neither.

    By default both in `fp8`, and the scores in `portable-f32`: that is the graph of OpenVINO, where they pay on every
    shape that was timed (docs/openvino.md).  On request both in the INT8 graphs of all compilers.
    """
    dialect = split_name(name)[0]
    if attention == "float" or dialect == "ort":
        return None
    if dialect == "fp8" or attention == "quantized":
        return "both"
    return "scores" if name == OPENVINO else None


def scanned_tensors(graph: Graph, choice: GraphChoice) -> dict[str, int]:
    """The values whose abs-max the chosen graphs need, in graph order, with their elements per row of the batch."""
    from quantempo.export.float_types import float_values
    from quantempo.export.quantize_attention import attention_tensors

    if not choice.needs_ranges:
        return {}
    wanted = set[str]()
    for name in choice.names:
        products = attention_products(name, choice.attention)
        if products is not None:
            wanted.update(attention_tensors(graph, "fp8" if split_name(name)[0] == "fp8" else "int8", products))
    everything = any(name.endswith("-f16") for name in choice.names)
    return {name: size for name, size in float_values(graph).items() if everything or name in wanted}


def ranged_tensors(graph: Graph, precision: Literal["int8", "fp8", "float32"]) -> tuple[str, ...]:
    """The operands of attention that `auto` quantizes in some graph of a precision; calibration finds their ranges."""
    from quantempo.export.quantize_attention import attention_tensors

    if precision == "fp8":
        return attention_tensors(graph, "fp8", "both")
    return attention_tensors(graph, "int8", "scores") if precision == "int8" else ()


def lower_graphs(
    graph: Graph,
    plan: QuantPlan,
    table: ScaleTable,
    weights: Mapping[str, QuantizedWeight],
    graphs: GraphChoice | Iterable[str],
    variant: str = "full",
) -> dict[str, Graph]:
    """Quantized graphs by name, all with the same weights.

    Args:
        graph: float graph in normal form; it is left as it is.
        plan: what to quantize.
        table: scales of exactly the plan's tensors.
        weights: of the plan's sites, INT8 or E4M3 as the dialects need.
        graphs: names, or names with what else matters.
        variant: what the graphs are variants of.

    Raises:
        PlanError, NoSites, ScaleMissing: see the lowerings.
    """
    choice = graphs if isinstance(graphs, GraphChoice) else GraphChoice(tuple(graphs), "float")
    found = {}
    for name in choice.names:
        dialect, kind = split_name(name)
        found[f"{variant}.{dialect}-{SHORT[kind]}"] = _lower(graph, plan, table, weights, choice, name)
    return found


def _lower(
    graph: Graph, plan: QuantPlan, table: ScaleTable, weights: Mapping[str, QuantizedWeight], choice: GraphChoice,
    name: str,
) -> Graph:
    from quantempo.export.float_types import to_half
    from quantempo.export.lower_fp8 import lower_fp8
    from quantempo.export.lower_ort import lower_ort
    from quantempo.export.lower_portable import lower_portable
    from quantempo.export.lower_variant import variant_table
    from quantempo.export.passes import GeluAsSigmoid, GroupNormToInstanceNorm
    from quantempo.export.passes.base import run_passes
    from quantempo.export.quantize_attention import quantize_attention
    from quantempo.export.unfold import UnfoldConvolutions

    lowerings = {"ort": lower_ort, "portable": lower_portable, "unfold": lower_portable, "fp8": lower_fp8}
    dialect, kind = split_name(name)
    plan = plan.for_graph(f"{dialect}-{SHORT[kind]}")
    lowered = lowerings[dialect](graph, plan, variant_table(table, plan), weights)
    if dialect == "unfold":
        run_passes(lowered, (UnfoldConvolutions(),))
    products = attention_products(name, choice.attention)
    if products is not None:
        quantize_attention(lowered, choice.ranges, "fp8" if dialect == "fp8" else "int8", products)
    if name == OPENVINO:
        run_passes(lowered, (GeluAsSigmoid(),))
    if choice.old_parser and dialect == "portable":
        GroupNormToInstanceNorm().apply(lowered)
    if kind != "float32":
        to_half(lowered, kind, choice.ranges)
    return lowered
