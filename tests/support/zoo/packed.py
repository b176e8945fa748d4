"""Image transformers on packed tokens: [batch, tokens, channels], with positions as further inputs."""

from __future__ import annotations

import torch
from support.zoo.entry import Draw, Entry, Inputs

IMAGE = 16
TEXT = 6


def grid_ids(side: int = 4, axes: int = 3) -> torch.Tensor:
    """[side * side, axes]: row and column of each image token, other axes zero."""
    ids = torch.zeros(side * side, axes)
    ids[:, 1] = torch.arange(side).repeat_interleave(side)
    ids[:, 2] = torch.arange(side).repeat(side)
    return ids


def packed(draw: Draw, channels: int = 4, width: int = 16) -> Inputs:
    return {
        "hidden_states": draw.normal(IMAGE, channels), "encoder_hidden_states": draw.normal(TEXT, width),
        "timestep": draw.steps(1.0),
    }


def flux(draw: Draw, axes: int = 3) -> Inputs:
    return {**packed(draw), "img_ids": grid_ids(4, axes), "txt_ids": torch.zeros(TEXT, axes)}


def qwen(draw: Draw) -> Inputs:
    return {
        **packed(draw, channels=16), "encoder_hidden_states_mask": draw.mask(TEXT, 5, torch.bool),
        "img_shapes": [[(1, 4, 4)]] * draw.batch,
    }


def qwen21(draw: Draw) -> Inputs:
    """The text holds four image slots at its end, each standing for two by two latent tokens."""
    slots = torch.zeros(draw.batch, TEXT + 4, dtype=torch.bool)
    slots[:, TEXT:] = True
    return {**packed(draw), "img_shapes": [[(1, 4, 4)]] * draw.batch, "img_mask": slots}


def krea(draw: Draw) -> Inputs:
    positions = torch.cat([torch.zeros(TEXT, 3), grid_ids()])
    return {
        "hidden_states": draw.normal(IMAGE, 4), "encoder_hidden_states": draw.normal(TEXT, 2, 16),
        "timestep": draw.steps(1.0), "position_ids": positions,
        "encoder_attention_mask": draw.mask(TEXT, 5, torch.bool),
    }


def ideogram(draw: Draw) -> Inputs:
    """Text and image tokens in one sequence; integers say which is which."""
    length = TEXT + IMAGE
    positions = torch.zeros(draw.batch, length, 3, dtype=torch.int64)
    positions[:, :TEXT] = torch.arange(TEXT)[:, None]
    positions[:, TEXT:] = grid_ids().long() + 65536
    indicator = torch.full((draw.batch, length), 3, dtype=torch.int64)
    indicator[:, TEXT:] = 2
    image, text = draw.normal(length, 4), draw.normal(length, 16)
    image[:, :TEXT] = 0
    text[:, TEXT:] = 0
    return {
        "hidden_states": image, "encoder_hidden_states": text, "timestep": draw.steps(1.0), "position_ids": positions,
        "segment_ids": torch.ones(draw.batch, length, dtype=torch.int64), "indicator": indicator,
    }


def joy(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(16, 1, 4, 4), "encoder_hidden_states": draw.normal(TEXT, 16),
        "timestep": draw.steps(),
    }


def joy_plus(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(2, 16, 1, 2, 2), "encoder_hidden_states": draw.normal(TEXT, 16),
        "timestep": draw.steps(), "shape_list": [[(1, 1, 1), (1, 1, 1)]] * draw.batch,
    }


FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
AXES = {"patch_size": 1, "axes_dims_rope": (4, 4, 8)}
QWEN = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
}
JOY = {
    "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}

ENTRIES = (
    Entry(
        "FluxTransformer2DModel", {**FLUX, **AXES, "pooled_projection_dim": 16, "guidance_embeds": True},
        lambda draw: {**flux(draw), "pooled_projections": draw.normal(16), "guidance": draw.repeat(3.5)[:, 0]},
    ),
    Entry(
        "Flux2Transformer2DModel",
        {**FLUX, "patch_size": 1, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda draw: {**flux(draw, 4), "guidance": draw.repeat(3.5)[:, 0]},
    ),
    Entry(
        "Flux3Transformer2DModel",
        {**FLUX, "cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda draw: flux(draw, 4),
    ),
    Entry(
        "ChromaTransformer2DModel",
        {
            **FLUX, **AXES, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        lambda draw: {**flux(draw), "attention_mask": draw.mask(TEXT + IMAGE, None, torch.bool)},
    ),
    Entry("BriaTransformer2DModel", {**FLUX, **AXES}, flux),
    Entry(
        "BriaFiboTransformer2DModel", {**FLUX, **AXES, "joint_attention_dim": 32, "text_encoder_dim": 16},
        lambda draw: {
            **flux(draw), "encoder_hidden_states": draw.normal(TEXT, 32),
            "text_encoder_layers": [draw.normal(TEXT, 16) for _ in range(3)],
        },
    ),
    Entry("OvisImageTransformer2DModel", {**FLUX, **AXES, "out_channels": 4}, flux),
    Entry("LongCatImageTransformer2DModel", {**FLUX, **AXES, "pooled_projection_dim": 16}, flux),
    Entry("QwenImageTransformer2DModel", {**QWEN, "patch_size": 2}, qwen),
    Entry(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "context_in_dim": 16, "axes_dims_rope": (8, 4, 4),
        },
        qwen21,
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        {
            **QWEN, "attention_head_dim": 32, "axes_dims_rope": (16, 8, 8), "patch_size": 2, "num_experts": 4,
            "moe_intermediate_dim": 32, "capacity_factors": 2.0,
            "dense_moe_strategy": "leave_first_block_dense",
        },
        lambda draw: {
            **packed(draw, channels=16), "encoder_hidden_states_mask": draw.mask(TEXT, 5, torch.bool),
            "img_shapes": [(1, 4, 4)] * draw.batch,
        },
    ),
    Entry(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 16, "text_hidden_dim": 16,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 4, 4),
        },
        krea,
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 16, "rope_theta": 10000,
            "mrope_section": (4, 2, 2),
        },
        ideogram,
    ),
    Entry("JoyImageEditTransformer3DModel", JOY, joy),
    Entry("JoyImageEditPlusTransformer3DModel", JOY, joy_plus, batches=(2, 2)),
)
"""Transformers that take tokens and where they are."""
