"""Image transformers on [batch, channels, height, width] latents."""

from __future__ import annotations

import torch
from support.zoo.entry import Draw, Entry, Inputs


def image(draw: Draw, channels: int = 4, size: int = 8) -> Inputs:
    return {"hidden_states": draw.normal(channels, size, size), "timestep": draw.steps()}


def prompted(draw: Draw, width: int = 16, channels: int = 4, size: int = 8) -> Inputs:
    return {**image(draw, channels, size), "encoder_hidden_states": draw.normal(6, width)}


def cog_view(draw: Draw) -> Inputs:
    return {
        **prompted(draw), "original_size": draw.repeat(64.0, 64.0), "target_size": draw.repeat(64.0, 64.0),
        "crop_coords": draw.repeat(0.0, 0.0),
    }


def hunyuan_dit(draw: Draw) -> Inputs:
    return {
        **image(draw), "encoder_hidden_states": draw.normal(4, 16), "text_embedding_mask": draw.mask(4, 3),
        "encoder_hidden_states_t5": draw.normal(5, 16), "text_embedding_mask_t5": draw.mask(5, 4),
        "image_meta_size": draw.repeat(1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0),
        "style": torch.zeros(draw.batch, dtype=torch.int64),
        "image_rotary_emb": (draw.shared(16, 8), draw.shared(16, 8)),
    }


def hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(4, 8, 8), "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.normal(5, 16),
        "encoder_hidden_states_llama3": torch.stack([draw.normal(5, 16), draw.normal(5, 16)]),
        "pooled_embeds": draw.normal(16),
    }


def lumina_next(draw: Draw) -> Inputs:
    angles = draw.shared(384, 384, 4)
    return {
        "hidden_states": draw.normal(4, 16, 16), "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(6, 16),
        "encoder_mask": draw.mask(6, 5), "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def lumina2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(4, 8, 8), "timestep": draw.steps(1.0), "encoder_hidden_states": draw.normal(6, 16),
        "encoder_attention_mask": draw.mask(6, 5, torch.bool),
    }


def z_image(draw: Draw) -> Inputs:
    return {"x": draw.samples(4, 1, 8, 8), "t": draw.steps(1.0), "cap_feats": draw.samples(6, 16)}


def omni_gen(draw: Draw) -> Inputs:
    length = 6 + 1 + 16
    return {
        "hidden_states": draw.normal(4, 8, 8), "timestep": draw.steps(1.0), "input_ids": draw.integers(30, 6),
        "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(draw.batch, length, length).tril(),
        "position_ids": torch.arange(length).repeat(draw.batch, 1),
    }


def glm(draw: Draw) -> Inputs:
    return {
        **prompted(draw), "prior_token_id": draw.integers(32, 16),
        "prior_token_drop": torch.zeros(draw.batch, 16, dtype=torch.bool), "target_size": draw.repeat(64.0, 64.0),
        "crop_coords": draw.repeat(0.0, 0.0),
    }


def vq_tokens(draw: Draw) -> Inputs:
    """VQ-Diffusion: the state is class indices, and one timestep serves all samples."""
    return {
        "hidden_states": draw.integers(12, 16), "encoder_hidden_states": draw.normal(6, 16),
        "timestep": draw.steps()[0].long(),
    }


def fibo2(draw: Draw) -> Inputs:
    """No mask: with one, the number of gist tokens follows each prompt's length, in Python."""
    return {
        "hidden_states": draw.normal(4, 8, 8), "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(2, 8, 16),
    }


def ernie(draw: Draw) -> Inputs:
    return {
        **image(draw, channels=16), "text_bth": draw.normal(6, 16),
        "text_lens": torch.tensor([6, 4, 5]).repeat(9)[: draw.batch],
    }


DIT = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 10,
}
PIXART = {
    **DIT, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 16, "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
}
MMDIT = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2}
COG = {**MMDIT, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8}

ENTRIES = (
    Entry("DiTTransformer2DModel", {**DIT, "out_channels": 8}, lambda draw: {
        **image(draw), "class_labels": draw.integers(10),
    }),
    Entry("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": False}, lambda draw: {
        **prompted(draw), "encoder_attention_mask": draw.mask(6, 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }),
    Entry(
        "Transformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "cross_attention_dim": 16,
            "attention_bias": True, "sample_size": 4, "num_vector_embeds": 12, "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm", "activation_fn": "geglu-approximate",
        },
        vq_tokens,
    ),
    Entry(
        "SD3Transformer2DModel",
        {
            **MMDIT, "sample_size": 8, "num_layers": 2, "caption_projection_dim": 32, "joint_attention_dim": 16,
            "pooled_projection_dim": 24, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda draw: {**prompted(draw), "pooled_projections": draw.normal(24)},
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        {
            **MMDIT, "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "caption_projection_dim": 32,
            "joint_attention_dim": 16, "pos_embed_max_size": 16,
        },
        lambda draw: {**prompted(draw), "timestep": draw.steps(1.0)},
    ),
    Entry("CogView3PlusTransformer2DModel", {**COG, "pos_embed_max_size": 8, "sample_size": 8}, cog_view),
    Entry("CogView4Transformer2DModel", {**COG, "sample_size": 8, "rope_axes_dim": (16, 16)}, cog_view),
    Entry("GlmImageTransformer2DModel", {**COG, "prior_vq_quantizer_codebook_size": 32}, glm),
    Entry(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8, "hidden_size": 16, "text_len": 4, "text_len_t5": 5,
        },
        hunyuan_dit,
    ),
    Entry(
        "SanaTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
            "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8,
        },
        lambda draw: {**prompted(draw), "encoder_attention_mask": draw.mask(6, 5)},
    ),
    Entry(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False,
            "cross_attention_dim": 16,
        },
        lumina_next,
    ),
    Entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2,
            "axes_dim_rope": (8, 4, 4), "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
        },
        lumina2,
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [16, 16], "text_emb_dim": 16,
            "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8), "llama_layers": (0, 1), "force_inference_output": True,
        },
        hidream,
    ),
    Entry(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32],
        },
        z_image, batches=(2, 2),
    ),
    Entry(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
            "num_layers": 2, "pad_token_id": 0, "vocab_size": 40, "in_channels": 4, "time_step_dim": 16,
            "pos_embed_max_size": 16, "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        omni_gen,
    ),
    Entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda draw: {**prompted(draw), "timestep": draw.steps(1.0)},
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16,
            "rope_axes_dim": (8, 8),
        },
        lambda draw: {
            **prompted(draw), "encoder_attention_mask": draw.mask(6, 5), "encoder_hidden_states_2": draw.normal(5, 16),
            "encoder_attention_mask_2": draw.mask(5, 4),
        },
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 16,
            "out_channels": 16, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4),
        },
        ernie,
    ),
    Entry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16,
            "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
            "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 32, "axes_dims": (8, 4, 4),
            "axes_lens": (64, 32, 32),
        },
        fibo2,
    ),
)
"""Transformers that cut the image into patches themselves."""
