"""The command line: `quantempo demo | compile | sample | inspect | report`.

Exit codes: 0 done, 1 one of our errors (its five parts on standard error), 2 wrong usage.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantempo.commands import register
from quantempo.commands.compile import compile_command, plan_command, stages_command
from quantempo.errors import OutputExists, QuantempoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from quantempo.contracts.manifest import Denoiser
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


Inputs = Annotated[
    Path | None, typer.Option(help="Conditioning arrays (.npz), as for --calib-set; negative_NAME with guidance.")
]
Engine = Annotated[str, typer.Option("--engine", help="Backend that runs the graphs; auto measures and remembers.")]


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a comma-separated list of numbers", param_hint=option) from error


@app.command()
def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    out: Out,
    label: Annotated[list[str] | None, typer.Option("--class", help="Class label or name; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same picture.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 takes the bundle's default.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    inputs: Inputs = None,
    count: Annotated[int, typer.Option(help="Images per class, or per row of --inputs.")] = 1,
    rng: Annotated[Rng, typer.Option(help="philox, or torch-cpu for the noise that diffusers draws.")] = Rng.philox,
    scheduler: Annotated[Path | None, typer.Option(help="Another scheduler (needs the compile extra).")] = None,
    cache: Annotated[str, typer.Option(help="Feature caching: auto, none, or plan to refuse without one.")] = "auto",
    engine: Engine = "ort",
    engine_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the engine, e.g. precision=bf16; repeatable.")
    ] = None,
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Generate images from a bundle and write them as one grid, or latents to a .npy file."""
    import numpy as np

    import quantempo
    from quantempo.runtime.images import grid, save

    _refuse_existing(out, overwrite)
    latent = out.suffix == ".npy"
    settings = _settings(engine_option or [])
    session = quantempo.load(bundle, engine=engine, threads=threads, feature_cache=cache, settings=settings)
    names = [_label(name) for name in label or [] for _ in range(count)]
    arrays: dict[str, Any] = {name: np.repeat(rows, count, axis=0) for name, rows in _arrays(inputs).items()}
    _check_conditioning(session.manifest.denoiser, names, arrays)
    program = _traced(scheduler, steps or session.manifest.programs.default_steps) if scheduler else None
    result = session(
        class_labels=names or None, batch_size=None if names or arrays else count, seed=seed, rng=rng.value,
        program=program,
        num_inference_steps=None if program else steps or None, guidance_scale=guidance,
        output_type="latent" if latent else "pil", **arrays,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if latent:
        np.save(out, np.asarray(result.images))
    else:
        save(grid(list(result.images), columns=count if len(names) > count else 0), out)
    timings = result.timings
    reused = f", {timings.reused / timings.rows:.0%} of the evaluations reused features" if timings.reused else ""
    what = "samples" if latent else "images"
    typer.echo(f"wrote {out}: {len(result.images)} {what}, {timings.total:.2f} s{reused}")


def _check_conditioning(denoiser: Denoiser, labels: Sequence[object], arrays: Mapping[str, Any]) -> None:
    """Refuse a missing condition in the words of the command line."""
    shapes = {spec.name: f"{spec.dtype} (samples, {', '.join(map(str, spec.shape))})" for spec in denoiser.arrays}
    missing = [name for name in shapes if name not in arrays]
    if missing:
        raise RequestError(
            f"sample, {', '.join(missing)}", found="no array", wanted=", ".join(shapes[name] for name in missing),
            cause="the model is conditioned on it",
            remedy=f"write numpy.savez(FILE, {', '.join(f'{name}=…' for name in missing)}) and pass --inputs FILE",
        )
    for spec in denoiser.classes:
        if not labels:
            raise RequestError(
                "sample, class", found="no label", wanted=f"0 to {spec.count - 1}, or a name",
                cause="the model is conditioned on classes", remedy="add --class 0, repeatable",
            )


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
    worst: Annotated[int, typer.Option(help="For how many tensors to measure what float would buy; 0 for none.")] = 10,
    min_psnr: Annotated[float | None, typer.Option(help="PSNR in dB to reach; below it the exit code is 1.")] = None,
    inputs: Inputs = None,
    engine: Engine = "ort",
    threads: Threads = 0,
) -> None:
    """Measure quality, size and speed against the float reference; write BUNDLE/report/ with a page and pictures."""
    from quantempo.report import ReportOptions, write_report

    options = ReportOptions(
        samples, population, _numbers(guidance, "--guidance"), steps, judge=judge, threads=threads, worst=worst,
        min_psnr_db=min_psnr, engine=engine, arrays=_arrays(inputs),
    )
    written = write_report(bundle, options, progress=_progress())
    typer.echo(written.text())
    written.check()


@app.command()
def demo(out: Out = Path("quantempo-demo"), overwrite: Overwrite = False, threads: Threads = 0) -> None:
    """Compile the trained model in the box to INT8, sample it and report: a few minutes on two cores."""
    from quantempo.demo import run_demo

    typer.echo(run_demo(out, overwrite=overwrite, threads=threads, progress=_progress()))


register(app)


app.command("compile")(compile_command)
app.command("plan")(plan_command)
app.command("stages")(stages_command)


def _arrays(path: Path | None) -> Mapping[str, NDArray[Any]]:
    from quantempo.stages.conditioning import read_arrays

    return {} if path is None else read_arrays(path, "inputs")


def _settings(pairs: list[str]) -> dict[str, str]:
    """`NAME=VALUE`, as typed."""
    for pair in pairs:
        if not pair.partition("=")[1] or not pair.partition("=")[0]:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--engine-option")
    return dict(pair.split("=", 1) for pair in pairs)


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
