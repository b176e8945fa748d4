"""The report as one HTML file that needs no network: figures are inline SVG, pictures are data addresses."""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantempo.contracts.partition import Partition
from quantempo.errors import MissingExtra
from quantempo.quality import Images
from quantempo.report.sheet import GAP, TILE, to_image

RAMP = ("#00204d", "#2c3e70", "#575d6d", "#7c7b78", "#a59c74", "#d3c064", "#ffea46")
"""Dark blue to yellow in even steps of lightness: readable in every common kind of colour blindness, and in grey."""
CELL_WIDTH, CELL_HEIGHT = 11, 13
CHART = (272, 150)
INSET = 34
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Pictures:
    """The same seeds, float and quantized; (count, height, width, channels) in [0, 1]."""

    reference: Images
    quantized: Images


def write_page(path: Path, title: str, facts: dict[str, Any], partition: Partition, pictures: Pictures) -> None:
    """Write `index.html`.

    Args:
        path: of the file.
        title: the model's name.
        facts: what `report.json` holds.
        partition: the groups' borders.
        pictures: for the slider.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingExtra("report/index.html", package="jinja2", extra="compile") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    )
    tensors = facts["analysis"]["tensors"]
    values = [value for row in tensors for value in row["sqnr_db"]]
    low, high = float(np.min(values)), float(np.max(values))
    sheets = [sheet_of(images) for images in (pictures.reference, pictures.quantized)]
    best = [best_single(row) for row in facts["quality"]["by_guidance"]]
    page = environment.get_template("page.html.j2").render(
        title=title, facts=facts, verdict=facts.get("verdict"), best=best, sheet_width=max(320, sheets[0].width),
        float_sheet=data_address(sheets[0]), quantized_sheet=data_address(sheets[1]),
        heat_svg=markupsafe.Markup(heat_map(tensors, low, high)), heat_low=low, heat_high=high, ramp=RAMP,
        heat_rows=[{"sites": row["sites"], "sqnr_db": row["sqnr_db"]} for row in tensors],
        heat_columns=group_names(partition), key_low=partition.low, key_high=partition.high,
        drift_figures=[
            {"svg": markupsafe.Markup(chart(row, partition)), "caption": ", ".join(row["sites"])}
            for row in facts["analysis"]["drift"]
        ],
    )
    path.write_text(page, encoding="utf-8")


def best_single(row: dict[str, Any]) -> tuple[str, float] | None:
    """The best single scale at one guidance scale: range method and PSNR in dB; `None` where none was measured."""
    single = {name: values["psnr_db"] for name, values in row["single_scale"].items()}
    name = max(single, key=lambda n: single[n], default=None)
    return None if name is None else (name, single[name])


def group_names(partition: Partition) -> list[str]:
    """What each group covers, as text."""
    ends = [partition.low, *partition.edges, partition.high]
    return [f"{start:g} to {stop:g}" for start, stop in itertools.pairwise(ends)]


def sheet_of(images: Images) -> Image.Image:
    """A grid of enlarged images, the same for every set of equally many."""
    rows = -(-len(images) // SHEET_COLUMNS)
    columns = min(SHEET_COLUMNS, len(images))
    step = TILE + GAP
    sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), (255, 255, 255))
    for index, image in enumerate(images):
        row, column = divmod(index, SHEET_COLUMNS)
        tile = to_image(image).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * step, row * step))
    return sheet


def data_address(image: Image.Image) -> str:
    """A picture as a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour(share: float) -> str:
    """A colour of the ramp; 0 is dark."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    at = min(int(place), len(RAMP) - 2)
    first, second = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in RAMP[at : at + 2])
    mixed = np.rint(first + (second - first) * (place - at)).astype(int)
    return "#" + "".join(f"{level:02x}" for level in mixed)


def heat_map(tensors: list[dict[str, Any]], low: float, high: float) -> str:
    """Tensors down, groups across."""
    groups = len(tensors[0]["sqnr_db"])
    width, height = groups * CELL_WIDTH, len(tensors) * CELL_HEIGHT
    cells = [
        f'<rect x="{c * CELL_WIDTH}" y="{r * CELL_HEIGHT}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" '
        f'data-r="{r}" data-c="{c}" fill="{colour((value - low) / max(high - low, 1e-9))}"/>'
        for r, row in enumerate(tensors)
        for c, value in enumerate(row["sqnr_db"])
    ]
    return (
        f'<svg id="heat" role="img" aria-label="signal to quantization noise by tensor and group" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(cells)}</svg>'
    )


def chart(row: dict[str, Any], partition: Partition) -> str:
    """Range of one tensor over the group key."""
    width, height = CHART
    keys, lows, highs = row["keys"], row["low"], row["high"]
    left, right = keys[0], max(keys[-1], keys[0] + 1e-9)
    bottom, top = min(lows), max(highs)
    span = max(top - bottom, 1e-9)

    def x(key: float) -> float:
        return float(INSET + (key - left) / (right - left) * (width - INSET - 6))

    def y(value: float) -> float:
        return float(8 + (top - value) / span * (height - 30))

    def line(values: list[float], stroke: str) -> str:
        points = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in zip(keys, values, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="1.6"/>'

    borders = "".join(
        f'<line x1="{x(edge):.1f}" x2="{x(edge):.1f}" y1="8" y2="{height - 22}" stroke="#e2e2e2"/>'
        for edge in partition.edges if left <= edge <= right
    )
    labels = (
        f'<text x="{INSET - 4}" y="{y(top) + 4:.1f}" text-anchor="end">{top:.3g}</text>'
        f'<text x="{INSET - 4}" y="{y(bottom) + 4:.1f}" text-anchor="end">{bottom:.3g}</text>'
        f'<text x="{INSET}" y="{height - 6}">{left:g}</text>'
        f'<text x="{width - 6}" y="{height - 6}" text-anchor="end">{partition.unit} {right:g}</text>'
    )
    return (
        f'<svg role="img" aria-label="range over {partition.unit}s" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-size="11" fill="#5c5c5c">{borders}{line(lows, "#d55e00")}{line(highs, "#0072b2")}'
        f"{labels}</svg>"
    )
