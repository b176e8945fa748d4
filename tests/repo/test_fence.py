"""Who may import whom: siblings never import each other, and heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIBLINGS = ("export", "calib", "engines", "runtime")
FRONT_DOOR = {
    "__init__.py", "planning.py", "recipe_file.py", "reproducing.py", "building.py", "pipeline.py", "cli.py",
    "inspection.py",
}
"""Modules of quantempo/ that compose the siblings; `FRONT_FOLDERS` are whole folders of such modules."""
FRONT_FOLDERS = {"commands", "demo", "devices", "report", "stages"}

ALLOWED = {
    "torch": ("export/", "calib/tuning/", "tools/", "benchmarks/"),
    "diffusers": ("export/", "calib/tuning/", "tools/", "benchmarks/"),
    "transformers": ("export/",),
    "onnx": ("export/", "benchmarks/"),
    "onnx_ir": ("export/", "benchmarks/"),
    "onnxscript": ("export/",),
    "onnxruntime": ("engines/ort.py", "benchmarks/"),
    "onnxruntime_ep_nv_tensorrt_rtx": ("engines/ort_gpu.py",),
    "openvino": ("engines/openvino.py", "benchmarks/"),
    "tensorrt": ("engines/tensorrt.py",),
    "tensorrt_rtx": ("engines/tensorrt.py",),
    "cuda": ("engines/cuda_device.py",),
    "typer": ("quantempo/cli.py", "quantempo/commands/"),
    "rich": ("quantempo/",),
    "sklearn": ("tools/", "benchmarks/"),
}


def sources() -> list[Path]:
    folders = (*SIBLINGS, "quantempo", "tools", "benchmarks")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return found


def may_compose(relative: Path) -> bool:
    parts = relative.parts
    if parts[0] != "quantempo":
        return parts[0] in ("tools", "benchmarks")
    return (len(parts) == 2 and parts[1] in FRONT_DOOR) or parts[1] in FRONT_FOLDERS


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_within_the_fence(path: Path) -> None:
    relative = path.relative_to(ROOT)
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in SIBLINGS, f"{relative} imports the bare folder {name}; write quantempo.{name}"
        if top == "quantempo" and len(name.split(".")) > 1:
            other = name.split(".")[1]
            if other in SIBLINGS and not may_compose(relative):
                assert relative.parts[0] == other, f"{relative} imports its sibling {name}"
        if top in ALLOWED:
            assert str(relative).startswith(ALLOWED[top]), f"{relative} imports {top}, which lives in {ALLOWED[top]}"


def test_import_of_the_package_loads_no_heavy_library() -> None:
    heavy = ["torch", "diffusers", "onnx", "onnxruntime", "PIL", "rich", "typer", "scipy"]
    code = (
        "import sys, quantempo, quantempo.contracts.manifest, quantempo.runtime.session\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]"


def test_contracts_import_standard_library_and_numpy_alone() -> None:
    for path in (ROOT / "quantempo" / "contracts").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in ("numpy", "__future__") or name.startswith(
                ("quantempo.contracts", "quantempo.errors")
            ), f"{path.name} imports {name}"


def test_runtime_imports_numpy_safetensors_and_pillow_alone() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            ours = ("numpy", "safetensors", "PIL", "quantempo")
            assert top in sys.stdlib_module_names or top in ours, f"{path.name} imports {name}"


BUDGET_EXCEPTIONS: dict[str, str] = {}
"""Files over the line budget, each with its reason."""


def test_files_stay_within_the_line_budget() -> None:
    for path in sources():
        lines = len(path.read_text().splitlines())
        relative = str(path.relative_to(ROOT))
        assert lines <= 500 or relative in BUDGET_EXCEPTIONS, f"{relative} has {lines} lines; the budget is 500"


def test_functions_stay_within_the_line_budget() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 70, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_no_module_is_a_drawer_for_anything() -> None:
    assert [p for p in sources() if p.stem in ("utils", "util", "helpers", "common", "misc")] == []
