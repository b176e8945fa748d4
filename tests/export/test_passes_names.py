import onnx_ir as ir
from support.tiny_graphs import graph_of, normal

from quantempo.export.passes import run_passes
from quantempo.export.passes.edit import MODULE
from quantempo.export.passes.exporter_metadata import SCOPES, KeepModulePaths, module_path
from quantempo.export.passes.name_values import NameValues


def test_module_path_is_the_innermost_module_without_the_wrapper():
    assert module_path("['', 'denoiser', 'denoiser.block.0', 'denoiser.block.0.to_q', 'linear']", "denoiser") == (
        "block.0.to_q"
    )
    assert module_path("['', 'denoiser', 'add']", "denoiser") == ""
    assert module_path("['_empty_nn_module_stack_from_metadata_hook', 'sym_size']", "denoiser") == ""
    assert module_path("[]", "denoiser") == ""


def test_exporter_notes_go_and_the_batch_gets_its_name():
    model = graph_of("g (float[s53, 4] x) => (float[s53, 4] y) { y = Sigmoid(x) }")
    (node,) = model.graph
    node.metadata_props.update({SCOPES: "['', 'denoiser', 'denoiser.act', 'sigmoid']", "stack_trace": "/home/me/x.py"})
    node.doc_string = "File /home/me/x.py"
    node.outputs[0].shape = ir.Shape([ir.SymbolicDim("2*s53"), 4])
    run_passes(model, [KeepModulePaths()])
    assert dict(node.metadata_props) == {MODULE: "act"}
    assert node.doc_string is None
    assert [d.value for v in (node.inputs[0], node.outputs[0]) for d in v.shape if not isinstance(d, int)] == [
        "batch",
        "2*batch",
    ]


def test_values_are_named_after_the_layers_they_belong_to():
    model = graph_of(
        """g (float[batch, 4] x, float[4, 4] w, float[4] b) => (float[batch, 4] y) {
            val_1 = Sigmoid(x)
            val_2 = MatMul(val_1, w)
            val_3 = Add(val_2, b)
            val_4 = Sigmoid(val_3)
            y = MatMul(val_4, w)
        }""",
        {"w": normal(4, 4), "b": normal(4)},
    )
    for old, name in (("w", "denoiser.fc.weight"), ("b", "val_9")):
        model.graph.initializers[old].name = name
    for node, module in zip(model.graph, ["act", "fc", "fc", "act", "fc"], strict=True):
        node.metadata_props[MODULE] = module
    run_passes(model, [NameValues()])
    names = [node.outputs[0].name for node in model.graph]
    assert names == ["fc/in", "fc/product", "fc/out", "fc#2/in", "y"]
    assert list(model.graph.initializers) == ["fc.weight", "constant.0"]
    assert [node.name for node in model.graph] == names
