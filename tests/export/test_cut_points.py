"""Where graphs can be cut: blocks, sublayers and long skips, found by data flow."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.tiny_graphs import graph_of, normal, traced

from quantempo.errors import ExportError
from quantempo.export.cut_points import (
    Branch,
    Flow,
    block_lists,
    branches,
    check_depth,
    first_block_list,
    modulated_input,
    span,
    sublayers,
)
from quantempo.export.passes.edit import MODULE

LONG_SKIP = """
g (float[batch, 4, 16] sample, float[16, 16] w0, float[16, 16] w1, float[32, 16] w2)
  => (float[batch, 4, 16] prediction)
{
  early = MatMul (sample, w0)
  deep = MatMul (early, w1)
  both = Concat <axis = -1> (deep, early)
  prediction = MatMul (both, w2)
}
"""


def load(name: str) -> ir.Model:
    return ir.load(traced(name)[2].path)


def long_skip() -> ir.Model:
    """A model of the U-ViT kind."""
    return graph_of(LONG_SKIP, {"w0": normal(16, 16), "w1": normal(16, 16), "w2": normal(32, 16)})


def test_the_branches_of_a_unet_are_its_skip_connections_outermost_first() -> None:
    found = branches(load("unet"))
    assert [branch.module for branch in found] == ["up_blocks.1", "up_blocks.1", "up_blocks.0", "up_blocks.0"]
    assert found[0].skip == "conv_in/out"
    assert found[-1].deep.startswith("mid_block.")


def test_a_transformer_with_long_skips_has_branches_too() -> None:
    assert branches(long_skip()) == (Branch("deep", "early", ""),)


def test_a_plain_transformer_has_none() -> None:
    assert branches(load("dit_pipeline")) == ()


def test_a_concatenation_of_two_independent_parts_is_no_branch() -> None:
    text = LONG_SKIP.replace("MatMul (early, w1)", "MatMul (sample, w1)")
    weights = {"w0": normal(16, 16), "w1": normal(16, 16), "w2": normal(32, 16)}
    assert branches(graph_of(text, weights)) == ()


def test_lists_of_blocks_and_their_lengths() -> None:
    assert block_lists(load("dit_pipeline")) == {"transformer_blocks": 2}
    assert block_lists(load("unet"))["up_blocks"] == 2


def test_the_first_block_is_the_first_that_one_value_enters_and_leaves() -> None:
    assert first_block_list(load("dit_pipeline")) == "transformer_blocks"
    assert first_block_list(load("unet")) == "down_blocks.0.resnets"  # a down block's skips leave it
    assert first_block_list(load("condition_unet")) == "down_blocks.0.resnets"


def test_the_modulated_input_depends_on_the_timestep() -> None:
    """The first convolution of a residual block sees the sample alone; the second one sees the embedding too."""
    assert modulated_input(Flow(load("unet")), "down_blocks.0.resnets") == "down_blocks.0.resnets.0.conv2/in"
    assert modulated_input(Flow(load("dit_pipeline")), "transformer_blocks") == "transformer_blocks.0.attn1.to_q/in"
    assert modulated_input(Flow(load("unet")), "blocks") is None


def test_sublayers_are_attention_and_mlp_and_not_the_norms() -> None:
    found = sublayers(Flow(load("dit_pipeline")), "transformer_blocks", 1, "here")
    assert list(found) == ["transformer_blocks.1.attn1", "transformer_blocks.1.ff"]
    assert found["transformer_blocks.1.attn1"].after == "transformer_blocks.1.attn1.to_out.0/out"
    assert found["transformer_blocks.1.ff"].before == "transformer_blocks.1.ff.net.0.proj/in"


def test_one_hidden_value_enters_and_leaves_a_range_of_blocks() -> None:
    flow = Flow(load("dit_pipeline"))
    first, second = (span(flow, "transformer_blocks", n, n, "here") for n in (0, 1))
    both = span(flow, "transformer_blocks", 0, 1, "here")
    assert (both.before, both.after) == (first.before, second.after)
    assert first.after == second.before


def test_a_range_that_skips_lead_out_of_is_refused_with_their_names() -> None:
    with pytest.raises(ExportError, match=r"down_blocks 0 to 0[\s\S]*leave the blocks[\s\S]*does not cache"):
        span(Flow(load("unet")), "down_blocks", 0, 0, "here")


def test_a_range_that_changes_the_shape_is_refused() -> None:
    model = graph_of(
        """
        g (float[batch, 4, 16] sample, float[16, 16] w0, float[16, 8] w1) => (float[batch, 4, 8] prediction)
        {
          first = MatMul (sample, w0)
          prediction = MatMul (first, w1)
        }
        """,
        {"w0": normal(16, 16), "w1": normal(16, 8)},
    )
    for index, node in enumerate(model.graph):
        node.metadata_props[MODULE] = f"blocks.{index}.linear"
    with pytest.raises(ExportError, match=r"blocks 0 to 1: found shapes \[batch,4,16\] in and \[batch,4,8\] out"):
        span(Flow(model), "blocks", 0, 1, "here")


def test_an_unknown_list_of_blocks_is_refused_with_the_nearest() -> None:
    with pytest.raises(ExportError, match="did you mean 'transformer_blocks'"):
        check_depth(load("dit_pipeline"), "transformer_block", 2, "here")


def test_another_depth_is_refused() -> None:
    with pytest.raises(ExportError, match=r"found a cut for 6 blocks, wanted one for 2"):
        check_depth(load("dit_pipeline"), "transformer_blocks", 6, "here")
