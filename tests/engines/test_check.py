"""Each rule finds the pattern that it is for, and leaves the pattern's healthy twin alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from support.quant_graphs import GraphMaker, min_max_table

from quantempo.contracts.plan import Quantize
from quantempo.engines.check import RULES, check_graph, check_structure, refusals, summary
from quantempo.engines.cpu import parse_cpu
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.rules import Finding
from quantempo.engines.targets import target, targets
from quantempo.errors import EngineError
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import lower_portable
from quantempo.export.unfold import UnfoldConvolutions

GPUS = [name for name in targets() if name not in ("cpu", "openvino")]
CPU_WITH_VNNI = parse_cpu("flags : avx2 avx512f avx512_vnni", "x86_64")
CPU_WITHOUT_VNNI = parse_cpu("flags : avx2 avx512f", "x86_64")


@dataclass
class Net:
    """A graph of one quantized MatMul, [2, 5, 32] by [32, 48], whose parts can be changed."""

    folder: Path
    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: dict[str, tuple[int, Sequence[Any]]] = field(default_factory=lambda: {"x": (TensorProto.FLOAT, [2, 5, 32])})
    infer: bool = True

    def op(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        node = helper.make_node(kind, list(inputs), [output], name=f"{output}/{kind}", domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray, kind: int | None = None) -> str:
        if kind is None:
            tensor = onnx.numpy_helper.from_array(np.asarray(array), name)
        else:
            tensor = helper.make_tensor(name, kind, np.shape(array), np.ravel(array).tolist())
        self.constants.append(tensor)
        return name

    def quantized(
        self, x: str, name: str = "xq", scale: Any = 0.02, zero: Any = 0, kind: int | None = None, **attributes: Any
    ) -> str:
        scale = np.float32(scale) if isinstance(scale, float) else scale
        zero = np.int8(zero) if isinstance(zero, int) else zero
        step = scale if isinstance(scale, str) else self.constant(f"{name}.scale", scale)
        point = zero if isinstance(zero, str) else self.constant(f"{name}.zero", zero, kind)
        self.op("QuantizeLinear", [x, step, point], f"{name}.q", **attributes)
        return self.op("DequantizeLinear", [f"{name}.q", step, point], name, **attributes)

    def weight(
        self, name: str = "w", k: int = 32, n: int = 48, axis: int = 1, values: np.ndarray | None = None
    ) -> str:
        stored = values if values is not None else np.full((k, n), 3, np.int8)
        self.constant(f"{name}.int8", stored)
        self.constant(f"{name}.scale", np.full(stored.shape[axis], 0.01, np.float32))
        return self.op("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], name, axis=axis)

    def product(self, x: str, w: str, output: str = "y", kind: str = "MatMul", **attributes: Any) -> str:
        return self.op(kind, [x, w], output, **attributes)

    def save(self, *outputs: str) -> Path:
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info(n, t, s) for n, (t, s) in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ("y",)],
            self.constants,
        )
        domains = {"": self.opset, **{node.domain: 1 for node in self.nodes if node.domain}}
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()])
        if self.infer:
            model = onnx.shape_inference.infer_shapes(model)
        path = self.folder / "net.onnx"
        onnx.save(model, path)
        return path


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net(tmp_path)


def found(path: Path, name: str, rule: str, version: str | None = None) -> list[Finding]:
    return [f for f in check_graph(path, target(name, CPU_WITH_VNNI), version) if f.rule == rule]


def levels(path: Path, name: str, rule: str, version: str | None = None) -> list[str]:
    return [finding.level for finding in found(path, name, rule, version)]


def healthy(net: Net) -> Path:
    net.product(net.quantized("x"), net.weight())
    return net.save()


@pytest.mark.parametrize("name", targets())
def test_a_healthy_graph_has_nothing_to_report_anywhere(net: Net, name: str) -> None:
    assert check_graph(healthy(net), target(name, CPU_WITH_VNNI)) == ()


@pytest.mark.parametrize("name", [n for n in targets() if n != "cpu"])
def test_our_portable_graph_with_groups_has_nothing_to_report(tmp_path: Path, name: str) -> None:
    path = tmp_path / "portable.onnx"
    ir.save(lowered(lower_portable), path)
    found = check_graph(path, target(name, CPU_WITH_VNNI))
    # Turing's library reads float16 graphs alone, and this one is float32; nor has it INT8 convolutions.
    turing = ["float-type", "integer-convolution"] if name == "rtx-turing" else []
    assert sorted(finding.rule for finding in found) == turing


def test_turing_has_no_integer_convolutions_and_the_unfold_dialect_has_none_either(tmp_path: Path) -> None:
    path, graph = tmp_path / "graph.onnx", lowered(lower_portable)
    ir.save(graph, path)
    (finding,) = [f for f in check_graph(path, target("rtx-turing")) if f.rule == "integer-convolution"]
    assert (finding.level, finding.where) == ("refused", "c")
    assert finding.remedy.startswith("compile with --target rtx-turing: dialect `unfold`")
    UnfoldConvolutions().apply(graph)
    ir.save(graph, path)
    assert [f.rule for f in check_graph(path, target("rtx-turing"))] == ["float-type"]
    assert check_graph(path, target("openvino", CPU_WITH_VNNI)) == ()


def lowered(lower: Callable[..., ir.Model]) -> ir.Model:
    maker = GraphMaker({"x": ("batch", 5, 32), "p": (2, 16, 8, 8)})
    y = maker.matmul(maker.inputs["x"], 32, 48, "a")
    model = maker.model(y, maker.conv(maker.inputs["p"], 16, 32, "c"))
    rng = np.random.default_rng(0)
    groups = [
        {n: (rng.standard_normal(s) * g).astype(np.float32) for n, s in {"x": (2, 5, 32), "p": (2, 16, 8, 8)}.items()}
        for g in (1, 2)
    ]
    plan = maker.plan(Quantize())
    return lower(model, plan, min_max_table(model, plan, groups))


def test_our_ort_graph_is_for_the_cpu_alone(tmp_path: Path) -> None:
    path = tmp_path / "ort.onnx"
    ir.save(lowered(lower_ort), path)
    assert check_graph(path, target("cpu", CPU_WITH_VNNI)) == ()
    rules = {finding.rule for finding in refusals(check_graph(path, target("ada")))}
    assert {"contrib", "zero-point"} <= rules


@pytest.mark.parametrize("name", GPUS)
def test_unsigned_zero_points_are_refused_on_gpus(net: Net, name: str) -> None:
    net.product(net.quantized("x", zero=np.uint8(128)), net.weight())
    finding = found(net.save(), name, "zero-point")[0]
    assert (finding.level, finding.where) == ("refused", "xq.q/QuantizeLinear")
    assert "uint8" in finding.found
    assert "portable" in finding.remedy
    assert found(net.folder / "net.onnx", "cpu", "zero-point") == []


def test_a_zero_point_that_is_not_zero_or_not_constant_is_refused(net: Net) -> None:
    net.inputs["z"] = (TensorProto.INT8, [])
    net.product(net.quantized("x", zero=np.int8(7)), net.weight())
    net.product(net.quantized("x", "other", zero="z"), net.weight("v"), "second")
    texts = [finding.found for finding in found(net.save("y", "second"), "orin-jp6", "zero-point")]
    assert texts == ["a zero point of 7"] * 2 + ["a zero point that is computed"] * 2


def test_dynamic_quantization_has_no_importer(net: Net) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dynamic")
    net.nodes.append(node)
    net.op("DequantizeLinear", ["q", "s", "z"], "xd")
    net.product("xd", net.weight())
    assert found(net.save(), "ada", "zero-point")[0].where == "dynamic"


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["cpu", "openvino", "ada"])
def test_a_scale_that_is_not_above_zero_is_refused_everywhere(net: Net, name: str, value: float) -> None:
    net.product(net.quantized("x", scale=np.float32(value)), net.weight())
    assert levels(net.save(), name, "scale") == ["refused"] * 2


def test_one_dead_channel_in_a_weight_scale_is_found(net: Net) -> None:
    net.product(net.quantized("x"), net.weight())
    scales = np.full(48, 0.01, np.float32)
    scales[5] = 0
    net.constants = [c for c in net.constants if c.name != "w.scale"]
    net.constant("w.scale", scales)
    assert "1 of 48 scales" in found(net.save(), "cpu", "scale")[0].found


def test_an_int32_bias_is_refused_on_gpus(net: Net) -> None:
    y = net.product(net.quantized("x"), net.weight(), "product")
    net.constant("b.int32", np.zeros(48, np.int32))
    net.constant("b.scale", np.full(48, 1e-4, np.float32))
    bias = net.op("DequantizeLinear", ["b.int32", "b.scale"], "b", axis=0)
    net.op("Add", [y, bias], "y")
    assert levels(net.save(), "ampere", "int32-bias") == ["refused"]
    assert levels(net.save(), "cpu", "int32-bias") == []


@pytest.mark.parametrize("kind", ["Sigmoid", "Gelu", "Softmax", "Tanh"])
def test_a_quantizer_in_front_of_a_nonlinearity_is_slow(net: Net, kind: str) -> None:
    net.product(net.op(kind, [net.quantized("x")], "after"), net.weight())
    finding = found(net.save(), "ada", "quantizer-before-activation")[0]
    assert finding.level == "slow"
    assert kind in finding.found


def test_a_quantizer_behind_a_nonlinearity_is_fine(net: Net) -> None:
    net.product(net.quantized(net.op("Gelu", ["x"], "after")), net.weight())
    assert found(net.save(), "ada", "quantizer-before-activation") == []


def test_a_factor_between_quantizer_and_product_is_slow(net: Net) -> None:
    net.constant("half", np.float32(0.5))
    net.product(net.op("Mul", [net.quantized("x"), "half"], "scaled"), net.weight())
    finding = found(net.save(), "hopper", "scale-mul")[0]
    assert (finding.level, finding.where) == ("slow", "scaled/Mul")
    assert finding.remedy == "multiply in front of the quantizer"


def test_a_factor_in_front_of_the_quantizer_is_fine(net: Net) -> None:
    net.constant("half", np.float32(0.5))
    net.product(net.quantized(net.op("Mul", ["x", "half"], "scaled")), net.weight())
    assert found(net.save(), "hopper", "scale-mul") == []


def runtime_scale(net: Net) -> Path:
    net.inputs["group"] = (TensorProto.INT64, [])
    net.constant("table", np.array([0.1, 0.2], np.float32))
    net.product(net.quantized("x", scale=net.op("Gather", ["table", "group"], "scale")), net.weight())
    return net.save()


@pytest.mark.parametrize(
    ("name", "level"),
    [("cpu", []), ("openvino", ["slow"]), ("ada", ["slow"]), ("rtx-ada", ["slow"]), ("orin-jp6", ["refused"])],
)
def test_a_computed_scale_is_right_for_one_engine_and_a_trap_for_the_others(
    net: Net, name: str, level: list[str]
) -> None:
    assert levels(runtime_scale(net), name, "runtime-scale") == level


def test_a_newer_library_on_the_old_jetson_takes_computed_scales(net: Net) -> None:
    assert levels(runtime_scale(net), "orin-jp6", "runtime-scale", "10.13") == ["slow"]


def test_an_activation_scale_per_channel_is_slow(net: Net) -> None:
    x = net.quantized("x", scale=np.full(32, 0.1, np.float32), zero=np.zeros(32, np.int8), axis=2)
    net.product(x, net.weight())
    assert levels(net.save(), "openvino", "channel-scale") == ["slow"]


def test_a_weight_scale_along_the_reduction_is_slow(net: Net) -> None:
    net.product(net.quantized("x"), net.weight(axis=0))
    finding = found(net.save(), "ada", "weight-axis")[0]
    assert (finding.level, finding.where) == ("slow", "w")
    assert "axis 0" in finding.found
    assert "axis 1" in finding.remedy


def test_a_quantizer_on_a_scalar_is_refused(net: Net) -> None:
    net.inputs["t"] = (TensorProto.FLOAT, [])
    net.op("Mul", [net.quantized("x"), net.quantized("t", "tq")], "both")
    net.product("both", net.weight())
    assert [f.where for f in found(net.save(), "ada", "scalar-input")] == ["tq.q/QuantizeLinear"]


def test_a_scale_of_another_type_than_the_data_is_refused_on_the_old_jetson(net: Net) -> None:
    net.inputs["x"] = (TensorProto.FLOAT16, [2, 5, 32])
    net.infer = False
    net.product(net.quantized("x"), net.weight())
    assert levels(net.save(), "orin-jp6", "scale-type") == ["refused"]
    assert levels(net.save(), "orin-jp7", "scale-type") == []


@pytest.mark.parametrize("name", targets())
def test_fp8_is_refused_where_the_device_has_none(net: Net, name: str) -> None:
    net.infer = False
    net.product(net.quantized("x", zero=0.0, kind=TensorProto.FLOAT8E4M3FN), net.weight())
    has = "fp8" in target(name).formats
    assert has == (name in ("thor", "ada", "hopper", "blackwell", "rtx-ada", "rtx-blackwell", "rtx-spark"))
    report = found(net.save(), name, "number-format")
    assert {f.level for f in report} == (set() if has else {"refused"})
    assert has or "this target has int8" in report[0].remedy


def test_fp4_is_for_blackwell_alone(net: Net) -> None:
    net.infer, net.opset = False, 23
    net.product(net.quantized("x", zero=0.0, kind=TensorProto.FLOAT4E2M1), net.weight())
    assert levels(net.save(), "hopper", "number-format")[0] == "refused"
    assert levels(net.save(), "blackwell", "number-format") == []


def test_int4_weights_are_widened_on_a_cpu(net: Net) -> None:
    net.constant("w.int4", np.ones((32, 48), np.int8), TensorProto.INT4)
    net.constant("w.scale", np.full(48, 0.01, np.float32))
    net.product(net.quantized("x"), net.op("DequantizeLinear", ["w.int4", "w.scale"], "w", axis=1))
    assert levels(net.save(), "cpu", "number-format") == ["slow"]
    assert levels(net.save(), "ada", "number-format") == []


def test_a_transpose_between_quantizer_and_product_is_refused_on_orin(net: Net) -> None:
    net.inputs["x"] = (TensorProto.FLOAT, [2, 32, 5])
    net.product(net.op("Transpose", [net.quantized("x")], "turned", perm=[0, 2, 1]), net.weight())
    assert levels(net.save(), "orin-jp7", "detached-quantizer") == ["refused"]
    assert levels(net.save(), "thor", "detached-quantizer") == []


@pytest.mark.parametrize(("reach", "level"), [(127, ["refused"]), (63, [])])
def test_wide_weights_are_refused_on_a_cpu_that_saturates(net: Net, reach: int, level: list[str]) -> None:
    values = np.resize(np.arange(-reach - 1, reach + 1), (32, 48)).astype(np.int8)
    net.product(net.quantized("x", zero=np.uint8(128)), net.weight(values=values))
    path = net.save()
    old = check_graph(path, target("cpu", CPU_WITHOUT_VNNI))
    assert [f.level for f in old if f.rule == "saturation"] == level
    assert "7-bit weights" in "".join(f.remedy for f in old) or not level
    assert found(path, "cpu", "saturation") == []


@pytest.mark.parametrize(("opset", "refused"), [(12, True), (13, False), (21, False), (22, True)])
def test_operator_sets_outside_the_range_are_refused(net: Net, opset: int, refused: bool) -> None:
    net.opset, net.infer = opset, False
    assert levels(healthy(net), "orin-jp6", "opset") == (["refused"] if refused else [])


@pytest.mark.parametrize("kind", ["MatMulInteger", "ConvInteger", "QLinearConv"])
def test_integer_operators_have_no_importer(net: Net, kind: str) -> None:
    net.infer = False
    net.op(kind, ["x", net.constant("w", np.ones((32, 48), np.int8))], "y")
    assert levels(net.save(), "ada", "operator-set") == ["refused"]
    assert levels(net.save(), "cpu", "operator-set") == []


def test_rms_normalization_is_read_from_a_version_on(net: Net) -> None:
    net.opset, net.infer = 23, False
    net.op("RMSNormalization", ["x", net.constant("g", np.ones(32, np.float32))], "y")
    assert levels(net.save(), "ada", "operator-set") == ["refused"]
    assert levels(net.save(), "ada", "operator-set", "10.15.1") == []


def test_contrib_operators_belong_to_one_engine(net: Net) -> None:
    net.infer = False
    net.op("FusedMatMul", ["x", net.constant("w", np.ones((32, 48), np.float32))], "y", domain="com.microsoft")
    assert levels(net.save(), "cpu", "contrib") == []
    assert levels(net.save(), "openvino", "contrib") == ["refused"]
    assert levels(net.save(), "rtx-ada", "contrib") == ["refused"]


def group_norm(net: Net, groups: int = 4) -> Path:
    net.inputs["x"] = (TensorProto.FLOAT, [2, 16, 8, 8])
    one, zero = net.constant("one", np.ones(16, np.float32)), net.constant("zero", np.zeros(16, np.float32))
    net.op("GroupNormalization", ["x", one, zero], "y", num_groups=groups)
    return net.save()


def test_group_normalization_of_opset_21_is_refused_by_old_tensorrt(net: Net) -> None:
    path = group_norm(net)
    finding = found(path, "orin-jp6", "group-norm")[0]
    assert (finding.level, "InstanceNormalization" in finding.remedy) == ("refused", True)
    assert found(path, "orin-jp6", "group-norm", "10.9") == found(path, "ada", "group-norm") == []


def test_group_normalization_with_one_group_is_refused_on_tensorrt(net: Net) -> None:
    path = group_norm(net, 1)
    assert levels(path, "hopper", "group-norm-one") == ["refused"]
    assert levels(path, "openvino", "group-norm-one") == []


def test_attention_as_one_operator_is_kept_or_refused(net: Net) -> None:
    net.opset, net.infer = 23, False
    net.op("Attention", ["x", "x", "x"], "y", q_num_heads=2, kv_num_heads=2)
    assert levels(net.save(), "cpu", "attention") == ["kept"]
    assert levels(net.save(), "ada", "attention") == ["refused"]
    assert levels(net.save(), "ada", "attention", "10.14") == ["kept"]


def test_control_flow_cannot_be_captured(net: Net) -> None:
    net.inputs["which"] = (TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["out"])], "body", [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    net.op("If", ["which"], "y", then_branch=body, else_branch=body)
    assert levels(net.save(), "thor", "control-flow") == ["slow"]
    assert read_graph(net.folder / "net.onnx").subgraphs == 2


def test_half_precision_weights_are_slow_on_a_cpu(net: Net) -> None:
    net.inputs["x"] = (TensorProto.FLOAT16, [2, 5, 32])
    net.infer = False
    net.product("x", net.constant("w", np.ones((32, 48), np.float16)))
    assert "float32" in found(net.save(), "cpu", "float-type")[0].remedy
    assert levels(net.save(), "ampere", "float-type") == []


def test_bfloat16_weights_are_slow_on_the_old_jetson(net: Net) -> None:
    net.infer = False
    net.product("x", net.constant("w", np.ones((32, 48), np.float32), TensorProto.BFLOAT16))
    assert levels(net.save(), "orin-jp6", "float-type") == ["slow"]
    assert levels(net.save(), "orin-jp7", "float-type") == []


@pytest.mark.parametrize(("k", "n"), [(8, 48), (32, 8)])
def test_tiny_products_gain_nothing_from_integers(net: Net, k: int, n: int) -> None:
    net.inputs["x"] = (TensorProto.FLOAT, [2, 5, k])
    net.product(net.quantized("x"), net.weight(k=k, n=n))
    assert levels(net.save(), "ada", "tiny-product") == ["slow"]


def test_tiny_products_of_a_float_graph_are_kept(net: Net) -> None:
    net.product("x", net.constant("to_out.weight", np.ones((32, 4), np.float32)))
    finding = found(net.save(), "cpu", "tiny-product")[0]
    assert (finding.level, finding.where) == ("kept", "to_out")


def test_products_left_in_float_are_listed_by_module(net: Net) -> None:
    y = net.product(net.quantized("x"), net.weight(n=48), "first")
    net.product(y, net.constant("proj_out.weight", np.ones((48, 32), np.float32)))
    finding = found(net.save(), "ada", "kept-product")[0]
    assert (finding.level, finding.where) == ("kept", "proj_out")


def test_int8_weights_alone_are_slow_on_onnx_runtime(net: Net) -> None:
    net.product("x", net.weight())
    assert levels(net.save(), "cpu", "weight-only") == ["slow"]
    assert levels(net.save(), "ada", "weight-only") == []


@pytest.mark.parametrize(("shape", "level"), [((48,), ["slow"]), ((1, 1, 48), [])])
def test_a_bias_of_rank_one_makes_a_float_gemm(net: Net, shape: tuple[int, ...], level: list[str]) -> None:
    bias = net.constant("b", np.ones(shape, np.float32))
    net.op("Add", [net.product(net.quantized("x"), net.weight(), "m"), bias], "y")
    assert levels(net.save(), "cpu", "bias-rank") == level


def test_any_bias_makes_a_float_gemm_of_a_rank_two_product(net: Net) -> None:
    net.inputs["x"] = (TensorProto.FLOAT, [5, 32])
    bias = net.constant("b", np.ones((1, 48), np.float32))
    net.op("Add", [net.product(net.quantized("x"), net.weight(), "m"), bias], "y")
    assert levels(net.save(), "cpu", "bias-rank") == ["slow"]


def test_a_convolution_without_output_quantizer_and_a_gemm_do_not_fuse_on_onnx_runtime(net: Net) -> None:
    net.inputs = {"x": (TensorProto.FLOAT, [2, 16, 8, 8]), "v": (TensorProto.FLOAT, [5, 32])}
    net.constant("k.int8", np.ones((32, 16, 3, 3), np.int8))
    net.constant("k.scale", np.full(32, 0.1, np.float32))
    kernel = net.op("DequantizeLinear", ["k.int8", "k.scale"], "k", axis=0)
    net.product(net.quantized("x"), kernel, "y", "Conv")
    net.product(net.quantized("v", "vq"), net.weight(), "z", "Gemm")
    assert [f.where for f in found(net.save("y", "z"), "cpu", "unfused")] == ["k", "w"]
    assert found(net.save("y", "z"), "openvino", "unfused") == []


def test_a_convolution_with_output_quantizer_fuses(net: Net) -> None:
    net.inputs = {"x": (TensorProto.FLOAT, [2, 16, 8, 8])}
    net.constant("k.int8", np.ones((32, 16, 3, 3), np.int8))
    net.constant("k.scale", np.full(32, 0.1, np.float32))
    kernel = net.op("DequantizeLinear", ["k.int8", "k.scale"], "k", axis=0)
    net.quantized(net.product(net.quantized("x"), kernel, "c", "Conv"), "y")
    assert found(net.save(), "cpu", "unfused") == []


def test_a_file_above_two_gibibytes_is_refused(net: Net) -> None:
    graph = replace(read_graph(healthy(net)), file_bytes=3 << 30)
    findings = check_structure(graph, target("ada"))
    assert [(f.level, f.rule) for f in findings] == [("refused", "inline-weights")]
    assert "3.0 GiB" in findings[0].found


@pytest.mark.parametrize("place", ["/etc/weights.bin", "../weights.bin", "C:weights.bin"])
def test_weights_outside_the_folder_are_refused(net: Net, place: str) -> None:
    path = healthy(net)
    model = onnx.load(path, load_external_data=False)
    external(next(c for c in model.graph.initializer if c.name == "w.int8"), place)
    path.write_bytes(model.SerializeToString())
    findings = found(path, "ada", "unsafe-path")
    assert [f.level for f in findings] == ["refused"]
    assert place in findings[0].found


def test_a_library_outside_the_profile_is_refused(net: Net) -> None:
    path = healthy(net)
    assert levels(path, "ada", "library-version", "10.12.0") == ["refused"]
    assert levels(path, "ada", "library-version", "12.0") == ["refused"]
    assert levels(path, "ada", "library-version", "11.4.1") == []
    assert levels(path, "openvino", "library-version", "2026.4.1-1234") == []


def external(tensor: onnx.TensorProto, place: str, offset: int = 0) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", str(offset))):
        tensor.external_data.add(key=key, value=value)


def test_a_graph_of_a_billion_parameters_takes_seconds_and_its_weights_are_not_read(tmp_path: Path) -> None:
    net = Net(tmp_path, infer=False)
    x = "x"
    net.inputs["x"] = (TensorProto.FLOAT, [2, 256, 1152])
    parameters = 0
    zero = net.constant("zero", np.int8(0))
    for layer in range(190):
        for k, n in ((1152, 4608),):
            name = f"blocks.{layer}.fc"
            weight = TensorProto(name=f"{name}.weight.int8", data_type=TensorProto.INT8, dims=[k, n])
            external(weight, "weights.int8.bin", parameters)
            net.constants.append(weight)
            net.constant(f"{name}.scale", np.full(n, 0.01, np.float32))
            w = net.op("DequantizeLinear", [f"{name}.weight.int8", f"{name}.scale"], f"{name}.w", axis=1)
            q = net.quantized(x, f"{name}.in", zero=zero)
            y = net.product(q, w, f"{name}.product")
            for step in range(15):
                y = net.op("Mul", [y, y], f"{name}.{step}")
            x = net.op("Slice", [y], f"{name}.out")
            parameters += k * n
    assert parameters > 1_000_000_000
    path = net.save(x)
    assert not (tmp_path / "weights.int8.bin").exists()
    for name in ("cpu", "openvino", "orin-jp6", "ada"):
        start = time.process_time()
        report = check_graph(path, target(name, CPU_WITHOUT_VNNI))
        assert time.process_time() - start < 10
        assert all(f.rule != "number-format" for f in report)


def test_findings_are_ordered_and_counted(net: Net) -> None:
    net.inputs["x"] = (TensorProto.FLOAT, [2, 5, 8])
    y = net.product(net.quantized("x", zero=np.uint8(128)), net.weight(k=8, n=48), "m")
    net.product(y, net.constant("proj.weight", np.ones((48, 32), np.float32)))
    report = check_graph(net.save(), target("ada"))
    assert [f.level for f in report] == ["refused", "refused", "slow", "kept"]
    assert [(level, rule, count) for level, rule, count, _ in summary(report)] == [
        ("refused", "zero-point", 2), ("slow", "tiny-product", 1), ("kept", "kept-product", 1),
    ]


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x08\x07", b"\xff" * 100, b"plain text, nothing else"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(EngineError, match="wanted an ONNX graph file"):
            check_graph(tmp_path / "bad.onnx", target("ada"))


def test_the_table_names_each_rule_once_and_findings_carry_its_names() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    known = {bad.rule for name in targets() for bad in target(name).known_bad if bad.rule}
    assert known <= set(names)
    here = Path(__file__).read_text()
    assert [name for name in names if f'"{name}"' not in here] == []
