import numpy as np
import onnx_ir as ir
import pytest
from support.tiny_graphs import traced

from quantempo.contracts.plan import Keep, Quantize, Share
from quantempo.errors import NoSites, PlanError
from quantempo.export.sites import PlanOptions, default_plan, find_sites


def model(class_name):
    graph = traced({"DiTTransformer2DModel": "dit_pipeline", "UNet2DModel": "unet"}[class_name])[2]
    return ir.load(graph.path), graph


def plan_of(class_name, **options):
    graph_model, graph = model(class_name)
    return default_plan(graph_model, graph.digest, PlanOptions(**options))


def by_id(class_name):
    return {site.id: site for site in find_sites(model(class_name)[0])}


def test_sites_are_sorted_unique_and_the_same_from_disk_and_from_the_trace():
    graph_model, graph = model("DiTTransformer2DModel")
    sites = find_sites(graph_model)
    assert sites == graph.sites
    ids = [site.id for site in sites]
    assert ids == sorted(set(ids))
    assert len(ids) == 2 * 9 + 3


def test_site_fields_of_a_linear_layer_and_a_convolution():
    site = by_id("DiTTransformer2DModel")["transformer_blocks.1.ff.net.0.proj"]
    assert (site.op, site.k, site.n, site.rank, site.module) == ("matmul", 32, 128, 3, site.id)
    conv = by_id("UNet2DModel")["up_blocks.0.resnets.0.conv1"]
    assert (conv.op, conv.k, conv.n, conv.rank) == ("conv", 64 * 9, 32, 4)
    assert by_id("DiTTransformer2DModel")["transformer_blocks.1.norm1.linear"].rank == 2


def test_a_module_that_runs_twice_gives_two_sites():
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 16])
    weight = ir.val("w", const_value=ir.tensor(np.eye(16, dtype=np.float32), name="w"))
    weight.shape, weight.dtype = ir.Shape([16, 16]), ir.DataType.FLOAT
    first = ir.node("MatMul", [x, weight], metadata_props={"quantempo.module": "block.proj"})
    second = ir.node("MatMul", [first.outputs[0], weight], metadata_props={"quantempo.module": "block.proj"})
    first.outputs[0].name, second.outputs[0].name = "a", "b"
    graph = ir.Graph([x], second.outputs, nodes=[first, second], initializers=[weight], opset_imports={"": 21})
    assert [site.id for site in find_sites(ir.Model(graph, ir_version=10))] == ["block.proj", "block.proj#2"]


def test_projections_of_one_tensor_share_its_scale():
    plan = plan_of("DiTTransformer2DModel")
    block = "transformer_blocks.1.attn1"
    assert isinstance(plan.decisions[f"{block}.to_k"], Quantize)
    assert plan.decisions[f"{block}.to_q"] == plan.decisions[f"{block}.to_v"] == Share(f"{block}.to_k")
    tensors = [site.tensor for site in plan.quantized()]
    assert len(set(tensors)) == len(plan.scaled_tensors())


def test_borders_and_embedders_stay_in_float_with_reasons():
    plan = plan_of("DiTTransformer2DModel")
    kept = {site.id: plan.decisions[site.id].reason for site in plan.kept()}
    assert kept["pos_embed.proj"] == "reads the model's input"
    assert kept["proj_out_2"] == "writes the model's output"
    assert "embedding" in kept["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"]
    assert len(kept) == 2 + 2 * 2
    unet = plan_of("UNet2DModel")
    kept = {site.id for site in unet.kept()}
    assert kept == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_adaln_layers_are_quantized_by_default():
    plan = plan_of("DiTTransformer2DModel")
    assert plan.settings(by_id("DiTTransformer2DModel")["transformer_blocks.1.norm1.linear"]) == Quantize()


def test_small_layers_stay_in_float():
    plan = plan_of("UNet2DModel", smallest=32)
    assert plan.decisions["up_blocks.1.resnets.0.conv1"] == Keep("k=432, n=16: fewer than 32 channels gain nothing")


def test_convolutions_are_asymmetric_unless_asked():
    assert not plan_of("UNet2DModel").decisions["mid_block.resnets.0.conv1"].symmetric
    assert plan_of("UNet2DModel", symmetric_convs=True).decisions["mid_block.resnets.0.conv1"].symmetric
    assert not plan_of("UNet2DModel", symmetric_convs=True).decisions["mid_block.attentions.0.to_k"].symmetric


def test_keep_pattern_leaves_modules_in_float_and_another_site_takes_the_share():
    plan = plan_of("DiTTransformer2DModel", keep=("*.to_k",))
    assert plan.decisions["transformer_blocks.0.attn1.to_k"] == Keep("kept by pattern '*.to_k'")
    assert isinstance(plan.decisions["transformer_blocks.0.attn1.to_q"], Quantize)
    assert plan.decisions["transformer_blocks.0.attn1.to_v"] == Share("transformer_blocks.0.attn1.to_q")


def test_quantize_pattern_overrides_a_rule():
    assert plan_of("DiTTransformer2DModel", quantize=("proj_out_2",)).decisions["proj_out_2"] == Quantize()


def test_pattern_without_a_match_names_the_nearest_module():
    with pytest.raises(PlanError, match=r"'proj_out_3'.*(?s:.*)did you mean 'proj_out_"):
        plan_of("DiTTransformer2DModel", keep=("proj_out_3",))
    with pytest.raises(PlanError, match=r"no site that it matches(?s:.*)known are pos_embed\.proj"):
        plan_of("DiTTransformer2DModel", keep=("qqqqq",))


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(NoSites, match=r"none of them(?s:.*)kept by pattern '\*'"):
        plan_of("DiTTransformer2DModel", keep=("*",))
