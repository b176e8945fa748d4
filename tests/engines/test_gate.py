"""The fusion gate: it fails on each planted trap, and passes on what is shipped."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support import trap_graphs

from quantempo.contracts.engine import EngineOptions
from quantempo.engines import gate
from quantempo.engines.kernels import Kernel, Operand, inspector_kernels, plan_kernels
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.ort import optimized_graph
from quantempo.engines.targets import target
from quantempo.errors import EngineError, FusionError

RTX = target("rtx-ada")
ONE = EngineOptions(threads=1)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra tensorrt-rtx)"
)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed (extra openvino)"
)


def build(graph: Path) -> bytes:
    from quantempo.engines.tensorrt import BuildJob, build_here

    job = BuildJob("tensorrt_rtx", str(graph), str(graph.with_suffix(".plan")), RTX.capability, ())
    build_here(job)
    return graph.with_suffix(".plan").read_bytes()


@needs_rtx
@pytest.mark.parametrize("kind", trap_graphs.FORMATS)
def test_rtx_passes_a_sound_graph(kind: str, tmp_path: Path) -> None:
    path = trap_graphs.save(trap_graphs.sound(kind), tmp_path)
    report = gate.check_rtx(build(path), read_graph(path), RTX)
    assert (report.sites, report.formats, report.products, report.breaches) == (1, {kind: 1}, 1, ())
    assert "passed" in str(report)
    report.require("graph")


@needs_rtx
@pytest.mark.parametrize("kind", trap_graphs.FORMATS)
@pytest.mark.parametrize("trap", [name for name in trap_graphs.TRAPS if name != "integer_bias"])
def test_rtx_fails_on_each_trap(trap: str, kind: str, tmp_path: Path) -> None:
    path = trap_graphs.save(trap_graphs.TRAPS[trap](kind), tmp_path)
    report = gate.check_rtx(build(path), read_graph(path), RTX)
    assert not report.passed
    with pytest.raises(FusionError, match="all 1 quantized sites on quantized operands"):
        report.require("graph")
    # All but the constant factor, which this version folds, are caught by what runs too, not by structure alone.
    seen = " ".join(breach.found for breach in report.breaches)
    assert ("the product runs on float × float" in seen) == (trap != "scale_between")
    assert ("dequantized to float at every call" in seen) == (trap != "scale_between")


@needs_rtx
def test_rtx_refuses_an_integer_bias_and_the_gate_says_so_before(tmp_path: Path) -> None:
    path = trap_graphs.save(trap_graphs.integer_bias("int8"), tmp_path)
    assert "an INT32 bias" in [breach.found for breach in gate.check_structure(read_graph(path), RTX)]
    with pytest.raises(EngineError, match="DequantizeLinear"):
        build(path)


@needs_rtx
def test_a_weight_that_is_only_stored_in_integers_is_no_breach(tmp_path: Path) -> None:
    path = trap_graphs.save(trap_graphs.weight_only("int8"), tmp_path)
    report = gate.check_rtx(build(path), read_graph(path), RTX)
    assert (report.sites, report.breaches) == (0, ())


@needs_rtx
def test_a_plan_lists_kernels_with_the_types_of_their_operands(tmp_path: Path) -> None:
    kernels = plan_kernels(build(trap_graphs.save(trap_graphs.sound("int8"), tmp_path)))
    (product,) = [kernel for kernel in kernels if kernel.product]
    assert product.name == "a.out/MatMul"
    assert [(o.dtype, o.constant, o.size) for o in product.inputs[:2]] == [("int8", False, 8192), ("int8", True, 8192)]


def test_arithmetic_on_sizes_is_no_kernel() -> None:
    one, tensor = Operand("a", "int64", size=1), Operand("x", "half", size=64)
    assert Kernel("k", "mul", (one, one), (one,), ()).sizes_only
    assert Kernel("k", "and", (Operand("b", "bool", size=1),), (), ()).sizes_only
    assert Kernel("k", "signal", (), (), ()).sizes_only
    assert not Kernel("k", "function", (tensor, one), (tensor,), ()).sizes_only
    assert not Kernel("k", "function", (one,), (Operand("t", "int64", size=2),), ()).sizes_only
    assert not Kernel("k", "gemm", (), (), ()).sizes_only


def test_a_plan_without_a_kernel_list_is_refused() -> None:
    with pytest.raises(EngineError, match="a plan of 5 bytes without a kernel list"):
        plan_kernels(b"bytes")


@pytest.mark.parametrize("trap", [*trap_graphs.TRAPS, "sound"])
def test_onnxruntime(trap: str, tmp_path: Path) -> None:
    maker = trap_graphs.TRAPS.get(trap, trap_graphs.sound)
    path = trap_graphs.save(maker("int8"), tmp_path)
    report = gate.check_ort(optimized_graph(path, ONE), read_graph(path), target("cpu"))
    # A scale that is looked up is what this engine's own dialect does; it fuses.
    assert report.passed == (trap in ("sound", "runtime_scale"))
    assert report.formats["int8"] == (1 if report.passed or trap == "integer_bias" else 0)


@needs_openvino
@pytest.mark.parametrize("trap", [*trap_graphs.TRAPS, "sound"])
def test_openvino(trap: str, tmp_path: Path) -> None:
    from quantempo.engines.openvino import integer_layers

    maker = trap_graphs.TRAPS.get(trap, trap_graphs.sound)
    path = trap_graphs.save(maker("int8"), tmp_path)
    report = gate.check_openvino(integer_layers(path, ONE, {}), read_graph(path), target("openvino"))
    assert report.passed == (trap == "sound"), report.breaches


def layer(dtypes: tuple[str, str], **more: Any) -> dict[str, Any]:
    inputs = [
        {"Name": name, "Dimensions": [64, 64], "Format/Datatype": kind}
        for name, kind in zip(("x", "w_const"), dtypes, strict=True)
    ]
    return {
        "Name": "gemm_1", "LayerType": "gemm", "Inputs": inputs,
        "Outputs": [{"Name": "y", "Dimensions": [64, 128], "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: a.out/MatMul]\x1e[ONNX Layer: x.dequantized/DequantizeLinear]", **more,
    }


@pytest.mark.parametrize(("kinds", "passes"), [
    (("Int8", "Int8"), True), (("FP8", "FP8"), True), (("Half", "Half"), False), (("Half", "Int8"), False),
])  # fmt: skip
def test_the_inspector_of_a_device_is_judged_alike(kinds: tuple[str, str], passes: bool, tmp_path: Path) -> None:
    graph = read_graph(trap_graphs.save(trap_graphs.sound("int8"), tmp_path))
    report = gate.check_inspector(json.dumps({"Layers": [layer(kinds)], "Bindings": []}), graph, target("ada"))
    assert report.passed == passes


def test_a_convolution_of_the_inspector_may_keep_its_weight_apart() -> None:
    given = layer(("Int8", "Int8"), LayerType="CaskConvolution", Weights={"Type": "Int8", "Count": 4096})
    given["Inputs"] = given["Inputs"][:1]
    (kernel,) = inspector_kernels(json.dumps({"Layers": [given]}))
    assert [(o.dtype, o.constant) for o in kernel.inputs] == [("int8", False), ("int8", True)]


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": ["gemm_1"]}', '{"Bindings": []}'])
def test_inspector_output_without_details_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"ProfilingVerbosity\.DETAILED"):
        inspector_kernels(text)


def test_a_site_that_no_kernel_computes_is_a_breach(tmp_path: Path) -> None:
    graph = read_graph(trap_graphs.save(trap_graphs.sound("int8"), tmp_path))
    report = gate.check_inspector(json.dumps({"Layers": []}), graph, target("ada"))
    assert [breach.found for breach in report.breaches] == ["no kernel computes it as a product"]
