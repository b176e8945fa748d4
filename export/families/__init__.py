"""The architectures that quantempo knows how to feed: one file and one line each."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from quantempo.errors import UnsupportedModel
from quantempo.export.classes import find_class, whole_config
from quantempo.export.families import adapters, dit, flux, pixart, sd3, unet2d, unet2d_condition, wan
from quantempo.export.families.base import Family, FamilyContext
from quantempo.export.families.derived import family_of_class, fitted_to_class
from quantempo.export.families.example import family_of_example, family_of_inputs

if TYPE_CHECKING:
    from quantempo.export.source import ModelSource

FAMILIES: Mapping[str, Callable[[Mapping[str, Any], FamilyContext], Family]] = {
    dit.CLASS_NAME: dit.build,
    flux.CLASS_NAME: flux.build,
    pixart.CLASS_NAME: pixart.build,
    sd3.CLASS_NAME: sd3.build,
    unet2d.CLASS_NAME: unet2d.build,
    unet2d_condition.CLASS_NAME: unet2d_condition.build,
    wan.CLASS_NAME: wan.build,
}

__all__ = [
    "FAMILIES", "Family", "FamilyContext", "class_of", "family_of", "family_of_class", "family_of_example",
    "family_of_inputs", "family_of_module",
]  # fmt: skip


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
        UnsupportedModel: a configuration key asks for something that the family does not know, or the inputs of a
            class without one do not follow from its signature and configuration.
        ExportError: the example call does not fit the class.
    """
    parts, name = source.parts, source.class_name
    if (parts.controlnets or parts.adapters) and name != unet2d_condition.CLASS_NAME:
        raise UnsupportedModel(
            f"denoiser of class {name!r}", found="a ControlNet or IP-Adapter", wanted=unet2d_condition.CLASS_NAME,
            cause="networks are added to UNets of Stable Diffusion alone", remedy="leave them out",
        )
    kind = find_class(name, parts.code)
    if parts.inputs is not None:
        return fitted_to_class(family_of_inputs(name, parts.inputs, parts.code), kind, source.config)
    config = whole_config(kind, source.config)
    extra = [read_config(folder) for folder in source.parts.controlnets]
    if source.parts.adapters:
        config["encoder_hid_dim_type"] = "ip_image_proj"
        extra += [{"image_embed_dim": adapters.embedding_shape(path)} for path in source.parts.adapters]
    context = FamilyContext(
        source.labels, source.parts.tokens or None, source.tokens, source.size, tuple(extra)
    )
    return _build(kind, config, context)


def _same_call(kind: Any) -> str | None:
    """The class with a family that a class is or derives from, and whose call it takes; `None` where there is none."""
    for base in kind.__mro__:
        if base.__name__ in FAMILIES and base.__module__.startswith("diffusers."):
            own, old = (list(inspect.signature(each.forward).parameters) for each in (kind, base))
            return base.__name__ if own == old else None
    return None


def family_of_module(
    module: nn.Module, tokens: int | None = None, size: tuple[int, ...] | None = None
) -> Family:
    """The family of a denoiser in memory.

    Args:
        module: the denoiser.
        tokens: prompt length; `None` for the family's usual one.
        size: latent size of a sample; `None` for what its configuration says.

    Raises:
        UnsupportedModel: a configuration that the family does not know, or a module without one whose inputs do not
            follow from signature and configuration.
    """
    config: Any = getattr(module, "config", {})
    extra: tuple[Mapping[str, Any], ...] = tuple(
        {"image_embed_dim": shape} for shape in adapters.embedding_shapes(getattr(module, "unet", module))
    )
    if isinstance(module, unet2d_condition.ControlledUNet):
        nets: Any = module.controls
        extra += tuple({**net.config, "_class_name": unet2d_condition.CONTROL_CLASS} for net in nets)
        return FAMILIES[unet2d_condition.CLASS_NAME](dict(config), FamilyContext({}, tokens, None, size, extra))
    return _build(type(module), dict(config), FamilyContext({}, tokens, None, size, extra))


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a network in a folder."""
    found: Mapping[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found


def _build(kind: type[nn.Module], config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a class or of a base whose call it takes, or else what its signature says."""
    name, base = kind.__name__, _same_call(kind)
    if base is not None:
        return dataclasses.replace(FAMILIES[base](config, context), class_name=name)
    return family_of_class(kind, config, context)
