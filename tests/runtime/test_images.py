from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantempo.runtime.images import encode_png, save


def pictures() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)
    return {
        "noise": rng.integers(0, 256, (17, 23), np.uint8), "ramp": ramp, "one": np.zeros((1, 1), np.uint8),
        "row": ramp[:1], "column": ramp[:, :1].copy(), "white": np.full((5, 5, 3), 255, np.uint8),
        "colour": np.stack([ramp, ramp // 2, ramp[::-1]], axis=2),
    }


@pytest.mark.parametrize("name", pictures())
def test_a_png_decodes_to_its_pixels(name: str) -> None:
    pixels = pictures()[name]
    decoded = Image.open(io.BytesIO(encode_png(pixels)))
    assert np.array_equal(np.asarray(decoded), pixels)
    assert decoded.mode == ("L" if pixels.ndim == 2 else "RGB")


def test_filters_are_chosen_per_row() -> None:
    smooth, noisy = encode_png(pictures()["ramp"]), encode_png(pictures()["noise"])
    assert len(smooth) < 300, "a ramp is nothing but its first differences"
    assert len(noisy) > 17 * 23


def test_other_formats_are_left_to_pillow(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp"):
        save(Image.fromarray(pictures()["colour"]), tmp_path / name)
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), pictures()["colour"])
