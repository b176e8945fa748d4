"""Denoisers of embeddings, audio and molecules."""

from __future__ import annotations

from typing import Any

import torch
from support.zoo.entry import Draw, Entry, Inputs


def ace_step(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(8, 8), "timestep": draw.steps(1.0), "timestep_r": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(6, 32), "context_latents": draw.normal(8, 16),
    }


def stable_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(4, 12), "timestep": draw.steps(1.0), "encoder_hidden_states": draw.normal(5, 16),
        "global_hidden_states": draw.normal(1, 16), "rotary_embedding": (draw.shared(13, 8), draw.shared(13, 8)),
    }


def stable_audio3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(8, 16), "timestep": draw.steps(1.0), "encoder_hidden_states": draw.normal(4, 16),
        "global_hidden_states": draw.normal(16), "local_add_cond": draw.normal(5, 16),
    }


def longcat(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(12, 8), "encoder_hidden_states": draw.normal(6, 16),
        "encoder_attention_mask": draw.mask(6, 5, torch.bool), "attention_mask": draw.mask(12, 11, torch.bool),
        "timestep": draw.steps(1.0), "latent_cond": draw.normal(12, 8),
    }


def music3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(8, 12), "encoder_hidden_states": draw.normal(12, 16), "timestep": draw.steps(1.0),
    }


def spectrogram(draw: Draw) -> Inputs:
    return {
        "encodings_and_masks": [(draw.normal(6, 32), draw.mask(6, 5)), (draw.normal(4, 32), draw.mask(4))],
        "decoder_input_tokens": draw.normal(8, 16), "decoder_noise_time": draw.steps(1.0),
    }


def molecule(draw: Draw) -> Inputs:
    emits = torch.zeros(draw.batch, 6, dtype=torch.bool)
    conditioning: dict[str, Any] = {
        "is_in_context_conditioning": emits, "supports_local_latent": torch.ones(draw.batch, 6, dtype=torch.bool),
    }
    return {
        "bb_ca": draw.normal(6, 3), "local_latents": draw.normal(6, 8), "bb_ca_time": draw.steps(1.0),
        "local_latents_time": draw.steps(1.0), "padding_mask": draw.mask(6, None, torch.bool),
        "token_type": draw.integers(7, 6), "conditioning": conditioning,
    }


def wuerstchen(draw: Draw) -> Inputs:
    return {"x": draw.normal(4, 8, 8), "r": draw.steps(1.0), "c": draw.normal(5, 16)}


def uni_diffuser(draw: Draw) -> Inputs:
    return {
        "latent_image_embeds": draw.normal(4, 8, 8), "image_embeds": draw.normal(1, 16),
        "prompt_embeds": draw.normal(7, 16), "timestep_img": draw.steps(), "timestep_text": draw.steps(),
    }


ENTRIES = (
    Entry(
        "PriorTransformer",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 16,
            "num_embeddings": 7, "additional_embeddings": 4,
        },
        lambda draw: {
            "hidden_states": draw.normal(16), "timestep": draw.steps(), "proj_embedding": draw.normal(16),
            "encoder_hidden_states": draw.normal(7, 16), "attention_mask": draw.mask(7, 6, torch.bool),
        },
    ),
    Entry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
            "sliding_window": 2,
        },
        ace_step,
    ),
    Entry(
        "StableAudioDiTModel",
        {
            "sample_size": 12, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 16,
            "global_states_input_dim": 16, "cross_attention_input_dim": 16,
        },
        stable_audio,
    ),
    Entry(
        "StableAudio3DiTModel",
        {
            "io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16,
            "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2, "num_memory_tokens": 3,
        },
        stable_audio3,
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8, "ff_mult": 2.0},
        longcat,
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "ff_inner_dim": 64, "rotary_dim": 8, "fourier_embedding_dim": 16,
        },
        music3,
    ),
    Entry(
        "T5FilmDecoder",
        {"input_dims": 16, "targets_length": 8, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64},
        spectrogram,
    ),
    Entry(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 8,
            "token_type_emb_dim": 8, "t_emb_dim": 16, "seq_sep_dim": 8, "xt_pair_dist_dim": 8, "tri_mult_c": 16,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"),
        },
        molecule, family={"output": 1},  # the local latents, which every input has a part in
    ),
    Entry(
        "WuerstchenPrior", {"c_in": 4, "c": 32, "c_cond": 16, "c_r": 16, "depth": 2, "nhead": 2}, wuerstchen,
        module="diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior",
        scales={"out.1.weight": 0.1},  # the output is divided by |1 - b| with a b from here
    ),
    Entry(
        "WuerstchenDiffNeXt",
        {
            "c_in": 4, "c_out": 4, "c_r": 16, "patch_size": 1, "c_cond": 16, "c_hidden": [16, 32], "nhead": [-1, 2],
            "blocks": [1, 1], "level_config": ["CT", "CTA"], "inject_effnet": [False, True], "effnet_embd": 8,
            "clip_embd": 16,
        },
        lambda draw: {
            "x": draw.normal(4, 8, 8), "r": draw.steps(1.0), "effnet": draw.normal(8, 4, 4), "clip": draw.normal(5, 16),
        },
        module="diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext",
    ),
    Entry(
        "UniDiffuserModel",
        {
            "text_dim": 16, "clip_img_dim": 16, "num_text_tokens": 7, "num_attention_heads": 2,
            "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8,
            "patch_size": 2, "norm_type": "layer_norm",
            "block_type": "unidiffuser", "pre_layer_norm": False, "use_timestep_embedding": False,
            "norm_elementwise_affine": True, "use_patch_pos_embed": False, "ff_final_dropout": True,
        },
        uni_diffuser, module="diffusers.pipelines.deprecated.unidiffuser.modeling_uvit",
    ),
)
"""Everything that is not an image or a video."""
