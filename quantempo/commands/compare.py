"""`quantempo compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def compare(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    engines: Annotated[str, typer.Option(help="Two engines, comma-separated.")] = "ort,openvino",
    samples: Annotated[int, typer.Option(help="Seeds of the end-to-end comparison.")] = 8,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 takes the bundle's default.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    calls: Annotated[int, typer.Option(help="Engine calls whose outputs and sites are compared.")] = 4,
    sites: Annotated[bool, typer.Option(help="Compare what quantized sites read and write, too.")] = True,
    threads: Annotated[int, typer.Option("--threads", help="Engine threads; 0 lets the engine choose.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Run two engines on the same inputs and seeds, and show where they part."""
    import json

    from quantempo.devices.comparing import CompareOptions, compare_engines

    options = CompareOptions(samples, steps, guidance, calls, sites, threads)
    found = compare_engines(bundle, [name.strip() for name in engines.split(",") if name.strip()], options)
    typer.echo(json.dumps(asdict(found), indent=2, sort_keys=True) if as_json else found.text())
