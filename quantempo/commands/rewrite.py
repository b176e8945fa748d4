"""`quantempo float-steps` and `quantempo import-scales`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[Path, typer.Argument(help="Bundle directory, compiled with its float reference.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]


def float_steps(
    bundle: Bundle,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the new bundle goes.")] = None,
    first: Annotated[int, typer.Option(min=0, help="Steps at the start with float activations.")] = 0,
    last: Annotated[int, typer.Option(min=0, help="Steps at the end with float activations.")] = 0,
    policy: Annotated[Path | None, typer.Option(help="config.json with a diffusion_step_policy to follow.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Let the first and last steps of every run compute with float activations; without --out, print the policy."""
    import json

    from quantempo.contracts.step_policy import StepPolicy
    from quantempo.devices.float_steps import bundle_policy, policy_of_model, with_float_steps
    from quantempo.runtime.bundle import read_bundle

    if out is None:
        typer.echo(json.dumps({"diffusion_step_policy": bundle_policy(read_bundle(bundle)).data()}, indent=2))
        return
    chosen = policy_of_model(policy) if policy is not None else StepPolicy(first, last)
    made = with_float_steps(bundle, out, chosen, overwrite)
    typer.echo(f"wrote {made.root}: the first {chosen.first} and the last {chosen.last} steps compute in float")


def import_scales(
    bundle: Bundle,
    checkpoint: Annotated[Path, typer.Argument(help="Safetensors file with the maxima or scales of a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the new bundle goes.")],
    overwrite: Overwrite = False,
) -> None:
    """Take the per-tensor activation scales of a ModelOpt checkpoint in place of the calibrated ones."""
    from quantempo.devices.importing import with_imported_scales

    made, imported = with_imported_scales(bundle, checkpoint, out, overwrite)
    typer.echo(f"wrote {made.root}: {len(imported.taken)} tensors with the checkpoint's scales")
    for tensor, reason in imported.left.items():
        typer.echo(f"  kept as they were: {tensor} ({reason})")
