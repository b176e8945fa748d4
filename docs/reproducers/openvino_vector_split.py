"""OpenVINO: the parts of a quantized product of a vector cannot be taken.

A vector [32] is quantized, multiplied by an INT8 matrix [32, 64] and by a number that is an input; a bias is added,
and the sum [64] is split into two.  ONNX Runtime runs it.  OpenVINO takes the sum for [1, 64] and refuses the split.
Without quantization of the vector both run.  `Transformer2DModel` of VQ diffusion has such products: one timestep
serves all samples.

    python docs/reproducers/openvino_vector_split.py
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper


def graph(quantized: bool) -> onnx.ModelProto:
    """The vector, its product, and the two parts."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (32, 64)).astype(np.int8)
    constants = {
        "weight": weight, "weight_scale": np.linspace(0.01, 0.02, 64, dtype=np.float32),
        "scale": np.float32(0.02), "zero": np.int8(0), "sizes": np.array([32, 32], np.int64),
    }
    nodes = [helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["w"], axis=1)]
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        ]
    nodes += [
        helper.make_node("MatMul", ["d" if quantized else "x", "w"], ["product"]),
        helper.make_node("Mul", ["product", "factor"], ["grown"]),
        helper.make_node("Add", ["grown", "bias"], ["sum"]),
        helper.make_node("Split", ["sum", "sizes"], ["first", "second"], axis=0),
    ]
    shapes = {"x": [32], "factor": [], "bias": [64], "first": [32], "second": [32]}
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "vector_split", border[:3], border[3:], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def main() -> None:
    x = np.linspace(-1, 1, 32, dtype=np.float32)
    feeds = {"x": x, "factor": np.array(2, np.float32), "bias": np.ones(64, np.float32)}
    print(f"onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}")
    for quantized in (False, True):
        data = graph(quantized).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        wanted = session.run(None, feeds)
        core = openvino.Core()
        try:
            compiled = core.compile_model(core.read_model(data, b""), "CPU")
            found = compiled(feeds)
            error = max(float(np.abs(found[i] - wanted[i]).max()) for i in range(2))
            print(f"quantized {quantized}: runs, largest difference {error:.2g}")
        except RuntimeError as failure:
            print(f"quantized {quantized}: {' '.join(str(failure).split())[-220:]}")


if __name__ == "__main__":
    main()
