"""What docs/cpp.md says to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.cpp_library import ROOT, SANITIZE, call
from support.onnx_bundles import write_onnx_bundle

PAGE = (ROOT / "docs" / "cpp.md").read_text()
FROM_PACKAGES = ("apt ", "dpkg ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def script(block: str, **places: object) -> str:
    """Its lines as one script, with the places that a reader would choose replaced; one that is not there fails."""
    for was, now in places.items():
        assert was in block, was
        block = block.replace(was, str(now))
    lines = [line for line in block.strip().split("\n") if not line.startswith(FROM_PACKAGES)]
    return "\n".join(["set -e", f"cd {shlex.quote(str(ROOT))}", *lines])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    return write_onnx_bundle(folder / "b", folder / "work", decoder=True)


@pytest.mark.skipif(bool(SANITIZE), reason="the example is built without sanitizers")
def test_the_commands_and_the_example_work(built: Path, ort_library: Path, parts: Path, tmp_path: Path) -> None:
    installed, picture = tmp_path / "installed", tmp_path / "out.png"
    places = {
        "build/cpp": built, "/usr/local": installed, " out ": f" {parts} ", "out.png": picture,
        "find .venv": f"find {sys.prefix}", "--steps 20": "--steps 5",
    }  # fmt: skip
    call("bash", "-c", script(blocks("bash")[0], **places))
    assert Image.open(picture).size == (8, 8)

    (cmake,), (example,) = blocks("cmake"), blocks(r"cpp")
    project = tmp_path / "project"
    project.mkdir()
    head = "cmake_minimum_required(VERSION 3.18)\nproject(app LANGUAGES CXX)\nadd_executable(app app.cpp)\n"
    (project / "CMakeLists.txt").write_text(head + "target_compile_features(app PRIVATE cxx_std_17)\n" + cmake)
    for was, now in (('"out"', f'"{parts}"'), ('"libonnxruntime.so.1"', f'"{ort_library}"')):
        assert was in example
        example = example.replace(was, now)
    include, _, body = example.partition("\n")
    (project / "app.cpp").write_text(f"{include}\nint main() {{\n{body}}}\n")
    call("cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    call("cmake", "--build", project / "build")
    call("bash", "-c", f"cd {shlex.quote(str(tmp_path))} && project/build/app")
    assert Image.open(picture).size == (18, 18)  # three of eight, two a row, a gap of two


@pytest.mark.full
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
def test_the_commands_for_aarch64_work(tmp_path: Path) -> None:
    (block,) = (each for each in blocks("bash") if "aarch64" in each)
    if not Path("/usr/lib/aarch64-linux-gnu/libz.so").exists():
        pytest.skip("needs zlib1g-dev:arm64")
    call("bash", "-c", script(block, **{"build/arm64": tmp_path / "arm64"}))
    assert "aarch64" in call("readelf", "-h", tmp_path / "arm64" / "libquantempo.so").lower()


def test_the_versions_that_the_page_names_are_those_that_were_compiled_against() -> None:
    """docs/cpp_headers.json is what tools/cpp_headers.py wrote."""
    results = json.loads((ROOT / "docs" / "cpp_headers.json").read_text())
    assert all(each["said"] == "" for library in results.values() for each in library)
    versions = [each["version"].rpartition(".")[0] for each in results["tensorrt"]]
    (toolkit,) = {each["cuda"] for each in results["tensorrt"]}
    named = f"headers of TensorRT {', '.join(versions[:-1])} and {versions[-1]} with those of CUDA {toolkit}"
    assert named in " ".join(PAGE.split())


def test_every_function_of_onnx_runtime_that_is_called_is_proven() -> None:
    """A position that `ort_slots.cpp` leaves out would be taken on trust."""
    called = re.findall(r"^using (\w+) =\s*Slot<", (ROOT / "runtime/cpp/src/backends/ort_api.hpp").read_text(), re.M)
    proven = re.findall(r"^SAME\((\w+)\);", (ROOT / "runtime/cpp/tests/ort_slots.cpp").read_text(), re.M)
    assert sorted(called) == sorted(proven)
    (recorded,) = json.loads((ROOT / "docs" / "cpp_headers.json").read_text())["onnxruntime"]
    assert recorded["functions"] == len(called)


def test_every_setting_and_option_of_the_page_exists() -> None:
    source = (ROOT / "runtime/cpp/CMakeLists.txt").read_text()
    for name in re.findall(r"`((?:QUANTEMPO|ONNXRUNTIME)_[A-Z]+)`", PAGE.partition("## Use")[0]):
        assert re.search(rf"(option|set)\({name}\b", source), name
    backends = "".join(path.read_text() for path in (ROOT / "runtime/cpp/src/backends").glob("*.cpp"))
    settings = PAGE.partition("Settings (`key=value`)")[2].partition("They mean")[0]
    words = re.findall(r"`([a-z0-9]+)`", settings)
    assert len(words) > 15
    for word in words:
        assert f'"{word}"' in backends, word
