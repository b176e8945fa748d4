"""The fusion gate over everything that writes a quantized bundle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx import load as load_onnx
from onnx import save as save_onnx

from quantempo.contracts.codec import canonical_json
from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.contracts.step_policy import StepPolicy
from quantempo.devices import rewriting
from quantempo.devices.comparing import CompareOptions, compare_engines
from quantempo.devices.float_steps import with_float_steps
from quantempo.devices.importing import with_imported_scales
from quantempo.engines import openvino_apart
from quantempo.errors import ExportError, FusionError
from quantempo.export import lower_ort, lower_portable
from quantempo.inspection import load_plan
from quantempo.runtime.bundle import OpenBundle
from quantempo.stages import gating, writing
from quantempo.stages.gating import NotGated, gate_graph, gate_graphs

ENGINES = ("ort", "portable") if find_spec("openvino") else ("ort",)


def plan_of(bundle: OpenBundle) -> QuantPlan:
    found = load_plan(bundle)
    assert found is not None
    return found


def quantized(bundle: OpenBundle) -> int:
    return len(plan_of(bundle).quantized())


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a writer hands to the gate, and how many sites it promises."""
    seen: dict[str, int] = {}

    def watch(root: Path, entries: Mapping[str, Any], plans: Mapping[str, QuantPlan | None]) -> dict[str, Any]:
        found = gate_graphs(root, entries, plans)
        for name, entry in entries.items():
            if entry.variant in plans:
                plan = plans[entry.variant]
                seen[name] = 0 if plan is None else len(plan.quantized())
        assert {name.partition(".")[2].rpartition(".")[2] for name in found} <= {"ort-f32", "portable-f32"}
        assert all(report.passed for report in found.values())
        return found

    monkeypatch.setattr(writing, "gate_graphs", watch)
    monkeypatch.setattr(rewriting, "gate_graphs", watch)
    return seen


def test_a_compile_puts_every_float32_graph_through_the_gate(
    compile_tiny: Any, judged: dict[str, int], tmp_path: Path
) -> None:
    bundle = compile_tiny(tmp_path / "b", cache="every:2").bundle
    sites = quantized(bundle)
    assert set(judged) == {f"{variant}.{kind}-f32" for variant in ("full", "reuse.0") for kind in ("ort", "portable")}
    assert judged["full.ort-f32"] == judged["full.portable-f32"] == sites
    assert 0 < judged["reuse.0.ort-f32"] < sites


def test_rewritten_bundles_go_through_the_gate(
    dit_bundle: OpenBundle, maxima: Path, judged: dict[str, int], tmp_path: Path
) -> None:
    with_imported_scales(dit_bundle.root, maxima, tmp_path / "imported")
    sites = quantized(dit_bundle)
    assert judged == {"full.ort-f32": sites, "full.portable-f32": sites}
    judged.clear()
    with_float_steps(dit_bundle.root, tmp_path / "steps", StepPolicy(1, 1))
    assert judged == {"float.ort-f32": 0, "float.portable-f32": 0}


@pytest.mark.parametrize(("module", "word", "trap", "error"), [
    (lower_ort, "ort", "", ExportError),
    pytest.param(lower_portable, "portable", "Tanh", FusionError,
                 marks=pytest.mark.skipif("portable" not in ENGINES, reason="openvino is not installed")),
    (lower_portable, "portable", "Sqrt", ExportError),
])  # fmt: skip
def test_a_planted_trap_stops_a_compile_and_nothing_is_written(
    module: Any, word: str, trap: str, error: type[Exception], compile_tiny: Any, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    real = getattr(module, f"lower_{word}")

    def trapped(*given: Any) -> ir.Model:
        model = real(*given)
        _behind_the_dequantizer(model, trap) if trap else _product_in_float(model)
        return model

    monkeypatch.setattr(module, f"lower_{word}", trapped)
    with pytest.raises(error, match=rf"full\.{word}-f32"):
        compile_tiny(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def _behind_the_dequantizer(model: ir.Model, operator: str) -> None:
    """An operator between the dequantizer of an activation and its product."""
    product = next(n for n in model.graph if n.op_type == "MatMul" and (v := n.inputs[1]) is not None
                   and (p := v.producer()) is not None and p.op_type == "DequantizeLinear")  # fmt: skip
    value = product.inputs[0]
    assert value is not None
    one = ir.Node("", operator, [value], name="trap")
    one.outputs[0].name, one.outputs[0].type, one.outputs[0].shape = "trap", value.type, value.shape
    model.graph.insert_before(product, one)
    product.replace_input_with(0, one.outputs[0])


def _product_in_float(model: ir.Model) -> None:
    """One site's integer product becomes a float one on what is dequantized."""
    product = next(n for n in model.graph if n.op_type == "MatMulIntegerToFloat")
    product.op_type, product.domain = "Identity", ""
    product.replace_input_with(0, _float(model, product))
    while len(product.inputs) > 1:
        product.resize_inputs(1)


def _float(model: ir.Model, product: ir.Node) -> ir.Value:
    value = product.inputs[0]
    assert value is not None
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", TensorProto.FLOAT)], name="trap")
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = "trap", product.outputs[0].type, value.shape
    model.graph.insert_before(product, cast)
    return cast.outputs[0]


def test_what_one_engine_keeps_in_float_the_other_quantizes(
    dit_bundle: OpenBundle, maxima: Path, compile_tiny: Any, judged: dict[str, int], tmp_path: Path
) -> None:
    """As `--guard revert` leaves a plan: the gate, rewriting and comparing follow the plan of each graph."""
    plan = plan_of(dit_bundle)
    kept = {site.id: Keep("slower on it") for site in plan.quantized() if "ff.net.2" in site.id}
    (tmp_path / "plan.json").write_text(canonical_json(replace(plan, dialects={"ort-f32": kept})))
    bundle = compile_tiny(tmp_path / "b", plan_file=tmp_path / "plan.json").bundle
    everything = quantized(dit_bundle)
    report = gate_graphs(bundle.root, bundle.manifest.graphs, {"full": plan_of(bundle)})
    assert report["full.ort-f32"].formats == {"int8": everything - len(kept)}
    if "portable" in ENGINES:
        attention = report["full.portable-f32"].sites - everything
        assert report["full.portable-f32"].formats == {"int8": everything + attention}
        found = compare_engines(bundle.root, ["ort", "openvino"], CompareOptions(2, 2, 1.5, 1, True, 1))
        assert found.text()
    with_imported_scales(bundle.root, maxima, tmp_path / "imported")
    again = with_float_steps(bundle.root, tmp_path / "steps", StepPolicy(1, 1))
    assert plan_of(again).dialects["ort-f32"] == kept


def test_a_graph_with_fewer_sites_than_the_plan_is_refused(dit_bundle: OpenBundle) -> None:
    graph, sites = dit_bundle.path("graphs/full.ort-f32.onnx"), quantized(dit_bundle)
    with pytest.raises(ExportError, match=rf"found {sites} quantized products, wanted {sites + 1}"):
        gate_graph(graph, "ort", sites + 1)
    report = gate_graph(graph, "ort", sites)
    assert report is not None
    assert report.formats == {"int8": sites}


@pytest.mark.skipif("portable" not in ENGINES, reason="openvino is not installed")
def test_a_graph_of_one_scale_is_recognised_on_openvino(compile_tiny: Any, tmp_path: Path) -> None:
    """With one group OpenVINO fuses so much that a product loses its name: its weight stands for it."""
    bundle = compile_tiny(tmp_path / "b", groups="single").bundle
    report = gate_graph(bundle.path("graphs/full.portable-f32.onnx"), "portable", quantized(bundle))
    assert report is not None
    assert report.formats == {"int8": report.sites}


@pytest.mark.skipif("portable" not in ENGINES, reason="openvino is not installed")
def test_a_graph_that_openvino_refuses_is_said_to_be_not_judged(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    model = load_onnx(dit_bundle.path("graphs/full.portable-f32.onnx"), load_external_data=False)
    node = helper.make_node("NoSuchOperator", [model.graph.output[0].name], ["more"], domain="made.up")
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))
    for file in (dit_bundle.root / "graphs").glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_onnx(model, tmp_path / "g.onnx")
    with pytest.warns(NotGated, match=r"g\.onnx is not judged: .*NoSuchOperator"):
        assert gate_graph(tmp_path / "g.onnx", "portable", quantized(dit_bundle)) is None


@pytest.mark.skipif("portable" not in ENGINES, reason="openvino is not installed")
def test_a_compile_survives_the_death_of_openvino(dit_bundle: OpenBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler has been seen to end in a segmentation fault; afterwards a new child serves the next graph."""
    graph, sites = dit_bundle.path("graphs/full.portable-f32.onnx"), quantized(dit_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(openvino_apart, "_child", None)
        patch.setattr(sys, "executable", shutil.which("false"))
        with pytest.warns(NotGated, match=r"is not judged: .*its compiler died \(exit code 1\)"):
            assert gate_graph(graph, "portable", sites) is None
    assert gate_graph(graph, "portable", sites) is not None
    child = openvino_apart._child
    assert child is not None
    child.kill()
    child.wait()
    assert gate_graph(graph, "portable", sites) is not None, "a child that died in between is replaced"


def test_without_openvino_its_graphs_are_not_judged(dit_bundle: OpenBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "installed_backends", lambda: ("ort",))
    found = gate_graphs(dit_bundle.root, dit_bundle.manifest.graphs, {"full": plan_of(dit_bundle)})
    assert set(found) == {"full.ort-f32"}
