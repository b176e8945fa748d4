"""A denoiser that is a torch module and nothing else: depthwise convolutions, modulated by the time and a prompt."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """A block in the style of ConvNeXt (Liu et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.narrow = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.modulate = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm(self.mix(x)) * (1 + scale) + shift
        return x + self.narrow(nn.functional.gelu(self.wide(hidden)))


class PlainConvNet(nn.Module):
    """[batch, C, H, W], [batch] and a prompt [batch, tokens, width] to {"noise": …, "attention": …}."""

    def __init__(
        self, in_channels: int = 4, sample_size: int = 16, width: int = 64, depth: int = 4, context_dim: int = 24
    ) -> None:
        super().__init__()
        self.enter = nn.Conv2d(in_channels, width, 3, padding=1)
        self.leave = nn.Conv2d(width, in_channels, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.prompt, self.score = nn.Linear(context_dim, width), nn.Linear(context_dim, 1)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = self.score(context).softmax(dim=1)
        condition = self.time(t[:, None].float() / 1000) + (weights * self.prompt(context)).sum(dim=1)
        hidden = self.enter(x)
        for layer in self.layers:
            hidden = layer(hidden, condition)
        return {"noise": self.leave(hidden), "attention": weights}
