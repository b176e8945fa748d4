"""Mixtures of experts, traced densely: the same function as routing in Python."""

from __future__ import annotations

import pytest
import torch
from support.onnxruntime_run import run

from quantempo.export.dense_experts import dense_experts
from quantempo.export.families import family_of_example
from quantempo.export.trace import trace_module, verify_denoiser


class Mixed(torch.nn.Module):
    """A linear layer and a mixture of experts as HiDream has it."""

    def __init__(self):
        super().__init__()
        hidream = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
        self.first = torch.nn.Linear(8, 8)
        self.mixture = hidream.MOEFeedForwardSwiGLU(8, 16, 4, 2)

    def forward(self, hidden_states, timestep):
        return (self.mixture(self.first(hidden_states)) * timestep[:, None, None],)


def test_dense_is_the_routed_function():
    module = Mixed().eval()
    x, time = torch.randn(3, 5, 8), torch.rand(3)
    with torch.no_grad():
        wanted = module(x, time)[0]
        with dense_experts(module):
            found = module(x, time)[0]
        assert torch.equal(module(x, time)[0], wanted)
    assert "moe_infer" not in vars(module.mixture)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_graph_routes_other_samples_as_the_module_does(tmp_path):
    module = Mixed().eval()
    family = family_of_example(
        module, [{"hidden_states": torch.randn(b, 5, 8), "timestep": torch.rand(b)} for b in (2, 3)]
    )
    graph = trace_module(module, family, tmp_path)
    assert not graph.pinned
    assert verify_denoiser(graph, module, family, run) <= 1e-5


def test_experts_that_choose_share_the_tokens_evenly():
    nucleus = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    experts = nucleus.SwiGLUExperts(8, 16, 4).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        x, counts = torch.randn(12, 8, generator=generator), torch.full((4,), 3)
        wanted = experts(x, counts)
        with dense_experts(experts):
            found = experts(x, counts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.abs().mean() > 0.1
    assert "_run_experts_for_loop" not in vars(experts)
