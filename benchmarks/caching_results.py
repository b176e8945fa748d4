"""What `caching.py` makes of final latents, and the JSON file that it goes to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.quality import Images, psnr_db

Latents = NDArray[np.float64]
RESAMPLES = 2000
PAIRS = (
    ("naive", "programmed"), ("programmed", "corrected"), ("corrected", "full"), ("naive", "full"), ("naive", "even"),
    ("naive", "dps"), ("shared", "full"), ("apart", "full"),
)


def compare(
    decode: Callable[[NDArray[Any]], Images], made: Mapping[str, Latents], reference: Latents
) -> dict[str, Any]:
    """Mean errors, and paired differences from variant to variant with 95 % intervals over seeds (bootstrap)."""
    images = decode(reference)
    errors = {name: ((x - reference) ** 2).reshape(len(x), -1).mean(axis=1) for name, x in made.items()}
    psnr = {name: psnr_db(decode(x), images) for name, x in made.items()}
    variants = {
        name: {"final_latent_mse": float(errors[name].mean()), "psnr_db": float(psnr[name].mean())} for name in made
    }
    paired = {}
    for worse, better in PAIRS:
        if worse in made and better in made:
            paired[f"{worse} - {better}"] = {
                "final_latent_mse": interval_of(errors[worse] - errors[better]),
                "gain_db": interval_of(psnr[better] - psnr[worse]),
            }
    return {"variants": variants, "paired": paired}


def interval_of(differences: NDArray[np.float64]) -> list[float]:
    """Mean, and the ends of its 95 % interval."""
    rng = np.random.Generator(np.random.Philox(0))
    picks = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[picks].mean(axis=1), [2.5, 97.5])
    return [float(differences.mean()), float(low), float(high)]


def read(path: Path | None) -> dict[str, Any]:
    """Results so far."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """All results."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
