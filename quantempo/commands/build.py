"""`quantempo build`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class WeightsChoice(str, Enum):
    """Where a plan's weights are."""

    plan = "plan"
    refit = "refit"
    bundle = "bundle"


def build_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    target: Annotated[str, typer.Option(help="What to build for, e.g. orin-jp6 or rtx-ada.")],
    shapes: Annotated[
        list[str] | None, typer.Option(help="NAME=LOWEST:BEST:HIGHEST, comma-separated; repeat for more profiles.")
    ] = None,
    graphs: Annotated[str, typer.Option(help="Dialect and float type, e.g. portable-f16.")] = "",
    weights: Annotated[
        WeightsChoice,
        typer.Option(help="In the plan; left out and refitted at load (refit); or taken from the bundle (bundle)."),
    ] = WeightsChoice.plan,
    memory: Annotated[int, typer.Option(help="Limit of scratch memory in MiB; 0 for none.")] = 0,
    timing_cache: Annotated[str, typer.Option(help="File of TensorRT's measurements, read and written.")] = "",
    level: Annotated[int, typer.Option(help="Builder optimization level, 0 to 5; -1 for the library's own.")] = -1,
    version_compatible: Annotated[bool, typer.Option(help="Let later TensorRT versions run the plans.")] = False,
    force: Annotated[bool, typer.Option(help="Build again what is there already.")] = False,
) -> None:
    """Build a bundle's engines for a device, with the engine library alone (no torch, no onnx)."""
    from quantempo.building import BuildOptions, build_bundle
    from quantempo.progress import console_progress

    options = BuildOptions(
        target, tuple(shapes or ()), graphs, weights.value, memory, timing_cache, level, version_compatible, force
    )
    typer.echo(build_bundle(bundle, options, console_progress()).text())
