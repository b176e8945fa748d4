"""Every name that the engine files use exists in the real bindings, and the builder's helpers do what they say."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantempo.engines import tensorrt
from quantempo.engines.registry import open_engine
from quantempo.engines.tensorrt import BuildJob
from quantempo.engines.trt_profiles import parse_profile
from quantempo.errors import EngineError, MissingExtra

ENGINES = Path(tensorrt.__file__).parent
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
needs_cuda = pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
CLASSES = {
    "builder": "Builder", "parser": ("OnnxParser", "OnnxParserRefitter"),
    "config": ("IBuilderConfig", "IRuntimeConfig"), "made": "IOptimizationProfile", "engine": "ICudaEngine",
    "refitter": "Refitter",
    r"self\._context": "IExecutionContext", r"self\._runtime": "Runtime", r"self\.plan": "ICudaEngine",
}


def used(files: tuple[str, ...], holder: str) -> set[str]:
    """The attributes of a variable that some files use."""
    text = "\n".join((ENGINES / file).read_text() for file in files)
    return set(re.findall(rf"(?<![\w.]){holder}\.([A-Za-z_]\w*)", text))


@needs_rtx
@pytest.mark.parametrize("holder", CLASSES)
def test_methods_exist_in_the_real_bindings(holder: str) -> None:
    trt, kinds = import_module("tensorrt_rtx"), CLASSES[holder]
    classes = [getattr(trt, kind) for kind in ((kinds,) if isinstance(kinds, str) else kinds)]
    names = used(("tensorrt.py", "trt_engine.py"), holder)
    # `engine` is the library's in one file and ours in the other, `plan` a path of ours as well.
    ours = {"device", "stream", "plan", "inputs", "outputs", "name", "profiles", "capture", "context", "_failed"}
    ours.add("_check_open")
    assert names, f"nothing uses {holder}"
    assert not {n for n in names - ours if not any(hasattr(kind, n) for kind in classes)}


@needs_rtx
def test_names_of_the_module_and_its_flags_exist() -> None:
    trt = import_module("tensorrt_rtx")
    assert not {n for n in used(("tensorrt.py", "trt_engine.py"), "trt") if not hasattr(trt, n)}
    for job in (job_of(weights="refit"), job_of(version_compatible=True), job_of("tensorrt", timing_cache="x")):
        assert set(tensorrt._flags(job)) <= set(trt.BuilderFlag.__members__)


@needs_cuda
@pytest.mark.parametrize(("holder", "module"), [(r"self\._runtime", "runtime"), (r"self\._driver", "driver"),
                                                ("runtime", "runtime"), ("nvrtc", "nvrtc")])  # fmt: skip
def test_cuda_names_exist(holder: str, module: str) -> None:
    names = used(("cuda_device.py",), holder)
    assert names
    assert not {name for name in names if not hasattr(import_module(f"cuda.bindings.{module}"), name)}


def calls(files: tuple[str, ...], holder: str) -> list[tuple[str, int, frozenset[str]]]:
    """Calls of a variable's methods: name, positional arguments, names of the others."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse((ENGINES / file).read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if re.fullmatch(holder, ast.unparse(node.func.value)):
                keywords = frozenset(str(keyword.arg) for keyword in node.keywords)
                found.append((node.func.attr, len(node.args), keywords))
    return found


def signatures(method: object) -> list[tuple[int, int, frozenset[str]]]:
    """Fewest and most arguments, and their names, of each overload, as pybind11 writes them into a docstring."""
    found = []
    for parameters in re.findall(r"^(?:\d+\. )?\w+\(self: ?[\w.]+(.*)\) ->", str(getattr(method, "__doc__", "")), re.M):
        names = re.findall(r"(?:^|, )(\w+): ", parameters)
        optional = len(re.findall(r" = ", parameters))
        found.append((len(names) - optional, len(names), frozenset(names)))
    return found


@needs_rtx
@pytest.mark.parametrize("holder", CLASSES)
def test_methods_are_called_with_the_arguments_that_the_bindings_take(holder: str) -> None:
    trt = import_module("tensorrt_rtx")
    kinds = CLASSES[holder]
    classes = [getattr(trt, kind) for kind in ((kinds,) if isinstance(kinds, str) else kinds)]
    checked = 0
    for name, count, keywords in calls(("tensorrt.py", "trt_engine.py"), holder):
        for kind in classes:
            overloads = signatures(getattr(kind, name, None))
            if overloads:
                fits = [low <= count + len(keywords) <= high and keywords <= names for low, high, names in overloads]
                assert any(fits), f"{kind.__name__}.{name} with {count} arguments and {set(keywords)}: {overloads}"
                checked += 1
    assert checked


@needs_cuda
@pytest.mark.parametrize(("holder", "module"), [(r"self\._runtime", "runtime"), (r"self\._driver", "driver"),
                                                ("runtime", "runtime"), ("nvrtc", "nvrtc")])  # fmt: skip
def test_cuda_functions_are_called_with_their_arguments(holder: str, module: str) -> None:
    found = calls(("cuda_device.py",), holder)
    assert found
    for name, count, keywords in found:
        function = getattr(import_module(f"cuda.bindings.{module}"), name)
        parameters = inspect.signature(function).parameters
        assert (count, keywords) == (len(parameters), frozenset()), f"{name}({', '.join(parameters)})"


def job_of(library: tensorrt.Library = "tensorrt_rtx", **changes: object) -> BuildJob:
    return BuildJob(library, "g", "p", "8.9", (parse_profile("batch=2"),), **changes)  # type: ignore[arg-type]


def test_no_flag_is_about_precision() -> None:
    precision = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS"}
    for job in (job_of(), job_of("tensorrt", weights="refit", timing_cache="c", version_compatible=True)):
        assert not precision & set(tensorrt._flags(job))


def test_what_changes_the_plan_is_part_of_the_key() -> None:
    plain = job_of().flags()
    for changed in (job_of(level=4), job_of(memory_mib=64), job_of(weights="refit"), job_of(version_compatible=True)):
        assert changed.flags() != plain
    assert job_of(weights="bundle").flags() == plain, "the plan itself is the same one"
    assert job_of(timing_cache="here").flags() == plain, "measurements are no choice"


def test_memory_is_read_from_the_log() -> None:
    lines = ["Max Scratch Memory: 12 bytes", "Total Weights Memory: 5 bytes", "Total Weights Memory: 7 bytes", "other"]
    assert tensorrt._memory_reports(lines) == {"scratch": 12, "weights": 7}


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_without_the_library_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'quantempo\[tensorrt\]'"):
        open_engine("tensorrt", Path("x.onnx"))
    with pytest.raises(MissingExtra, match=r"pip install 'quantempo\[tensorrt\]'"):
        tensorrt.version("tensorrt")


@needs_rtx
def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="found no such file"):
        open_engine("tensorrt-rtx", tmp_path / "x.onnx")
