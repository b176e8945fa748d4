from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from quantempo.contracts.engine import EngineOptions
from quantempo.engines import onnx_file
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.ort import executed_operators
from quantempo.engines.registry import open_engine
from quantempo.errors import EngineError, UnsafePath

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
h = onnx.helper
FLOAT = onnx.TensorProto.FLOAT
ONE = EngineOptions(threads=1)


def of_opset_21(graph):  # type: ignore[no-untyped-def]
    """What the project exports; the onnx package would stamp its newest opset, which engines may not know yet."""
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)])
    model.ir_version = 10
    return model


def mlp(folder: Path, external: bool = False, location: str = "w.bin") -> Path:
    """y = relu(x · w1) · w2, with a subgraph beside it (If) whose branches hold constants."""
    random = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n)
        for n, s in (("w1", (8, 16)), ("w2", (16, 4)))
    ]
    branches = {}
    for name, value in (("then_branch", 1.0), ("else_branch", 2.0)):
        constant = h.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.float32(value)))
        branches[name] = h.make_graph([constant], name, [], [h.make_tensor_value_info(name, FLOAT, [])])
    nodes = [
        h.make_node("MatMul", ["x", "w1"], ["hidden"]), h.make_node("Relu", ["hidden"], ["active"]),
        h.make_node("MatMul", ["active", "w2"], ["out"]), h.make_node("If", ["flag"], ["factor"], **branches),
        h.make_node("Mul", ["out", "factor"], ["y"]),
    ]
    inputs = [h.make_tensor_value_info("x", FLOAT, ["batch", 8]),
              h.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])]  # fmt: skip
    graph = h.make_graph(nodes, "g", inputs, [h.make_tensor_value_info("y", FLOAT, ["batch", 4])], weights)
    model = of_opset_21(graph)
    path = folder / "g.onnx"
    onnx.save_model(model, path, save_as_external_data=external, location="w.bin", size_threshold=0)
    if external and location != "w.bin":
        changed = onnx.load(path, load_external_data=False)
        for tensor in changed.graph.initializer:
            tensor.external_data[0].value = location
        path.write_bytes(changed.SerializeToString())
    return path


def feeds(batch: int = 3) -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((batch, 8)).astype(np.float32)
    return {"x": x, "flag": np.array(True)}


@pytest.mark.parametrize("external", [False, True])
def test_inner_tensors_come_as_extra_outputs(tmp_path: Path, external: bool) -> None:
    graph = mlp(tmp_path, external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    plain = open_engine("ort", graph, ONE).run(feeds())
    tapped = open_engine("ort", graph, EngineOptions(1, ("active", "hidden")))
    assert list(tapped.outputs) == ["y", "active", "hidden"]
    out = tapped.run(feeds())
    np.testing.assert_allclose(out["y"], plain["y"], rtol=1e-6)
    assert np.array_equal(out["active"], np.maximum(out["hidden"], 0))
    assert out["hidden"].shape == (3, 16)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, "something was written beside the graph"


def test_extra_outputs_are_bound_in_place_too(tmp_path: Path) -> None:
    binding = open_engine("ort", mlp(tmp_path), EngineOptions(1, ("active",))).bind({"batch": 2})
    tap = binding.outputs["active"].array
    address = tap.ctypes.data
    sums = []
    for factor in (1, 2):
        binding.inputs["x"].array[...] = feeds(2)["x"] * factor
        binding.run()
        sums.append(float(tap.sum()))
    assert sums[1] == pytest.approx(2 * sums[0], rel=1e-5)
    assert binding.outputs["active"].array.ctypes.data == address


def test_appended_outputs_make_a_model_that_onnx_reads(tmp_path: Path) -> None:
    graph = mlp(tmp_path)
    model = onnx.ModelProto.FromString(onnx_file.with_outputs(graph, ["hidden", "active"]))
    assert [o.name for o in model.graph.output] == ["y", "hidden", "active"]
    original = onnx.load(graph)
    del model.graph.output[1:]
    assert model == original


def test_an_extra_output_that_no_node_writes_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"extra output 'activ': found no such tensor[\s\S]*did you mean 'active'"):
        open_engine("ort", mlp(tmp_path), EngineOptions(1, ("activ",)))


def test_operators_are_counted_with_subgraphs(tmp_path: Path) -> None:
    operators = Counter(node.operator for node in read_graph(mlp(tmp_path)).nodes)
    assert operators == {"MatMul": 2, "Relu": 1, "If": 1, "Mul": 1}


def test_a_long_field_is_walked(tmp_path: Path) -> None:
    """Lengths above 127 take several bytes; a name of 300 letters needs that everywhere."""
    name = "n" * 300
    node = h.make_node("Relu", ["x"], [name])
    info = [h.make_tensor_value_info(n, FLOAT, [2]) for n in ("x", name)]
    (tmp_path / "g.onnx").write_bytes(h.make_model(h.make_graph([node], "g", info[:1], info[1:])).SerializeToString())
    assert read_graph(tmp_path / "g.onnx").main_values == (name,)
    model = onnx.ModelProto.FromString(onnx_file.with_outputs(tmp_path / "g.onnx", [name]))
    assert [o.name for o in model.graph.output] == [name, name]


def test_executed_operators_show_what_was_fused(tmp_path: Path) -> None:
    array = onnx.numpy_helper.from_array
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"]), h.make_node("MatMul", ["d", "dw"], ["y"]),
    ]
    constants = [
        array(np.float32(0.1), "s"), array(np.uint8(128), "z"), array(np.float32(0.1), "ws"), array(np.int8(0), "wz"),
        array(np.ones((64, 32), np.int8), "w"),
    ]
    info = [h.make_tensor_value_info("x", FLOAT, ["b", 64]), h.make_tensor_value_info("y", FLOAT, ["b", 32])]
    model = of_opset_21(h.make_graph(nodes, "g", info[:1], info[1:], constants))
    onnx.save(model, tmp_path / "q.onnx")
    counts = executed_operators(tmp_path / "q.onnx", ONE)
    assert counts["com.microsoft.MatMulIntegerToFloat"] == 1
    assert counts["MatMul"] == 0
    off = executed_operators(tmp_path / "q.onnx", EngineOptions(1, settings={"optimization": "none"}))
    assert (off["MatMul"], off["DequantizeLinear"]) == (1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "a/../../w.bin", "a\\w.bin", "C:w.bin"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "in").mkdir()
    graph = mlp(tmp_path / "in", True, location)
    with pytest.raises(UnsafePath, match=r"external data: found location .* wanted a path below the graph's folder"):
        open_engine("ort", graph, ONE)


def test_weights_behind_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    graph = mlp(tmp_path / "in", True)
    (tmp_path / "in/w.bin").rename(tmp_path / "w.bin")
    (tmp_path / "in/w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(UnsafePath, match=r"'w\.bin' is a link"):
        open_engine("ort", graph, ONE)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    graph = mlp(tmp_path, True)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"external data: found no file 'w\.bin', wanted it next to g\.onnx"):
        open_engine("ort", graph, ONE)


@pytest.mark.parametrize("content", [b"", b"hello, this is no graph", b"\x3a\xff\xff\xff\xff\x0f", b"\x07"])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(EngineError, match="wanted an ONNX graph file"):
        open_engine("ort", tmp_path / "g.onnx", ONE)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_graph_that_was_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    graph = mlp(tmp_path)
    content = graph.read_bytes()
    graph.write_bytes(content[: int(part * len(content))])
    with pytest.raises(EngineError, match="wanted an ONNX graph file"):
        open_engine("ort", graph, ONE)


def test_a_graph_that_the_engine_refuses_is_quoted(tmp_path: Path) -> None:
    info = [h.make_tensor_value_info(n, FLOAT, [2]) for n in ("x", "y")]
    model = of_opset_21(h.make_graph([h.make_node("NoSuchThing", ["x"], ["y"])], "g", info[:1], info[1:]))
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"NoSuchThing[\s\S]*Next step: look at the message above"):
        open_engine("ort", tmp_path / "g.onnx", ONE)


def test_a_failure_while_running_is_quoted(tmp_path: Path) -> None:
    info = [h.make_tensor_value_info("i", onnx.TensorProto.INT64, ["n"]), h.make_tensor_value_info("y", FLOAT, ["n"])]
    table = onnx.numpy_helper.from_array(np.ones(3, np.float32), "table")
    model = of_opset_21(h.make_graph([h.make_node("Gather", ["table", "i"], ["y"])], "g", info[:1], info[1:], [table]))
    onnx.save(model, tmp_path / "g.onnx")
    engine = open_engine("ort", tmp_path / "g.onnx", ONE)
    with pytest.raises(EngineError, match="wanted inputs that the graph can compute") as caught:
        engine.run({"i": np.array([5])})
    assert "out of" in caught.value.found
    assert np.array_equal(engine.run({"i": np.array([2])})["y"], [1.0]), "the engine is usable after a failure"


def test_a_setting_s_value_is_checked(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"found optimization=most, wanted one of all, extended, basic, none"):
        open_engine("ort", mlp(tmp_path), EngineOptions(settings={"optimization": "most"}))
    settings = {"prepacking": "off", "spinning": "off", "optimization": "basic"}
    assert open_engine("ort", mlp(tmp_path), EngineOptions(1, settings=settings)).run(feeds())["y"].shape == (3, 4)


@pytest.mark.parametrize("place", ["function", "attribute list", "sparse"])
def test_a_weight_file_outside_the_folder_is_seen_wherever_it_hides(tmp_path: Path, place: str) -> None:
    secret = onnx.TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value="../secret.bin")
    info = [h.make_tensor_value_info(n, FLOAT, [2]) for n in ("x", "y")]
    model = of_opset_21(h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:]))
    if place == "function":
        node = h.make_node("Constant", [], ["c"])
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(secret)
        model.functions.append(h.make_function("local", "f", [], ["c"], [node], model.opset_import))
    elif place == "attribute list":
        model.graph.node[0].attribute.add(name="hidden", type=onnx.AttributeProto.TENSORS).tensors.append(secret)
    else:
        model.graph.sparse_initializer.add(dims=[4]).values.CopyFrom(secret)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafePath, match=r"external data: found location '\.\./secret\.bin'"):
        open_engine("ort", tmp_path / "g.onnx", ONE)


def test_graphs_that_share_an_arena_compute_what_they_compute_alone(tmp_path: Path) -> None:
    path = mlp(tmp_path)
    own, *shared = (
        open_engine("ort", path, EngineOptions(1, settings={"arena": arena})) for arena in ("own", "shared", "shared")
    )
    for rows in (3, 50, 2):
        wanted = own.run(feeds(rows))["y"]
        for engine in shared:
            np.testing.assert_array_equal(engine.run(feeds(rows))["y"], wanted)


@pytest.mark.parametrize(("backend", "version", "wanted"), [
    ("ort", "1.22.1", r"onnxruntime from 1\.23 to below 2"), ("ort", "2.0.0", r"onnxruntime from 1\.23 to below 2"),
    ("openvino", "2024.6.0-123", r"openvino from 2025\.0 on"),
])  # fmt: skip
def test_a_library_outside_the_range_is_refused_when_a_graph_is_opened(
    backend: str, version: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"quantempo.engines.{backend}")
    pytest.importorskip("onnxruntime" if backend == "ort" else "openvino")
    monkeypatch.setattr(module, "version", lambda: version)
    with pytest.raises(EngineError, match=rf"(?s)found \w+ {version}, wanted {wanted}.*pip install"):
        open_engine(backend, mlp(tmp_path), ONE)
