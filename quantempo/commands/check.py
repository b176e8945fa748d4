"""`quantempo check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def check(
    subject: Annotated[Path, typer.Argument(help="Model directory, bundle directory or ONNX file.")],
    target: Annotated[str, typer.Option(help="What it is to run on; see docs/targets.md.")] = "cpu",
    library_version: Annotated[str, typer.Option(help="Version of the target's library, e.g. 10.3.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a target refuses, what is slow there and what stays in float; no device needed.

    Exit code 1 where something is refused.
    """
    import json

    from quantempo.devices.checking import check_subject

    report = check_subject(subject, target, library_version)
    typer.echo(json.dumps(asdict(report), indent=2, sort_keys=True) if as_json else report.text())
    if report.refused:
        raise typer.Exit(1)
