"""Graph variants for feature caching: `full` writes features, `reuse.k` reads them, `probe` serves decisions.

All variants are cut from one float graph and keep the names of its values, so that a quantization plan, its weights
and its scales fit each of them.  Around a feature, names are as follows; X is the value that is cached.

    full, feature         cache.0 = Identity(X)
    full, delta           cache.0 = X - before
    reuse, feature        X = cache.0                  with corrections: X = cache.0 · cache.0.gain + cache.0.bias
    reuse, delta          X = before + cache.0         likewise

What nothing reads after that is removed.  All variants take all inputs of the float graph, in its order, whether they
read them or not; features and vectors follow, then `scale_group` in quantized graphs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from quantempo.contracts.cache import (
    FULL,
    PROBE,
    Cut,
    DeltaCut,
    FeatureCut,
    Probe,
    SublayerCut,
    check_cut,
    correction_inputs,
    feature_name,
)
from quantempo.contracts.program import INDICATOR
from quantempo.export.cut_points import (
    Flow,
    branches,
    check_depth,
    is_within,
    modulated_input,
    refuse_cut,
    span,
    sublayers,
)
from quantempo.export.passes.edit import module_of, readers
from quantempo.export.passes.name_values import is_site
from quantempo.export.passes.remove_dead import RemoveDead
from quantempo.export.sites import SHAPERS

Correction = Literal["feature", "product"]


@dataclass(frozen=True)
class Feature:
    """What is cached under one name.

    Args:
        name: `cache.N`.
        tensor: the value of the float graph that reuse does not compute.
        before: for a delta, the value that it is added to.
        channels: how many; gain and bias have one number for each.
        axis: the channel axis of the feature.
        product: the value after the one product (and its bias) that consumes the feature through data movement alone;
            `None` where there is none or several.
        product_channels: of that value.
    """

    name: str
    tensor: str
    before: str | None
    channels: int
    axis: int
    product: str | None = None
    product_channels: int = 0


@dataclass(frozen=True, eq=False)
class VariantGraph:
    """One graph.

    Args:
        reads, writes: features by name.
        vectors: inputs that take a vector per call, float32 [channels].
    """

    name: str
    graph: ir.Model
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class VariantSet:
    """All variants of a model by name, and the features that they exchange."""

    variants: Mapping[str, VariantGraph]
    features: Mapping[str, Feature]

    def vectors(self) -> dict[str, tuple[str, ...]]:
        """Vector inputs by variant, as `cached_program` takes them."""
        return {name: variant.vectors for name, variant in self.variants.items()}


@dataclass(frozen=True)
class _Point:
    """Where a cut goes through: `before` as in `Feature`; `inner` is what must be gone afterwards."""

    tensor: str
    before: str | None = None
    inner: frozenset[str] = field(default=frozenset(), compare=False)


def cut_variants(
    model: ir.Model, cuts: Mapping[str, Cut], probe: Probe | None = None, corrections: Sequence[Correction] = ()
) -> VariantSet:
    """The variants of a float graph.

    Args:
        model: a graph in normal form; it is left as it is.
        cuts: by variant name; `full` writes the features of all of them.
        probe: what the variant `probe` computes; `None` for no such variant.
        corrections: which gains and biases the reuse graphs take: on the features, on the products that consume them.

    Raises:
        ExportError: a cut does not fit the graph, needs tensors that it does not cache, or saves nothing.
        DataError: a cut that fits no graph.
    """
    flow = Flow(model)
    points = {name: _points(model, flow, cut, f"cut {name!r}") for name, cut in cuts.items()}
    names: dict[_Point, str] = {}
    for found in points.values():
        for point in found:
            names.setdefault(point, feature_name(len(names)))
    features = {names[point]: _feature(flow, point, names[point]) for point in names}
    if "product" in corrections and not any(feature.product for feature in features.values()):
        raise refuse_cut(
            "corrections 'product'", "no product that reads a cached feature", "a feature that one product consumes",
            "the features pass a gate, a norm or an addition first", "leave this correction out",
        )
    variants = {FULL: _full(model, features)}
    for name, found in points.items():
        read = [features[names[point]] for point in found]
        variants[name] = _reuse(model, name, read, corrections)
        _check_reuse(model, variants[name], found)
    if probe is not None:
        variants[PROBE] = _probe(model, flow, probe)
    return VariantSet(variants, features)


def consumed(model: ir.Model, cut: Cut) -> bool:
    """Whether a correction of products has something to correct: one product alone reads a cached feature.

    Raises:
        ExportError: the cut does not fit the graph.
    """
    flow = Flow(model)
    return any(_feature(flow, point, feature_name(0)).product for point in _points(model, flow, cut, "cut"))


def branch_cut(model: ir.Model, index: int) -> FeatureCut:
    """The cut of a long-skip model at one of its branches.

    Args:
        model: a graph in normal form.
        index: 0 for the outermost branch, where reuse is cheapest and coarsest.

    Raises:
        ExportError: the model has no such branch.
    """
    found = branches(model)
    if not 0 <= index < len(found):
        raise refuse_cut(
            f"branch {index}", f"a model with {len(found)} long skips", f"0 to {len(found) - 1}" if found else "some",
            "another architecture, or a misspelling", "choose another branch, or a delta cut for a plain transformer",
        )
    return FeatureCut((found[index].deep,))


def sublayer_cut(model: ir.Model, blocks: str, depth: int, among: Collection[int]) -> SublayerCut:
    """The cut that reuses every attention and MLP layer of some blocks.

    Args:
        model: a graph in normal form.
        blocks: module path of the list of blocks.
        depth: how many there are.
        among: indices of the blocks.

    Raises:
        ExportError: a block without such layers.
    """
    flow = Flow(model)
    found = [len(sublayers(flow, blocks, index, f"cut of {blocks!r}")) for index in range(depth)]
    return SublayerCut(tuple((index in among,) * count for index, count in enumerate(found)), blocks)


def _points(model: ir.Model, flow: Flow, cut: Cut, what: str) -> tuple[_Point, ...]:
    check_cut(cut, what)
    if isinstance(cut, FeatureCut):
        skips = {branch.deep: branch.skip for branch in branches(model)}
        return tuple(_feature_point(flow, name, skips.get(name), what) for name in cut.tensors)
    check_depth(model, cut.blocks, cut.depth, what)
    if isinstance(cut, DeltaCut):
        ends = span(flow, cut.blocks, cut.first, cut.last, what)
        inner = flow.between(flow.values[ends.before], flow.values[ends.after])
        return (_Point(ends.after, ends.before, _names(inner)),)
    found = []
    for index, row in enumerate(cut.mask):
        layers = sublayers(flow, cut.blocks, index, what)
        if len(layers) != len(row):
            raise refuse_cut(
                f"{what}, block {index}", f"a mask for {len(row)} sublayers", f"{len(layers)}: {', '.join(layers)}",
                "the mask was learned for another model", "fit the cache plan anew for this model",
            )
        for (module, layer), reused in zip(layers.items(), row, strict=True):
            if reused:
                inner = {node for node in flow.hidden if is_within(node, module)}
                found.append(_Point(layer.after, None, _names(inner)))
    return tuple(found)


def _feature_point(flow: Flow, name: str, skip: str | None, what: str) -> _Point:
    value = flow.named(name, what)
    if not flow.is_hidden(value):
        raise refuse_cut(
            f"{what}, tensor {name!r}", "a value that does not depend on the sample", "a hidden value",
            "timestep and class embeddings are cheap, and each call has its own", "choose another tensor",
        )
    return _Point(name, None, _names(flow.between(flow.values[skip], value)) if skip is not None else frozenset())


def _names(nodes: set[ir.Node]) -> frozenset[str]:
    return frozenset(str(node.outputs[0].name) for node in nodes)


def _feature(flow: Flow, point: _Point, name: str) -> Feature:
    channels, axis = _channels(flow.named(point.tensor, f"feature {name!r}"), f"feature {name!r}")
    product = _consumer(flow.values[point.tensor]) if point.before is None else None
    if product is None:
        return Feature(name, point.tensor, point.before, channels, axis)
    width, _ = _channels(product, f"feature {name!r}")
    return Feature(name, point.tensor, point.before, channels, axis, str(product.name), width)


def _channels(value: ir.Value, what: str) -> tuple[int, int]:
    """(channels, channel axis): axis 1 of images and videos, the last one of token sequences."""
    rank = len(value.shape) if value.shape is not None else 0
    axis = 1 if rank > 3 else rank - 1
    size = value.shape[axis] if value.shape is not None and rank > 1 else None
    if not isinstance(size, int) or value.dtype != ir.DataType.FLOAT:
        raise refuse_cut(
            f"{what}, tensor {value.name!r}", f"type {value.dtype}, shape {value.shape}",
            "float32 with a known number of channels", "the exporter did not infer its shape", "choose another tensor",
        )
    return size, axis


def _consumer(value: ir.Value) -> ir.Value | None:
    """The result, bias included, of the one product that reads a value through data movement alone."""
    front, seen, found = [value], set[ir.Value](), list[ir.Node]()
    while front:
        here = front.pop()
        if here in seen:
            continue
        seen.add(here)
        for user in readers(here):
            if is_site(user):
                found.append(user)
            elif user.op_type in SHAPERS:
                front.extend(user.outputs)
    if len(found) != 1:
        return None
    result = found[0].outputs[0]
    adds = [user for user in readers(result) if user.op_type == "Add" and module_of(user) == module_of(found[0])]
    if len(adds) == 1 and len(readers(result)) == 1:
        result = adds[0].outputs[0]
    return None if result.is_graph_output() else result


def _full(model: ir.Model, features: Mapping[str, Feature]) -> VariantGraph:
    copy = model.clone()
    values = Flow(copy).values
    for feature in features.values():
        source = values[feature.tensor]
        terms = [source] if feature.before is None else [source, values[feature.before]]
        node = ir.node("Identity" if feature.before is None else "Sub", terms, name=feature.name)
        _describe(node.outputs[0], feature.name, source)
        copy.graph.append(node)
        copy.graph.outputs.append(node.outputs[0])
    return VariantGraph(FULL, copy, writes=tuple(features))


def _reuse(model: ir.Model, name: str, features: Sequence[Feature], corrections: Sequence[Correction]) -> VariantGraph:
    copy = model.clone()
    values = Flow(copy).values
    vectors: list[str] = []
    for feature in features:
        old = values[feature.tensor]
        producer = old.producer()
        assert producer is not None
        here = _Edit(copy.graph, producer)
        source = here.input(feature.name, old)
        if "feature" in corrections:
            source = here.affine(source, feature.name, feature.channels, feature.axis, "feature", vectors)
        if feature.before is None:
            new = here.node("Identity", [source], f"{feature.name}.read", old)
        else:
            new = here.node("Add", [values[feature.before], source], f"{feature.name}.added", old)
        _take_over(old, new)
    # All features are in place first: a product may read several.
    for feature in features:
        if "product" in corrections and feature.product is not None:
            _correct_product(copy, values[feature.product], feature, vectors)
    RemoveDead().apply(copy)
    return VariantGraph(name, copy, reads=tuple(f.name for f in features), vectors=tuple(vectors))


def _correct_product(model: ir.Model, result: ir.Value, feature: Feature, vectors: list[str]) -> None:
    """Gain and bias on a product's result; the corrected value takes its name, unless the lowering looks for it."""
    producer = result.producer()
    assert producer is not None
    users = readers(result)
    if is_site(producer) and any(is_site(user) and user.inputs[0] is result for user in users):
        raise refuse_cut(
            f"feature {feature.name!r}, product {result.name!r}", "another product that reads it as it is",
            "a bias or some operation between the two", "two linear layers in a row without bias",
            "leave the correction 'product' out",
        )
    here = _Edit(model.graph, producer, after=True)
    axis = 1 if result.shape is not None and len(result.shape) > 3 else -1
    uses = list(result.uses())
    new = here.affine(result, feature.name, feature.product_channels, axis, "product", vectors)
    for node, index in uses:
        node.replace_input_with(index, new)
    if not is_site(producer):
        name, result.name = result.name, f"{result.name}.uncorrected"
        new.name = name


class _Edit:
    """Inserts nodes at one place, in order."""

    def __init__(self, graph: ir.Graph, at: ir.Node, after: bool = False) -> None:
        self.graph, self.at, self.after = graph, at, after

    def node(self, op: str, inputs: Sequence[ir.Value], name: str, like: ir.Value | None) -> ir.Value:
        made = ir.node(op, list(inputs), name=name)
        made.metadata_props.update(self.at.metadata_props)
        _describe(made.outputs[0], name, like)
        if self.after:
            self.graph.insert_after(self.at, made)
            self.at = made
        else:
            self.graph.insert_before(self.at, made)
        return made.outputs[0]

    def input(self, name: str, like: ir.Value) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=like.shape)
        self.graph.inputs.append(value)
        return value

    def affine(
        self, value: ir.Value, feature: str, channels: int, axis: int, of: Correction, vectors: list[str]
    ) -> ir.Value:
        """`value · gain + bias` with new vector inputs."""
        for op, name in zip(("Mul", "Add"), correction_inputs(feature, of), strict=True):
            vector = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([channels]))
            self.graph.inputs.append(vector)
            vectors.append(name)
            row = self._row(vector, value, axis)
            value = self.node(op, [value, row], f"{name}.applied", value)
        return value

    def _row(self, vector: ir.Value, value: ir.Value, axis: int) -> ir.Value:
        """The vector in a shape that broadcasts along the channel axis."""
        rank = len(value.shape) if value.shape is not None else 0
        trailing = rank - 1 - axis % rank
        if not trailing:
            return vector
        name = f"cache.axes.{trailing}"
        axes = self.graph.initializers.get(name)
        if axes is None:
            tensor = ir.tensor(np.arange(1, trailing + 1, dtype=np.int64), name=name)
            axes = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([trailing]))
            self.graph.register_initializer(axes)
        row = self.node("Unsqueeze", [vector, axes], f"{vector.name}.row", None)
        row.type, row.shape = vector.type, ir.Shape([*(vector.shape or ()), *[1] * trailing])
        return row


def _describe(value: ir.Value, name: str, like: ir.Value | None) -> None:
    value.name = name
    if like is not None:
        value.type, value.shape = like.type, like.shape


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the place and the name of `old`."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}.not_computed"
    new.name = name


def _check_reuse(model: ir.Model, variant: VariantGraph, points: Sequence[_Point]) -> None:
    """Post-conditions of a cut, which are conditions on what the caller asked for."""
    graph = variant.graph.graph
    alive = {str(v.name): v for node in graph for v in node.outputs}
    for value in graph.inputs:
        if value.name in variant.reads and not value.uses():
            raise refuse_cut(
                f"cut {variant.name!r}, feature {value.name!r}", "a cached tensor that the reuse graph does not read",
                "features that are all needed", "it lies behind another tensor of the same cut", "leave it out",
            )
    fed = {point.tensor for point in points}
    for point in points:
        left = sorted((point.inner - fed) & set(alive))
        read = [name for name in left if any(str(u.outputs[0].name) not in left for u in readers(alive[name]))]
        if left:
            raise refuse_cut(
                f"cut {variant.name!r}, tensor {point.tensor!r}",
                f"a reuse graph that still needs {', '.join((read or left)[:3])}", "only cached tensors from in there",
                "a skip connection leads out of the part that is left out", "cache these tensors too, or cut elsewhere",
            )
    before, now = _products(model), _products(variant.graph)
    if now >= before:
        raise refuse_cut(
            f"cut {variant.name!r}", f"a reuse graph with all {before} products", "fewer than in the full graph",
            "everything before the cached tensors is needed elsewhere too", "cut elsewhere",
        )


def _products(model: ir.Model) -> int:
    return sum(node.op_type in ("MatMul", "Conv") for node in model.graph)


def _probe(model: ir.Model, flow: Flow, probe: Probe) -> VariantGraph:
    if probe.of == "first_block":
        ends = span(flow, probe.blocks, 0, 0, "probe")
        names = [ends.after, ends.before]
    else:
        name = modulated_input(flow, probe.blocks)
        if name is None:
            raise refuse_cut(
                f"probe, blocks {probe.blocks!r}", "no layer in block 0 that timestep or condition have a part in",
                "the module path of a list of blocks", "another architecture, or a misspelling",
                "choose a block list of this model, or a fixed schedule",
            )
        names = [name]
    copy = model.clone()
    values = Flow(copy).values
    sources = [values[name] for name in names]
    node = ir.node("Sub" if len(sources) > 1 else "Identity", sources, name=INDICATOR)
    _describe(node.outputs[0], INDICATOR, sources[0])
    copy.graph.append(node)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(node.outputs[0])
    RemoveDead().apply(copy)
    return VariantGraph(PROBE, copy)


def variant_of(name: str) -> str:
    """The variant in a graph's name, `reuse.0.ort-f32`."""
    return re.sub(r"\.[^.]+$", "", name)
