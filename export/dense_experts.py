"""Mixtures of experts without routing in Python: every expert sees every token, and the router's weights choose.

Python that routes tokens cannot be traced: which tokens go where depends on the sample.  With all experts on all
tokens, `out = sum_i expert_i(x) * w_i`, where `w_i` is the weight of the router, zero where it chose others.  It is the
same function with more arithmetic: as many times the cost of the experts as there are experts per chosen one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def dense_experts(module: nn.Module) -> Iterator[None]:
    """Route densely while a module is traced.

    Layers are known by what they have, not by their class: `experts`, `num_activated_experts` and
    `moe_infer(x, chosen, weights)`, which is HiDream's way, after DeepSeek's.
    """
    changed: list[Any] = []
    for layer in module.modules():
        if hasattr(layer, "moe_infer") and isinstance(getattr(layer, "experts", None), nn.ModuleList):
            routed: Any = layer
            routed.moe_infer = partial(_dense, layer)
            changed.append(routed)
    try:
        yield
    finally:
        for routed in changed:
            del routed.moe_infer


def _dense(layer: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over all experts.

    Args:
        layer: the mixture.
        x: [tokens, channels].
        chosen: [tokens · k], the experts of each token.
        weights: [tokens · k, 1], their weights.
    """
    index = chosen.reshape(-1, layer.num_activated_experts)
    share = weights.reshape(-1, layer.num_activated_experts)
    total = torch.zeros_like(x)
    for number, expert in enumerate(layer.experts):
        total = total + expert(x) * (share * (index == number)).sum(dim=1, keepdim=True)
    return total
