"""Commands about engines and devices; `register` adds them to the command line."""

from __future__ import annotations

import typer

from quantempo.commands.again import bench_command, reproduce_command
from quantempo.commands.build import build_command
from quantempo.commands.cache import cache_app
from quantempo.commands.check import check
from quantempo.commands.compare import compare
from quantempo.commands.rewrite import float_steps, import_scales


def register(app: typer.Typer) -> None:
    """Add `build`, `check`, `compare`, `bench`, `reproduce`, `cache` and what rewrites bundles."""
    app.command("build")(build_command)
    app.command()(check)
    app.command()(compare)
    app.command("bench")(bench_command)
    app.command("reproduce")(reproduce_command)
    app.command("float-steps")(float_steps)
    app.command("import-scales")(import_scales)
    app.add_typer(cache_app, name="cache")
