"""Stable Diffusion 3's transformer with one argument more: a style vector that is added to the pooled prompt."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn


class StyledSD3(SD3Transformer2DModel):
    """`forward` of its base with `style` [batch, style_dim]."""

    @register_to_config
    def __init__(
        self, style_dim: int = 12, sample_size: int = 16, patch_size: int = 2, in_channels: int = 4,
        out_channels: int = 4, num_layers: int = 3, attention_head_dim: int = 16, num_attention_heads: int = 4,
        joint_attention_dim: int = 24, caption_projection_dim: int = 64, pooled_projection_dim: int = 20,
        pos_embed_max_size: int = 16,
    ) -> None:
        super().__init__(
            sample_size, patch_size, in_channels, num_layers, attention_head_dim, num_attention_heads,
            joint_attention_dim, caption_projection_dim, pooled_projection_dim, out_channels, pos_embed_max_size,
        )
        self.style = nn.Linear(style_dim, pooled_projection_dim)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor,
        timestep: torch.Tensor, style: torch.Tensor, return_dict: bool = True,
    ) -> Any:
        return super().forward(
            hidden_states, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections + self.style(style), timestep=timestep, return_dict=return_dict,
        )
