"""Compare the range methods on synthetic activations.

    python benchmarks/range_methods.py

Prints the signal-to-quantization-noise ratio in dB, measured on the values themselves (not on the histogram), for each
method, bit width and form.  `drift` is Gaussian with a scale that falls from 6 to 0.3 over 16 timesteps: its figure is
the mean over timesteps in dB, once with one scale for all and once with a scale per timestep.
"""

from __future__ import annotations

import argparse
import math
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.ranges import METHODS, quantizer_for
from quantempo.contracts.stats import TensorStats

VALUES = 200_000
Array = NDArray[np.float32]


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def activations() -> dict[str, list[Array]]:
    """Arrays per timestep, by name; only `drift` has more than one."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    channels = np.where(np.arange(100) < 2, 20.0, 1.0)
    made = {
        "gaussian": [normal(VALUES) * 1.7 + 0.3],
        "post-GELU": [_gelu(normal(VALUES) * 1.5 - 0.3)],
        "post-SiLU": [(x := normal(VALUES) * 2) / (1 + np.exp(-x))],
        "laplace": [rng.laplace(size=VALUES)],
        "student t3": [rng.standard_t(3, VALUES)],
        "outlier channels": [(normal((VALUES // 100, 100)) * channels).ravel()],
        "drift": [normal(VALUES // 16) * scale for scale in np.geomspace(6, 0.3, 16)],
    }
    return {name: [part.astype(np.float32) for part in parts] for name, parts in made.items()}


def sqnr(x: Array, scale: float, point: int, bits: int) -> float:
    """Signal-to-quantization-noise ratio of one array in dB."""
    wide = x.astype(np.float64)
    restored = (np.clip(np.rint(wide / scale) + point, 0, 2**bits - 1) - point) * scale
    return float(10 * np.log10(np.sum(wide**2) / np.sum((wide - restored) ** 2)))


def score(parts: list[Array], method: str, bits: int, symmetric: bool, *, grouped: bool) -> float:
    """Mean over the parts, quantized with one scale for all or one each."""
    stats = [TensorStats.of(part) for part in parts]
    if not grouped:
        stats = [reduce(TensorStats.merge, stats)] * len(parts)
    found = [quantizer_for(*METHODS[method](cell, bits, symmetric), bits, symmetric) for cell in stats]
    return float(np.mean([sqnr(x, float(s), z, bits) for x, (s, z) in zip(parts, found, strict=True)]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data = activations()
    print("| values | bits | form | " + " | ".join(METHODS) + " |")
    print("| --- " * (3 + len(METHODS)) + "|")
    for bits in (8, 6):
        for symmetric in (False, True):
            rows = [(name, parts, False) for name, parts in data.items()]
            rows.append(("drift, a scale per timestep", data["drift"], True))
            for name, parts, grouped in rows:
                figures = [f"{score(parts, method, bits, symmetric, grouped=grouped):.2f}" for method in METHODS]
                form = "symmetric" if symmetric else "asymmetric"
                print(f"| {name} | {bits} | {form} | " + " | ".join(figures) + " |")


if __name__ == "__main__":
    main()
