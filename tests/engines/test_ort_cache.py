"""Optimized graphs of ONNX Runtime are kept, found again without any optimizer work, and never trusted blindly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantempo.contracts.engine import EngineOptions
from quantempo.engines import ort
from quantempo.engines.cpu import CpuFeatures, parse_cpu
from quantempo.engines.registry import cache_key, open_engine
from quantempo.engines.saturation import SaturationNotice
from quantempo.errors import EngineError

onnx = pytest.importorskip("onnx")
ONLY_AVX2 = parse_cpu("flags : sse4_1 avx2", "x86_64")
WITH_VNNI = parse_cpu("flags : sse4_1 avx2 avx512f avx512_vnni", "x86_64")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return quantized_product(tmp_path)


def quantized_product(folder: Path, top: int = 127) -> Path:
    """`y = DQ(Q(x)) · DQ(w)` with U8 activations and weights up to `top`, in a weight file of its own."""
    h, types = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(0)
    weight = random.integers(-top, top + 1, (64, 32)).astype(np.int8)
    weight[0, 0] = top
    constants = {
        "scale": np.float32(0.02), "zero": np.uint8(120), "w": weight, "ws": np.full(32, 0.01, np.float32),
        "wz": np.zeros(32, np.int8),
    }
    nodes = [
        h.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        h.make_node("MatMul", ["d", "wd"], ["p"]), h.make_node("Relu", ["p"], ["y"]),
    ]
    made = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", types.FLOAT, ["batch", 64])],
        [h.make_tensor_value_info("y", types.FLOAT, ["batch", 32])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = h.make_model(made, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, folder / "g.onnx", save_as_external_data=True, location="w.bin", size_threshold=256)
    return folder / "g.onnx"


def options(folder: Path, **settings: str) -> EngineOptions:
    return EngineOptions(threads=1, settings={"cache": str(folder), **settings})


X = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graphs that ONNX Runtime was asked to optimize and save."""
    calls: list[Path] = []
    real = ort.save_optimized

    def counted(graph: Path, *rest: Any) -> Path:
        calls.append(graph)
        return real(graph, *rest)

    monkeypatch.setattr(ort, "save_optimized", counted)
    return calls


def level(engine: Any) -> str:
    return str(engine._session.get_session_options().graph_optimization_level).rpartition(".")[2]


def test_a_hit_calls_no_builder_and_opens_without_optimizing(graph: Path, tmp_path: Path, builds: list[Path]) -> None:
    folder = tmp_path / "cache"
    plain = open_engine("ort", graph, EngineOptions(1)).run(X)["y"]
    first = open_engine("ort", graph, options(folder))
    assert builds == [graph]
    np.testing.assert_array_equal(first.run(X)["y"], plain)
    second = open_engine("ort", graph, options(folder))
    assert builds == [graph], "a hit has to call no builder"
    assert level(second) == "ORT_DISABLE_ALL", "what was optimized must not be optimized again"
    np.testing.assert_array_equal(second.run(X)["y"], plain)
    assert list(second.inputs.values()) == list(open_engine("ort", graph).inputs.values())


def test_taps_are_part_of_the_key(graph: Path, tmp_path: Path, builds: list[Path]) -> None:
    folder = tmp_path / "cache"
    open_engine("ort", graph, options(folder))
    for _ in range(2):
        tapped = open_engine("ort", graph, EngineOptions(1, ("p",), {"cache": str(folder)}))
        out = tapped.run(X)
        np.testing.assert_array_equal(np.maximum(out["p"], 0), out["y"])
    assert len(builds) == 2


@pytest.mark.parametrize("victim", [ort.OPTIMIZED, ort.OPTIMIZED_WEIGHTS])
def test_a_damaged_entry_is_built_again_with_a_word(
    graph: Path, tmp_path: Path, builds: list[Path], victim: str
) -> None:
    folder = tmp_path / "cache"
    wanted = open_engine("ort", graph, options(folder)).run(X)["y"]
    (entry,) = (p for p in folder.iterdir() if p.is_dir())
    content = bytearray((entry / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / victim).write_bytes(content)
    with pytest.warns(UserWarning, match=f"is built again: {victim} has another digest than when it was made"):
        again = open_engine("ort", graph, options(folder))
    assert len(builds) == 2
    np.testing.assert_array_equal(again.run(X)["y"], wanted)


def test_an_entry_of_another_cpu_is_not_used_and_the_message_names_both(
    graph: Path, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    here = CpuFeatures("x86", ("avx2", "avx512-vnni"))
    monkeypatch.setattr(ort, "cpu_features", lambda: CpuFeatures("arm", ("dotprod", "neon")))
    open_engine("ort", graph, options(folder))
    monkeypatch.setattr(ort, "cpu_features", lambda: here)
    words = r"does not fit here and is built anew: device: x86-\w+ \(avx2\+avx512-vnni\) \(was arm-\w+ \(dotprod\+neon"
    with pytest.warns(UserWarning, match=words):
        open_engine("ort", graph, options(folder))
    assert len(builds) == 2


def test_a_folder_that_others_can_write_to_is_refused(graph: Path, tmp_path: Path, builds: list[Path]) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(EngineError, match=r"(?s)a folder that others can write to \(mode 777\).*chmod 700"):
        open_engine("ort", graph, options(folder))
    assert builds == []


def config(engine: Any) -> str:
    try:
        return str(engine._session.get_session_options().get_session_config_entry(ort.PRECISE))
    except RuntimeError:
        return ""


@pytest.mark.parametrize("cached", [False, True])
def test_wide_weights_on_a_cpu_without_vnni_switch_to_the_precise_mode(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(ort, "cpu_features", lambda: ONLY_AVX2)
    given = options(tmp_path / "cache") if cached else EngineOptions(1)
    with pytest.warns(SaturationNotice, match=r"precise mode .*slower: 1 weights such as w \(-127 to 127\): without"):
        engine = open_engine("ort", graph, given)
    assert config(engine) == "1"


def test_no_switch_where_nothing_can_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"vnni": (127, WITH_VNNI), "narrow": (63, ONLY_AVX2)}
    for name, (top, cpu) in cases.items():
        (tmp_path / name).mkdir()
        monkeypatch.setattr(ort, "cpu_features", lambda cpu=cpu: cpu)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SaturationNotice)
            engine = open_engine("ort", quantized_product(tmp_path / name, top), EngineOptions(1))
        assert config(engine) in ("", "0"), name


def test_the_mode_can_be_chosen_and_is_part_of_the_key(graph: Path, tmp_path: Path) -> None:
    assert config(open_engine("ort", graph, EngineOptions(1, settings={"integers": "precise"}))) == "1"
    for mode in ("fast", "precise"):
        parts = cache_key("ort", graph, options(tmp_path / "c", integers=mode))
        assert parts is not None
        assert parts.flags["integers"] == mode
    with pytest.raises(EngineError, match="found integers=slow, wanted one of auto, fast, precise"):
        open_engine("ort", graph, EngineOptions(1, settings={"integers": "slow"}))


def test_openvino_has_no_precise_mode_and_says_so(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantempo.engines import openvino, registry

    if "openvino" not in registry.installed_backends():
        pytest.skip("openvino is not installed")
    monkeypatch.setattr(openvino, "cpu_features", lambda: ONLY_AVX2)
    with pytest.warns(SaturationNotice, match="OpenVINO has no mode that avoids saturation.*use the engine 'ort'"):
        open_engine("openvino", graph, EngineOptions(1))
