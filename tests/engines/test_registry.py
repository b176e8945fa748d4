from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from quantempo.engines import registry
from quantempo.errors import EngineError, MissingExtra


def test_an_unknown_backend_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"found backend 'orrt', wanted one of echo, .*ort[\s\S]*did you mean 'ort'"):
        registry.open_engine("orrt", tmp_path)


@pytest.mark.parametrize(("backend", "package", "extra"), [
    ("ort", "onnxruntime", "cpu"), ("openvino", "openvino", "openvino"),
])  # fmt: skip
def test_a_backend_that_is_not_installed_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, package: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    words = rf"no installed package '{package}'[\s\S]*pip install 'quantempo\[{extra}\]'"
    with pytest.raises(MissingExtra, match=words):
        registry.open_engine(backend, tmp_path / "g.onnx")
    assert "echo" in registry.installed_backends()
    assert backend not in registry.installed_backends()


def test_looking_at_the_backends_imports_none_of_them() -> None:
    code = (
        "import sys; from quantempo.engines import registry; registry.installed_backends();"
        "import quantempo.engines.ort; print('onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
