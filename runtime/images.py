"""Decoded tensors to pictures."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
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


def save(image: Image, path: Path) -> None:
    """Write a picture; a PNG of ours has the bytes that the C++ runtime writes, other formats are Pillow's."""
    if path.suffix.lower() == ".png" and image.mode in ("L", "RGB"):
        path.write_bytes(encode_png(np.asarray(image)))
    else:
        image.save(path)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file: 8 bits, (height, width) grey or (height, width, 3) colour.

    Each row has the filter whose bytes, as signed numbers, have the smallest sum of magnitudes, the first of equals;
    then one deflate stream of zlib's level 6.  So two runtimes that use the same zlib write the same file.
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    filtered = _filter_rows(pixels.reshape(height, width * channels), channels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(filtered, 6)), (b"IEND", b"")
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _filter_rows(rows: NDArray[np.uint8], step: int) -> bytes:
    """Rows behind PNG's filter bytes; `step` is the bytes of a pixel."""
    raw = rows.astype(np.int16)
    padded = np.pad(raw, ((1, 0), (step, 0)))
    left, up, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    estimate = left + up - corner
    far = [np.abs(estimate - side) for side in (left, up, corner)]
    paeth = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
    tried = np.stack([raw, raw - left, raw - up, raw - (left + up) // 2, raw - paeth]) & 0xFF
    costs = np.where(tried < 128, tried, 256 - tried).sum(axis=2, dtype=np.int64)
    chosen = costs.argmin(axis=0)
    best = tried[chosen, np.arange(len(raw))].astype(np.uint8)
    return np.concatenate([chosen[:, None].astype(np.uint8), best], axis=1).tobytes()
