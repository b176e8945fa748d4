from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from quantempo.errors import RequestError
from quantempo.runtime.torch_rng import TorchGenerator, TorchNoise

torch = pytest.importorskip("torch")

SHAPES = [(1, 4, 64, 64), (2, 4, 8, 8), (3, 7), (2, 3), (15,), (16,), (17,), (1,), (31, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 5, 2**32 + 7, 2**63 + 1])
def test_randn_is_that_of_torch_draw_after_draw(shape: tuple[int, ...], seed: int) -> None:
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    for _ in range(3):
        assert np.abs(torch.randn(shape, generator=theirs).numpy() - ours.randn(shape)).max() <= 1e-6


def test_small_and_large_draws_mix_as_in_torch() -> None:
    theirs, ours = torch.Generator().manual_seed(3), TorchGenerator(3)
    for shape in [(3,), (40, 20), (2,), (33,), (1,), (700,)]:
        assert np.abs(torch.randn(shape, generator=theirs).numpy() - ours.randn(shape)).max() <= 1e-6


def test_one_generator_draws_the_whole_batch_and_several_draw_a_sample_each() -> None:
    out = np.empty((2, 4, 8, 8), np.float32)
    TorchNoise.from_seeds(1, 2).draw(0, out)
    assert np.abs(torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).numpy() - out).max() <= 1e-6
    TorchNoise.from_seeds([1, 6], 2).draw(0, out)
    second = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(6)).numpy()
    assert np.abs(second[0] - out[1]).max() <= 1e-6


def test_draws_that_a_program_leaves_out_are_still_made() -> None:
    every, some = TorchNoise.from_seeds(4, 2), TorchNoise.from_seeds(4, 2)
    drawn = {index: np.empty((2, 5, 7), np.float32) for index in range(6)}
    for index, out in drawn.items():
        every.draw(index, out)
    out = np.empty((2, 5, 7), np.float32)
    for index in (0, 3, 5):
        some.draw(index, out)
        assert np.array_equal(out, drawn[index])


def test_without_the_initial_draw_the_first_one_starts_the_generator() -> None:
    out = np.empty((2, 4, 8, 8), np.float32)
    TorchNoise.from_seeds(1, 2).draw(1, out)
    assert np.abs(torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).numpy() - out).max() <= 1e-6


@pytest.mark.parametrize("before", [(), (3,), (100,), (524,), (2, 4, 8, 8)])
def test_a_generator_goes_on_where_it_stands_and_is_left_where_the_run_ended(before: tuple[int, ...]) -> None:
    theirs, reference = torch.Generator().manual_seed(8), torch.Generator().manual_seed(8)
    for generator in (theirs, reference):
        torch.randn(before, generator=generator)
    ours = TorchGenerator.continuing(theirs)
    for shape in [(3,), (2, 40), (5,)]:
        assert np.abs(torch.randn(shape, generator=reference).numpy() - ours.randn(shape)).max() <= 1e-6
    ours.store(theirs)
    for shape in [(1,), (700,)]:
        assert torch.equal(torch.randn(shape, generator=reference), torch.randn(shape, generator=theirs))


def test_something_else_than_a_generator_is_refused() -> None:
    with pytest.raises(RequestError, match=r"generator: found a Generator, wanted a torch\.Generator on the CPU"):
        TorchGenerator.continuing(np.random.default_rng())


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, quantempo.runtime.torch_rng as t; t.TorchGenerator(0).randn((20,));"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
