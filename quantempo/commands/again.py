"""`quantempo reproduce` and `quantempo bench`: a bundle's bytes and its speed, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleFolder = Annotated[Path, typer.Argument(help="Bundle directory.")]


def reproduce_command(
    bundle: BundleFolder,
    model: Annotated[Path, typer.Argument(help="The model that it was compiled from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the new bundle goes.")],
    scheduler: Annotated[Path | None, typer.Option(help="Scheduler directory, where it was compiled with one.")] = None,
    calib_set: Annotated[
        Path | None, typer.Option("--calib-set", help="The .npz of the calibration, where there was one.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for results of stages; default: user cache.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compile again with a bundle's own recipe and plan, and say whether every byte is the same."""
    from quantempo.progress import console_progress
    from quantempo.reproducing import reproduce

    found = reproduce(
        bundle, model, out, scheduler=scheduler, calibration=calib_set, work=work, overwrite=overwrite,
        progress=console_progress(quiet),
    )
    found.check()
    typer.echo(f"the same to the last byte: {len(found.again.manifest.files)} files, digest {found.again.digest}")


def bench_command(
    bundle: BundleFolder,
    rounds: Annotated[int, typer.Option(help="Rounds, float and quantized in turn.")] = 15,
    inputs: Annotated[Path | None, typer.Option(help="Conditioning arrays (.npz), as for --calib-set.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="Backend that runs the graphs; auto measures.")] = "ort",
    threads: Annotated[int, typer.Option("--threads", help="Engine threads; 0 lets the engine choose.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Time a bundle against its float reference in alternation, on whole runs of one guided sample."""
    import json

    from quantempo.report.bench import bench

    found = bench(bundle, rounds=rounds, inputs=inputs, engine=engine, threads=threads)
    typer.echo(json.dumps(found.data(), indent=2, sort_keys=True) if as_json else found.text())
