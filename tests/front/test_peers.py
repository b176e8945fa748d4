"""benchmarks/peers.py: other models as engines, settings that do what they say, failures that are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.registry import open_engine

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers as module

    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_a_module_is_an_engine(peers: ModuleType) -> None:
    """What a module returns beyond the latents' channels is left out; bfloat16 is really taken, by the sample alone."""
    import torch

    class Denoiser(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            assert timestep.dtype == torch.float32
            return (torch.cat([sample * 1.01, -sample], dim=1),)

    shape = ("batch", 4, 2, 2)
    specs = TensorSpec("sample", "float32", shape), TensorSpec("timestep", "float32", ("batch",))
    feeds = {"sample": np.random.default_rng(0).standard_normal((3, 4, 2, 2), np.float32), "timestep": np.ones(3, "f")}
    error = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = peers.EagerEngine(Denoiser(), dtype, specs, [TensorSpec("prediction", "float32", shape)])
        error[dtype] = np.abs(engine.run(feeds)["prediction"] - 1.01 * feeds["sample"]).max()
    assert error[torch.float32] < 1e-6 < error[torch.bfloat16] < 0.1


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two layers with weights, and a product of their results that is like attention."""
    rng = np.random.default_rng(0)
    weights = [onnx.numpy_helper.from_array(rng.standard_normal((16, 16), np.float32), f"{n}.weight") for n in "ab"]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "a.weight"], ["a/product"], "a/product"),
        onnx.helper.make_node("MatMul", ["x", "b.weight"], ["b/product"], "b/product"),
        onnx.helper.make_node("Transpose", ["b/product"], ["turned"], "turned", perm=[0, 2, 1]),
        onnx.helper.make_node("MatMul", ["a/product", "turned"], ["scores"], "scores"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 8, d])
            for n, d in (("x", 16), ("scores", 8))]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 21)],
    )
    onnx.save(model, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


@pytest.mark.parametrize(("ours", "quantized"), [(False, {"a/product", "b/product"}), (True, {"b/product"})])
def test_quantize_static_keeps_what_it_is_told_and_attention(
    graph: Path, peers: ModuleType, ours: bool, quantized: set[str]
) -> None:
    tools = peers.peer_tools
    rng = np.random.default_rng(1)
    rows = [{"x": rng.standard_normal((1, 8, 16), np.float32)} for _ in range(6)]
    tool = tools.OrtStatic("MinMax", True, float_outputs=True, ours=ours)
    made = tool.quantize(tools.Job(None, graph, rows, ("a/product",), graph.parent))
    nodes = onnx.load(made).graph.node
    restored = {out for node in nodes if node.op_type == "DequantizeLinear" for out in node.output}
    # An input that another product reads as well stays rounded; the weight tells.
    assert {node.name for node in nodes if node.op_type == "MatMul" and node.input[1] in restored} == quantized
    exact, found = (
        open_engine("ort", path, EngineOptions(threads=1)).run(rows[0])["scores"] for path in (graph, made)
    )
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    assert peers.bytes_of(made) == made.stat().st_size


def test_bytes_of_a_shared_weight_file_are_those_of_the_graph_alone(
    graph: Path, peers: ModuleType, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(graph), outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with (tmp_path / "weights.bin").open("ab") as file:
        file.write(bytes(10_000))  # of another graph
    assert peers.bytes_of(outside) == outside.stat().st_size + 2 * 16 * 16 * 4


def test_a_layer_that_is_not_there_is_an_error(graph: Path, peers: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"has 0 products 'nothing/product'"):
        peers.peer_tools.nodes_that_make(graph, ["nothing/product"])


def test_a_failure_is_kept_with_its_words_and_forgotten_once_it_works(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    results = peers.Results(path)
    with results.failures("fidelity", "dit", "tool"):
        peers.peer_tools.run([sys.executable, "-c", "raise ValueError('no such\\nmodel')"])
    (words,) = json.loads(path.read_text())["failures"]["fidelity"]["dit"].values()
    assert words == "ToolFailed: exit code 1: ValueError: no such"
    with peers.Results(path).failures("fidelity", "dit", "tool"):
        results = peers.Results(path)
        results.drop("failures", "fidelity", "dit", "tool")
        results.put(1, "fidelity", "dit", "seconds", "tool")
    assert json.loads(path.read_text())["failures"]["fidelity"]["dit"] == {}


@pytest.mark.parametrize(("rows", "size"), [(1000, 50), (300, 50), (7, 7), (101, 1), (1, 1)])
def test_the_rows_are_read_in_equal_parts(peers: ModuleType, rows: int, size: int) -> None:
    assert peers.peer_tools.stride(rows) == size


def test_the_command_that_is_recorded_names_no_place_of_one_machine(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["peers.py", "--work", "/a", "--modelopt", "/b/python", "--json", "/c/docs/peers.json", "--rows", "9"]
    monkeypatch.setattr(sys, "argv", given)
    assert peers.command() == (
        "python benchmarks/peers.py --modelopt MODELOPT_PYTHON --json docs/peers.json --rows 9"
    )
