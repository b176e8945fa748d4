"""The report's figures as PNG, for papers and tickets; the page has its own, which answer to the pointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantempo.contracts.partition import Partition
from quantempo.errors import MissingExtra

LABELLED_ROWS = 40
"""Heat maps with more rows than this are labelled by number alone."""


def write_figures(folder: Path, analysis: dict[str, Any], partition: Partition) -> None:
    """Write `heatmap.png` (SQNR by tensor and group) and `drift.png` (ranges over the timesteps).

    Args:
        folder: exists.
        analysis: `analysis` of `report.json`.
        partition: the groups' borders.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("report/heatmap.png", package="matplotlib", extra="compile") from error
    rows = analysis["tensors"]
    figure = Figure(figsize=(10, max(2.5, 0.24 * min(len(rows), 60))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        np.array([row["sqnr_db"] for row in rows]), aspect="auto", cmap="cividis", interpolation="nearest"
    )
    if len(rows) <= LABELLED_ROWS:
        axes.set_yticks(range(len(rows)), [row["sites"][0] for row in rows], fontsize=7)
    axes.set_xlabel(f"group ({partition.unit} {partition.low:g} to {partition.high:g})")
    figure.colorbar(image, label="SQNR in dB, estimated")
    figure.savefig(folder / "heatmap.png", dpi=130)

    drift = analysis["drift"]
    figure = Figure(figsize=(10, 2.4 * -(-len(drift) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(drift) // 3), 3, squeeze=False).reshape(-1)
    for axes in grid[len(drift) :]:
        axes.axis("off")
    for axes, row in zip(grid, drift, strict=False):
        for edge in partition.edges:
            axes.axvline(edge, color="0.9", linewidth=0.6)
        axes.plot(row["keys"], row["high"], color="#0072b2")
        axes.plot(row["keys"], row["low"], color="#d55e00")
        axes.set_title(row["sites"][0], fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(folder / "drift.png", dpi=130)
