"""Video transformers."""

from __future__ import annotations

from typing import Any

import torch
from support.zoo.entry import Draw, Entry, Inputs

FRAMES = 3
WAN_TEXT = 512
"""The prompt length by which Wan's attention tells text from image tokens."""


def video(draw: Draw, channels: int = 4, width: int = 16, frames: int = FRAMES) -> Inputs:
    """[batch, channels, frames, height, width]."""
    return {
        "hidden_states": draw.normal(channels, frames, 8, 8), "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(6, width),
    }


def frames_first(draw: Draw, channels: int = 4) -> Inputs:
    """[batch, frames, channels, height, width]."""
    return {**video(draw), "hidden_states": draw.normal(FRAMES, channels, 8, 8)}


def channels_last(draw: Draw, channels: int) -> Inputs:
    """[batch, frames, height, width, channels]."""
    return {
        "hidden_states": draw.normal(FRAMES, 8, 8, channels), "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(6, 16), "pooled_projections": draw.normal(16),
    }


def rotary(draw: Draw, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines, sines) of random angles, as a pipeline computes them from positions."""
    angles = draw.shared(tokens, width // 2).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def allegro(draw: Draw) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *angles, frames, rows, columns = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), FRAMES)
    places = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T.reshape(3, 1, -1).contiguous()
    return {
        **video(draw), "attention_mask": torch.ones(draw.batch, FRAMES, 8, 8),
        "encoder_attention_mask": draw.mask(6, 5),
        "image_rotary_emb": (tuple(angles), tuple(places)),
    }


def consis_id(draw: Draw) -> Inputs:
    return {
        **frames_first(draw), "id_cond": draw.normal(16), "id_vit_hidden": [draw.normal(4, 16) for _ in range(2)],
        "image_rotary_emb": rotary(draw, FRAMES * 16, 16),
    }


def cosmos(draw: Draw) -> Inputs:
    """Without a padding mask: diffusers resizes it by torchvision, which quantempo does not need."""
    return {**video(draw), "attention_mask": draw.mask(6, 5), "fps": 24}


def any_flow(draw: Draw) -> Inputs:
    return {
        **frames_first(draw), "timestep": draw.steps()[:, None].repeat(1, FRAMES),
        "r_timestep": draw.steps()[:, None].repeat(1, FRAMES),
    }


def any_flow_far(draw: Draw) -> Inputs:
    """Two chunks of two frames; attention is causal over chunks."""
    from diffusers.models.transformers.transformer_anyflow_far import _build_anyflow_far_causal_block_mask

    mask = _build_anyflow_far_causal_block_mask(
        chunk_partition=[2, 2], height=8, width=8, patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3, mode="train", has_clean_context=False, device="cpu",
    )
    return {
        **video(draw), "hidden_states": draw.normal(4, 4, 8, 8), "chunk_partition": [2, 2],
        "timestep": draw.steps()[:, None].repeat(1, 4), "r_timestep": draw.steps()[:, None].repeat(1, 4),
        "attention_mask": mask,
    }


def helios(draw: Draw) -> Inputs:
    return {
        **video(draw, frames=2), "indices_hidden_states": draw.repeat(7.0, 8.0),
        "indices_latents_history_short": draw.repeat(6.0), "indices_latents_history_mid": draw.repeat(5.0),
        "indices_latents_history_long": draw.repeat(1.0, 2.0, 3.0, 4.0),
        "latents_history_short": draw.normal(4, 1, 8, 8), "latents_history_mid": draw.normal(4, 1, 8, 8),
        "latents_history_long": draw.normal(4, 4, 8, 8),
    }


def hunyuan(draw: Draw) -> Inputs:
    return {
        **video(draw), "pooled_projections": draw.normal(8), "encoder_attention_mask": draw.mask(6, 5),
        "guidance": draw.steps(),
    }


def hunyuan15(draw: Draw) -> Inputs:
    return {
        **video(draw), "encoder_attention_mask": draw.mask(6, 5), "encoder_hidden_states_2": draw.normal(4, 16),
        "encoder_attention_mask_2": draw.mask(4, 3), "image_embeds": torch.zeros(draw.batch, 3, 16),
    }


def frame_pack(draw: Draw) -> Inputs:
    return {
        **video(draw), "hidden_states": draw.normal(4, 3, 8, 8), "pooled_projections": draw.normal(8),
        "encoder_attention_mask": draw.mask(6, 5), "guidance": draw.steps(), "image_embeds": draw.normal(4, 16),
        "indices_latents": torch.arange(3.0), "latents_clean": draw.normal(4, 2, 8, 8),
        "indices_latents_clean": torch.arange(2.0), "latents_history_2x": draw.normal(4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(2.0), "latents_history_4x": draw.normal(4, 8, 8, 8),
        "indices_latents_history_4x": torch.arange(8.0),
    }


def ltx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(FRAMES * 16, 4), "encoder_hidden_states": draw.normal(6, 16),
        "timestep": draw.steps(), "encoder_attention_mask": draw.mask(6, 5), "num_frames": FRAMES,
        "height": 4, "width": 4,
    }


def ltx2(draw: Draw) -> Inputs:
    return {
        **ltx(draw), "audio_hidden_states": draw.normal(9, 4), "audio_encoder_hidden_states": draw.normal(6, 16),
        "audio_num_frames": 9, "fps": 24.0,
    }


def mochi(draw: Draw) -> Inputs:
    return {**video(draw), "encoder_attention_mask": draw.mask(6, 5, torch.bool)}


def minimax(draw: Draw) -> Inputs:
    """One packed sequence of text, audio and video rows, each with its tag, its noise level and its place."""
    text, audio, frames = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags, levels, places = torch.zeros(18, dtype=torch.int64), torch.zeros(18, dtype=torch.int64), torch.zeros(18, 3)
    tags[text], tags[audio], levels[audio] = 1, 2, 1
    places[:, 0] = torch.arange(18.0)
    places[frames, 1], places[frames, 2] = torch.arange(8.0) % 4, torch.arange(8.0) % 2
    return {
        "hidden_states": draw.normal(8, 16), "audio_hidden_states": draw.normal(6, 8),
        "encoder_hidden_states": draw.normal(4, 16), "timestep": torch.tensor([0.7, 0.3]), "timestep_indices": levels,
        "token_tags": tags, "position_ids": places, "video_indices": frames, "audio_indices": audio,
        "text_indices": text,
    }


def animate(draw: Draw) -> Inputs:
    """Frames: one reference and two driven latents, that is eight driving face images."""
    return {
        **video(draw, channels=12), "encoder_hidden_states": draw.normal(WAN_TEXT, 16),
        "encoder_hidden_states_image": draw.normal(4, 16),
        "pose_hidden_states": draw.normal(4, 2, 8, 8), "face_pixel_values": draw.normal(3, 5, 16, 16),
        "motion_encode_batch_size": 1000,
    }


def animate2(draw: Draw) -> Inputs:
    """A denoising call: four frames of sixteen tokens, and keys and values that a reference video left in a cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, cache = 4, WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        key, value = (draw.shared(FRAMES * 16, 2, 16).expand(draw.batch, -1, -1, -1) for _ in range(2))
        layer.store(key, value)
    return {
        "hidden_states": draw.samples(4, frames, 8, 8), "timestep": draw.steps(),
        "encoder_hidden_states": draw.samples(6, 16), "condition_latents": draw.samples(8, frames, 8, 8),
        "kv_cache": cache, "kv_cache_mode": "cached", "seq_len": frames * 16,
        "reference_grid_sizes": torch.tensor([[FRAMES, 4, 4]] * draw.batch), "origin_len": 8, "origin_area": [64, 64],
    }


def vace(draw: Draw) -> Inputs:
    return {**video(draw), "control_hidden_states": draw.normal(12, FRAMES, 8, 8)}


def image_conditioned(draw: Draw) -> Inputs:
    return {
        **video(draw), "encoder_hidden_states": draw.normal(WAN_TEXT, 16),
        "encoder_hidden_states_image": draw.normal(4, 16),
    }


def kandinsky5(draw: Draw) -> Inputs:
    return {
        **channels_last(draw, 4), "visual_rope_pos": [torch.arange(FRAMES), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(6),
    }


def kandinsky6(draw: Draw) -> Inputs:
    return {**channels_last(draw, 9), "audio_hidden_states": draw.normal(5, 8)}


def kandinsky6_sr(draw: Draw) -> Inputs:
    return {"hidden_states": draw.normal(FRAMES, 8, 8, 9), "timestep": draw.steps()}


def sana_world(draw: Draw) -> Inputs:
    camera = torch.cat([torch.eye(4).flatten().repeat(draw.batch, FRAMES, 1), draw.normal(FRAMES, 4).abs() + 1], -1)
    return {
        "hidden_states": draw.normal(4, FRAMES, 8, 8), "timestep": draw.steps()[:, None, None].repeat(1, 1, FRAMES),
        "encoder_hidden_states": draw.normal(1, 6, 16), "encoder_attention_mask": draw.mask(6),
        "camera_conditions": camera, "chunk_plucker": draw.normal(48, FRAMES, 8, 8),
    }


def sana_refiner(draw: Draw) -> Inputs:
    tokens = FRAMES * 16
    return {
        "hidden_states": draw.normal(tokens, 4), "encoder_hidden_states": draw.normal(6, 16),
        "timestep": draw.steps()[:, None].repeat(1, tokens), "video_rotary_emb": rotary(draw, tokens, 32),
        "encoder_attention_mask": draw.mask(6, 5),
    }


def cosmos3(draw: Draw) -> Inputs:
    """One packed sequence without a batch: two text tokens, then four by four vision tokens."""
    vision = torch.arange(2, 18)
    positions = torch.zeros(3, 18, dtype=torch.int64)
    positions[1, 2:], positions[2, 2:] = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    return {
        "input_ids": torch.tensor([1, 2]), "text_indexes": torch.arange(2), "position_ids": positions, "und_len": 2,
        "sequence_length": 18, "vision_tokens": [draw.shared(1, 4, 1, 4, 4)], "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": vision, "vision_mse_loss_indexes": vision,
        "vision_timesteps": draw.shared(1).abs().repeat(16), "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def motif(draw: Draw) -> Inputs:
    return {**video(draw, channels=9), "encoder_attention_mask": draw.mask(6, 5, torch.bool)}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
COG: dict[str, Any] = {
    **HEADS, "time_embed_dim": 16, "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8,
    "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6,
    "use_rotary_positional_embeddings": True,
}
WAN: dict[str, Any] = {
    **HEADS, "attention_head_dim": 12, "patch_size": (1, 2, 2), "text_dim": 16, "freq_dim": 32, "ffn_dim": 48,
    "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}
ANY_FLOW = {**WAN, "deltatime_type": "r", "gate_value": 0.25}
HUNYUAN: dict[str, Any] = {
    **HEADS, "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 8),
}
LTX2: dict[str, Any] = {
    **HEADS, "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2,
    "caption_channels": 16,
}
KANDINSKY: dict[str, Any] = {
    "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "in_visual_dim": 4, "out_visual_dim": 4,
}

ENTRIES = (
    Entry("CogVideoXTransformer3DModel", COG, lambda draw: {
        **frames_first(draw), "image_rotary_emb": rotary(draw, FRAMES * 16, 16),
    }),
    Entry(
        "ConsisIDTransformer3DModel",
        {
            **COG, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2,
            "LFE_id_dim": 16, "LFE_vit_dim": 16, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 2,
            "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 2,
        },
        consis_id,
    ),
    Entry(
        "AllegroTransformer3DModel",
        {
            **HEADS, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48, "sample_width": 8,
            "sample_height": 8, "sample_frames": 3, "caption_channels": 16,
        },
        allegro,
    ),
    Entry(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "caption_channels": 16, "video_length": FRAMES,
        },
        video,
    ),
    Entry(
        "MochiTransformer3DModel",
        {
            **HEADS, "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": 16,
            "time_embed_dim": 16, "max_sequence_length": 6,
        },
        mochi,
    ),
    Entry(
        "CosmosTransformer3DModel",
        {
            **HEADS, "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 8,
            "max_size": (4, 16, 16), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False,
        },
        cosmos,
    ),
    Entry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "latent_channel": 4, "latent_patch_size": 1,
            "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 4,
            "rope_axes_dim": [4, 2, 2], "rope_theta": 10000.0, "vocab_size": 32, "dtype": "float32",
        },
        cosmos3, batches=(1, 1),
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        {
            **HEADS, "mmdit_layers": 2, "num_layers": 2, "patch_size": 2, "sample_height": 8, "sample_width": 8,
            "text_embed_dim": 16, "time_embed_dim": 16,
        },
        video,
    ),
    Entry("WanTransformer3DModel", {**WAN, "image_dim": 16, "added_kv_proj_dim": 24}, image_conditioned),
    Entry("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 12}, vace),
    Entry("SkyReelsV2Transformer3DModel", WAN, video),
    Entry("ChronoEditTransformer3DModel", {**WAN, "rope_temporal_skip_len": 8}, video),
    Entry("AnyFlowTransformer3DModel", ANY_FLOW, any_flow),
    Entry(
        "AnyFlowFARTransformer3DModel", {**ANY_FLOW, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        any_flow_far,
    ),
    Entry(
        "WanAnimateTransformer3DModel",
        {
            **WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        animate,
    ),
    Entry(
        "WanAnimate2Transformer3DModel",
        {
            "in_dim": 12, "dim": 32, "ffn_dim": 48, "freq_dim": 32, "text_dim": 16, "out_dim": 4, "num_heads": 2,
            "num_layers": 2, "text_len": 6, "use_img_emb": False,
        },
        animate2, batches=(2, 2),
    ),
    Entry(
        "HeliosTransformer3DModel",
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)}, helios,
    ),
    Entry("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16,
            "text_embed_2_dim": 16, "image_embed_dim": 16, "rope_axes_dim": (4, 4, 8), "target_size": 16,
            "task_type": "t2v", "patch_size": 2,
        },
        hunyuan15,
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        frame_pack,
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        {**HEADS, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
        ltx,
    ),
    Entry("LTX2VideoTransformer3DModel", LTX2, ltx2),
    Entry("SanaWMLTX2RefinerTransformer3DModel", LTX2, sana_refiner),
    Entry(
        "SanaVideoTransformer3DModel",
        {
            **HEADS, "attention_head_dim": 12, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda draw: {**video(draw), "encoder_attention_mask": draw.mask(6, 5)},
    ),
    Entry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
            "linear_head_dim": 16, "chunk_plucker_post_attn_blocks": 2, "image_size": 64, "caption_channels": 16,
        },
        sana_world,
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        {
            **HEADS, "in_channels": 9, "num_layers": 1, "num_single_layers": 2, "patch_size": 2, "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 8),
        },
        motif,
    ),
    Entry("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky5),
    Entry("Kandinsky6Transformer3DModel", {**KANDINSKY, "in_audio_dim": 8, "out_audio_dim": 8}, kandinsky6),
    Entry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 64,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        kandinsky6_sr,
    ),
    Entry(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4, "audio_in_channels": 8, "text_dim": 16,
            "freq_dim": 16, "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        minimax,
    ),
)
"""Transformers of videos, some with sound."""

