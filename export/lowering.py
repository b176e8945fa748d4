"""What the two lowerings share: finding a plan's sites in a graph, editing it, and the conditions that hold afterwards.

A lowering takes a float graph in normal form: a site is `MatMul(x, W)` with `W` a float32 initializer `[k, n]`, or
`Conv(x, W)` without bias; the bias follows as `Add(y, b)`.  It works on a copy, and it keeps the names of all float
values, so that a tensor can be compared between the float and the quantized graph by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Site
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import ExportError, NoSites, PlanError, ScaleMissing
from quantempo.export.centring import apply_centres, bias_per_group
from quantempo.export.weights import (
    FP8_VALUES,
    SCALE,
    VALUES,
    QuantizedWeight,
    output_axis,
    quantize_weights,
    weight_of,
    weight_tensor,
)

GROUP_INPUT = "scale_group"
"""Name of the graph input that chooses the row of every scale table; int64, shape `()`."""

CONTRIB = "com.microsoft"
OPERATOR = {"matmul": "MatMul", "conv": "Conv"}


@dataclass(frozen=True)
class LoweringOptions:
    """How to lower, beyond what the plan says.

    Args:
        quantization: `False` makes all rewrites but leaves the quantizers out: the result must equal the float graph.
            It is how the rewrites are tested.
        group: bake the scales of this group into the graph as constants (there is then no `scale_group` input); for
            measuring what the table look-up costs.
    """

    quantization: bool = True
    group: int | None = None


@dataclass(frozen=True, order=True)
class ActivationKey:
    """One quantizer of one tensor: sites that agree on all three share it."""

    tensor: str
    symmetric: bool
    bits: int


@dataclass(frozen=True, eq=False)
class PlacedSite:
    """A site found in the graph.

    Args:
        node: the product.
        bias: its bias, an initializer; `None` without.
        result: the value after the bias, or the product itself.
    """

    site: Site
    settings: Quantize
    node: ir.Node
    bias: ir.Value | None
    result: ir.Value

    @property
    def activation(self) -> ir.Value:
        """The activation that the site reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value


@dataclass(eq=False)
class Lowering:
    """A graph while it is lowered.

    Args:
        model: the copy that is edited.
        places: quantized sites in graph order.
        weights: INT8 weights by initializer name.
        moved: centres that a site's bias has to take off, by the site's output: its result is itself centred.
    """

    model: ir.Model
    plan: QuantPlan
    table: ScaleTable
    weights: Mapping[str, QuantizedWeight]
    options: LoweringOptions
    places: tuple[PlacedSite, ...] = ()
    moved: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _group: ir.Value | None = None
    _constants: dict[str, ir.Value] = field(default_factory=dict)
    _consumed: set[str] = field(default_factory=set)
    _head: ir.Node | None = None

    @staticmethod
    def start(
        model: ir.Model,
        plan: QuantPlan,
        table: ScaleTable,
        weights: Mapping[str, QuantizedWeight],
        options: LoweringOptions,
    ) -> Lowering:
        """Copy the graph, find the sites and check that plan, table and graph belong together.

        Raises:
            NoSites: nothing would be quantized.
            ScaleMissing: the table lacks a tensor, or holds one that the plan does not use.
            PlanError: a site is not in the graph as the plan describes it.
        """
        if not plan.quantized():
            raise NoSites(
                "quantization plan",
                found=f"{len(plan.sites)} sites, none of them quantized",
                wanted="at least one quantized site",
                cause="the keep rules cover every site, or the model has no matrix product with a constant weight",
                remedy="loosen the keep rules, or compile with float32",
            )
        _check_table(plan, table)
        if options.group is not None and not 0 <= options.group < table.partition.groups:
            raise PlanError(
                "lowering option group", found=str(options.group), wanted=f"0 to {table.partition.groups - 1}",
                cause="the table has fewer groups", remedy="choose a group of the partition",
            )
        lowering = Lowering(model.clone(), plan, table, weights, options)
        lowering._place()
        if options.group is None:
            lowering._group = ir.Value(
                name=GROUP_INPUT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])
            )
            lowering.graph.inputs.append(lowering._group)
        apply_centres(lowering)
        return lowering

    @property
    def graph(self) -> ir.Graph:
        """The graph that is edited."""
        return self.model.graph

    def _place(self) -> None:
        nodes = list(self.graph)
        order = {node: index for index, node in enumerate(nodes)}
        by_output = {value.name: node for node in nodes for value in node.outputs}
        places = []
        for site in self.plan.quantized():
            settings = self.plan.settings(site)
            assert settings is not None
            node = _site_node(by_output.get(site.output), site)
            weight_tensor(self.model, site)
            if self.options.quantization and site.weight not in self.weights:
                raise PlanError(
                    f"site {site.id!r}", found=f"no INT8 weight {site.weight!r}", wanted="one for each quantized site",
                    cause="the weights were quantized for another plan", remedy="quantize the weights with this plan",
                )
            bias, result = _bias_of(node, site)
            places.append(PlacedSite(site, settings, node, bias, result))
        self.places = tuple(sorted(places, key=lambda place: order[place.node]))

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """An initializer; the same name twice gives the same one."""
        if name not in self._constants:
            tensor = ir.tensor(np.asarray(array), name=name)
            value = ir.Value(name=name, const_value=tensor)
            describe(value, tensor.dtype, ir.Shape(tensor.shape.numpy()))
            self.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]

    def node(
        self,
        before: ir.Node | None,
        operator: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        **attributes: int,
    ) -> ir.Value:
        """Insert a node with one output and return that output.

        Args:
            before: the node that it is put ahead of; `None` for the head of the graph.
            operator: operator, with the domain before `::` where it is not ONNX's own.
            inputs: may hold `None` for optional inputs.
            output: name of the output.
            attributes: integers.
        """
        return self.nodes(before, operator, inputs, (output,), **attributes)[0]

    def nodes(
        self,
        before: ir.Node | None,
        operator: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        **attributes: int,
    ) -> tuple[ir.Value, ...]:
        """Like `node`, for any number of outputs."""
        domain, _, op_type = operator.rpartition("::")
        made = ir.Node(
            domain, op_type, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()],
            outputs=[ir.Value(name=name) for name in outputs], name=f"{outputs[0]}/{op_type}",
        )
        if before is not None:
            self.graph.insert_before(before, made)
            return tuple(made.outputs)
        # Nodes at the head stay in the order in which they were made.
        if self._head is None:
            self.graph.insert_before(self.graph[0], made)
        else:
            self.graph.insert_after(self._head, made)
        self._head = made
        return tuple(made.outputs)

    def lookup(self, name: str, per_group: NDArray[Any]) -> ir.Value:
        """The current group's row of a table whose first axis is the group; made once per name."""
        key = f"{name}.now"
        if key not in self._constants:
            if self.options.group is not None:
                return self.constant(name, per_group[self.options.group])
            table = self.constant(f"{name}.table", per_group)
            self._constants[key] = self.node(None, "Gather", [table, self._group], name, axis=0)
            describe(self._constants[key], table.dtype, ir.Shape(per_group.shape[1:]))
        return self._constants[key]

    def scales(self, key: ActivationKey) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Scale and zero point per group of one quantizer."""
        self._consumed.add(key.tensor)
        return self.table.of(key.tensor).pick(key.symmetric, key.bits)

    def tensor_scales(self, tensor: str) -> TensorScales:
        """All scales of a tensor."""
        self._consumed.add(tensor)
        return self.table.of(tensor)

    def bias_rows(self, place: PlacedSite) -> NDArray[np.float64] | None:
        """The bias of a site per group, `[groups, n]`; `None` where neither its input nor its result is centred."""
        centre, own = self.table.of(place.site.tensor).centre, self.moved.get(place.site.output)
        if centre is None and own is None:
            return None
        stored = place.bias.const_value if place.bias is not None else None
        bias = None if stored is None else stored.numpy()
        if centre is None:
            rows = np.zeros((1, place.site.n)) if bias is None else bias.reshape(1, -1).astype(np.float64)
        else:
            rows = bias_per_group(centre, weight_of(self.model, place.site), bias)
        return rows if own is None else rows - own

    def replace(self, place: PlacedSite, new: ir.Value, *, bias_included: bool) -> None:
        """Let `new` take the place and the name of the site's result, and remove what computed it before."""
        old = place.result if bias_included else place.node.outputs[0]
        add = old.producer()
        describe(new, old.dtype, old.shape)
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        stale = [add] if add is place.node or add is None else [add, place.node]
        self.graph.remove([node for node in stale if node is not None], safe=True)
        old.name = None
        new.name = name

    def finish(self, dialect: str, unused: Iterable[str] = ()) -> ir.Model:
        """Store what is kept as INT8, drop float weights that nothing reads any more, and check the result.

        Args:
            dialect: written into the model's metadata.
            unused: tensors whose scales this dialect has no use for.
        """
        if self.options.quantization:
            self._store_kept(dialect)
        for place in self.places:
            for name in (place.site.weight, place.bias.name if place.bias is not None else None):
                value = self.graph.initializers.get(name) if name is not None else None
                if value is not None and not value.uses() and not value.is_graph_output():
                    del self.graph.initializers[value.name or ""]
        self._check(set(unused))
        self.model.metadata_props["quantempo.dialect"] = dialect
        return self.model

    def _store_kept(self, dialect: str) -> None:
        """Kept sites with INT8 storage: the float weight becomes a constant expression over INT8 values."""
        for site in self.plan.kept():
            decision = self.plan.decisions[site.id]
            value = self.graph.initializers.get(site.weight)
            if not isinstance(decision, Keep) or decision.weight_storage != "int8" or value is None:
                continue
            # Kept sites are few: a search through the consumers is cheap.
            users = [(node, index) for node, index in value.uses() if node.outputs[0].name == site.output]
            for node, index in users:
                node.replace_input_with(index, self._dequantized(site, node, dialect))
            if not value.uses():
                del self.graph.initializers[site.weight]

    def _dequantized(self, site: Site, before: ir.Node, dialect: str) -> ir.Value:
        weight, scale = self.weight_constants(site)
        key = f"{site.weight}.kept"
        if key not in self._constants:
            if dialect == "ort":
                # ONNX Runtime turns a lone DequantizeLinear on a weight into MatMulNBits, which rounds the activations
                # to INT8.  Cast and Mul compute the same product and are folded into a float constant at load time.
                shape = [1] * self.weights[site.weight].values.ndim
                shape[output_axis(site)] = -1
                factor = self.constant(f"{site.weight}.scale.kept", self.weights[site.weight].scale.reshape(shape))
                real = self.node(before, "Cast", [weight], f"{site.weight}.cast", to=int(ir.DataType.FLOAT))
                self._constants[key] = self.node(before, "Mul", [real, factor], f"{site.weight}.dequantized")
            else:
                self._constants[key] = self.node(
                    before, "DequantizeLinear", [weight, scale], f"{site.weight}.dequantized", axis=output_axis(site)
                )
        return self._constants[key]

    def weight_constants(self, site: Site) -> tuple[ir.Value, ir.Value]:
        """Values and scale of a site's quantized weight, as initializers."""
        weight = self.weights[site.weight]
        return (
            self.constant(f"{site.weight}{VALUES if weight.values.dtype == np.int8 else FP8_VALUES}", weight.values),
            self.constant(f"{site.weight}{SCALE}", weight.scale),
        )

    def _check(self, unused: set[str]) -> None:
        """Post-conditions."""
        left = {place.site.weight for place in self.places} & set(self.graph.initializers)
        kept = {site.weight for site in self.plan.kept()}
        tied = {name for name in left if self.graph.initializers[name].uses()}
        if self.options.quantization and left - kept - tied:
            raise _broken("float weights of quantized sites", ", ".join(sorted(left - kept - tied)), "none of them")
        if self.options.quantization:
            found, wanted = sum(map(_is_integer_product, self.graph)), len(self.places)
            if found != wanted:
                raise _broken("integer products", str(found), f"{wanted}, one per quantized site")
        missed = set(self.table.tensors) - self._consumed - unused
        if self.options.quantization and missed:
            raise _broken("scales", f"unused scales of {', '.join(sorted(missed))}", "every scale used")


class Lower(Protocol):
    """How every dialect is lowered."""

    def __call__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        table: ScaleTable,
        weights: Mapping[str, QuantizedWeight] | None = None,
        options: LoweringOptions | None = None,
    ) -> ir.Model:
        """The quantized graph.

        Args:
            model: float graph in normal form; it is left as it is.
            plan: what to quantize.
            table: scales of exactly the plan's tensors.
            weights: of the plan's sites, in the dialect's number format; computed here where absent.  Pass them to
                share the bytes with another dialect.
            options: see there.

        Returns:
            A new model with the further input `scale_group` (int64, shape `()`).

        Raises:
            NoSites: the plan quantizes nothing.
            ScaleMissing: table and plan name different tensors.
            PlanError: the plan does not fit the graph, or asks for bits that the dialect does not have.
        """


Quantizer = Callable[[ir.Model, QuantPlan], Mapping[str, QuantizedWeight]]


def dialect(quantize: Quantizer = quantize_weights) -> Callable[[Callable[[Lowering], ir.Model]], Lower]:
    """Makes a `Lower` of a function that edits a graph whose sites are found.

    Args:
        quantize: makes the dialect's weights.
    """

    def decorate(edit: Callable[[Lowering], ir.Model]) -> Lower:
        @wraps(edit)
        def lower(
            model: ir.Model,
            plan: QuantPlan,
            table: ScaleTable,
            weights: Mapping[str, QuantizedWeight] | None = None,
            options: LoweringOptions | None = None,
        ) -> ir.Model:
            options = options or LoweringOptions()
            if weights is None:
                weights = quantize(model, plan) if options.quantization and plan.quantized() else {}
            return edit(Lowering.start(model, plan, table, weights, options))

        return lower

    return decorate


def describe(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    """Give a value an element type and a shape, where known."""
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    value.shape = shape


def _is_integer_product(node: ir.Node) -> bool:
    """Whether a node is a product of two quantized operands, in either dialect."""
    if node.op_type in ("MatMulIntegerToFloat", "QLinearConv"):
        return True
    if node.op_type not in OPERATOR.values():
        return False
    producers = [value.producer() if value is not None else None for value in node.inputs]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _broken(where: str, found: str, wanted: str) -> ExportError:
    return ExportError(
        f"lowered graph, {where}", found=found, wanted=wanted, cause="a mistake in the lowering",
        remedy="report this with the plan",
    )


def _check_table(plan: QuantPlan, table: ScaleTable) -> None:
    wanted, produced = set(plan.scaled_tensors()), set(table.tensors)
    for tensor in sorted(wanted):
        table.of(tensor)
    if produced - wanted:
        raise ScaleMissing(
            "scale table",
            found=f"scales that no quantized site reads: {', '.join(sorted(produced - wanted))}",
            wanted="exactly the tensors of the plan",
            cause="the plan was changed after the scales were computed",
            remedy="compute the scales anew from the same statistics",
        )
    centred = {name for name, scales in table.tensors.items() if scales.centre is not None}
    if centred != set(plan.centred):
        raise ScaleMissing(
            "scale table", found=f"centres of {len(centred)} tensors",
            wanted=f"those of the {len(plan.centred)} tensors that the plan centres",
            cause="the plan was changed after the scales were computed",
            remedy="compute the scales anew from the same statistics",
        )


def _site_node(node: ir.Node | None, site: Site) -> ir.Node:
    """The product of a site; raises where the graph differs from the plan."""
    if node is not None:
        names = [value.name if value is not None else None for value in node.inputs]
        if node.op_type == OPERATOR[site.op] and names == [site.tensor, site.weight]:
            return node
        found = f"{node.op_type}({', '.join(str(name) for name in names)})"
    else:
        found = "no node with that output"
    raise PlanError(
        f"site {site.id!r}, output {site.output!r}",
        found=found,
        wanted=f"{OPERATOR[site.op]}({site.tensor}, {site.weight})",
        cause="the plan belongs to another graph, or the graph is not in normal form",
        remedy="make the plan anew for this model",
    )


def _bias_of(node: ir.Node, site: Site) -> tuple[ir.Value | None, ir.Value]:
    """The bias that follows a product, and the value after it; `(None, product)` without."""
    product = node.outputs[0]
    uses = list(product.uses())
    if product.is_graph_output() or len(uses) != 1 or uses[0][0].op_type != "Add":
        return None, product
    add = uses[0][0]
    other = next((value for value in add.inputs if value is not product), None)
    if other is None or other.name is None or other.name not in node.graph.initializers:  # type: ignore[union-attr]
        return None, product
    tensor = other.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None, product
    shape = list(tensor.shape.numpy())
    channel = shape[-1:] if site.op == "matmul" else shape[1:2]
    # A bias of a higher rank than the product would change the result's rank.
    if channel != [site.n] or int(np.prod(shape)) != site.n or len(shape) > site.rank:
        return None, product
    return other, add.outputs[0]
