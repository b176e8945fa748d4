"""ONNX Runtime's GPU providers: what is missing is named before a session falls back; options are the providers'."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantempo.contracts.engine import EngineOptions
from quantempo.engines import ort, ort_gpu, registry
from quantempo.engines.cuda_device import CudaDevice
from quantempo.engines.host import HostBuffer
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.ort_gpu import PLUGIN, PROVIDERS, OrtGpuEngine
from quantempo.engines.trt_profiles import parse_profile
from quantempo.errors import EngineError, MissingExtra

CONTRACT = Path(__file__).parents[1] / "conformance" / "contract.onnx"
CPU_ONLY = "CUDAExecutionProvider" not in ort.library().get_available_providers()
cpu_build = pytest.mark.skipif(not CPU_ONLY, reason="onnxruntime-gpu is installed")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return Path(shutil.copy(CONTRACT, tmp_path / "g.onnx"))


def stand_in(graph: Path, **more: Any) -> OrtGpuEngine:
    """The engine over ONNX Runtime's CPU provider, tensors on the host."""
    configured = ort.session_options(ort.DEFAULTS | {"integers": "fast"}, 1)
    return OrtGpuEngine("stand-in", ort.open_session(graph, EngineOptions(), configured), memory="cpu", **more)


@cpu_build
@pytest.mark.parametrize("backend", ["ort-cuda", "ort-tensorrt"])
def test_the_package_for_cpus_is_no_gpu_engine(graph: Path, backend: str) -> None:
    assert backend not in registry.installed_backends()
    command = r"pip uninstall -y onnxruntime && pip install 'quantempo\[gpu\]'"
    words = rf"no installed package 'onnxruntime-gpu'(.|\n)*{command}"
    with pytest.raises(MissingExtra, match=words):
        registry.open_engine(backend, graph)


@cpu_build
@pytest.mark.parametrize("opener", ["open_cuda", "open_tensorrt"])
def test_a_build_without_the_provider_is_refused_by_name(graph: Path, opener: str) -> None:
    words = r"found the providers (.|\n)*CPUExecutionProvider, wanted \w+ExecutionProvider"
    with pytest.raises(EngineError, match=words):
        getattr(ort_gpu, opener)(graph, EngineOptions())


@pytest.mark.skipif(importlib.util.find_spec(PLUGIN) is not None, reason="the plug-in is installed")
def test_without_the_plug_in_the_extra_is_named(graph: Path) -> None:
    words = r"no installed package 'onnxruntime-ep-nv-tensorrt-rtx'(.|\n)*pip install 'quantempo\[ort-rtx\]'"
    with pytest.raises(MissingExtra, match=words):
        registry.open_engine("ort-rtx", graph)
    with pytest.raises(MissingExtra, match=words):
        ort_gpu.open_rtx(graph, EngineOptions())


def plugin(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A plug-in whose library lies at a path."""
    load = importlib.import_module
    made = SimpleNamespace(__version__="0.5.0", get_library_path=lambda: str(path))
    monkeypatch.setattr(importlib, "import_module", lambda name: made if name == PLUGIN else load(name))


def test_a_plug_in_that_does_not_load_is_quoted(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin.so").write_bytes(b"no library")
    plugin(monkeypatch, tmp_path / "plugin.so")
    with pytest.raises(EngineError, match=r"plug-in 0\.5\.0: found (.|\n)*plugin\.so(.|\n)*no NVIDIA driver"):
        ort_gpu.open_rtx(graph, EngineOptions())


def test_a_plug_in_without_a_gpu_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, graph)
    real, loaded = ort.library(), []
    fake = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    fake.register_execution_provider_library = lambda name, path: loaded.append((name, path))
    fake.__version__ = real.__version__
    monkeypatch.setattr(ort, "library", lambda: fake)
    with pytest.raises(EngineError, match=r"found 0 GPUs for NvTensorRTRTXExecutionProvider, wanted GPU 1"):
        ort_gpu.open_rtx(graph, EngineOptions(settings={"device": "1"}))
    assert loaded == [("NvTensorRTRTXExecutionProvider", str(graph))]


def test_a_session_that_fell_back_to_the_cpu_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime warns and goes on where a provider cannot start; here its own CPU session stands for that."""
    monkeypatch.setattr(ort_gpu, "_require", lambda provider: None)
    original = ort.open_session
    asked: list[Any] = []

    def fallen(graph: Path, options: EngineOptions, configured: Any, providers: Any) -> Any:
        asked.append(providers)
        return original(graph, options, configured)

    monkeypatch.setattr(ort, "open_session", fallen)
    with pytest.raises(EngineError, match=r"found a session on CPUExecutionProvider, wanted TensorrtExecutionProvider"):
        ort_gpu.open_tensorrt(graph, EngineOptions(settings={"device": "2", "shapes": "batch=1:2:4"}))
    ((name, given), *rest), = asked
    assert (name, rest) == ("TensorrtExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert given == {
        "device_id": "2", "trt_profile_min_shapes": "x:1x4x6,t:1,label:1",
        "trt_profile_opt_shapes": "x:2x4x6,t:2,label:2", "trt_profile_max_shapes": "x:4x4x6,t:4,label:4",
    }


def test_options_are_those_of_the_provider(tmp_path: Path) -> None:
    settings = {"device": "0", "cuda_graph": "on", "cache": "/c", "shapes": ""}
    made = {name: ort_gpu.provider_options(p, settings, (), CONTRACT) for name, p in PROVIDERS.items()}
    assert made["ort-cuda"] == {"device_id": "0", "enable_cuda_graph": "1"}
    assert made["ort-rtx"] == {"enable_cuda_graph": "1", "nv_runtime_cache_path": "/c"}
    assert made["ort-tensorrt"]["trt_cuda_graph_enable"] == "1"
    assert made["ort-tensorrt"]["trt_engine_cache_path"] == "/c"


@pytest.mark.skipif(importlib.util.find_spec(PLUGIN) is None, reason=f"{PLUGIN.replace('_', '-')} is not installed")
def test_the_plug_in_knows_the_options(tmp_path: Path) -> None:
    """Its wheel holds the header with the names of all options."""
    spec = importlib.util.find_spec(PLUGIN)
    assert spec is not None
    assert spec.origin is not None
    (header,) = Path(spec.origin).parent.glob("*provider_options.h")
    known = set(re.findall(r'constexpr const char\* \w+ = "(\w+)"', header.read_text()))
    settings = {"device": "0", "cuda_graph": "on", "cache": "/c"}
    given = ort_gpu.provider_options(PROVIDERS["ort-rtx"], settings, (parse_profile("batch=1:2:4"),), CONTRACT)
    assert set(given) <= known


@pytest.mark.parametrize(
    ("opener", "settings", "words"),
    [
        ("open_cuda", {"devise": "0"}, "did you mean 'device'"), ("open_cuda", {"device": "first"}, "device=first"),
        ("open_rtx", {"cuda_graph": "yes"}, "cuda_graph=yes"),
        ("open_cuda", {"shapes": "batch=2"}, "CUDAExecutionProvider compiles nothing"),
        ("open_cuda", {"cache": "/tmp"}, "take ort-tensorrt or ort-rtx"),
        ("open_tensorrt", {"cache": "OPEN"}, "chmod 700"),
    ],
)
def test_settings_are_checked_first(
    graph: Path, tmp_path: Path, opener: str, settings: dict[str, str], words: str
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    given = {key: value.replace("OPEN", str(tmp_path / "open")) for key, value in settings.items()}
    with pytest.raises(EngineError, match=words):
        getattr(ort_gpu, opener)(graph, EngineOptions(settings=given))


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="found no such file"):
        ort_gpu.open_cuda(tmp_path / "x.onnx", EngineOptions())


def test_sizes_outside_the_shapes_are_refused(graph: Path) -> None:
    engine = stand_in(graph, profiles=(parse_profile("batch=1:2:4"),))
    engine.bind({"batch": 4})
    with pytest.raises(EngineError, match=r"found batch = 5(.|\n)*nearest legal sizes are batch = 4"):
        engine.bind({"batch": 5})


def test_shared_tensors_are_one_and_the_same(graph: Path) -> None:
    one, two = stand_in(graph), stand_in(graph)
    first = one.bind({"batch": 2})
    second = two.bind({"batch": 2}, {"x": first.outputs["y"]})
    given = {
        "x": np.arange(48, dtype=np.float32).reshape(2, 4, 6), "t": np.ones(2, np.float32),
        "label": np.zeros(2, np.int64), "group": np.array(1),
    }
    for name, value in given.items():
        first.inputs[name].upload(value)
        if name != "x":
            second.inputs[name].upload(value)
    first.run()
    second.run()
    inner = one.run(given)["y"]
    np.testing.assert_array_equal(second.outputs["y"].download(), two.run({**given, "x": inner})["y"])
    with pytest.raises(EngineError, match="bind both with the same sizes"):
        two.bind({"batch": 1}, {"x": first.outputs["y"]})
    spec = read_graph(graph).inputs["x"]
    with pytest.raises(EngineError, match="of this engine"):
        two.bind({"batch": 2}, {"x": HostBuffer(spec, np.zeros((2, 4, 6), np.float32), "another engine")})
    with pytest.raises(EngineError, match="buffers live on its device"):
        _ = first.inputs["x"].array
    one.close()
    with pytest.raises(EngineError, match="closed engine"):
        first.run()


def has_gpu() -> bool:
    try:
        CudaDevice.open()
    except (EngineError, MissingExtra):
        return False
    return True


@pytest.mark.skipif(CPU_ONLY or not has_gpu(), reason="runs on a GPU with onnxruntime-gpu")
def test_tensors_lie_on_the_device(graph: Path) -> None:
    engine = ort_gpu.open_cuda(graph, EngineOptions())
    assert engine.bind({"batch": 2}).inputs["x"].value.device_name() == "cuda"  # type: ignore[attr-defined]
