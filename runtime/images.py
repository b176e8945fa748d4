"""Decoded tensors to pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def to_unit(decoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """(batch, channels, height, width) in [-1, 1] to (batch, height, width, channels) in [0, 1], clipped."""
    unit = np.clip(decoded * np.float32(0.5) + np.float32(0.5), np.float32(0.0), np.float32(1.0))
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_pil(images: NDArray[np.float32]) -> list[Image]:
    """(batch, height, width, channels) in [0, 1] to pictures: mode L for one channel, RGB for three."""
    from PIL import Image

    # A NaN has no grey value; it becomes black instead of whatever the cast gives.
    finite: NDArray[Any] = np.nan_to_num(images, nan=0.0)
    pixels = np.rint(finite * 255.0).astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def grid(images: list[Image], columns: int = 0, gap: int = 2) -> Image:
    """Pictures of one size and mode, side by side in rows.

    Args:
        images: at least one.
        columns: per row; 0 for about as many as rows.
        gap: white pixels between pictures.
    """
    from PIL import Image as Pillow

    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Pillow.new(images[0].mode, size, 255 if images[0].mode == "L" else (255, 255, 255))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet
