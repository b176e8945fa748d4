"""The noise of torch's CPU generator without torch, so that a seed gives the picture that diffusers gives.

Reproduces `torch.randn(..., generator=torch.Generator().manual_seed(seed))` in float32 to about 1e-6 (torch's vector
path approximates logarithm, sine and cosine).  Sources: ATen/native/cpu/DistributionTemplates.h (`normal_fill`),
ATen/core/DistributionsHelper.h, c10 CPUGeneratorImpl and MT19937RNGEngine.h of PyTorch 2.x.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import RequestError

_GROUP = 16
_WORDS = 624
_LEFT, _NEXT, _KEY = 8, 16, 24
_SPARE = _KEY + 8 * _WORDS + 8
"""Byte offsets in a generator's state."""


class TorchGenerator:
    """torch's CPU generator: a Mersenne Twister and the second normal of the last pair of the scalar path."""

    def __init__(self, seed: int) -> None:
        # torch seeds its twister with the low 32 bits.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    @staticmethod
    def continuing(generator: Any) -> TorchGenerator:
        """A generator that goes on where a `torch.Generator` stands, read from its state without importing torch.

        The state's layout is CPUGeneratorImplStateLegacy: seed (8 bytes), left (4), seeded (4), next (8), 624 words of
        8 bytes, then normal_x, normal_y, normal_rho (doubles) and whether normal_y, the spare, is valid.

        Raises:
            RequestError: not a CPU generator of torch.
        """
        device = getattr(getattr(generator, "device", None), "type", None)
        if device != "cpu" or not hasattr(generator, "get_state"):
            found = f"a generator on {device!r}" if device else f"a {type(generator).__name__}"
            raise RequestError(
                "generator", found=found, wanted="a torch.Generator on the CPU",
                cause="only torch's CPU noise can be reproduced without torch", remedy="pass seed= instead",
            )
        state = generator.get_state().numpy().tobytes()
        (left,) = struct.unpack_from("<i", state, _LEFT)
        made = TorchGenerator(0)
        words = np.frombuffer(state, np.uint64, _WORDS, _KEY).astype(np.uint32)
        made._twister.set_state(("MT19937", words, _WORDS + 1 - left, 0, 0.0))
        spare, _, valid = struct.unpack_from("<ddi", state, _SPARE)
        made._spare = spare if valid else None
        return made

    def store(self, generator: Any) -> None:
        """Move a `torch.Generator` to where this one stands, as drawing from it would have done."""
        twister: Any = self._twister.get_state(legacy=False)
        words, position = twister["state"]["key"], twister["state"]["pos"]
        tensor = generator.get_state()
        state = tensor.numpy()
        state[_KEY : _KEY + 8 * _WORDS] = np.frombuffer(words.astype(np.uint64).tobytes(), np.uint8)
        for offset, value in (
            (_LEFT, struct.pack("<i", _WORDS + 1 - position)), (_NEXT, struct.pack("<Q", position)),
            (_SPARE, struct.pack("<ddi", self._spare or 0.0, 0.0, self._spare is not None)),
        ):
            state[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
        generator.set_state(tensor)

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next `torch.randn(shape)` of this generator."""
        count = math.prod(shape)
        if count >= _GROUP:
            return self._filled(count).reshape(shape)
        return np.array([self._scalar() for _ in range(count)], np.float64).astype(np.float32).reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        low = self._words(count) & np.uint32(0xFFFFFF)
        uniform: NDArray[np.float32] = low.astype(np.float32) * np.float32(2.0**-24)
        return uniform

    def _filled(self, count: int) -> NDArray[np.float32]:
        data = np.empty(count, np.float32)
        uniform = self._uniform(count)
        whole = count - count % _GROUP
        data[:whole] = _box_muller(uniform[:whole])
        if count != whole:
            # The last sixteen are drawn anew, so some values of the last whole group are replaced.
            data[-_GROUP:] = _box_muller(self._uniform(_GROUP))
        return data

    def _scalar(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        first, second = (self._uniform53() for _ in range(2))
        radius = math.sqrt(-2.0 * math.log1p(-second))
        self._spare = radius * math.sin(2.0 * math.pi * first)
        return radius * math.cos(2.0 * math.pi * first)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Groups of 16: the first eight give radii, the last eight angles; in float32, as torch does."""
    pairs = uniform.reshape(-1, 2, _GROUP // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    angle = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class TorchNoise:
    """Noise as diffusers draws it.

    Args:
        generators: one for the whole batch (all samples in one draw), or one per sample.
        batch: samples.
    """

    def __init__(self, generators: Sequence[TorchGenerator], batch: int) -> None:
        if len(generators) not in (1, batch):
            raise ValueError(f"{len(generators)} generators for {batch} samples")
        self._generators = tuple(generators)
        self._drawn = 0

    @staticmethod
    def from_seeds(seeds: int | Sequence[int], batch: int) -> TorchNoise:
        """One seed is one generator for the whole batch; a list is a generator per sample, as in diffusers."""
        each = [seeds] if isinstance(seeds, int) else list(seeds)
        return TorchNoise([TorchGenerator(seed) for seed in each], batch)

    def draw(self, index: int, out: NDArray[np.float32]) -> None:
        """See `NoiseSource.draw`.

        A generator's draws are consecutive.  Numbers that a program leaves out are draws that the stock scheduler makes
        and multiplies by zero (SA-Solver does), so they are made here too.
        """
        while self._drawn < index - 1:
            self._next(out.shape)
            self._drawn += 1
        out[...] = self._next(out.shape)
        self._drawn = index

    def _next(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(self._generators) == 1:
            return self._generators[0].randn(shape)
        return np.concatenate([generator.randn((1, *shape[1:])) for generator in self._generators])
