"""Convolutional denoisers and their relatives."""

from __future__ import annotations

from typing import Any

from support.zoo.entry import Draw, Entry, Inputs

CROSS = {
    "block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 8,
    "layers_per_block": 1, "sample_size": 8,
}
CONDITION = {
    **CROSS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def condition(draw: Draw) -> Inputs:
    return {"sample": draw.normal(4, 8, 8), "timestep": draw.steps(), "encoder_hidden_states": draw.normal(6, 16)}


def text_time(draw: Draw) -> Inputs:
    added = {"text_embeds": draw.normal(16), "time_ids": draw.repeat(64.0, 64.0, 0.0, 0.0, 64.0, 64.0)}
    return {**condition(draw), "added_cond_kwargs": added}


def video(draw: Draw) -> Inputs:
    return {"sample": draw.normal(4, 3, 8, 8), "timestep": draw.steps(), "encoder_hidden_states": draw.normal(6, 16)}


def motion(draw: Draw) -> Inputs:
    """One prompt for all frames of a video, repeated per frame by the pipeline."""
    prompt = draw.normal(6, 16).repeat_interleave(3, 0)
    return {"sample": draw.normal(4, 3, 8, 8), "timestep": draw.steps(), "encoder_hidden_states": prompt}


def spatio_temporal(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(3, 8, 8, 8), "timestep": draw.steps(), "encoder_hidden_states": draw.normal(1, 16),
        "added_time_ids": draw.repeat(6.0, 127.0, 0.02),
    }


def image_to_video(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(4, 3, 8, 8), "timestep": draw.steps(), "fps": draw.repeat(16.0)[:, 0],
        "image_latents": draw.normal(4, 3, 8, 8), "image_embeddings": draw.normal(16),
        "encoder_hidden_states": draw.normal(6, 16),
    }


def cascade(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(4, 8, 8), "timestep_ratio": draw.steps(1.0), "clip_text_pooled": draw.normal(1, 16),
        "clip_text": draw.normal(3, 16), "clip_img": draw.normal(1, 16),
    }


def audio_ldm(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(4, 8, 8), "timestep": draw.steps(), "encoder_hidden_states": draw.normal(6, 16),
        "encoder_hidden_states_1": draw.normal(5, 16), "encoder_attention_mask_1": draw.mask(5, 4),
    }


def tokens(draw: Draw) -> Inputs:
    """Masked image tokens: the state is integers."""
    return {
        "input_ids": draw.integers(32, 4, 4), "encoder_hidden_states": draw.normal(6, 16),
        "pooled_text_emb": draw.normal(16), "micro_conds": draw.repeat(64.0, 64.0, 0.0, 0.0, 6.0),
    }


def with_control(draw: Draw) -> Inputs:
    return {**condition(draw), "controlnet_cond": draw.normal(3, 16, 16), "conditioning_scale": 1.0}


MOTION: dict[str, Any] = {
    "block_out_channels": (16, 32), "norm_num_groups": 16, "cross_attention_dim": 16, "num_attention_heads": 2,
    "motion_num_attention_heads": 2, "layers_per_block": 1, "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
CASCADE: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16, "conditioning_dim": 32,
    "block_out_channels": (16, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 16, "clip_text_pooled_in_channels": 16,
    "clip_image_in_channels": 16, "clip_seq": 2,
}

ENTRIES = (
    Entry(
        "UNet1DModel",
        {
            "block_out_channels": (16, 16, 32, 32), "in_channels": 8, "out_channels": 8, "sample_size": 16,
            "time_embedding_type": "positional", "use_timestep_embedding": True, "flip_sin_to_cos": False,
            "freq_shift": 1.0, "out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D",
            "down_block_types": ("DownResnetBlock1D",) * 4, "up_block_types": ("UpResnetBlock1D",) * 3,
            "act_fn": "swish",
        },
        lambda draw: {"sample": draw.normal(8, 16), "timestep": draw.steps()},
    ),
    Entry(
        "UNet2DModel",
        {
            "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda draw: {"sample": draw.normal(3, 8, 8), "timestep": draw.steps()},
    ),
    Entry(
        "UNet2DConditionModel",
        {
            **CONDITION, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        },
        text_time,
    ),
    Entry(
        "UNet3DConditionModel",
        {
            **CROSS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        video,
    ),
    Entry("UNetMotionModel", MOTION, motion),
    Entry(
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32, 64), "cross_attention_dim": 16, "num_attention_heads": 2, "sample_size": 8,
            "layers_per_block": 1, "num_frames": 3, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        spatio_temporal,
    ),
    Entry(
        "I2VGenXLUNet",
        {
            **CROSS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        image_to_video,
    ),
    Entry(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2,
            "block_out_channels": (16, 32, 32, 32), "cross_attention_dim": 16, "encoder_hid_dim": 16,
        },
        lambda draw: {
            "sample": draw.normal(4, 16, 16), "timestep": draw.steps(), "encoder_hidden_states": draw.normal(6, 16),
            "encoder_attention_mask": draw.mask(6, 5),
        },
    ),
    Entry("StableCascadeUNet", CASCADE, cascade),
    Entry(
        "DreamLiteUNetModel",
        {
            "block_out_channels": (16, 32, 32), "norm_num_groups": 4, "cross_attention_dim": 16,
            "attention_head_dim": 8, "layers_per_block": 1, "sample_size": 8, "ff_mult": 2,
        },
        condition,
    ),
    Entry(
        "UVit2DModel",
        {
            "hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16, "vocab_size": 33, "codebook_size": 32, "in_channels": 32,
            "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 64, "sample_size": 4,
        },
        tokens,
    ),
    Entry(
        "AudioLDM2UNet2DConditionModel",
        {
            **{key: value for key, value in CONDITION.items() if key != "cross_attention_dim"},
            "cross_attention_dim": ((None, 16, 16), (None, 16, 16)),
        },
        audio_ldm,
        module="diffusers.pipelines.audioldm2.modeling_audioldm2",
    ),
    Entry(
        "UNetControlNetXSModel",
        {
            "sample_size": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 32),
            "cross_attention_dim": 16, "num_attention_heads": 2, "norm_num_groups": 4,
            "ctrl_block_out_channels": (8, 16), "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4,
            "ctrl_conditioning_embedding_out_channels": (8, 8),
        },
        with_control,
    ),
)
"""UNets of images, video and audio."""


