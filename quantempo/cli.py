"""The command line: `quantempo demo | compile | sample | inspect | report`.

Exit codes: 0 done, 1 one of our errors (its five parts on standard error), 2 wrong usage.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantempo.errors import OutputExists, QuantempoError

if TYPE_CHECKING:
    from quantempo.contracts.program import StepProgram
    from quantempo.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile diffusion models to quantized bundles whose activation scales follow the timestep.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
Threads = Annotated[int, typer.Option("--threads", help="Engine threads; 0 lets the engine choose.")]
class Rng(str, Enum):
    """Sources of noise."""

    philox = "philox"
    torch_cpu = "torch-cpu"


Engine = Annotated[str, typer.Option("--engine", help="Backend that runs the graphs.")]


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a comma-separated list of numbers", param_hint=option) from error


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(help="Pipeline directory, or denoiser directory with --scheduler.")],
    out: Out,
    scheduler: Annotated[Path | None, typer.Option(help="Scheduler directory.")] = None,
    dtype: Annotated[str, typer.Option(help="int8, or float32 for a float bundle.")] = "int8",
    groups: Annotated[str, typer.Option(help="auto, single, uniform:G or optimal:G.")] = "auto",
    range_method: Annotated[str, typer.Option(help="How activation ranges are clipped.")] = "",
    guidance: Annotated[str, typer.Option(help="Guidance scales to calibrate on, comma-separated.")] = "",
    steps: Annotated[str, typer.Option(help="Step counts to calibrate on, comma-separated.")] = "",
    samples: Annotated[int, typer.Option(help="Calibration samples in all.")] = 0,
    keep: Annotated[list[str] | None, typer.Option(help="Module-path pattern to keep in float; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="The same as --keep.")] = None,
    activation_bits: Annotated[int, typer.Option(help="8, or fewer (simulated).")] = 8,
    weight_method: Annotated[str, typer.Option(help="gptq, mse or minmax rounding of weights.")] = "gptq",
    max_steps: Annotated[int, typer.Option(help="Programs for 1 to this many steps go into the bundle.")] = 100,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to follow instead of the default plan.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration noise.")] = 0,
    reference: Annotated[bool, typer.Option(help="Write the float twin beside the bundle.")] = True,
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compile MODEL to a quantized bundle."""
    from quantempo.pipeline import compile_model
    from quantempo.recipe import Recipe

    chosen: dict[str, object] = {
        "precision": dtype, "groups": groups, "keep": tuple(keep or ()), "exclude": tuple(exclude or ()),
        "activation_bits": activation_bits, "seed": seed, "reference": reference, "threads": threads,
        "weight_method": weight_method, "max_steps": max_steps,
    }
    if range_method:
        chosen["range_method"] = range_method
    if guidance:
        chosen["guidance"] = _numbers(guidance, "--guidance")
    if steps:
        counts = _numbers(steps, "--steps")
        if any(count != int(count) for count in counts):
            raise typer.BadParameter(f"{steps!r} holds a step count that is not a whole number", param_hint="--steps")
        chosen["steps"] = tuple(int(count) for count in counts)
    if samples:
        chosen["samples"] = samples
    summary = compile_model(
        model, out, Recipe(**chosen),  # type: ignore[arg-type]  # Recipe checks its values
        scheduler=scheduler, plan_file=plan, overwrite=overwrite, progress=_progress(),
    )
    typer.echo(summary.text())


@app.command()
def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    out: Out,
    label: Annotated[list[str] | None, typer.Option("--class", help="Class label or name; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same picture.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 takes the bundle's default.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    count: Annotated[int, typer.Option(help="Images per class.")] = 1,
    rng: Annotated[Rng, typer.Option(help="philox, or torch-cpu for the noise that diffusers draws.")] = Rng.philox,
    scheduler: Annotated[Path | None, typer.Option(help="Another scheduler (needs the compile extra).")] = None,
    engine: Engine = "ort",
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Generate images from a bundle and write them as one grid."""
    import quantempo
    from quantempo.runtime.images import grid

    _refuse_existing(out, overwrite)
    session = quantempo.load(bundle, engine=engine, threads=threads)
    names = [_label(name) for name in label or [] for _ in range(count)]
    program = _traced(scheduler, steps or session.manifest.programs.default_steps) if scheduler else None
    result = session(
        class_labels=names or None, batch_size=None if names else count, seed=seed, rng=rng.value, program=program,
        num_inference_steps=None if program else steps or None, guidance_scale=guidance,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(list(result.images), columns=count if len(names) > count else 0).save(out)
    typer.echo(f"wrote {out}: {len(result.images)} images, {result.timings.total:.2f} s")


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Verify a bundle and show what is in it."""
    import json

    from quantempo.inspection import describe, render

    facts = describe(bundle)
    typer.echo(json.dumps(facts, indent=2, sort_keys=True) if as_json else render(facts))


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, compiled with its float reference.")],
    samples: Annotated[int, typer.Option(help="Held-out seeds for same-seed fidelity.")] = 64,
    population: Annotated[int, typer.Option(help="Images for accuracy and Fréchet distance; 0 leaves them out.")] = 0,
    guidance: Annotated[str, typer.Option(help="Guidance scales, comma-separated; the first is the headline.")] = "1.5",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    judge: Annotated[Path | None, typer.Option(help="ONNX classifier for accuracy and Fréchet distance.")] = None,
    threads: Threads = 0,
) -> None:
    """Measure quality, size and speed against the float reference; write BUNDLE/report/."""
    from quantempo.report import ReportOptions, write_report

    options = ReportOptions(samples, population, _numbers(guidance, "--guidance"), steps, judge=judge, threads=threads)
    typer.echo(write_report(bundle, options, progress=_progress()).text())


@app.command()
def demo(out: Out = Path("quantempo-demo"), overwrite: Overwrite = False, threads: Threads = 0) -> None:
    """Compile the trained model in the box to INT8, sample it and report: a few minutes on two cores."""
    from quantempo.demo import run_demo

    typer.echo(run_demo(out, overwrite=overwrite, threads=threads, progress=_progress()))


def _label(word: str) -> int | str:
    """A class label as typed: a number is a number, anything else a name."""
    return int(word) if word.removeprefix("-").isdecimal() else word


def _traced(scheduler: Path, steps: int) -> StepProgram:
    from quantempo.pipeline import trace_scheduler

    return trace_scheduler(scheduler, steps)


def _progress() -> Progress:
    from quantempo.progress import console_progress

    return console_progress()


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise OutputExists(
            f"output {out}", found="an existing file", wanted="a free path", cause="an earlier run wrote it",
            remedy="choose another path or pass --overwrite",
        )


def main() -> None:
    """Run the command line; our errors end it with code 1 and their words on standard error."""
    try:
        app(prog_name="quantempo")
    except QuantempoError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
