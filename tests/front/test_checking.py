"""`check` says what a target makes of a graph, a bundle or a model, and reads no weight for it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import tiny_models

from quantempo.devices.checking import check_subject
from quantempo.errors import EngineError, NotAModelDirectory, PlanError, RequestError
from quantempo.export.sites import find_sites
from quantempo.export.structure import ABSENT, trace_structure
from quantempo.inspection import load_plan
from quantempo.runtime.bundle import OpenBundle, read_bundle, read_manifest


def test_a_bundle_is_checked_by_the_graph_that_suits_the_target(dit_bundle: OpenBundle) -> None:
    assert check_subject(dit_bundle.root, "cpu").checked == "full.ort-f32, decoder.float-f32"
    assert check_subject(dit_bundle.root, "openvino").checked == "full.portable-f32, decoder.float-f32"
    jetson = check_subject(dit_bundle.root, "orin-jp6", "10.3")
    assert jetson.refused
    assert "GroupNormalization of opset 21" in jetson.text()
    assert not check_subject(dit_bundle.root, "cpu").refused


def test_no_weight_file_is_opened(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dit_bundle.root, copy)
    for file in (copy / "graphs").glob("weights.*.bin"):
        file.unlink()
    assert check_subject(copy, "cpu").findings == check_subject(dit_bundle.root, "cpu").findings
    assert read_manifest(copy).digest == dit_bundle.digest
    with pytest.raises(Exception, match="no such file"):
        read_bundle(copy)


def test_the_ort_graph_does_not_suit_a_compiler(dit_bundle: OpenBundle) -> None:
    report = check_subject(dit_bundle.path("graphs/full.ort-f32.onnx"), "openvino")
    assert report.refused
    assert {finding.rule for finding in report.findings} >= {"contrib", "runtime-scale"}
    assert "use the `portable` graph" in report.text()


@pytest.mark.parametrize("model", ["dit_pipeline", "unet", "condition_unet"])
def test_the_structure_of_a_model_is_that_of_its_graph(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    folder: Path = getattr(tiny_models, model)()
    plan = trace_structure(folder, tmp_path / "g.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"], "no weights are written"
    loaded = ir.load(tmp_path / "g.onnx")
    assert find_sites(loaded) == plan.sites
    big = [v.const_value for v in loaded.graph.initializers.values() if v.const_value.nbytes >= 1024]
    assert all(isinstance(t, ir.ExternalTensor) and t.location == ABSENT for t in big)
    if model == "dit_pipeline":
        real = load_plan(request.getfixturevalue("dit_bundle"))
        assert real is not None
        assert plan.sites == real.sites
        assert plan.decisions == real.decisions


def test_a_model_directory_needs_no_weights(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_models.unet(), copy)
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    report = check_subject(copy, "cpu")
    assert "the float graph from the configuration, and the default plan" in report.checked
    assert any(finding.rule == "plan" and "reads the model's input" in finding.found for finding in report.findings)
    turing = check_subject(copy, "rtx-turing").findings
    kept = [f for f in turing if f.rule == "plan" and "the device has no INT8 convolutions" in f.found]
    assert kept, "what the target's own dialect keeps is shown"
    assert len([f for f in turing if f.rule == "plan"]) == len(kept) + sum(f.rule == "plan" for f in report.findings)


@pytest.mark.parametrize(
    ("subject", "target", "error", "words"),
    [
        ("nothing.onnx", "cpu", EngineError, "no such file or directory"),
        (".", "cpu", NotAModelDirectory, "wanted model_index.json"),
        ("nothing.onnx", "cpuu", RequestError, "did you mean 'cpu'"),
    ],
)
def test_bad_input(
    tmp_path: Path, subject: str, target: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_subject(tmp_path / subject, target)


def test_a_number_format_that_the_target_lacks_is_refused_at_once(
    dit_bundle: OpenBundle, tmp_path: Path
) -> None:
    import dataclasses

    from quantempo.contracts.codec import canonical_json

    copy = tmp_path / "copy"
    shutil.copytree(dit_bundle.root, copy)
    changed = dataclasses.replace(dit_bundle.manifest, precision="fp8")
    (copy / "manifest.json").write_text(canonical_json(changed))
    with pytest.raises(PlanError, match=r"(?s)found number format 'fp8', wanted one of int8, .*use 'int8'"):
        check_subject(copy, "cpu")


def big_graph(folder: Path, layers: int = 64, width: int = 4096) -> tuple[Path, int]:
    """A quantized chain of products with a billion weights in a file that is not there."""
    h = pytest.importorskip("onnx").helper
    types = pytest.importorskip("onnx").TensorProto
    nodes, weights, offset = [], [], 0
    numpy_tensor = pytest.importorskip("onnx").numpy_helper.from_array
    shared = [numpy_tensor(np.float32(0.02), "s"), numpy_tensor(np.int8(0), "z"),
              numpy_tensor(np.full(width, 0.01, np.float32), "ws"), numpy_tensor(np.zeros(width, np.int8), "wz")]
    last = "x"
    for i in range(layers):
        tensor = types(name=f"w{i}", data_type=types.INT8, dims=[width, width], data_location=types.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", str(offset)), ("length", str(width * width))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        offset += width * width
        weights.append(tensor)
        nodes += [
            h.make_node("QuantizeLinear", [last, "s", "z"], [f"q{i}"]),
            h.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"d{i}"]),
            h.make_node("DequantizeLinear", [f"w{i}", "ws", "wz"], [f"wd{i}"], axis=1),
            h.make_node("MatMul", [f"d{i}", f"wd{i}"], [f"y{i}"]),
        ]
        last = f"y{i}"
    graph = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", types.FLOAT, ["b", width])],
        [h.make_tensor_value_info(last, types.FLOAT, ["b", width])], [*shared, *weights],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    (folder / "big.onnx").write_bytes(model.SerializeToString())
    return folder / "big.onnx", offset


@pytest.mark.parametrize("target", ["cpu", "openvino", "orin-jp6", "rtx-ada"])
def test_a_billion_weights_are_checked_in_under_ten_seconds(tmp_path: Path, target: str) -> None:
    graph, weights = big_graph(tmp_path)
    assert weights > 1e9
    started = time.perf_counter()
    report = check_subject(graph, target)
    assert time.perf_counter() - started < 10
    assert report.target == target
