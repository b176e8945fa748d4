"""Rewrites of the captured program: the same numbers, in operations that ONNX has."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from support.onnxruntime_run import run

from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import ExportError
from quantempo.export.capture import capture


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = torch.polar(torch.ones(4), torch.arange(4.0))
        self.register_buffer("places", torch.arange(1.0, 6.0), persistent=False)

    def forward(self, x, mask):
        return (self.function(self, x, mask),)


def rotate(self, x, mask):
    pairs = torch.view_as_complex(x.double().reshape(x.shape[0], 4, 2))
    return torch.view_as_real(pairs * self.table).flatten(1).float()


def rearranged(self, x, mask):
    first, second = self.table.split([1, 3])
    table = torch.cat([second, first], -1).unsqueeze(0).expand(x.shape[0], -1).to(torch.complex64)
    pairs = torch.view_as_complex(x.reshape(-1, 4, 2))
    turned = torch.stack([pairs * table, pairs.conj() + 1], dim=-1)[..., 1].reshape(-1, 2, 2).transpose(1, 2)
    return turned.real.flatten(1) + turned.abs().flatten(1) - turned.imag.sum(-1).mean(-1, keepdim=True)


def polar(self, x, mask):
    made = torch.polar(torch.exp(x), x * 3) * 2 - torch.complex(x, x)
    return torch.cat([made.real, made.imag], 1)


def outer(self, x, mask):
    return torch.einsum("bn,d->bnd", x, torch.arange(3.0).double()).flatten(1).float()


def gathered(self, x, mask):
    """A table filled in place, then rows of it taken by index."""
    table = torch.zeros(2, 4, dtype=torch.complex64)
    table[0, :4] = self.table
    table[1, 1:] = self.table[:3]
    index = (x[:, :2] > 0).long()[:, :, None].expand(-1, -1, 4)
    rows = table[None].expand(x.shape[0], -1, -1).gather(1, index)
    return torch.view_as_real(rows).flatten(1) * x.sum(1, keepdim=True)


def without_autocast(self, x, mask):
    with torch.amp.autocast("cuda", enabled=False):
        pairs = torch.view_as_complex(x.reshape(-1, 4, 2)) * self.table
        turned, half = torch.view_as_real(pairs).flatten(1), x * 0.5
    with torch.no_grad():
        return turned + half


def narrow_index(self, x, mask):
    return x[:, torch.tensor([3, 0, 3], dtype=torch.int32)]


def placed(self, x, mask):
    """Where each value stands in the order: a permutation and its inverse."""
    return (x.argsort(-1).argsort(-1) * x + mask.argsort(dim=-1, descending=True, stable=True)).float()


def assigned(self, x, mask):
    y = x * 2
    y[mask] *= 0.25
    y[y > 1] = -1.0
    rows = x.reshape(x.shape[0], 4, 2) + 0
    rows[mask[:, :4]] *= 0.0
    return y + rows.flatten(1)


def in_portions(self, x, mask):
    """Rows in portions, which saves memory: their number depends on the batch."""
    return torch.cat([portion * 2 for portion in torch.split(x.reshape(-1, 1), 1000)]).view(x.shape[0], 8)


def copied_into_data(self, x, mask):
    """A table made in forward, filled past autograd: where places come from, in CogVideoX."""
    places = torch.zeros(1, 8)
    places.data[:, 3:].copy_(self.places)
    later = torch.zeros_like(places)
    later.data.copy_(places * 2)
    return x * places + later + x.new_zeros(x.shape[0], 8)


CASES = {
    "copies into the data of a constant": copied_into_data,
    "split of the batch": in_portions,
    "root of whole numbers": lambda self, x, mask: x * mask.sum(1, keepdim=True).sqrt(),
    "assignment where a mask says": assigned,
    "complex rows by index": gathered,
    "regions without autocast": without_autocast,
    "index of 32 bits": narrow_index,
    "argsort": placed,
    "joining with nothing": lambda self, x, mask: torch.cat([x[:, 8:].reshape(x.shape[0], -1), x, x[:, :0]], 1) * 2,
    "rotary embedding": rotate,
    "moves and parts": rearranged,
    "polar and complex": polar,
    "squeeze of another size": lambda self, x, mask: x.unsqueeze(1).squeeze(2).squeeze(1) * 2,
    "where of truth values": lambda self, x, mask: x * torch.where(mask, ~mask, mask | (x > 0)),
    "masked_fill of truth values": lambda self, x, mask: x * (x > 0).masked_fill(mask, True)
    + x.gt(0.5).masked_fill(mask, False),
    "stable sort": lambda self, x, mask: x.sort(dim=1, stable=True, descending=True).values,
    "einsum of two types": outer,
    "tiny summand": lambda self, x, mask: (x * 0) / (x * 0 + 1e-15),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name):
    module = Call(CASES[name]).eval()
    inputs = TensorSpec("x", "float32", ("batch", 8)), TensorSpec("mask", "bool", ("batch", 8))
    args = torch.randn(2, 8), torch.rand(2, 8) > 0.5
    model = capture(module, args, inputs, (TensorSpec("y", "float32", ("batch",)),))
    x, mask = torch.randn(3, 8), torch.rand(3, 8) > 0.5
    found = run(ir.to_proto(model).SerializeToString(), {"x": x.numpy(), "mask": mask.numpy()})["y"]
    torch.testing.assert_close(torch.from_numpy(found), module(x, mask)[0].float(), rtol=1e-5, atol=1e-6)


def test_complex_operation_without_a_rule_is_named():
    module = Call(lambda self, x, mask: torch.view_as_real(torch.fft.fft(torch.complex(x, x)).sqrt())).eval()
    inputs = TensorSpec("x", "float32", ("batch", 8)), TensorSpec("mask", "bool", ("batch", 8))
    with pytest.raises(ExportError, match=r"operation aten(?s:.*)complex numbers"):
        capture(module, (torch.randn(2, 8), torch.rand(2, 8) > 0.5), inputs, (TensorSpec("y", "float32", ()),))


def test_autocast_that_is_on_is_refused():
    def half(self, x, mask):
        with torch.amp.autocast("cpu", torch.bfloat16):
            return x @ torch.ones(8, 8)

    inputs = TensorSpec("x", "float32", ("batch", 8)), TensorSpec("mask", "bool", ("batch", 8))
    args = torch.randn(2, 8), torch.rand(2, 8) > 0.5
    with pytest.raises(ExportError, match=r"autocast: found a region in half precision(?s:.*)forward"):
        capture(Call(half).eval(), args, inputs, (TensorSpec("y", "float32", ()),))
