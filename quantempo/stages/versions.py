"""What else a stage's result depends on: the installed libraries, their versions, and our own code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from quantempo.errors import MissingExtra


def libraries(*names: str) -> Mapping[str, str]:
    """The installed version of each package."""
    return {name: version(name) for name in names}


@cache
def code(*modules: str) -> str:
    """A digest over the source of modules and, for packages, of everything in them.

    A release has one digest; in a checkout, an edited file redoes the stages that it is part of.
    """
    total = sha256()
    for module in sorted(modules):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            total.update(f"{module}/{file.relative_to(origin.parent)}\n".encode())
            total.update(sha256(file.read_bytes()).digest())
    return total.hexdigest()


def require_compile_extra() -> None:
    """Ask for the extra in our words before some import asks for a package in its own."""
    for package in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtra("compile", package=package, extra="compile,cpu")
