import json
import shutil

import onnx_ir as ir
import pytest
from support import tiny_models
from support.onnxruntime_run import run

from quantempo.contracts.manifest import Decoder
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import UnsupportedModel
from quantempo.export.decoder import (
    decoder_contract,
    load_vae,
    trace_decoder,
    trace_decoder_module,
    verify_decoder,
)


def test_decoder_agrees_with_torch_and_keeps_its_scaling(tmp_path):
    vae = tiny_models.dit_pipeline() / "vae"
    graph, contract = trace_decoder(vae, tmp_path, run, sample_shape=(4, 8, 8))
    assert contract == Decoder("decoder", scaling=0.18215, shift=0.0)
    assert graph.inputs == (TensorSpec("latents", "float32", ("batch", 4, 8, 8)),)
    assert graph.outputs == (TensorSpec("image", "float32", ("batch", 1, 16, 16)),)
    assert verify_decoder(graph, load_vae(vae), run) <= 1e-5
    assert not [node for node in ir.load(graph.path).graph if node.op_type == "Conv" and len(node.inputs) > 2]


def test_shift_and_missing_post_quant_conv(tmp_path):
    config = {**tiny_models.VAE, "shift_factor": 0.0609, "scaling_factor": 1.5, "use_post_quant_conv": False}
    vae = tiny_models.build("AutoencoderKL", 4, **config)
    graph = trace_decoder_module(vae, (4, 8, 8), tmp_path)
    assert decoder_contract(vae) == Decoder("decoder", scaling=1.5, shift=0.0609)
    assert "post_quant_conv" not in {site.id for site in graph.sites}
    assert verify_decoder(graph, vae, run) <= 1e-5


def test_other_autoencoder_is_refused_by_class(tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(tiny_models.dit_pipeline() / "vae", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderDC"}))
    with pytest.raises(UnsupportedModel, match=r"'AutoencoderDC', wanted AutoencoderKL"):
        load_vae(folder)
