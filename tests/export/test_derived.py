"""Families from signature and configuration: what follows is traced, what does not is listed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from support.onnxruntime_run import run
from support.zoo import ZOO
from support.zoo.entry import find_class

from quantempo.errors import ExportError, UnsupportedModel
from quantempo.export.families import FamilyContext, family_of, family_of_class, family_of_module
from quantempo.export.families.conventions import CONVENTIONS, PLAIN, convention_of
from quantempo.export.source import ModelParts, open_source
from quantempo.export.trace import load_denoiser, trace_module, verify_denoiser

TOKENS = 6
VIDEO = (3, 8, 8)
FOLLOWS = {
    "AuraFlowTransformer2DModel": ((4, 8, 8), {"encoder_hidden_states": (TOKENS, 16)}),
    "CogView4Transformer2DModel": ((4, 8, 8), {
        "encoder_hidden_states": (TOKENS, 16), "original_size": (2,), "target_size": (2,), "crop_coords": (2,),
    }),
    "LatteTransformer3DModel": ((4, 3, 8, 8), {"encoder_hidden_states": (TOKENS, 16)}),
    "SanaTransformer2DModel": ((4, 8, 8), {
        "encoder_hidden_states": (TOKENS, 16), "encoder_attention_mask": (TOKENS,),
    }),
    "SkyReelsV2Transformer3DModel": ((4, 3, 8, 8), {"encoder_hidden_states": (TOKENS, 16)}),
    "HunyuanVideoTransformer3DModel": ((4, 3, 8, 8), {
        "encoder_hidden_states": (TOKENS, 16), "encoder_attention_mask": (TOKENS,), "pooled_projections": (8,),
        "guidance": (),
    }),
    "UNet1DModel": ((8, 16), {}),
}  # fmt: skip
"""Classes without a family of their own: shape of a sample, and shapes of the arrays."""
OTHERS = (
    "CogView3PlusTransformer2DModel", "EasyAnimateTransformer3DModel", "Kandinsky3UNet", "SanaVideoTransformer3DModel",
    "UNet3DConditionModel",
)  # fmt: skip


def derived(name, size=None):
    entry = ZOO[name]
    return family_of_class(find_class(name, entry.module), entry.config, FamilyContext(tokens=TOKENS, size=size))


def size_of(name):
    entry = ZOO[name]
    if name == "Kandinsky3UNet":
        return (16, 16)
    return None if "sample_size" in entry.config and "3D" not in name else VIDEO


@pytest.mark.parametrize("name", FOLLOWS)
def test_inputs_follow_from_signature_and_configuration(name):
    family = derived(name, size_of(name))
    shape, arrays = FOLLOWS[name]
    assert family.sample_shape == shape
    assert {array.name: array.shape for array in family.arrays} == arrays
    assert not family.sets
    assert family.output_channels == (8 if name.startswith("Latte") else None)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.startswith("Aura") else pytest.mark.full) for n in (*FOLLOWS, *OTHERS)]
)
def test_class_is_traced_with_nothing_supplied(name, tmp_path):
    module = ZOO[name].build()
    family = family_of_module(module, TOKENS, size_of(name))
    graph = trace_module(module, family, tmp_path)
    assert verify_denoiser(graph, module, family, run) <= 1e-4


def test_timestep_is_scaled_as_the_pipeline_does():
    feeds = {"sample": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor([500.0, 20.0])}
    given = derived("AuraFlowTransformer2DModel").arguments(feeds)["timestep"]
    assert torch.allclose(given, torch.tensor([0.5, 0.02]))
    assert torch.equal(derived("UNet1DModel").arguments(feeds)["timestep"], feeds["timestep"])


def test_conventions_are_those_of_the_pipelines():
    """A factor of 1/1000 stands in the pipelines of exactly those classes that have it here, and no other factor."""
    found = {}
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = file.read_text()
        for name in CONVENTIONS:
            if f"transformer: {name}" in text or f"unet: {name}" in text:
                found.setdefault(name, set()).update(_factors(text))
    for name, factors in found.items():
        assert ("1000" in factors) == (CONVENTIONS[name].scale == 1e-3), (name, factors)
        assert ("timestep_scale" in factors) == (CONVENTIONS[name].scale_key == "timestep_scale"), (name, factors)
    assert set(CONVENTIONS) - set(found) <= {"DiTTransformer2DModel", "UNet1DModel", "Kandinsky3UNet", "UNet2DModel"}


def _factors(text):
    """What a pipeline multiplies or divides its timestep by."""
    factors = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            left, right = ast.unparse(node.left), ast.unparse(node.right)
            if left in ("t", "timestep", "t.float()"):
                factors.add(right.rpartition(".")[2])
    return factors


def test_class_of_diffusers_without_a_convention_is_refused_with_its_arguments():
    words = (
        r"denoiser of class 'OmniGenTransformer2DModel': found no note of what(?s:.*)hidden_states \(2, axes of 4 "
        r"channels and unknown size \(--size\)\); timestep \(2,\) float32; input_ids \(shape unknown\)(?s:.*)"
        r"position_ids \(shape unknown\)(?s:.*)add --size, or give one example call with --inputs FILE.npz"
    )
    with pytest.raises(UnsupportedModel, match=words):
        derived("OmniGenTransformer2DModel")


def test_image_embeddings_that_the_configuration_turns_on_are_not_left_out():
    entry = ZOO["SkyReelsV2Transformer3DModel"]
    config = {**entry.config, "image_dim": 16, "added_kv_proj_dim": 24}
    with pytest.raises(UnsupportedModel, match="not understood: encoder_hidden_states_image, wanted"):
        family_of_class(diffusers.SkyReelsV2Transformer3DModel, config, FamilyContext(tokens=TOKENS, size=VIDEO))


def test_call_that_does_not_run_is_refused_with_the_reason():
    entry = ZOO["AuraFlowTransformer2DModel"]
    with pytest.raises(UnsupportedModel, match=r"found a call that does not run \(RuntimeError: (?s:.*)\(2, 6, 16\)"):
        family_of_class(
            diffusers.AuraFlowTransformer2DModel, entry.config, FamilyContext(tokens=TOKENS, size=(9, 7))
        )


OWN = '''
import torch
from torch import nn
from diffusers import AuraFlowTransformer2DModel, UNet2DModel


class Doubled(UNet2DModel):
    """The call of its base."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (2 * super().forward(sample, timestep, class_labels, return_dict=False)[0],)


class Scaled(AuraFlowTransformer2DModel):
    pass


class Plain(nn.Module):
    """No diffusers at all."""

    def __init__(self, in_channels=4, sample_size=8, num_classes=5, text_dim=None, width=16):
        super().__init__()
        self.enter = nn.Conv2d(in_channels, width, 3, padding=1)
        self.label = nn.Embedding(num_classes + 1, width)
        self.leave = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, class_labels):
        hidden = self.enter(x) * (1 + t[:, None, None, None] / 1000) + self.label(class_labels)[:, :, None, None]
        return self.leave(torch.nn.functional.silu(hidden))
'''


def own(tmp_path, name, module, config):
    """A folder with a model of a class that only a file knows."""
    from safetensors.torch import save_file

    (tmp_path / "own.py").write_text(OWN)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    save_file(module.state_dict(), str(folder / "diffusion_pytorch_model.safetensors"))
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    return open_source(folder, folder / "scheduler", ModelParts(code=tmp_path / "own.py"))


def classes(tmp_path):
    from quantempo.export.classes import find_class as found

    (tmp_path / "own.py").write_text(OWN)
    return {name: found(name, tmp_path / "own.py") for name in ("Doubled", "Scaled", "Plain")}


def test_module_of_ones_own_is_loaded_and_traced(tmp_path):
    torch.manual_seed(0)
    module = classes(tmp_path)["Plain"]().eval()
    source = own(tmp_path, "Plain", module, {"in_channels": 4, "sample_size": 8})
    family = family_of(source)
    (labels,) = family.classes
    assert (family.sample_shape, labels.count, labels.null, family.arrays) == ((4, 8, 8), 5, 5, ())
    loaded = load_denoiser(source)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    assert verify_denoiser(trace_module(loaded, family, tmp_path), loaded, family, run) <= 1e-5


def test_derived_class_keeps_family_or_convention_of_its_base(tmp_path):
    kinds = classes(tmp_path)
    config = dict(ZOO["UNet2DModel"].config)
    family = family_of(own(tmp_path, "Doubled", kinds["Doubled"](**config), config))
    assert (family.class_name, family.sample_shape) == ("Doubled", (3, 8, 8))
    assert convention_of(kinds["Scaled"]) == CONVENTIONS["AuraFlowTransformer2DModel"]
    assert convention_of(kinds["Plain"]) == PLAIN
    assert convention_of(diffusers.OmniGenTransformer2DModel) is None


def test_weights_of_another_class_are_refused(tmp_path):
    source = own(tmp_path, "Plain", torch.nn.Linear(2, 2), {})
    with pytest.raises(ExportError, match=r"do not fit the class(?s:.*)wanted a Plain(?s:.*)save_file"):
        load_denoiser(source)


def test_code_is_part_of_the_digest_and_refused_where_it_does_not_run(tmp_path):
    kinds = classes(tmp_path)
    source = own(tmp_path, "Plain", kinds["Plain"](), {})
    path = tmp_path / "own.py"
    path.write_text(OWN + "\n# other\n")
    again = open_source(source.denoiser, source.scheduler, source.parts)
    assert again.digest != source.digest
    path.write_text("import no_such_package_at_all\n")
    with pytest.raises(UnsupportedModel, match=r"own.py: found ModuleNotFoundError(?s:.*)run: python"):
        family_of(again)
    path.write_text(OWN.replace("class Plain", "class Plane"))
    with pytest.raises(UnsupportedModel, match=r"no torch module 'Plain'(?s:.*)did you mean 'Plane'"):
        family_of(again)


def test_settings_of_an_example_call(tmp_path):
    """`forward` gets 1 - t / 1000, and the sampler the negative of its second output."""
    from quantempo.export.families import family_of_inputs

    (tmp_path / "net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, sample, timestep):\n"
        "        return sample, sample * timestep[:, None]\n"
    )
    np.savez(
        tmp_path / "call.npz", sample=np.ones((2, 4), np.float32), timestep=np.array([0.25, 0.75], np.float32),
        timestep_scale=-0.001, timestep_offset=1.0, prediction_scale=-1.0, output_select=1,
    )  # fmt: skip
    family = family_of_inputs("Net", tmp_path / "call.npz", tmp_path / "net.py")
    assert np.allclose(family.examples()[0]["timestep"], [750, 250])
    module = find_own(tmp_path)
    feeds = {"sample": torch.ones(2, 4), "timestep": torch.tensor([750.0, 0.0])}
    made = family.prediction(module(**family.arguments(feeds)), feeds)
    assert torch.allclose(made, torch.tensor([[-0.25] * 4, [-1.0] * 4]))


def find_own(folder):
    from quantempo.export.classes import find_class as found

    return found("Net", folder / "net.py")()
