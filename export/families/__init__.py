"""The architectures that quantempo knows how to feed: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from quantempo.errors import UnsupportedModel, nearest
from quantempo.export.families import dit, unet2d, unet2d_condition
from quantempo.export.families.base import Family, FamilyContext
from quantempo.export.families.example import family_of_example

if TYPE_CHECKING:
    from quantempo.export.source import ModelSource

FAMILIES: Mapping[str, Callable[[Mapping[str, Any], FamilyContext], Family]] = {
    dit.CLASS_NAME: dit.build,
    unet2d.CLASS_NAME: unet2d.build,
    unet2d_condition.CLASS_NAME: unet2d_condition.build,
}

__all__ = ["FAMILIES", "Family", "FamilyContext", "class_of", "family_of", "family_of_example", "family_of_module"]


def class_of(config: Mapping[str, Any]) -> str | None:
    """The denoiser's class by its configuration; `None` where there is none.

    The published DiT checkpoints name a class that diffusers has since split up; it loads them as the DiT too.
    """
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return dit.CLASS_NAME
    return name if isinstance(name, str) else None


def family_of(source: ModelSource) -> Family:
    """The family of a model directory.

    Raises:
        UnsupportedModel: a configuration key asks for something that the family does not know.
    """
    return _build(source.class_name, source.config, FamilyContext(source.labels, source.tokens))


def family_of_module(module: nn.Module, tokens: int = 77) -> Family:
    """The family of a diffusers denoiser in memory (benchmarks with random weights).

    Raises:
        UnsupportedModel: a module of another class, or with a configuration that the family does not know.
    """
    config: Any = getattr(module, "config", {})
    return _build(type(module).__name__, dict(config), FamilyContext({}, tokens))


def _build(class_name: str, config: Mapping[str, Any], context: FamilyContext) -> Family:
    if class_name not in FAMILIES:
        raise UnsupportedModel(
            f"denoiser of class {class_name!r}", found="no family of that name", wanted="one of " + ", ".join(FAMILIES),
            cause="quantempo has no description of this architecture's inputs yet",
            remedy=nearest(class_name, FAMILIES),
        )
    return FAMILIES[class_name](config, context)
