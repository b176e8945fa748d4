"""Flex attention as plain attention: torch compiles it for itself, so that no trace can see into it.

`flex_attention` takes a function that changes scores and a block mask: which blocks of queries and keys are attended to
at all, and a function that masks inside them.  Both functions are made of tensor operations on indices, so with indices
of shapes [batch, 1, 1, 1], [1, heads, 1, 1], [1, 1, queries, 1] and [1, 1, 1, keys] they give all scores at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

HIDDEN = -1e30
"""Added to a score that a mask hides: its weight is exactly zero, and a row without any other is no NaN."""


@contextlib.contextmanager
def plain_flex_attention() -> Iterator[None]:
    """Let `torch.nn.attention.flex_attention.flex_attention` be `dense_attention`, while a module runs in a trace.

    Masks that the module makes then have no blocks by key, which only gradients need and which cannot be traced.
    """
    from torch.nn.attention import flex_attention as flex

    module: Any = flex
    changed = {"flex_attention": dense_attention, "_transpose_ordered": lambda *_: (None, None)}
    kept = {name: getattr(module, name) for name in changed if hasattr(module, name)}
    for name in kept:
        setattr(module, name, changed[name])
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(module, name, original)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None, scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
    kernel_options: Any = None, *, return_aux: Any = None,
) -> torch.Tensor:
    """What `torch.nn.attention.flex_attention.flex_attention` computes, by all scores.

    Args:
        query: [batch, heads, queries, channels].
        key: [batch, heads or a divisor of them, keys, channels].
        value: likewise.
        score_mod: `(score, batch, head, query, key) -> score`, of scores before the softmax.
        block_mask: which scores count; a query with none has the output 0.
        scale: of the products; `None` for 1 / sqrt(channels).
        enable_gqa: whether groups of query heads share one of key and value.
        return_lse: refused.
        kernel_options: ignored; they change no result.
        return_aux: refused.

    Raises:
        NotImplementedError: a normalizer or maximum is asked for.
    """
    if return_lse or return_aux is not None:
        raise NotImplementedError("flex attention that returns its normalizer")
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    places = _places(query, key)
    if score_mod is not None:
        scores = score_mod(scores, *places)
    if block_mask is None:
        return scores.softmax(-1) @ value
    kept = _kept(block_mask, *places)
    weights = torch.where(kept, scores, torch.full_like(scores, HIDDEN)).softmax(-1)
    return (weights @ value) * kept.any(-1, keepdim=True).to(value.dtype)


def _places(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Indices of samples, heads, queries and keys, each on an axis of its own."""
    sizes = (*query.shape[:3], key.shape[2])
    return tuple(
        torch.arange(size, device=query.device).view([-1 if axis == own else 1 for axis in range(4)])
        for own, size in enumerate(sizes)
    )


def _kept(mask: Any, *places: torch.Tensor) -> torch.Tensor:
    """[batch or 1, heads or 1, queries, keys]: which scores count."""
    _, _, rows, columns = places
    tall, wide = mask.BLOCK_SIZE
    down, across = (rows // tall).flatten(), (columns // wide).flatten()

    def spread(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        dense = _dense_blocks(count, index)
        return dense[:, :, down][:, :, :, across]

    inside: torch.Tensor = mask.mask_mod(*places)
    kept = spread(mask.kv_num_blocks, mask.kv_indices) & inside
    if mask.full_kv_num_blocks is None:
        return kept
    return kept | spread(mask.full_kv_num_blocks, mask.full_kv_indices)


def _dense_blocks(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The first `count` [..., rows] columns in each row of `index` [..., rows, columns], as truth values."""
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    found = torch.zeros(index.shape, dtype=torch.int32, device=index.device)
    return found.scatter_reduce(-1, index.long(), listed.int(), "amax") > 0
