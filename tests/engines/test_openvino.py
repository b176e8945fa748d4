"""OpenVINO runs the portable dialect in integers, in place, with the group as an input."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.quant_graphs import GraphMaker, min_max_table, run, sqnr_db, tap

from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.plan import Keep
from quantempo.engines import openvino
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.registry import open_engine
from quantempo.errors import EngineError, UnsafePath
from quantempo.export.graph_files import write_graphs
from quantempo.export.lower_ort import lower_ort
from quantempo.export.lower_portable import lower_portable
from quantempo.export.quantize_attention import attention_tensors, quantize_attention

# Not `importorskip`: a plain import of the library reports itself to its vendor.
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
ONE = EngineOptions(threads=1)


def data(group: int, rows: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(group)
    shapes = {"x": (rows, 16, 64), "p": (rows, 16, 8, 8)}
    return {n: (rng.standard_normal(s) * (1 + group) + 0.3).astype(np.float32) for n, s in shapes.items()}


class Toy:
    """Two chained products and a convolution, three scale groups: float and portable, in memory and as files."""

    def __init__(self, folder: Path) -> None:
        maker = GraphMaker({"x": ("batch", 16, 64), "p": ("batch", 16, 8, 8)})
        hidden = maker.op("Relu", [maker.matmul(maker.inputs["x"], 64, 96, "a")], "relu")
        self.float = maker.model(maker.matmul(hidden, 96, 64, "b"), maker.conv(maker.inputs["p"], 16, 32, "c"))
        self.plan = maker.plan()
        self.table = min_max_table(self.float, self.plan, [data(g) for g in range(3)])
        self.portable = lower_portable(self.float, self.plan, self.table)
        contrib = lower_ort(self.float, self.plan, self.table)
        write_graphs(folder, {"float": self.float, "portable": self.portable, "ort": contrib})
        self.folder = folder

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


def feeds(group: int, rows: int = 2) -> dict[str, np.ndarray]:
    return {**data(group, rows), "scale_group": np.array(group)}


@pytest.mark.parametrize("sizes", [{"batch": 2}, None])
def test_every_quantized_site_computes_in_integers(toy: Toy, sizes: dict[str, int] | None) -> None:
    executed = openvino.executed_precisions(toy.file("portable"), ONE, sizes)
    assert executed["FullyConnected:i8"] == 2
    assert executed["Convolution:u8"] + executed["Convolution:i8"] == 1
    products = {k for k in executed if k.startswith(("FullyConnected", "MatMul", "Convolution"))}
    assert not {k for k in products if not k.endswith(("i8", "u8"))}
    assert openvino.sites_in_float(toy.file("portable"), ONE, sizes) == ()


def test_a_site_that_computes_in_float_is_named(toy: Toy, tmp_path: Path) -> None:
    # A scale per input channel cannot be taken out of the sum.
    model = toy.portable.clone()
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[0].name.startswith("x."):
            for index, value in ((1, np.linspace(0.01, 0.05, 64, dtype=np.float32)), (2, np.zeros(64, np.int8))):
                name = f"{node.outputs[0].name}.{index}"
                constant = ir.Value(name=name, const_value=ir.tensor(value, name=name))
                model.graph.register_initializer(constant)
                node.replace_input_with(index, constant)
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
    ir.save(model, tmp_path / "per_channel.onnx")
    assert openvino.sites_in_float(tmp_path / "per_channel.onnx", ONE, {"batch": 2}) == ("a.product.product/MatMul",)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_the_group_input_chooses_the_scales_and_the_result_is_that_of_the_reference(toy: Toy, group: int) -> None:
    with_engine = open_engine("openvino", toy.file("portable"), ONE)
    assert with_engine.inputs["scale_group"].shape == ()
    got = with_engine.run(feeds(group))
    reference = run(toy.portable, feeds(group), optimize=False)
    for expected, value, exact in zip(reference, got.values(), run(toy.float, data(group)), strict=True):
        assert sqnr_db(exact, value) > 33
        assert sqnr_db(expected, value) > sqnr_db(exact, expected) + 6
    other = with_engine.run({**feeds(group), "scale_group": np.array((group + 1) % 3)})
    assert any(not np.array_equal(other[name], got[name]) for name in got)


def test_a_float_graph_is_exact_with_the_default_precision_and_faster_types_are_a_choice(toy: Toy) -> None:
    expected = run(toy.float, data(0))
    exact = open_engine("openvino", toy.file("float"), ONE).run(data(0))
    for value, wanted in zip(exact.values(), expected, strict=True):
        assert np.abs(value - wanted).max() <= 2e-6 * np.abs(wanted).max()
    narrow = EngineOptions(threads=1, settings={"precision": "bf16"})
    engine = openvino.open_engine(toy.file("float"), narrow)
    assert str(engine.compiled({"batch": 2}).get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'bfloat16'>"
    rounded = engine.run(data(0))
    assert all(sqnr_db(w, v) > 35 for v, w in zip(rounded.values(), expected, strict=True))


def test_auto_is_the_narrowest_type_that_the_cpu_computes_natively(toy: Toy) -> None:
    engine = openvino.open_engine(toy.file("float"), EngineOptions(threads=1, settings={"precision": "auto"}))
    assert engine.properties()["INFERENCE_PRECISION_HINT"] == openvino.native_precision()
    assert openvino.native_precision() in ("bf16", "f16", "f32")
    assert engine.run(data(0))


def test_buffers_are_read_and_written_in_place(toy: Toy) -> None:
    engine = open_engine("openvino", toy.file("portable"), ONE)
    binding = engine.bind({"batch": 2})
    addresses = {n: b.array.ctypes.data for n, b in (*binding.inputs.items(), *binding.outputs.items())}
    results = []
    for group in (0, 1):
        for name, value in feeds(group).items():
            binding.inputs[name].array[...] = value
        binding.run()
        results.append({n: b.array.copy() for n, b in binding.outputs.items()})
        expected = engine.run(feeds(group))
        for name, value in results[-1].items():
            np.testing.assert_array_equal(value, expected[name])
    assert not np.array_equal(results[0]["b.out"], results[1]["b.out"])
    assert addresses == {n: b.array.ctypes.data for n, b in (*binding.inputs.items(), *binding.outputs.items())}


def test_each_bound_size_is_compiled_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = openvino.open_engine(toy.file("portable"), ONE)
    built: list[object] = []
    build = engine._build
    monkeypatch.setattr(engine, "_build", lambda sizes: (built.append(dict(sizes)), build(sizes))[1])
    for rows in (1, 2, 1, 3, 2):
        shapes = {n: v.shape[0] for n, v in engine.run(feeds(0, rows)).items()}
        assert set(shapes.values()) == {rows}
    assert built == [{"batch": 1}, {"batch": 2}, {"batch": 3}]


def test_free_shapes_give_the_same_numbers(toy: Toy) -> None:
    fixed = open_engine("openvino", toy.file("portable"), ONE).run(feeds(1))
    free = openvino.open_engine(toy.file("portable"), EngineOptions(threads=1, settings={"shapes": "free"}))
    got = free.run(feeds(1))
    assert all(sqnr_db(fixed[name], got[name]) > 45 for name in fixed)
    assert free.compiled({"batch": 2}) is free.compiled({"batch": 7})


def test_inner_tensors_come_out_and_leave_the_rest_as_it_is(toy: Toy) -> None:
    taps = ("relu", "a.product")
    plain = open_engine("openvino", toy.file("float"), ONE).run(data(0))
    engine = open_engine("openvino", toy.file("float"), EngineOptions(threads=1, extra_outputs=taps))
    assert engine.outputs["relu"].shape == ("batch", 16, 96)
    got = engine.run(data(0))
    for name, wanted in zip(taps, run(toy.float, data(0), taps), strict=True):
        assert np.abs(got[name] - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert list(got) == [*plain, *taps]
    assert all(np.allclose(got[n], plain[n], atol=1e-5) for n in plain)


def test_an_unknown_tap_is_refused_with_the_nearest_name(toy: Toy) -> None:
    with pytest.raises(EngineError, match=r"extra output 'relo'.*\n.*\n.*did you mean 'relu'"):
        open_engine("openvino", toy.file("float"), EngineOptions(extra_outputs=("relo",)))


def test_weights_stored_as_int8_do_not_make_the_activations_int8(tmp_path: Path) -> None:
    # OpenVINO's default is to quantize the activations of such layers as they come: 47 dB here instead of 136.
    maker = GraphMaker({"x": ("batch", 16, 64)})
    model = maker.model(maker.matmul(maker.matmul(maker.inputs["x"], 64, 64, "a"), 64, 64, "b"))
    plan = maker.plan(b=Keep("sensitive", weight_storage="int8"))
    feed = {"x": data(0)["x"]}
    lowered = lower_portable(model, plan, min_max_table(model, plan, [feed]))
    write_graphs(tmp_path, {"kept": lowered})
    executed = openvino.executed_precisions(tmp_path / "kept.onnx", ONE, {"batch": 2})
    assert executed["FullyConnected:f32"] == 1
    full = {**feed, "scale_group": np.array(0)}
    got = open_engine("openvino", tmp_path / "kept.onnx", ONE).run(full)
    assert sqnr_db(run(lowered, full, optimize=False)[0], got["b.out"]) > 100


def test_compiled_graphs_are_kept_in_the_engine_cache(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(threads=1, settings={"cache": str(tmp_path / "cache")})
    first = openvino.open_engine(toy.file("portable"), options).run(feeds(1))
    monkeypatch.setattr(openvino.OpenVinoEngine, "_build", lambda *_: pytest.fail("a hit must not compile"))
    again = openvino.open_engine(toy.file("portable"), options).run(feeds(1))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_graph_of_another_dialect_is_refused_in_openvinos_own_words(toy: Toy) -> None:
    words = r"(?s)Conversion is failed for: .*QLinearConv.*wanted a graph that OpenVINO opens"
    with pytest.raises(EngineError, match=words):
        open_engine("openvino", toy.file("ort"), ONE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precison": "f32"}, "did you mean 'precision'"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"streams": "0"}, "streams=0.*a number of at least 1"),
        ({"shapes": "dynamic"}, "shapes=dynamic.*fixed, free"),
    ],
)
def test_a_wrong_setting_is_refused(toy: Toy, settings: dict[str, str], words: str) -> None:
    with pytest.raises(EngineError, match=f"(?s){words}"):
        openvino.open_engine(toy.file("float"), EngineOptions(settings=settings))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        openvino.open_engine(tmp_path / "nothing.onnx", ONE)
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(EngineError, match="wanted an ONNX graph file"):
        openvino.open_engine(tmp_path / "text.onnx", ONE)


def test_weights_behind_a_link_are_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "float.onnx").write_bytes(toy.file("float").read_bytes())
    (tmp_path / "weights.float32.bin").symlink_to(toy.folder / "weights.float32.bin")
    with pytest.raises(UnsafePath, match="is a link"):
        openvino.open_engine(tmp_path / "float.onnx", ONE)


def test_an_input_has_the_name_of_the_file_where_copies_of_it_have_others(tmp_path: Path) -> None:
    maker = GraphMaker({"x": ("batch", 8), "zz": ("batch", 8)})
    copy = maker.op("Identity", [maker.inputs["zz"]], "a copy")
    write_graphs(tmp_path, {"g": maker.model(maker.op("Add", [maker.inputs["x"], copy], "sum"))})
    given = {"x": np.ones((2, 8), np.float32), "zz": np.full((2, 8), 2, np.float32)}
    engine = open_engine("openvino", tmp_path / "g.onnx", ONE)
    assert set(engine.inputs) == {"x", "zz"}
    assert next(iter(engine.run(given).values())).tolist() == [[3.0] * 8] * 2


def test_a_chain_that_openvino_has_too_few_registers_for_is_not_fused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, asked = openvino._core(), []

    class Short:
        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def compile_model(self, model: object, device: str, properties: dict[str, object]) -> object:
            asked.append(properties.get("SNIPPETS_MODE"))
            if asked[-1] is None:
                raise RuntimeError("failed at src/common/snippets/src/lowered/pass/assign_registers.cpp")
            return core.compile_model(model, device, properties)

    monkeypatch.setattr(openvino, "_core", lambda: Short())
    assert open_engine("openvino", toy.file("float"), ONE).run(data(0))
    assert asked == [None, "DISABLE"]


def test_a_closed_engine_says_so(toy: Toy) -> None:
    engine = open_engine("openvino", toy.file("float"), ONE)
    binding = engine.bind({"batch": 1})
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="a closed engine"):
        engine.run(data(0))
    with pytest.raises(EngineError, match="a closed engine"):
        binding.run()


def test_importing_the_library_reports_nothing_to_anybody() -> None:
    code = (
        "import sys; from quantempo.engines import openvino; openvino.version();"
        "print('openvino_telemetry' in sys.modules, 'openvino.tools.ovc.telemetry_stub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def attention_graph() -> GraphMaker:
    """A modulated input, which is centred, and two heads that look at it."""
    maker = GraphMaker({"x": (2, 16, 64), "shift": (2, 1, 64)})
    modulated = maker.op("Add", [maker.inputs["x"], maker.inputs["shift"]], "modulated")
    shape = maker.constant("heads", np.array([0, 0, 2, 32]))

    def part(name: str, *perm: int) -> ir.Value:
        split = maker.op("Reshape", [maker.matmul(modulated, 64, 64, name), shape], f"{name}.heads")
        return maker.op("Transpose", [split], f"{name}.t", perm=list(perm))

    query = maker.op("Mul", [part("q", 0, 2, 1, 3), maker.constant("scale", np.float32(32**-0.5))], "query")
    scores = maker.op("MatMul", [query, part("k", 0, 2, 3, 1)], "scores")
    weights = maker.op("Softmax", [scores], "p", axis=-1)
    mixed = maker.op("MatMul", [weights, part("v", 0, 2, 1, 3)], "mixed")
    maker.result = maker.op("Transpose", [mixed], "tokens", perm=[0, 2, 1, 3])
    return maker


@pytest.mark.parametrize("products", ["scores", "both"])
def test_quantized_attention_computes_in_integers_on_a_centred_input_with_groups(tmp_path: Path, products: str) -> None:
    maker = attention_graph()
    model, plan = maker.model(maker.result), replace(maker.plan(), centred=("modulated",))
    rng = np.random.default_rng(0)
    inputs = [
        {"x": rng.standard_normal((2, 16, 64)).astype(np.float32) * (1 + group),
         "shift": np.repeat(rng.standard_normal((1, 1, 64)).astype(np.float32), 2, 0)}
        for group in range(3)
    ]
    table = min_max_table(model, plan, inputs)
    centres = {"modulated": np.stack([given["shift"][0, 0] for given in inputs])}
    tensors = {n: replace(s, centre=centres.get(n)) for n, s in table.tensors.items()}
    lowered = lower_portable(model, plan, replace(table, tensors=tensors))
    runs = [tap(model, given, list(attention_tensors(model, "int8"))) for given in inputs]
    ranges = {name: max(float(np.abs(run[name]).max()) for run in runs) for name in runs[0]}
    assert quantize_attention(lowered, ranges, "int8", products) == 1  # type: ignore[arg-type]
    write_graphs(tmp_path, {"attention": lowered})
    path = tmp_path / "attention.onnx"
    assert openvino.sites_in_float(path, ONE, {}) == ()
    assert len(read_graph(path).quantized_products()) == (5 if products == "both" else 4)
    for group, given in enumerate(inputs):
        (found,) = open_engine("openvino", path, ONE).run({**given, "scale_group": np.array(group)}).values()
        assert sqnr_db(run(model, given)[0], found) > 25, group
