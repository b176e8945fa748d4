"""Denoiser classes by name: diffusers' own, and those that a user's Python file defines."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quantempo.errors import UnsupportedModel, nearest


def find_class(name: str, code: Path | None = None) -> type[nn.Module]:
    """A denoiser class.

    Args:
        name: `_class_name` of the model's configuration.
        code: Python file that defines it; it is run.  `None` for a class of diffusers.

    Raises:
        UnsupportedModel: there is no such class, or the file does not run.
    """
    if code is not None:
        return _defined(name, code)
    import diffusers
    import diffusers.models

    for place in (diffusers, diffusers.models):
        found = getattr(place, name, None)
        if inspect.isclass(found) and issubclass(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"denoiser of class {name!r}", found="a class that the installed diffusers does not have",
        wanted="one of its denoisers, or the file that defines the class",
        cause="the model is newer than the installed diffusers, or the class is your own",
        remedy="run: pip install --upgrade diffusers; or, for a class of your own, add --code FILE.py (docs/models.md)",
    )


def is_known(name: str) -> bool:
    """Whether the installed diffusers has a class of that name."""
    try:
        find_class(name)
    except UnsupportedModel:
        return False
    return True


def whole_config(kind: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what the class takes where it says nothing."""
    known = inspect.signature(kind.__init__).parameters.values()
    return {**{p.name: p.default for p in known if p.default is not inspect.Parameter.empty}, **config}


def make(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A model with weights of its own drawing.

    Args:
        kind: the class; one without diffusers' `from_config` takes the configuration as keyword arguments.
        config: parsed `config.json`; keys with an underscore in front are diffusers' own notes.
    """
    made: Any = kind
    if hasattr(kind, "from_config"):
        found: nn.Module = made.from_config(dict(config))
        return found
    built: nn.Module = made(**{key: value for key, value in config.items() if not key.startswith("_")})
    return built


def _defined(name: str, code: Path) -> type[nn.Module]:
    """The class from a user's file, which is run once a process."""
    label = "quantempo_code_" + hashlib.sha256(str(code.resolve()).encode() + code.read_bytes()).hexdigest()[:16]
    module = sys.modules.get(label)
    if module is None:
        spec = importlib.util.spec_from_file_location(label, code)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module  # dataclasses and pickles look for it there
        sys.path.insert(0, str(code.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[label]
            raise UnsupportedModel(
                f"code {code}", found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                wanted="a Python file that runs by itself", cause="it imports something that is not installed here, or "
                "belongs to a package", remedy=f"run: python {code}",
            ) from error
        finally:
            sys.path.remove(str(code.resolve().parent))
    found = getattr(module, name, None)
    if inspect.isclass(found) and issubclass(found, nn.Module):
        return found
    own = [n for n, value in vars(module).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
    raise UnsupportedModel(
        f"code {code}", found=f"no torch module {name!r}", wanted="the class that config.json names as '_class_name'",
        cause="another file, or another class name", remedy=nearest(name, own),
    )
