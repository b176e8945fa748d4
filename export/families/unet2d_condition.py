"""UNet2DConditionModel: Stable Diffusion 1, 2 and XL, inpainting, IP-Adapter, latent consistency, ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from quantempo.contracts.manifest import ArrayInput, ClassInput
from quantempo.export.families.base import (
    Family,
    FamilyContext,
    Feeds,
    conditioned_sample,
    refuse,
    sample_size,
    square_size,
    with_condition,
)

CLASS_NAME = "UNet2DConditionModel"
CONTROL_CLASS = "ControlNetModel"
TOKENS = 77
TIME_IDS = 6
"""Numbers in `time_ids`: original size, crop, target size."""
IMAGE_TOKENS = 1
"""Images per IP-Adapter."""
IP_ADAPTER = "ip_image_embeds"
CONTROL_IMAGE, CONTROL_SCALE = "control_image", "control_scale"


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a conditional UNet, with the inputs that its configuration asks for."""
    if config.get("attention_type", "default") != "default":
        raise refuse(CLASS_NAME, "attention_type", config["attention_type"], "'default'")
    configured = None if context.size else square_size(CLASS_NAME, config.get("sample_size"))
    size = sample_size(CLASS_NAME, context, configured, rank=2)
    channels, given, condition = conditioned_sample(CLASS_NAME, config, size)
    classes, arrays = _class_input(config, context)
    controls, control_arrays = _controls(context, size)
    arrays = (
        *_prompt(config, context), *arrays, *_added(config), *_adapters(config, context), *_guidance(config),
        *condition, *control_arrays,
    )
    return Family(
        CLASS_NAME, (channels, *size), _arguments(arrays, controls), given, classes=classes, arrays=arrays
    )


def _prompt(config: Mapping[str, Any], context: FamilyContext) -> tuple[ArrayInput, ...]:
    if config.get("encoder_hid_dim_type") == "image_proj":
        return ()  # the image embedding stands in its place
    widths = config.get("cross_attention_dim", 1280)
    width = widths if isinstance(widths, int) else widths[0] if len(set(widths)) == 1 else None
    if config.get("encoder_hid_dim_type") == "text_proj":
        width = config["encoder_hid_dim"]
    if width is None:
        raise refuse(CLASS_NAME, "cross_attention_dim", widths, "one width for all blocks")
    tokens = context.tokens or context.encoder_tokens or TOKENS
    return (ArrayInput("encoder_hidden_states", "float32", (tokens, int(width))),)


def _class_input(
    config: Mapping[str, Any], context: FamilyContext
) -> tuple[tuple[ClassInput, ...], tuple[ArrayInput, ...]]:
    kind, rows = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind in ("projection", "simple_projection"):
        width = int(config["projection_class_embeddings_input_dim"])
        return (), (ArrayInput("class_labels", "float32", (width,)),)
    if kind is not None:
        raise refuse(CLASS_NAME, "class_embed_type", kind, "none, 'projection' or 'simple_projection'")
    return (() if rows is None else (ClassInput("class_labels", int(rows), None, context.labels),)), ()


def _added(config: Mapping[str, Any]) -> tuple[ArrayInput, ...]:
    """What goes into `added_cond_kwargs`."""
    kind = config.get("addition_embed_type")
    if kind is None:
        found: tuple[ArrayInput, ...] = ()
    elif kind == "text_time":
        width = int(config["projection_class_embeddings_input_dim"]) - TIME_IDS * int(config["addition_time_embed_dim"])
        found = (
            ArrayInput("text_embeds", "float32", (width,)), ArrayInput("time_ids", "float32", (TIME_IDS,), guided=False)
        )
    elif kind in ("image", "text_image") or kind == "text":
        found = ()
    else:
        raise refuse(CLASS_NAME, "addition_embed_type", kind, "none, 'text', 'text_time', 'image' or 'text_image'")
    if config.get("encoder_hid_dim_type") in ("image_proj", "text_image_proj") or kind in ("image", "text_image"):
        width = int(config.get("encoder_hid_dim") or config["cross_attention_dim"])
        found = (*found, ArrayInput("image_embeds", "float32", (width,)))
    if kind == "text_image":
        found = (*found, ArrayInput("text_embeds", "float32", (int(config["cross_attention_dim"]),)))
    return found


def _adapters(config: Mapping[str, Any], context: FamilyContext) -> tuple[ArrayInput, ...]:
    """One embedding per IP-Adapter."""
    kind = config.get("encoder_hid_dim_type")
    if kind not in (None, "text_proj", "image_proj", "text_image_proj", "ip_image_proj"):
        raise refuse(CLASS_NAME, "encoder_hid_dim_type", kind, "none, 'text_proj', 'image_proj' or 'ip_image_proj'")
    widths = [extra["image_embed_dim"] for extra in context.extra if "image_embed_dim" in extra]
    if kind == "ip_image_proj" and not widths:
        raise refuse(CLASS_NAME, "encoder_hid_dim_type", kind, "IP-Adapter weights, by --ip-adapter FILE")
    many = len(widths) > 1
    return tuple(
        ArrayInput(f"{IP_ADAPTER}_{index}" if many else IP_ADAPTER, "float32", (IMAGE_TOKENS, *shape))
        for index, shape in enumerate(widths)
    )


def _guidance(config: Mapping[str, Any]) -> tuple[ArrayInput, ...]:
    """The guidance scale's embedding of a latent consistency model."""
    width = config.get("time_cond_proj_dim")
    return () if width is None else (ArrayInput("timestep_cond", "float32", (int(width),), guided=False),)


def _controls(
    context: FamilyContext, size: tuple[int, ...]
) -> tuple[int, tuple[ArrayInput, ...]]:
    """How many ControlNets there are, and an image and a strength for each."""
    nets = [extra for extra in context.extra if extra.get("_class_name") == CONTROL_CLASS]
    arrays: list[ArrayInput] = []
    for index, net in enumerate(nets):
        scale = 2 ** (len(net.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
        image = (int(net.get("conditioning_channels", 3)), *(side * scale for side in size))
        suffix = f"_{index}" if len(nets) > 1 else ""
        arrays.append(ArrayInput(CONTROL_IMAGE + suffix, "float32", image, guided=False))
        arrays.append(ArrayInput(CONTROL_SCALE + suffix, "float32", (), guided=False))
    return len(nets), tuple(arrays)


class ControlledUNet(nn.Module):
    """A UNet and the ControlNets whose residuals it takes."""

    def __init__(self, unet: nn.Module, controls: list[nn.Module]) -> None:
        super().__init__()
        self.unet = unet
        self.controls = nn.ModuleList(controls)
        self.config = unet.config  # families read it

    def forward(self, images: list[torch.Tensor], scales: list[torch.Tensor], **arguments: Any) -> Any:
        """`forward` of the UNet, with an image [batch, C, H, W] and a strength [batch] for each ControlNet."""
        shared = {n: arguments.get(n) for n in ("sample", "timestep", "encoder_hidden_states", "class_labels",
                                                "timestep_cond", "added_cond_kwargs")}  # fmt: skip
        down: list[torch.Tensor] = []
        middle: torch.Tensor | None = None
        for net, image, scale in zip(self.controls, images, scales, strict=True):
            made, last = net(controlnet_cond=image, return_dict=False, **shared)
            factor = scale[:, None, None, None]
            made, last = [residual * factor for residual in made], last * factor
            down = [a + b for a, b in zip(down, made, strict=True)] if down else made
            middle = last if middle is None else middle + last
        return self.unet(
            **arguments, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle
        )


ADDED = ("text_embeds", "time_ids", "image_embeds", "hint")
PASSED = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond")


def _arguments(arrays: tuple[ArrayInput, ...], controls: int) -> Callable[[Feeds], Mapping[str, Any]]:
    names = [array.name for array in arrays]

    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        found: dict[str, Any] = {name: feeds[name] for name in PASSED if name in feeds}
        found.setdefault("encoder_hidden_states", None)
        found |= {"sample": with_condition(feeds), "return_dict": False}
        added: dict[str, Any] = {name: feeds[name] for name in ADDED if name in names}
        adapters = [feeds[name] for name in names if name.startswith(IP_ADAPTER)]
        if adapters:
            added["image_embeds"] = adapters
        if added:
            found["added_cond_kwargs"] = added
        if controls:
            found["images"] = [feeds[name] for name in names if name.startswith(CONTROL_IMAGE)]
            found["scales"] = [feeds[name] for name in names if name.startswith(CONTROL_SCALE)]
        return found

    return arguments
