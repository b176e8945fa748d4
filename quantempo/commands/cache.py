"""`quantempo cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cache_app = typer.Typer(no_args_is_help=True, help="The cache of compiled engines.")


@cache_app.command()
def explain(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    engine: Annotated[str, typer.Option("--engine", help="Backend that runs the graphs.")] = "ort",
    rows: Annotated[int, typer.Option(help="Rows of the call, where the engine compiles for fixed sizes.")] = 2,
    threads: Annotated[int, typer.Option("--threads", help="Engine threads; 0 lets the engine choose.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Cache folder; the usual place by default.")] = None,
) -> None:
    """Print what the compiled engines of a bundle depend on, and on a miss, what changed."""
    from quantempo.devices.explaining import explain_cache

    typer.echo(explain_cache(bundle, engine, rows=rows, threads=threads, folder=folder))


@cache_app.command()
def prune(
    keep: Annotated[float, typer.Option(help="Gigabytes to keep; 0 empties the cache.")] = 16.0,
    folder: Annotated[Path | None, typer.Option(help="Cache folder; the usual place by default.")] = None,
) -> None:
    """Remove what was not used for longest."""
    from quantempo.devices.opening import cache_folder
    from quantempo.engines.cache import EngineCache

    place = cache_folder(folder if folder is not None else True)
    gone = EngineCache(place).prune(int(keep * 1e9)) if place is not None else ()
    typer.echo(f"{place}: {len(gone)} entries removed")
