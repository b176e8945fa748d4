import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import tiny_models
from support.onnxruntime_run import run
from support.tiny_graphs import MODELS, traced

from quantempo.errors import ExportError, UnsupportedModel
from quantempo.export.families import family_of_module
from quantempo.export.source import open_source
from quantempo.export.trace import (
    load_denoiser,
    relative_error,
    torch_reference,
    trace,
    trace_module,
    verify,
    verify_denoiser,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_graph_agrees_with_torch(name, batch):
    module, family, graph = traced(name)
    feeds = family.example(batch, seed=batch + 10)
    found = run(graph.path, feeds)["prediction"]
    assert found.shape == (batch, *family.sample_shape)
    assert relative_error(found, torch_reference(module, family)(feeds)["prediction"]) <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_border_is_the_documented_contract(name):
    _, family, graph = traced(name)
    model = ir.load(graph.path)
    for values, specs in ((model.graph.inputs, family.inputs()), (model.graph.outputs, family.outputs())):
        assert [(v.name, v.dtype.numpy().name) for v in values] == [(s.name, s.dtype) for s in specs]
        assert [tuple(d if isinstance(d, int) else d.value for d in v.shape) for v in values] == [
            s.shape for s in specs
        ]
    assert (graph.inputs, graph.outputs) == (family.inputs(), family.outputs())


@pytest.mark.parametrize("name", MODELS)
def test_graph_is_in_normal_form(name):
    _, _, graph = traced(name)
    model = ir.load(graph.path)
    ops = Counter(node.op_type for node in model.graph)
    gone = {"Gemm", "Constant", "Identity", "Einsum", "SplitToSequence", "SequenceAt", "CastLike", "Cast", "Shape",
            "Expand", "Range", "Dropout", "Slice"}
    assert not gone & set(ops)
    for node in model.graph:
        if node.op_type == "Conv":
            assert len(node.inputs) == 2
        if node.op_type == "Transpose":
            assert not node.inputs[0].is_initializer()
    for site in graph.sites:
        weight = model.graph.initializers[site.weight]
        assert weight.dtype == ir.DataType.FLOAT
        bias = model.graph.initializers.get(f"{site.module}.bias")
        if bias is not None:
            (adder,) = {use.node for use in value_named(model, site.output).uses()}
            assert (adder.op_type, adder.inputs[1]) == ("Add", bias)
            assert list(bias.shape.numpy()) == ([site.n] if site.op == "matmul" else [1, site.n, 1, 1])


def value_named(model, name):
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def test_attention_is_two_products_one_scale_and_four_transposes():
    _, _, graph = traced("dit_pipeline")
    model = ir.load(graph.path)
    block = [node for node in model.graph if node.metadata_props["quantempo.module"] == "transformer_blocks.1.attn1"]
    ops = Counter(node.op_type for node in block)
    assert ops == {"Reshape": 4, "Transpose": 4, "MatMul": 2, "Mul": 1, "Softmax": 1}


def test_sinusoids_are_computed_once_for_all_blocks():
    _, _, graph = traced("dit_pipeline")
    ops = Counter(node.op_type for node in ir.load(graph.path).graph)
    assert (ops["Sin"], ops["Cos"]) == (1, 1)


def test_gelu_stays_one_operator():
    _, _, graph = traced("dit_pipeline")
    gelus = [node for node in ir.load(graph.path).graph if node.op_type == "Gelu"]
    assert [node.attributes["approximate"].value for node in gelus] == ["tanh", "tanh"]


def test_learned_variance_is_cut_from_the_last_weight():
    _, _, graph = traced("dit_pipeline")
    last = next(site for site in graph.sites if site.id == "proj_out_2")
    assert last.n == 2 * 2 * 4


def test_names_follow_module_paths():
    _, _, graph = traced("dit_pipeline")
    site = next(site for site in graph.sites if site.id == "transformer_blocks.0.ff.net.2")
    assert site.tensor == "transformer_blocks.0.ff.net.2/in"
    assert site.output == "transformer_blocks.0.ff.net.2/product"
    assert site.weight == "transformer_blocks.0.ff.net.2.weight"
    names = [v.name for node in ir.load(graph.path).graph for v in node.outputs]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith(("val_", "denoiser"))]


def test_no_path_of_this_machine_is_in_the_file():
    _, _, graph = traced("dit_pipeline")
    text = graph.path.read_bytes()
    for word in (b"site-packages", b"stack_trace", b"/work", b".py", str(Path.home()).encode()):
        assert word not in text


def test_two_traces_are_byte_identical(tmp_path):
    folder = tiny_models.dit_pipeline()
    _, _, first = traced("dit_pipeline")
    second = trace(open_source(folder), tmp_path / "again")
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.data.read_bytes() == first.data.read_bytes()
    assert second.digest == first.digest


def test_unconditional_unet_in_memory(tmp_path):
    config = {**tiny_models.UNET, "num_class_embeds": None, "out_channels": 2}
    module = tiny_models.build("UNet2DModel", 5, **config)
    family = family_of_module(module)
    graph = trace_module(module, family, tmp_path)
    assert [spec.name for spec in graph.inputs] == ["sample", "timestep"]
    assert next(site for site in graph.sites if site.id == "conv_out").n == 1
    assert verify_denoiser(graph, module, family, run) <= 1e-4


def test_unknown_module_in_memory_is_refused():
    with pytest.raises(UnsupportedModel, match="Linear"):
        family_of_module(torch.nn.Linear(2, 2))


def test_half_precision_weights_are_widened(tmp_path):
    import diffusers

    folder = tmp_path / "half"
    module = tiny_models.build("UNet2DModel", 2, **tiny_models.UNET).half()
    module.save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    loaded = load_denoiser(open_source(folder, folder / "scheduler"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.conv_in.weight, module.conv_in.weight.float())


def test_damaged_weights_are_an_export_error(tmp_path):
    copy = tiny_models.edited(tiny_models.unet(), tmp_path / "copy")
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(ExportError, match="weights missing"):
        load_denoiser(open_source(copy, copy / "scheduler"))
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ExportError, match="cannot load"):
        load_denoiser(open_source(copy, copy / "scheduler"))


def test_verify_refuses_a_wrong_graph_and_nan():
    module, family, graph = traced("dit_pipeline")
    reference, feeds = torch_reference(module, family), [family.example(2)]

    def off(path, feed):
        return {"prediction": run(path, feed)["prediction"] * 1.001}

    def broken(path, feed):
        return {"prediction": np.full((2, *family.sample_shape), np.nan, np.float32)}

    assert verify(graph, reference, feeds, run) < 1e-5
    with pytest.raises(ExportError, match=r"'prediction', input set 0: found a relative error of 0\.001"):
        verify(graph, reference, feeds, off)
    with pytest.raises(ExportError, match="nan"):
        verify(graph, reference, feeds, broken)


def test_module_that_cannot_be_traced_is_an_export_error(tmp_path):
    module, family, _ = traced("unet")

    def branches(feeds):
        sample = feeds["sample"]
        return family.arguments({**feeds, "sample": sample if sample.sum() > 0 else -sample})

    with pytest.raises(ExportError, match="input 'sample': found Python that looks at its contents"):
        trace_module(module, dataclasses.replace(family, arguments=branches), tmp_path)
