"""Graphs that share weight files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.quant_graphs import GraphMaker, min_max_table, run

from quantempo.errors import ExportError, OutputExists
from quantempo.export.graph_files import ALIGNMENT, INLINE_BYTES, write_graphs
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import lower_portable
from quantempo.export.weights import quantize_weights

DATA = {"x": np.random.default_rng(1).standard_normal((2, 6, 48)).astype(np.float32)}


def graphs() -> dict[str, ir.Model]:
    maker = GraphMaker({"x": (2, 6, 48)})
    y = maker.op("Relu", [maker.matmul(maker.inputs["x"], 48, 600, "a")], "relu")
    model = maker.model(maker.matmul(y, 600, 48, "b"))
    plan = maker.plan()
    table, weights = min_max_table(model, plan, [DATA]), quantize_weights(model, plan)
    return {
        "full.ort-f32": lower_ort(model, plan, table, weights),
        "full.portable-f32": lower_portable(model, plan, table, weights),
        "full.float-f32": model,
    }


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, ["CPUExecutionProvider"])


def test_both_dialects_read_one_file_of_int8_weights(tmp_path: Path) -> None:
    made = graphs()
    del made["full.float-f32"]
    written = write_graphs(tmp_path, made)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "full.ort-f32.onnx", "full.portable-f32.onnx", "weights.float32.bin", "weights.int8.bin",
    ]
    for name in made:
        assert written[name].file == f"{name}.onnx"
        assert written[name].data == ("weights.float32.bin", "weights.int8.bin")
    # Two weights of 48 · 600, each once and the second one aligned.
    assert (tmp_path / "weights.int8.bin").stat().st_size == -(-28800 // ALIGNMENT) * ALIGNMENT + 28800


@pytest.mark.parametrize("name", ["full.ort-f32", "full.portable-f32", "full.float-f32"])
def test_a_written_graph_computes_what_the_graph_in_memory_does(tmp_path: Path, name: str) -> None:
    made = graphs()
    write_graphs(tmp_path, made)
    feeds = DATA if name == "full.float-f32" else {**DATA, "scale_group": np.array(0)}
    opened = session(tmp_path / f"{name}.onnx")
    np.testing.assert_array_equal(opened.run(None, feeds)[0], run(made[name], feeds)[0])


def test_small_tensors_stay_inline_and_large_ones_are_aligned(tmp_path: Path) -> None:
    write_graphs(tmp_path, graphs())
    proto = onnx.load(tmp_path / "full.ort-f32.onnx", load_external_data=False)
    kept = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert kept["b.bias"] == {}
    assert INLINE_BYTES < 600 * 4
    assert "offset" in kept["a.bias"]
    for entry in kept.values():
        if entry:
            assert int(entry["offset"]) % ALIGNMENT == 0
            assert "/" not in entry["location"]


def test_writing_twice_gives_the_same_bytes_and_leaves_the_graphs_alone(tmp_path: Path) -> None:
    made = graphs()
    before = {name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in made.items()}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_graphs(tmp_path / folder, made if folder == "one" else graphs())
    assert before == {name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in made.items()}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_exporter_metadata_with_paths_is_not_written(tmp_path: Path) -> None:
    made = graphs()
    node = made["full.float-f32"].graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/someone/model.py"
    node.metadata_props["module"] = "a"
    write_graphs(tmp_path, made)
    assert b"/home/someone" not in (tmp_path / "full.float-f32.onnx").read_bytes()
    assert ir.load(tmp_path / "full.float-f32.onnx").graph[0].metadata_props["module"] == "a"
    assert "pkg.torch.onnx.stack_trace" in node.metadata_props


def test_an_existing_file_is_not_overwritten_and_nothing_is_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "full.portable-f32.onnx").write_text("mine")
    with pytest.raises(OutputExists, match=r"full\.portable-f32\.onnx: found a file, wanted a free name"):
        write_graphs(tmp_path, graphs())
    assert [p.name for p in tmp_path.iterdir()] == ["full.portable-f32.onnx"]


def test_an_initializer_without_a_value_is_refused_by_name(tmp_path: Path) -> None:
    made = graphs()
    made["full.float-f32"].graph.initializers["a.weight"].const_value = None
    with pytest.raises(ExportError, match=r"initializer 'a\.weight': found no value"):
        write_graphs(tmp_path, made)
    assert not list(tmp_path.iterdir())


def test_graphs_that_were_read_from_a_folder_can_be_written_to_another(tmp_path: Path) -> None:
    made = graphs()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    # Saved by another writer, which keeps even the smallest tensors outside the graph.
    ir.save(made["full.float-f32"], tmp_path / "one" / "g.onnx", external_data="g.data", size_threshold_bytes=0)
    write_graphs(tmp_path / "two", {"g": ir.load(tmp_path / "one" / "g.onnx")})
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["g.onnx", "weights.float32.bin"]
    expected = run(made["full.float-f32"], DATA)[0]
    np.testing.assert_array_equal(session(tmp_path / "two" / "g.onnx").run(None, DATA)[0], expected)
