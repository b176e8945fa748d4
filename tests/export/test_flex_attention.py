"""Flex attention by all scores: the same as attention with the mask that the block mask stands for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from quantempo.export.flex_attention import dense_attention, plain_flex_attention


def heads(seed=0, keys=160, groups=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 160, 16), (2, 4 // groups, keys, 16), (2, 4 // groups, keys, 16)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_mask_it_is_plain_attention():
    q, k, v = heads(keys=96, groups=1)
    close(dense_attention(q, k, v), scaled_dot_product_attention(q, k, v))
    close(dense_attention(q, k, v, scale=0.3), scaled_dot_product_attention(q, k, v, scale=0.3))


def test_groups_of_heads_share_keys():
    q, k, v = heads()
    close(dense_attention(q, k, v, enable_gqa=True), scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_block_mask_is_taken_inside_and_outside_of_whole_blocks():
    q, k, v = heads(groups=1)
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 160, 160, device="cpu", BLOCK_SIZE=32)
    assert int(mask.full_kv_num_blocks.sum()) == 10  # those below the diagonal need no function
    close(dense_attention(q, k, v, block_mask=mask), scaled_dot_product_attention(q, k, v, is_causal=True))


def test_mask_may_look_into_tables_and_at_heads_and_samples():
    q, k, v = heads(groups=1)
    documents = torch.arange(160) // 50
    kept = (documents[:, None] == documents[None, :]).expand(2, 4, 160, 160).clone()
    kept[1, 2] = True
    mask = flex.create_block_mask(
        lambda b, h, i, j: (documents[i] == documents[j]) | ((b == 1) & (h == 2)), 2, 4, 160, 160, device="cpu"
    )
    close(dense_attention(q, k, v, block_mask=mask), scaled_dot_product_attention(q, k, v, kept))


def test_scores_are_changed_before_the_softmax():
    q, k, v = heads(groups=1)
    slope = torch.tensor([0.0, 0.1, 0.2, 0.3])
    bias = -slope[:, None, None] * (torch.arange(160)[:, None] - torch.arange(160)[None, :]).abs()
    found = dense_attention(q, k, v, lambda score, b, h, i, j: score - slope[h] * (i - j).abs())
    close(found, scaled_dot_product_attention(q, k, v, bias.expand(2, -1, -1, -1)))


def test_query_that_may_see_nothing_is_zero():
    q, k, v = heads(groups=1)
    mask = flex.create_block_mask(lambda b, h, i, j: (i >= 40) & (j < 100), None, None, 160, 160, device="cpu")
    found = dense_attention(q, k, v, block_mask=mask)
    assert not found[:, :, :40].any()
    close(found[:, :, 40:], scaled_dot_product_attention(q[:, :, 40:], k[:, :, :100], v[:, :, :100]))


def test_normalizers_are_refused():
    with pytest.raises(NotImplementedError):
        dense_attention(*heads(groups=1), return_lse=True)


@pytest.mark.full
def test_it_is_what_torch_computes():
    q, k, v = heads()
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 160, 160, device="cpu")
    wanted = flex.flex_attention(q, k, v, lambda s, b, h, i, j: s + h, mask, scale=0.2, enable_gqa=True)
    close(dense_attention(q, k, v, lambda s, b, h, i, j: s + h, mask, scale=0.2, enable_gqa=True), wanted)


def test_torch_has_its_own_back_afterwards():
    original = flex.flex_attention
    with plain_flex_attention():
        assert flex.flex_attention is dense_attention
    assert flex.flex_attention is original
