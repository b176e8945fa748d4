"""Families beyond the demo models: their graphs agree with torch, their inputs follow from the configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import families, tiny_models
from support.onnxruntime_run import run

from quantempo.errors import ExportError, UnsupportedModel
from quantempo.export.families import FamilyContext, family_of, family_of_inputs, flux, wan
from quantempo.export.families.unet2d_condition import build
from quantempo.export.source import ModelParts, open_source
from quantempo.export.trace import load_denoiser, trace_module, verify_denoiser


def source_of(name, **added):
    folder, options = families.directory(name), families.MODELS[name].options
    parts = ModelParts(options.get("size", ""), options.get("tokens", 0), **added)
    return open_source(folder, folder / "scheduler", parts)


ADDED = {
    "control": ("sd", lambda: {"controlnets": (families.controlnet(),)}),
    "adapter": ("sd", lambda: {"adapters": (families.ip_adapter(),)}),
    "sdxl control": ("sdxl", lambda: {"controlnets": (families.controlnet(large=True),)}),
    "sdxl adapter": ("sdxl", lambda: {"adapters": (families.ip_adapter(),)}),
}


def variant(name):
    base, added = ADDED.get(name, (name, dict))
    return source_of(base, **added())


SLOW = ("sd", "lcm", "inpaint", "sdxl control", "sdxl adapter")
"""Variants of a UNet whose parts others cover."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n in SLOW else n for n in (*families.MODELS, *ADDED)]
)
def test_graph_agrees_with_torch(name, tmp_path):
    source = variant(name)
    family, module = family_of(source), load_denoiser(source)
    graph = trace_module(module, family, tmp_path)
    assert graph.inputs == family.inputs()
    assert verify_denoiser(graph, module, family, run) <= 1e-4
    assert len(graph.sites) > 10


INPUTS = {
    "sd": ["encoder_hidden_states"],
    "sdxl": ["encoder_hidden_states", "text_embeds", "time_ids"],
    "lcm": ["encoder_hidden_states", "timestep_cond"],
    "inpaint": ["encoder_hidden_states", "sample_condition"],
    "control": ["encoder_hidden_states", "control_image", "control_scale"],
    "adapter": ["encoder_hidden_states", "ip_image_embeds"],
    "sdxl control": ["encoder_hidden_states", "text_embeds", "time_ids", "control_image", "control_scale"],
    "sdxl adapter": ["encoder_hidden_states", "text_embeds", "time_ids", "ip_image_embeds"],
    "flux": ["encoder_hidden_states", "pooled_projections", "guidance"],
    "sd3": ["encoder_hidden_states", "pooled_projections"],
    "pixart": ["encoder_hidden_states", "encoder_attention_mask"],
    "wan": ["encoder_hidden_states"],
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_follow_from_the_configuration(name):
    assert [array.name for array in family_of(variant(name)).arrays] == INPUTS[name]


def test_flux_packs_as_its_pipeline_does():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8)
    packed = flux.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(flux.unpack(packed, 6, 8), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(flux.position_ids(6, 8), ids)


@pytest.mark.full
def test_residuals_of_a_controlnet_are_inputs_of_an_example_call(tmp_path):
    """Computed outside, they give what the graph with the ControlNet inside gives."""
    source = variant("control")
    inside, module = family_of(source), load_denoiser(source)
    feeds = {name: torch.from_numpy(array) for name, array in inside.example(2).items()}
    (net,) = module.controls
    given = {name: feeds[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    with torch.no_grad():
        down, middle = net(controlnet_cond=feeds["control_image"], return_dict=False, **given)
        scale = feeds["control_scale"][:, None, None, None]
        down, middle = [residual * scale for residual in down], middle * scale
        wanted = module(**inside.arguments(feeds))[0].numpy()
    residuals = {f"down_block_additional_residuals.{i}": residual for i, residual in enumerate(down)}
    arrays = {**given, **residuals, "mid_block_additional_residual": middle}
    np.savez(tmp_path / "call.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    family = family_of_inputs("UNet2DConditionModel", tmp_path / "call.npz")
    graph = trace_module(module.unet, family, tmp_path)
    assert len(graph.inputs) == len(arrays)
    assert verify_denoiser(graph, module.unet, family, run) <= 1e-4
    found = run(graph.path, family.examples()[0])["prediction"]
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_control_scale_zero_is_the_plain_unet():
    source = variant("control")
    family, module = family_of(source), load_denoiser(source)
    feeds = {name: torch.from_numpy(array) for name, array in family.example(2).items()}
    feeds["control_scale"] = torch.zeros(2)
    with torch.no_grad():
        controlled = module(**family.arguments(feeds))[0]
        plain = module.unet(
            feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"], return_dict=False
        )[0]
    assert torch.equal(controlled, plain)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_size_is_asked_for_where_nothing_says_it(name):
    folder = families.directory(name)
    with pytest.raises(UnsupportedModel, match=r"no size(?s:.*)add --size"):
        family_of(open_source(folder, folder / "scheduler"))


@pytest.mark.parametrize(
    ("size", "words"),
    [("7x8x", "a preset"), ("sqare-512", "square-512"), ("0x8", "at least 1"), ("8", "HEIGHTxWIDTH")],
)
def test_sizes_that_are_none_are_refused(size, words):
    folder = families.directory("sd")
    with pytest.raises(UnsupportedModel, match=words):
        open_source(folder, folder / "scheduler", ModelParts(size))


def test_size_counts_in_pixels_of_the_vae():
    source = open_source(tiny_models.dit_pipeline(), None, ModelParts("16x24"))
    assert source.size == (8, 12)
    with pytest.raises(UnsupportedModel, match=r"multiples of 2 pixels(?s:.*)16x16"):
        open_source(tiny_models.dit_pipeline(), None, ModelParts("15x16"))


def test_short_prompts_are_refused_where_wan_counts_them():
    config = {**families.WAN, "image_dim": 16, "added_kv_proj_dim": 32}
    built = wan.build(config, FamilyContext(size=(3, 8, 8)))
    assert [(a.name, a.shape) for a in built.arrays] == [
        ("encoder_hidden_states", (512, 24)), ("encoder_hidden_states_image", (257, 16)),
    ]  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"prompts of 6 tokens(?s:.*)leave --tokens out"):
        wan.build(config, FamilyContext(tokens=6, size=(3, 8, 8)))


def test_two_experts_are_found():
    source = open_source(families.two_experts(), None, ModelParts("3x8x8"))
    second = source.second()
    assert (source.boundary, second.denoiser.name, second.expert) == (0.875, "transformer_2", None)
    assert source.digest != second.digest


def test_adapter_weights_are_asked_for():
    config = {**tiny_models.CONDITION_UNET, "encoder_hid_dim_type": "ip_image_proj"}
    with pytest.raises(UnsupportedModel, match="--ip-adapter"):
        build(config, FamilyContext())


def test_file_that_is_no_adapter_is_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(2, np.float32)}, str(path))
    with pytest.raises(UnsupportedModel, match=r"found tensors weight"):
        family_of(source_of("sd", adapters=(path,)))


def test_training_mode_is_refused(tmp_path):
    module = tiny_models.build("UNet2DModel", 5, **tiny_models.UNET).train()
    with pytest.raises(ExportError, match=r"training mode(?s:.*)model.eval"):
        trace_module(module, family_of(open_source(tiny_models.unet(), tiny_models.unet() / "scheduler")), tmp_path)


def test_overflowed_weights_are_refused(tmp_path):
    module = tiny_models.build("UNet2DModel", 5, **tiny_models.UNET)
    with torch.no_grad():
        module.conv_in.weight[0, 0] = 1e5
    folder = tmp_path / "half"
    module.half().save_pretrained(folder)
    tiny = tiny_models.unet()
    source = open_source(folder, Path(tiny) / "scheduler")
    with pytest.raises(ExportError, match=r"weight 'conv_in.weight': found infinity(?s:.*)float16 ends at 65504"):
        trace_module(load_denoiser(source), family_of(source), tmp_path)
