"""A U-ViT (Bao et al., 2023), written by hand as a diffusers model: tokens for time, class, patches; long skips."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Block(nn.Module):
    """Attention and MLP before which an early block's tokens may join."""

    def __init__(self, width: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.join = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, skip], dim=-1))
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class HandMadeUViT(ModelMixin, ConfigMixin):
    """Class-conditional; the last label is the unconditional one."""

    @register_to_config
    def __init__(
        self, sample_size: int = 16, in_channels: int = 4, patch: int = 2, width: int = 96, heads: int = 4,
        depth: int = 5, num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        grid = sample_size // patch
        self.enter = nn.Conv2d(in_channels, width, patch, patch)
        self.label = nn.Embedding(num_classes + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, grid * grid + 2, width))
        half = depth // 2
        self.down = nn.ModuleList(Block(width, heads, False) for _ in range(half))
        self.mid = Block(width, heads, False)
        self.up = nn.ModuleList(Block(width, heads, True) for _ in range(half))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, patch * patch * in_channels)
        self.smooth = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """[batch, C, H, W], [batch], [batch] to the noise [batch, C, H, W]."""
        batch, channels, height, width = x.shape
        rates = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        angles = timesteps[:, None].float() * rates
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        tokens = self.enter(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([time[:, None], self.label(class_labels)[:, None], tokens], dim=1) + self.places
        kept = []
        for block in self.down:
            tokens = block(tokens)
            kept.append(tokens)
        tokens = self.mid(tokens)
        for block in self.up:
            tokens = block(tokens, kept.pop())
        pixels = self.leave(self.norm(tokens))[:, 2:]
        rows, columns, side = height // self.patch, width // self.patch, self.patch
        image = pixels.view(batch, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
        return self.smooth(image.reshape(batch, channels, height, width))
