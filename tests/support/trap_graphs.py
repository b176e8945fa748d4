"""Small QDQ graphs written node by node: one that every engine fuses, and others with a trap planted in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, K, N = 64, 64, 128
FORMATS = ("int8", "fp8")


class TrapMaker:
    """A graph in the making; its input `x` is float32 `[2, ROWS, K]`."""

    def __init__(self, kind: str = "int8") -> None:
        self.kind, self.nodes, self.stored = kind, [], []  # type: ignore[var-annotated]
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, array: np.ndarray) -> str:
        if array.dtype == ml_dtypes.float8_e4m3fn:
            kind = TensorProto.FLOAT8E4M3FN
            self.stored.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        else:
            self.stored.append(numpy_helper.from_array(array, name))
        return name

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def op(self, kind: str, inputs: list[str], output: str, **attributes: int) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes))
        return output

    def quantized(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.int8 if self.kind == "int8" else ml_dtypes.float8_e4m3fn)

    def quantizer(self, value: str, name: str, scale: str | None = None) -> str:
        """QuantizeLinear and DequantizeLinear."""
        scale = scale or self.number(f"{name}.scale", 0.02)
        zero = self.constant(f"{name}.zero", self.quantized(np.zeros(())))
        integers = self.op("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
        return self.op("DequantizeLinear", [integers, scale, zero], f"{name}.dequantized")

    def weight(self, name: str = "a") -> str:
        values = self.constant(f"{name}.weight", self.quantized(self.rng.integers(-100, 100, (K, N))))
        scale = self.constant(f"{name}.weight_scale", np.full(N, 0.01, np.float32))
        return self.op("DequantizeLinear", [values, scale], f"{name}.weight.dequantized", axis=1)

    def product(self, value: str, name: str = "a") -> str:
        return self.op("MatMul", [value, self.weight(name)], f"{name}.out")

    def model(self, output: str, group: bool = False) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, ROWS, K])]
        if group:
            inputs.append(helper.make_tensor_value_info("scale_group", TensorProto.INT64, []))
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [2, ROWS, N])]
        graph = helper.make_graph(self.nodes, "trap", inputs, outputs, self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sound(kind: str) -> onnx.ModelProto:
    """No trap."""
    maker = TrapMaker(kind)
    product = maker.product(maker.quantizer("x", "x"))
    return maker.model(maker.op("Add", [product, maker.constant("bias", np.ones((1, 1, N), np.float32))], "y"))


def runtime_scale(kind: str) -> onnx.ModelProto:
    """The scale of a quantizer and of its dequantizer comes out of a table."""
    maker = TrapMaker(kind)
    table = maker.constant("table", np.array([0.01, 0.02], np.float32))
    scale = maker.op("Gather", [table, "scale_group"], "scale", axis=0)
    return maker.model(maker.product(maker.quantizer("x", "x", scale)), group=True)


def before_nonlinearity(kind: str) -> onnx.ModelProto:
    """The quantizer stands in front of SiLU instead of behind it."""
    maker = TrapMaker(kind)
    value = maker.quantizer("x", "x")
    silu = maker.op("Mul", [value, maker.op("Sigmoid", [value], "sigmoid")], "silu")
    return maker.model(maker.product(silu))


def integer_bias(kind: str) -> onnx.ModelProto:
    """A bias stored as INT32 with a dequantizer."""
    maker = TrapMaker(kind)
    product = maker.product(maker.quantizer("x", "x"))
    stored = maker.constant("bias.int32", np.ones((1, 1, N), np.int32))
    bias = maker.op("DequantizeLinear", [stored, maker.number("bias.scale", 0.01)], "bias")
    return maker.model(maker.op("Add", [product, bias], "y"))


def scale_between(kind: str) -> onnx.ModelProto:
    """A constant factor stands between dequantizer and product."""
    maker = TrapMaker(kind)
    value = maker.op("Mul", [maker.quantizer("x", "x"), maker.number("factor", 3.0)], "scaled")
    return maker.model(maker.product(value))


def group_scale_between(kind: str) -> onnx.ModelProto:
    """A factor per group stands between dequantizer and product."""
    maker = TrapMaker(kind)
    table = maker.constant("table", np.array([1.0, 2.0], np.float32))
    factor = maker.op("Gather", [table, "scale_group"], "factor", axis=0)
    value = maker.op("Mul", [maker.quantizer("x", "x"), factor], "scaled")
    return maker.model(maker.product(value), group=True)


def weight_only(kind: str) -> onnx.ModelProto:
    """A weight that is only stored in the narrow format, by intent."""
    maker = TrapMaker(kind)
    return maker.model(maker.product("x"))


TRAPS: dict[str, Callable[[str], onnx.ModelProto]] = {
    trap.__name__: trap
    for trap in (runtime_scale, before_nonlinearity, integer_bias, scale_between, group_scale_between)
}


def save(model: onnx.ModelProto, folder: Path) -> Path:
    """The graph's file."""
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return path
