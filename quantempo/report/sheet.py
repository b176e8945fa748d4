"""The picture of a report: the same seeds as float, with one scale, and with scales per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 72
GAP = 4
MARGIN = 12
CAPTION = 34
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
AMPLIFY = 32


@dataclass(frozen=True)
class Panel:
    """One column block: a title, a line below it, and images (count, height, width, channels) in [0, 1]."""

    title: str
    note: str
    images: NDArray[np.float32]


def error_panel(title: str, note: str, images: NDArray[np.float32], reference: NDArray[np.float32]) -> Panel:
    """Absolute difference to the reference, amplified so that it can be seen at all."""
    return Panel(title, note, np.clip(np.abs(images - reference) * AMPLIFY, 0, 1).astype(np.float32))


def contact_sheet(panels: Sequence[Panel], columns: int = 4) -> Image.Image:
    """All panels side by side, each a grid of its images in the same order."""
    count = len(panels[0].images)
    rows = -(-count // columns)
    width = columns * TILE + (columns - 1) * GAP
    height = rows * TILE + (rows - 1) * GAP
    sheet = Image.new(
        "RGB", (len(panels) * (width + MARGIN) + MARGIN, CAPTION + height + 2 * MARGIN), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    small = ImageFont.load_default(11)
    for place, panel in enumerate(panels):
        left = MARGIN + place * (width + MARGIN)
        draw.text((left, MARGIN - 4), panel.title, INK, font=font)
        draw.text((left, MARGIN + 13), panel.note, FAINT, font=small)
        for index, image in enumerate(panel.images):
            row, column = divmod(index, columns)
            tile = to_image(image).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (TILE + GAP), MARGIN + CAPTION + row * (TILE + GAP)))
    return sheet


def to_image(pixels: NDArray[np.float32]) -> Image.Image:
    """A Pillow image of (height, width, channels) values in [0, 1]; of latents, the first three channels or one."""
    channels = 3 if pixels.shape[-1] >= 3 else 1
    levels = np.round(np.clip(pixels[..., :channels], 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
