"""What every engine does, for every backend whose library is installed.

A backend joins by an entry in `MAKERS`: a function that writes, in the backend's format, a graph with

    inputs  x: float32 [batch, 4, 6], t: float32 [batch], label: int64 [batch], group: int64 ()
    output  y: float32 [batch, 4, 6], which depends on all of them, row by row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines import ort, trt_process
from quantempo.engines.cache import KeyParts, file_entry
from quantempo.engines.cuda_device import CudaDevice
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.ort_gpu import OrtGpuEngine
from quantempo.engines.registry import installed_backends, open_engine
from quantempo.engines.tensorrt import BuildJob, Library, version
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import EngineRecord, PlanRecord, write_record
from quantempo.errors import EngineError, MissingExtra

INPUTS = (
    TensorSpec("x", "float32", ("batch", 4, 6)), TensorSpec("t", "float32", ("batch",)),
    TensorSpec("label", "int64", ("batch",)), TensorSpec("group", "int64", ()),
)
STORED = Path(__file__).with_name("contract.onnx")
OUTPUTS = (TensorSpec("y", "float32", ("batch", 4, 6)),)
Feeds = dict[str, np.ndarray]


def echo_graph(folder: Path) -> Path:
    write_echo_graph(folder / "g.json", EchoGraph(INPUTS, OUTPUTS))
    return folder / "g.json"


def onnx_graph(folder: Path) -> Path:
    """A copy of contract.onnx, so that engines are tested where the onnx package is absent."""
    return Path(shutil.copy(STORED, folder / "g.onnx"))


def made_with_onnx() -> bytes:
    """y = x * table[group] + t + label."""
    onnx = pytest.importorskip("onnx")
    h, types = onnx.helper, {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    nodes = [
        h.make_node("Gather", ["table", "group"], ["scale"]), h.make_node("Mul", ["x", "scale"], ["scaled"]),
        h.make_node("Cast", ["label"], ["flabel"], to=onnx.TensorProto.FLOAT),
        h.make_node("Add", ["t", "flabel"], ["row"]), h.make_node("Reshape", ["row", "shape"], ["wide"]),
        h.make_node("Add", ["scaled", "wide"], ["y"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([1.0, 2.0, -1.0], np.float32), "table"),
        onnx.numpy_helper.from_array(np.array([-1, 1, 1]), "shape"),
    ]
    values = [[h.make_tensor_value_info(s.name, types[s.dtype], s.shape) for s in side] for side in (INPUTS, OUTPUTS)]
    model = h.make_model(h.make_graph(nodes, "g", *values, constants), opset_imports=[h.make_opsetid("", 21)])
    model.ir_version = 10
    content: bytes = model.SerializeToString()
    return content


def compiled_graph(library: Library, folder: Path) -> Path:
    """The same graph in the layout of a bundle, with a plan for the GPU beside it where there is one."""
    (folder / "graphs").mkdir()
    graph = Path(shutil.copy(STORED, folder / "graphs" / "g.onnx"))
    try:
        capability = CudaDevice.open().capability
    except (EngineError, MissingExtra):
        return graph
    place = folder / "engines" / "here"
    place.mkdir(mode=0o700, parents=True)
    job = BuildJob(library, str(graph), str(place / "g.plan"), capability, (parse_profile("batch=1:2:8"),))
    trt_process.build(job)
    entry = file_entry(place / "g.plan")
    parts = KeyParts(graph="", backend=library, version=version(library), device=capability)
    plan = PlanRecord("g.plan", entry, entry.size, parts, job.profiles)
    write_record(place, EngineRecord("here", library, version(library), capability, "", {"g": plan}))
    return graph


MAKERS: dict[str, Callable[[Path], Path]] = {
    "echo": echo_graph, "ort": onnx_graph, "openvino": onnx_graph, "tensorrt": partial(compiled_graph, "tensorrt"),
    "tensorrt-rtx": partial(compiled_graph, "tensorrt_rtx"), "ort-cuda": onnx_graph, "ort-rtx": onnx_graph,
    "ort-tensorrt": onnx_graph,
}


GPU = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-rtx", "ort-tensorrt")
STAND_IN = "ort-gpu on the CPU"
"""The binding of the GPU providers, with tensors that ONNX Runtime keeps on the host."""


@pytest.fixture(params=(*installed_backends(), STAND_IN))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    if request.param == STAND_IN:
        graph, options = onnx_graph(tmp_path), EngineOptions(threads=1)
        session = ort.open_session(graph, options, ort.session_options(ort.DEFAULTS | {"integers": "fast"}, 1))
        return OrtGpuEngine(STAND_IN, session, memory="cpu")
    if request.param in GPU:
        try:
            CudaDevice.open()
        except (EngineError, MissingExtra) as error:
            pytest.skip(f"{request.param} runs on a GPU: {error.found}")
    return open_engine(request.param, MAKERS[request.param](tmp_path), EngineOptions(threads=1))


def feeds(batch: int = 2, seed: int = 0) -> Feeds:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((batch, 4, 6)).astype(np.float32), "t": random.random(batch).astype(np.float32),
        "label": random.integers(0, 9, batch), "group": np.array(1, np.int64),
    }


def test_inputs_and_outputs_are_described(engine: Engine) -> None:
    assert tuple(engine.inputs.values()) == INPUTS
    assert tuple(engine.outputs.values()) == OUTPUTS


def test_every_input_moves_the_output(engine: Engine) -> None:
    plain = engine.run(feeds())["y"]
    for name, value in feeds().items():
        changed = {**feeds(), name: value + 1 if name != "group" else np.array(2, np.int64)}
        assert not np.allclose(engine.run(changed)["y"], plain), name


def test_run_is_bind_and_run(engine: Engine) -> None:
    binding = engine.bind({"batch": 2})
    for name, value in feeds().items():
        binding.inputs[name].upload(value)
    binding.run()
    assert np.array_equal(binding.outputs["y"].download(), engine.run(feeds())["y"])


def test_the_batch_is_symbolic_and_rows_are_independent(engine: Engine) -> None:
    many = feeds(5)
    whole = engine.run(many)["y"]
    for row in range(5):
        alone = {name: v if name == "group" else v[row : row + 1] for name, v in many.items()}
        np.testing.assert_allclose(engine.run(alone)["y"], whole[row : row + 1], rtol=1e-6, atol=1e-6)


def test_a_write_into_a_bound_buffer_is_seen_without_binding_again(engine: Engine) -> None:
    if not engine.host:
        pytest.skip("the buffers of this engine are not host memory")
    binding = engine.bind({"batch": 2})
    out = binding.outputs["y"].array
    address = out.ctypes.data
    for seed in range(3):
        for name, value in feeds(2, seed).items():
            binding.inputs[name].array[...] = value
        binding.run()
        assert np.array_equal(out, engine.run(feeds(2, seed))["y"])
        assert binding.outputs["y"].array.ctypes.data == address


def test_buffers_belong_to_their_binding(engine: Engine) -> None:
    """The caller's arrays are neither kept nor changed, and what was returned stays as it was."""
    given = feeds()
    kept = {name: value.copy() for name, value in given.items()}
    first = engine.run(given)["y"]
    copy = first.copy()
    given["x"][...] = 99.0
    engine.run(feeds(2, 1))
    assert np.array_equal(first, copy)
    given["x"][...] = kept["x"]
    assert all(np.array_equal(given[name], kept[name]) for name in given)
    first[...] = 7.0
    assert np.array_equal(engine.run(given)["y"], copy)


def test_two_bindings_do_not_touch_each_other(engine: Engine) -> None:
    one, two = engine.bind({"batch": 2}), engine.bind({"batch": 2})
    for binding, seed in ((one, 0), (two, 1)):
        for name, value in feeds(2, seed).items():
            binding.inputs[name].upload(value)
    one.run()
    before = one.outputs["y"].download()
    two.run()
    assert np.array_equal(one.outputs["y"].download(), before)
    assert not np.array_equal(two.outputs["y"].download(), before)


def test_a_binding_may_work_on_another_one_s_buffer(engine: Engine) -> None:
    one = engine.bind({"batch": 2})
    two = engine.bind({"batch": 2}, {"x": one.outputs["y"]})
    for binding in (one, two):
        for name, value in feeds().items():
            if binding is one or name != "x":
                binding.inputs[name].upload(value)
    one.run()
    two.run()
    chained = engine.run({**feeds(), "x": one.outputs["y"].download()})["y"]
    assert np.array_equal(two.outputs["y"].download(), chained)


def test_not_a_number_passes_through(engine: Engine) -> None:
    given = feeds()
    given["x"][1] = np.nan
    out = engine.run(given)["y"]
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[0]).all()


def refused(engine: Engine, changes: dict[str, np.ndarray | None], words: str) -> None:
    given = {name: value for name, value in {**feeds(), **changes}.items() if value is not None}
    with pytest.raises(EngineError, match=words):
        engine.run(given)


def test_a_missing_input_is_named(engine: Engine) -> None:
    refused(engine, {"t": None}, r"found no value for 't', wanted a value for each of 'x', 't', 'label', 'group'")


def test_an_extra_input_is_named_in_another_sentence(engine: Engine) -> None:
    words = r"found a value for 'lable', which the graph does not have[\s\S]*did you mean 'label'"
    refused(engine, {"lable": np.zeros(2)}, words)


def test_a_wrong_type_is_named(engine: Engine) -> None:
    refused(engine, {"x": np.zeros((2, 4, 6))}, r"input 'x': found type float64, wanted type float32")
    refused(engine, {"label": np.zeros(2, np.int32)}, r"input 'label': found type int32, wanted type int64")


@pytest.mark.parametrize(
    ("shape", "legal"), [((2, 4, 7), (2, 4, 6)), ((4, 6), (1, 4, 6)), ((2, 3, 5), (2, 4, 6)), ((0, 4, 6), (1, 4, 6))]
)
def test_a_wrong_shape_is_refused_with_the_nearest_legal(
    engine: Engine, shape: tuple[int, ...], legal: tuple[int, ...]
) -> None:
    words = rf"input 'x': found shape \({', '.join(map(str, shape))}\), wanted shape \(batch, 4, 6\)"
    nearest = rf"[\s\S]*nearest shape that the graph takes is \({', '.join(map(str, legal))}\)"
    refused(engine, {"x": np.zeros(shape, np.float32)}, words + nearest)


def test_two_sizes_for_one_symbol_are_refused(engine: Engine) -> None:
    refused(engine, {"t": np.zeros(3, np.float32)}, r"input 't': found batch = 3, wanted batch = 2, as in 'x'")


def test_an_upload_of_another_size_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"input 'x': found shape \(3, 4, 6\), wanted shape \(2, 4, 6\)"):
        engine.bind({"batch": 2}).inputs["x"].upload(np.zeros((3, 4, 6), np.float32))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "bind: found no size for 'batch'"),
        ({"batch": 0}, r"found batch = 0[\s\S]*nearest legal size is batch = 1"),
        ({"batch": 1, "batsch": 2}, "a size for 'batsch', which the graph does not have"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(engine: Engine, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        engine.bind(sizes)


def test_close_may_be_called_twice_and_then_nothing_runs(engine: Engine) -> None:
    binding = engine.bind({"batch": 2})
    engine.close()
    engine.close()
    for action in (binding.run, lambda: engine.run(feeds()), lambda: engine.bind({"batch": 1})):
        with pytest.raises(EngineError, match="found a closed engine, wanted an open one"):
            action()


@pytest.mark.parametrize("backend", installed_backends())
def test_files_and_settings_that_do_not_fit_are_refused(backend: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="found no such file"):
        open_engine(backend, tmp_path / "nothing")
    graph = MAKERS[backend](tmp_path)
    with pytest.raises(EngineError, match=r"settings: found '?turbo"):
        open_engine(backend, graph, EngineOptions(settings={"turbo": "on"}))
    with pytest.raises(EngineError, match="extra output 'nowhere': found no such tensor"):
        open_engine(backend, graph, EngineOptions(extra_outputs=("nowhere",)))


def test_the_stored_graph_is_what_its_source_makes() -> None:
    """After a change: write `made_with_onnx()` to contract.onnx."""
    assert made_with_onnx() == STORED.read_bytes()


def test_every_backend_has_a_maker() -> None:
    assert set(installed_backends()) <= set(MAKERS)
