"""Families from example calls: names, dynamic axes, refusals; contents that Python looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.onnxruntime_run import run

from quantempo.errors import ExportError, UnsupportedModel
from quantempo.export.families import family_of_example
from quantempo.export.families.example import family_of_inputs
from quantempo.export.trace import trace_module, verify_denoiser


class Nested(torch.nn.Module):
    """Takes what pipelines pass: nested arguments, a mask, a flag, position ids."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        torch.nn.init.normal_(self.layer.weight)

    def forward(self, hidden_states, timestep, added=None, tables=None, scale=1.0, flag=True, return_dict=True):
        x = self.layer(hidden_states) * timestep[:, None, None]
        if flag:
            x = x + added["text"][:, None] * scale + added["ids"].sum(-1)[:, None, None]
        cosine, sine = tables
        x = x * cosine + x.flip(-1) * sine
        return {"out": x} if return_dict else (x, hidden_states)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nested_call(batch):
    return {
        "hidden_states": normal(batch, batch, 5, 4), "timestep": torch.rand(batch),
        "added": {"text": normal(9 + batch, batch, 4), "ids": torch.ones(batch, 6, dtype=torch.int32)},
        "tables": (normal(1, 5, 4), normal(2, 5, 4)), "scale": 0.5,
    }


def build(forward):
    """A module with one weight and the given forward."""
    kind = type("Net", (torch.nn.Module,), {"forward": forward})
    module = kind()
    module.weight = torch.nn.Parameter(normal(3, 4, 4))
    return module.eval()


def test_nested_arguments_become_named_inputs(tmp_path):
    module = Nested().eval()
    family = family_of_example(module, [nested_call(2), nested_call(3)])
    assert [(s.name, s.dtype, s.shape) for s in family.inputs()] == [
        ("sample", "float32", ("batch", 5, 4)), ("timestep", "float32", ("batch",)),
        ("text", "float32", ("batch", 4)), ("ids", "int64", ("batch", 6)),
        ("tables_0", "float32", (5, 4)), ("tables_1", "float32", (5, 4)),
    ]  # fmt: skip
    graph = trace_module(module, family, tmp_path)
    assert verify_denoiser(graph, module, family, run) <= 1e-6


def test_one_set_gets_a_second_and_constants_are_baked(tmp_path):
    module = Nested().eval()
    family = family_of_example(module, [nested_call(2)], constants=["tables"])
    assert [s.name for s in family.inputs()] == ["sample", "timestep", "text", "ids"]
    graph = trace_module(module, family, tmp_path)
    assert [len(feeds["sample"]) for feeds in family.examples()] == [2, 3]
    assert verify_denoiser(graph, module, family, run) <= 1e-6


def test_other_output_is_selected(tmp_path):
    module = Nested().eval()
    family = family_of_example(module, [{**nested_call(2), "return_dict": True}], output=lambda made: made["out"] + 1)
    assert verify_denoiser(trace_module(module, family, tmp_path), module, family, run) <= 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda call: {**call, "hiden_states": 1}, "did you mean 'hidden_states'"),
        (lambda call: {k: v for k, v in call.items() if k != "timestep"}, r"'timestep': found no value"),
    ],
)
def test_arguments_that_forward_does_not_take_are_refused(change, words):
    with pytest.raises(ExportError, match=words):
        family_of_example(Nested().eval(), [change(nested_call(2)), change(nested_call(3))])


def test_call_that_the_module_itself_refuses_is_explained():
    def per_sample(self, sample, timestep, places):
        return (torch.stack([sample[i, places[i]] @ self.weight for i in range(len(sample))]),)

    sets = [{"sample": normal(b, b, 5, 4), "timestep": torch.rand(b), "places": [0] * b} for b in (2, 3)]
    with pytest.raises(ExportError, match=r"of Net, set 1: found IndexError(?s:.*)two sets of equal batch size"):
        family_of_example(build(per_sample), sets)
    wrong = [{**nested_call(b), "hidden_states": normal(b, b, 5, 3)} for b in (2, 3)]
    with pytest.raises(ExportError, match=r"of Nested, set 0: found RuntimeError(?s:.*)by itself first"):
        family_of_example(Nested().eval(), wrong)


def test_size_one_on_a_dynamic_axis_is_refused():
    with pytest.raises(ExportError, match=r"size 1 on a dynamic axis(?s:.*)batches of 2 and 3"):
        family_of_example(Nested().eval(), [nested_call(1), nested_call(3)])
    with pytest.raises(ExportError, match="size 1 on a dynamic axis"):
        family_of_example(Nested().eval(), [nested_call(1)])


def test_axis_that_is_no_multiple_of_the_batch_is_refused():
    longer = nested_call(3)
    longer["hidden_states"] = normal(1, 3, 6, 4)
    with pytest.raises(ExportError, match="sizes 5 and 6 with batches 2 and 3"):
        family_of_example(Nested().eval(), [nested_call(2), longer])


def test_idle_input_is_refused(tmp_path):
    module = build(lambda self, sample, timestep, extra: (sample @ self.weight,))
    sets = [{"sample": normal(b, b, 4), "timestep": torch.rand(b), "extra": normal(b, b, 2)} for b in (2, 3)]
    with pytest.raises(ExportError, match="neither module nor graph reads: timestep, extra"):
        trace_module(module, family_of_example(module, sets), tmp_path)


def masked(self, sample, timestep, mask):
    length = int(mask.sum(dim=1).max())
    kept = sample[:, :length] @ self.weight
    if mask.all():
        kept = kept * 2
    selected = sample[:, mask[0].bool()]
    return (torch.cat([kept, sample[:, length:]], dim=1) + selected.mean(1, keepdim=True) * timestep[:, None, None],)


def masked_call(batch, mask=(1, 1, 1, 0, 0)):
    return {"sample": normal(batch, batch, 5, 4), "timestep": torch.rand(batch),
            "mask": torch.tensor([list(mask)] * batch)}  # fmt: skip


def test_python_that_looks_at_a_mask_pins_it(tmp_path):
    module = build(masked)
    family = family_of_example(module, [masked_call(2), masked_call(3)])
    graph = trace_module(module, family, tmp_path)
    assert [spec.name for spec in graph.inputs] == ["sample", "timestep"]
    assert graph.pinned["mask"].tolist() == [1, 1, 1, 0, 0]
    assert verify_denoiser(graph, module, family, run) <= 1e-6


def test_mask_that_differs_between_samples_is_refused(tmp_path):
    module = build(masked)
    family = family_of_example(module, [masked_call(2), masked_call(3, (1, 1, 0, 0, 0))])
    with pytest.raises(ExportError, match=r"input 'mask': found Python that looks at its contents, which differ"):
        trace_module(module, family, tmp_path)


def test_python_that_looks_at_the_sample_is_refused(tmp_path):
    module = build(lambda self, sample, timestep: (sample @ self.weight if sample.mean() > 0 else sample,))
    sets = [{"sample": normal(b, b, 4), "timestep": torch.rand(b)} for b in (2, 3)]
    words = r"input 'sample': found Python that looks at its contents, in \S+lambda> \(test_example.py:\d+\), wanted"
    with pytest.raises(ExportError, match=words):
        trace_module(module, family_of_example(module, sets), tmp_path)


def test_loop_over_the_batch_gives_a_graph_for_one_sample(tmp_path):
    def loop(self, sample, timestep):
        return (torch.stack([sample[i] @ self.weight * timestep[i] for i in range(int(sample.shape[0]))]),)

    module = build(loop)
    sets = [{"sample": normal(b, b, 5, 4), "timestep": torch.rand(b)} for b in (2, 3)]
    family = family_of_example(module, sets)
    graph = trace_module(module, family, tmp_path)
    assert [spec.shape for spec in graph.inputs] == [(1, 5, 4), (1,)]
    assert verify_denoiser(graph, module, family, run) <= 1e-6
    same = [sets[0], {"sample": normal(7, 2, 5, 4), "timestep": torch.rand(2)}]
    family = family_of_example(module, same)
    assert family.inputs()[0].shape == (2, 5, 4)
    assert verify_denoiser(trace_module(module, family, tmp_path / "two"), module, family, run) <= 1e-6


def test_factorisation_of_a_weight_is_a_constant(tmp_path):
    def forward(self, sample, timestep):
        q, _ = torch.linalg.qr(self.weight)
        return (sample @ q * timestep[:, None],)

    module = build(forward)
    sets = [{"sample": normal(b, b, 4), "timestep": torch.rand(b)} for b in (2, 3)]
    family = family_of_example(module, sets)
    graph = trace_module(module, family, tmp_path)
    assert not graph.pinned
    assert verify_denoiser(graph, module, family, run) <= 1e-6


class ThriftyAttnProcessor:
    """Attends only where it finds something to attend to."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if hidden_states.abs().max() > 3:
            return attn.to_out[0](attn.to_v(hidden_states))
        return hidden_states


class FarAttnProcessor:
    """Calls what torch.onnx has no translation for."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return torch.special.bessel_j0(attn.to_v(hidden_states))


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        (ThriftyAttnProcessor(), r"input 'sample': found Python that looks at its contents, in the attention processor "
         r"ThriftyAttnProcessor.__call__ \(test_example.py:\d+\)(?s:.*)set_default_attn_processor"),
        (FarAttnProcessor(), r"processors that are not diffusers' own: FarAttnProcessor(?s:.*)set_default_attn_proc"),
    ],
)  # fmt: skip
def test_attention_processor_of_another_package_is_named(processor, words, tmp_path):
    from support.tiny_models import DIT
    from support.tiny_models import build as diffusers_model

    from quantempo.export.families import family_of_module

    module = diffusers_model("DiTTransformer2DModel", 4, **{**DIT, "num_layers": 1})
    module.transformer_blocks[0].attn1.set_processor(processor)
    with pytest.raises(ExportError, match=words):
        trace_module(module, family_of_module(module), tmp_path)


def test_inputs_file_describes_a_diffusers_class(tmp_path):
    from support.tiny_models import CONDITION_UNET
    from support.tiny_models import build as diffusers_model

    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "call.npz", sample=rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
        timestep=np.array([0.3, 0.3], np.float32), timestep_scale=np.float32(0.001),
        encoder_hidden_states=rng.standard_normal((2, 7, 24)).astype(np.float32),
    )  # fmt: skip
    family = family_of_inputs("UNet2DConditionModel", tmp_path / "call.npz")
    assert (family.sample_shape, [a.name for a in family.arrays]) == ((4, 8, 8), ["encoder_hidden_states"])
    assert np.allclose(family.examples()[0]["timestep"], 300)
    module = diffusers_model("UNet2DConditionModel", 3, **CONDITION_UNET)
    assert verify_denoiser(trace_module(module, family, tmp_path), module, family, run) <= 1e-4


def test_class_of_your_own_is_told_what_to_do(tmp_path):
    np.savez(tmp_path / "call.npz", sample=np.zeros((2, 4), np.float32))
    with pytest.raises(UnsupportedModel, match=r"installed diffusers does not have(?s:.*)--code FILE.py"):
        family_of_inputs("MyTransformer2DModel", tmp_path / "call.npz")
