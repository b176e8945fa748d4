"""Tiny denoiser directories of the larger families, random weights, and conditioning for them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.tiny_models import CONDITION_UNET, build

from quantempo.contracts.manifest import Denoiser

LARGE: Mapping[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                            "projection_class_embeddings_input_dim": 6 * 8 + 16}  # fmt: skip
"""What XL has beyond its predecessors, its UNet and its ControlNets."""
XL = {**CONDITION_UNET, **LARGE}
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True}  # fmt: skip
SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
       "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
       "pooled_projection_dim": 12, "pos_embed_max_size": 8}  # fmt: skip
PIXART = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 2,
          "attention_head_dim": 16, "num_attention_heads": 2, "cross_attention_dim": 32, "caption_channels": 24,
          "use_additional_conditions": False}  # fmt: skip
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
       "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2}  # fmt: skip
CONTROL = {"in_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32), "attention_head_dim": 2,
           "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8,
           "cross_attention_dim": 24, "conditioning_embedding_out_channels": (8, 16)}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A denoiser directory to compile.

    Args:
        class_name, config: what is built.
        scheduler: its diffusers class.
        options: fields of the recipe.
    """

    class_name: str
    config: Mapping[str, Any]
    scheduler: str = "DDIMScheduler"
    options: Mapping[str, Any] = field(default_factory=dict)


FLOW = "FlowMatchEulerDiscreteScheduler"
MODELS: Mapping[str, Tiny] = {
    "sd": Tiny("UNet2DConditionModel", CONDITION_UNET, options={"tokens": 7}),
    "sdxl": Tiny("UNet2DConditionModel", XL, options={"tokens": 7}),
    "lcm": Tiny("UNet2DConditionModel", {**CONDITION_UNET, "time_cond_proj_dim": 8}, options={"tokens": 7}),
    "inpaint": Tiny("UNet2DConditionModel", {**CONDITION_UNET, "in_channels": 9}, options={"tokens": 7}),
    "flux": Tiny("FluxTransformer2DModel", FLUX, FLOW, {"tokens": 6, "size": "8x12"}),
    "sd3": Tiny("SD3Transformer2DModel", SD3, FLOW, {"tokens": 9}),
    "pixart": Tiny("PixArtTransformer2DModel", PIXART, options={"tokens": 6}),
    "wan": Tiny("WanTransformer3DModel", WAN, FLOW, {"tokens": 6, "size": "3x8x8"}),
}


@functools.cache
def directory(name: str) -> Path:
    """The denoiser directory; its scheduler lies in `scheduler/`."""
    import diffusers

    tiny = MODELS[name]
    folder = Path(tempfile.mkdtemp(prefix="quantempo-family-")) / name
    build(tiny.class_name, sorted(MODELS).index(name), **tiny.config).save_pretrained(folder)
    getattr(diffusers, tiny.scheduler)().save_pretrained(folder / "scheduler")
    return folder


@functools.cache
def controlnet(large: bool = False) -> Path:
    """A ControlNet for `sd`, or for `sdxl`."""
    folder = Path(tempfile.mkdtemp(prefix="quantempo-control-")) / "controlnet"
    build("ControlNetModel", 40, **CONTROL, **(LARGE if large else {})).save_pretrained(folder)
    return folder


@functools.cache
def ip_adapter() -> Path:
    """An IP-Adapter for `sd` and `sdxl`: image embeddings of 20 numbers, four tokens."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(41)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    width = int(CONDITION_UNET["cross_attention_dim"])  # type: ignore[call-overload]
    tensors = {"image_proj.proj.weight": normal(4 * width, 20), "image_proj.proj.bias": normal(4 * width),
               "image_proj.norm.weight": 1 + normal(width), "image_proj.norm.bias": normal(width)}  # fmt: skip
    unet: Any = build("UNet2DConditionModel", 0, **CONDITION_UNET)
    number = 1
    for key, processor in unet.attn_processors.items():
        if "attn2" in key:
            hidden = unet.get_submodule(key.removesuffix(".processor")).inner_dim
            for part in ("k", "v"):
                tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] = normal(hidden, width)
        number += 2 * ("attn2" in key)
        assert processor is not None
    path = Path(tempfile.mkdtemp(prefix="quantempo-adapter-")) / "adapter.safetensors"
    save_file(tensors, str(path))
    return path


def conditioning(denoiser: Denoiser, rows: int, seed: int = 0, negative: bool = True) -> dict[str, NDArray[Any]]:
    """Arrays for every input of a denoiser, with and without `negative_`."""
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for array in denoiser.arrays:
        for name in (array.name, f"negative_{array.name}")[: 2 if array.guided and negative else 1]:
            shape = (rows, *map(int, array.shape))
            found[name] = rng.standard_normal(shape).astype(np.float32)
            if array.dtype == "int64":
                found[name] = np.ones(shape, np.int64)
                found[name][:, -1:] = name == array.name
    return found


@functools.cache
def two_experts() -> Path:
    """A pipeline directory as Wan 2.2 has it: two transformers and the boundary between them."""
    import json

    import diffusers

    folder = Path(tempfile.mkdtemp(prefix="quantempo-experts-")) / "wan22"
    for index, name in enumerate(("transformer", "transformer_2")):
        build("WanTransformer3DModel", 50 + index, **WAN).save_pretrained(folder / name)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.875}))
    return folder


def json_class(config: Path) -> str:
    """The class that a configuration file names."""
    import json

    return str(json.loads(config.read_text())["_class_name"])
