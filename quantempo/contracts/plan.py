"""Places that can be quantized, and what is decided for each of them, before any graph is edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Union

PLAN_VERSION = 1


@dataclass(frozen=True)
class Site:
    """One matrix product or convolution with a constant weight, in a float graph.

    Args:
        id: unique; the module path, with `#2` and so on where a module holds several.
        graph: the graph variant that it was found in.
        op: `matmul` (MatMul, weight `[k, n]`) or `conv` (Conv, weight `[n, k / group, ...]`).
        tensor: the activation's value name; sites that read one tensor share its scale.
        output: the value name of the product before any bias.
        weight: the initializer's name.
        module: module path, e.g. `transformer_blocks.0.attn1.to_q`.
        k: reduction length (for a convolution: input channels per group times kernel area).
        n: output channels.
        rank: rank of the activation.
    """

    id: str
    graph: str
    op: Literal["matmul", "conv"]
    tensor: str
    output: str
    weight: str
    module: str
    k: int
    n: int
    rank: int


@dataclass(frozen=True)
class Quantize:
    """Compute in integers: activation `activation_bits` per tensor and group, weight `weight_bits` per output channel.

    `symmetric` fixes the zero point to the middle of the range (needed for convolutions in the portable dialect, whose
    padding must stay exact).  Fewer than 8 bits are simulated in 8-bit storage.
    """

    kind: ClassVar[str] = "quantize"
    symmetric: bool = False
    activation_bits: int = 8
    weight_bits: int = 8


@dataclass(frozen=True)
class Share:
    """Quantize, with the activation scale and settings of another site that reads the same tensor."""

    kind: ClassVar[str] = "share"
    site: str


@dataclass(frozen=True)
class Keep:
    """Compute in float; the weight may still be stored as INT8 and dequantized when the graph is loaded."""

    kind: ClassVar[str] = "keep"
    reason: str
    weight_storage: Literal["float32", "int8"] = "float32"


Decision = Union[Quantize, Share, Keep]


@dataclass(frozen=True)
class Rule:
    """A change to the default plan for the sites that a pattern matches; a later rule wins over an earlier one.

    Args:
        match: fnmatch pattern, case-sensitive, for the whole module path or site id.
        action: `quantize` although a default rule keeps the site, `keep` it in float, or change nothing (empty).
        activation_bits, weight_bits: of the site where it is quantized; 0 changes nothing.
        reason: for `keep`, what the plan says.
    """

    match: str
    action: Literal["", "keep", "quantize"] = ""
    activation_bits: int = 0
    weight_bits: int = 0
    reason: str = ""


@dataclass(frozen=True)
class QuantPlan:
    """A decision for every site of a model.

    Args:
        model: digest of the float graph that the sites were found in.
        sites: all of them, sorted by id.
        decisions: by site id.
        centred: tensors whose channels are shifted per group before they are quantized, by an exact rewrite.
        dialects: what the graphs of a dialect, or of one kind (`DIALECT-TYPE`), keep in float on top, by site id: the
            devices that read them lack something, or the latency guard saw the sites lose on the engine that does.
    """

    model: str
    sites: tuple[Site, ...]
    decisions: Mapping[str, Decision]
    centred: tuple[str, ...] = ()
    dialects: Mapping[str, Mapping[str, Keep]] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def settings(self, site: Site) -> Quantize | None:
        """The quantizer settings of a site, through `Share`; `None` where it is kept."""
        decision = self.decisions[site.id]
        if isinstance(decision, Share):
            decision = self.decisions[decision.site]
        return decision if isinstance(decision, Quantize) else None

    def quantized(self) -> tuple[Site, ...]:
        """The sites that compute in integers."""
        return tuple(site for site in self.sites if self.settings(site) is not None)

    def kept(self) -> tuple[Site, ...]:
        """The sites that compute in float."""
        return tuple(site for site in self.sites if self.settings(site) is None)

    def keeping(self, kept: Mapping[str, Keep]) -> QuantPlan:
        """The plan with some more sites in float.

        Where the site that owned a scale goes, the first of those that shared it becomes the owner.
        """
        decisions: dict[str, Decision] = {**self.decisions, **{name: kept[name] for name in kept}}
        heirs: dict[str, str] = {}
        for site in self.sites:
            decision = self.decisions[site.id]
            if site.id not in kept and isinstance(decision, Share) and decision.site in kept:
                heir = heirs.setdefault(decision.site, site.id)
                decisions[site.id] = self.decisions[decision.site] if heir == site.id else Share(heir)
        plan = replace(self, decisions=decisions)
        scaled = set(plan.scaled_tensors())
        return replace(plan, centred=tuple(name for name in self.centred if name in scaled))

    def for_graph(self, kind: str) -> QuantPlan:
        """The plan that a graph follows.

        Args:
            kind: `DIALECT-TYPE`, or a dialect.
        """
        kept = {**self.dialects.get(kind.partition("-")[0], {}), **self.dialects.get(kind, {})}
        quantized = {site.id for site in self.quantized()}
        plan = replace(self, dialects={})
        return plan.keeping({name: decision for name, decision in kept.items() if name in quantized})

    def scaled_tensors(self) -> tuple[str, ...]:
        """Tensors that need scales: inputs of quantized sites, and outputs of quantized convolutions; sorted."""
        names = set()
        for site in self.quantized():
            names.add(site.tensor)
            if site.op == "conv":
                names.add(site.output)
        return tuple(sorted(names))
