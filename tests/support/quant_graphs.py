"""Small float graphs in normal form with their sites, tables from min-max, and one-line ONNX Runtime calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from quantempo.contracts.partition import Partition
from quantempo.contracts.plan import Decision, Quantize, QuantPlan, Site
from quantempo.contracts.table import ScaleTable, TensorScales

Feeds = Mapping[str, np.ndarray]


class GraphMaker:
    """Writes a graph node by node and notes the sites."""

    def __init__(self, inputs: Mapping[str, Sequence[int | str]], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.sites: list[Site] = []
        self.initializers: list[ir.Value] = []
        self.result: ir.Value | None = None
        self.inputs = {
            name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
            for name, shape in inputs.items()
        }

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.initializers.append(value)
        return value

    def op(self, op_type: str, inputs: Sequence[ir.Value], output: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, outputs=[ir.Value(name=output)])
        self.nodes.append(node)
        return node.outputs[0]

    def matmul(self, x: ir.Value, k: int, n: int, module: str, *, rank: int = 3, bias: bool = True) -> ir.Value:
        weight = (self.rng.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
        product = self.op("MatMul", [x, self.constant(f"{module}.weight", weight)], f"{module}.product")
        self._site("matmul", x, product, module, k, n, rank)
        if not bias:
            return product
        row = self.rng.standard_normal(n).astype(np.float32)
        return self.op("Add", [product, self.constant(f"{module}.bias", row)], f"{module}.out")

    def conv(
        self, x: ir.Value, c: int, n: int, module: str, *, stride: int = 1, group: int = 1, size: int = 3
    ) -> ir.Value:
        shape = (n, c // group, size, size)
        k = int(np.prod(shape[1:]))
        weight = (self.rng.standard_normal(shape) / np.sqrt(k)).astype(np.float32)
        pad = size // 2
        product = self.op(
            "Conv", [x, self.constant(f"{module}.weight", weight)], f"{module}.product",
            pads=[pad] * 4, strides=[stride, stride], group=group,
        )
        self._site("conv", x, product, module, k, n, 4)
        bias = self.rng.standard_normal((1, n, 1, 1)).astype(np.float32)
        return self.op("Add", [product, self.constant(f"{module}.bias", bias)], f"{module}.out")

    def _site(self, op: Any, x: ir.Value, y: ir.Value, module: str, k: int, n: int, rank: int) -> None:
        self.sites.append(Site(module, "full", op, str(x.name), str(y.name), f"{module}.weight", module, k, n, rank))

    def model(self, *outputs: ir.Value) -> ir.Model:
        """The graph, with inferred shapes; the maker must not be used further."""
        for value in outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            list(self.inputs.values()), list(outputs), nodes=self.nodes, initializers=self.initializers, name="toy",
            opset_imports={"": 21},
        )
        return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(ir.Model(graph, ir_version=10))))

    def plan(self, decision: Decision | None = None, **by_site: Decision) -> QuantPlan:
        sites = tuple(sorted(self.sites, key=lambda site: site.id))
        default = decision if decision is not None else Quantize()
        return QuantPlan("toy", sites, {s.id: by_site.get(s.id, default) for s in sites})


def run(model: ir.Model, feeds: Feeds, outputs: Sequence[str] = (), *, optimize: bool = True) -> list[np.ndarray]:
    """Evaluate with ONNX Runtime; `outputs` may name inner values; an unknown feed is an error."""
    session = open_session(model, outputs, optimize=optimize)
    return session.run(None, dict(feeds))


def open_session(
    model: ir.Model, outputs: Sequence[str] = (), *, optimize: bool = True, save: Path | None = None
) -> ort.InferenceSession:
    copy = model.clone()
    if outputs:
        values = {v.name: v for node in copy.graph for v in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(ir.to_proto(copy).SerializeToString(), options, ["CPUExecutionProvider"])


def optimized(model: ir.Model, folder: Path) -> ir.Model:
    """The graph that ONNX Runtime really runs."""
    open_session(model, save=folder / "optimized.onnx")
    return ir.load(folder / "optimized.onnx")


def count(model: ir.Model) -> Counter[str]:
    """Number of nodes by operator."""
    return Counter(node.op_type for node in model.graph)


def tap(model: ir.Model, feeds: Feeds, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of inputs and inner tensors by name."""
    inner = [name for name in names if name not in feeds]
    values = run(model, feeds, inner) if inner else []
    return {**{n: feeds[n] for n in names if n in feeds}, **dict(zip(inner, values, strict=True))}


def min_max_table(model: ir.Model, plan: QuantPlan, groups: Sequence[Feeds], bits: int = 8) -> ScaleTable:
    """Scales from the extremes of one run per group."""
    runs = [tap(model, feeds, plan.scaled_tensors()) for feeds in groups]
    top = 2**bits - 1
    tensors = {}
    for name in plan.scaled_tensors():
        low = np.array([min(0.0, r[name].min()) for r in runs])
        high = np.array([max(0.0, r[name].max()) for r in runs])
        scale = ((high - low) / top).astype(np.float32)
        point = np.clip(np.rint(-low / scale), 0, top).astype(np.int32)
        symmetric = (np.maximum(high, -low) / (top // 2)).astype(np.float32)
        tensors[name] = TensorScales(scale, point, symmetric)
    edges = tuple(float(i + 1) for i in range(len(groups) - 1))
    return ScaleTable(Partition(edges, 0.0, float(len(groups))), tensors)


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise in decibels."""
    noise = np.square(reference.astype(np.float64) - other).mean()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).mean() / noise))
