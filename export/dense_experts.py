"""Mixtures of experts without routing in Python: every expert sees every token, and the router's weights choose.

Python that routes tokens cannot be traced: which tokens go where depends on the sample.  With all experts on all
tokens, `out = sum_i expert_i(x) * w_i`, where `w_i` is the weight of the router, zero where it chose others.  It is the
same function with more arithmetic: as many times the cost of the experts as there are experts per chosen one.

Where the experts choose instead, each takes as many tokens as any other, so that the tokens, which come sorted by
expert, are divided evenly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

EVEN = "_run_experts_for_loop"


@contextlib.contextmanager
def dense_experts(module: nn.Module) -> Iterator[None]:
    """Route densely while a module is traced.

    Layers are known by what they have, not by their class: `experts`, `num_activated_experts` and
    `moe_infer(x, chosen, weights)`, which is HiDream's way, after DeepSeek's; or `gate_up_proj`, `down_proj` and
    `_run_experts_for_loop(x, counts)`, which is Nucleus's.
    """
    changed: list[tuple[Any, str]] = []
    for layer in module.modules():
        routed: Any = layer
        if hasattr(layer, "moe_infer") and isinstance(getattr(layer, "experts", None), nn.ModuleList):
            routed.moe_infer = partial(_dense, layer)
            changed.append((routed, "moe_infer"))
        elif hasattr(layer, EVEN):
            setattr(routed, EVEN, partial(_even, layer))
            changed.append((routed, EVEN))
    try:
        yield
    finally:
        for routed, name in changed:
            delattr(routed, name)


def _even(layer: Any, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Experts that take the same number of tokens each.

    Args:
        layer: `gate_up_proj` [experts, channels, 2 · hidden] and `down_proj` [experts, hidden, channels].
        x: [experts · tokens, channels], sorted by expert.
        counts: [experts], all alike; not read.
    """
    shares = x.reshape(len(layer.gate_up_proj), -1, x.shape[-1])
    made = []
    for share, inner, outer in zip(shares.unbind(), layer.gate_up_proj.unbind(), layer.down_proj.unbind(), strict=True):
        gate, up = (share @ inner).chunk(2, dim=-1)
        made.append((nn.functional.silu(gate) * up) @ outer)
    return torch.cat(made)


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
