"""The architectures that quantempo knows how to feed: one file and one line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from quantempo.errors import UnsupportedModel, nearest
from quantempo.export.families import adapters, dit, flux, pixart, sd3, unet2d, unet2d_condition, wan
from quantempo.export.families.base import Family, FamilyContext
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
    "FAMILIES", "Family", "FamilyContext", "class_of", "family_of", "family_of_example", "family_of_inputs",
    "family_of_module",
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
        UnsupportedModel: a configuration key asks for something that the family does not know.
        ExportError: the example call does not fit the class.
    """
    if source.parts.inputs is not None:
        return family_of_inputs(source.class_name, source.parts.inputs)
    config = dict(source.config)
    extra = [read_config(folder) for folder in source.parts.controlnets]
    if source.parts.adapters:
        config["encoder_hid_dim_type"] = "ip_image_proj"
        extra += [{"image_embed_dim": adapters.embedding_shape(path)} for path in source.parts.adapters]
    context = FamilyContext(
        source.labels, source.parts.tokens or None, source.tokens, source.size, tuple(extra)
    )
    return _build(source.class_name, config, context)


def family_of_module(
    module: nn.Module, tokens: int | None = None, size: tuple[int, ...] | None = None
) -> Family:
    """The family of a diffusers denoiser in memory (benchmarks with random weights).

    Args:
        module: the denoiser.
        tokens: prompt length; `None` for the family's usual one.
        size: latent size of a sample; `None` for what its configuration says.

    Raises:
        UnsupportedModel: a module of another class, or with a configuration that the family does not know.
    """
    config: Any = getattr(module, "config", {})
    extra: tuple[Mapping[str, Any], ...] = tuple(
        {"image_embed_dim": shape} for shape in adapters.embedding_shapes(getattr(module, "unet", module))
    )
    if isinstance(module, unet2d_condition.ControlledUNet):
        nets: Any = module.controls
        extra += tuple({**net.config, "_class_name": unet2d_condition.CONTROL_CLASS} for net in nets)
        return _build(unet2d_condition.CLASS_NAME, dict(config), FamilyContext({}, tokens, None, size, extra))
    return _build(type(module).__name__, dict(config), FamilyContext({}, tokens, None, size, extra))


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a network in a folder."""
    found: Mapping[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found


def _build(class_name: str, config: Mapping[str, Any], context: FamilyContext) -> Family:
    if class_name not in FAMILIES:
        raise UnsupportedModel(
            f"denoiser of class {class_name!r}", found="no family of that name", wanted="one of " + ", ".join(FAMILIES),
            cause="quantempo has no description of this architecture's inputs, and makes none up",
            remedy=nearest(class_name, FAMILIES) + " Or describe its inputs by an example: family_of_example(module, "
            "[arguments]), or --inputs FILE.npz",
        )
    return FAMILIES[class_name](config, context)
