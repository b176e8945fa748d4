"""`quantempo compile`, `plan` and `stages`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantempo.progress import Progress
    from quantempo.recipe import Recipe


class Log(str, Enum):
    """How progress is written."""

    text = "text"
    json = "json"


Model = Annotated[Path, typer.Argument(help="Pipeline directory, or denoiser directory with --scheduler.")]
Scheduler = Annotated[Path | None, typer.Option(help="Scheduler directory.")]
RecipeFiles = Annotated[
    list[Path] | None, typer.Option("--recipe", help="YAML or JSON; repeatable, later files and flags win.")
]
Dtype = Annotated[str | None, typer.Option(help="int8, fp8 (simulated on a CPU), or float32 for a float bundle.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Device to hold graphs for, see `quantempo targets`; repeatable.")
]
Graphs = Annotated[list[str] | None, typer.Option("--graph", help="Further graph, e.g. portable-bf16; repeatable.")]
Attention = Annotated[str | None, typer.Option(help="auto, float or quantized products inside attention.")]
Groups = Annotated[str | None, typer.Option(help="auto, single, uniform:G or optimal:G.")]
RangeMethod = Annotated[str | None, typer.Option(help="How activation ranges are clipped.")]
Guidance = Annotated[str | None, typer.Option(help="Guidance scales to calibrate on: 1.5,4 or 1.5..7.")]
Steps = Annotated[str | None, typer.Option(help="Step counts to calibrate on, comma-separated.")]
Samples = Annotated[int | None, typer.Option(help="Calibration samples in all.")]
Batch = Annotated[int | None, typer.Option(help="Calibration samples that run together.")]
Size = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH, FRAMESxHEIGHTxWIDTH or a preset, for models of any resolution.")
]
Tokens = Annotated[int | None, typer.Option(help="Prompt length; 0 for the model's usual one.")]
ControlNets = Annotated[list[Path] | None, typer.Option("--controlnet", help="ControlNet directory; repeatable.")]
Adapters = Annotated[list[Path] | None, typer.Option("--ip-adapter", help="IP-Adapter safetensors file; repeatable.")]
Inputs = Annotated[
    Path | None, typer.Option(help="Example call (.npz), where a denoiser's inputs do not follow from its signature.")
]
Code = Annotated[Path | None, typer.Option(help="Python file with the denoiser's class, where it is not diffusers'.")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calib-set", help="Conditioning arrays (.npz), or labels (.txt, .json).")
]
CalibrationScheduler = Annotated[
    list[str] | None, typer.Option("--calib-scheduler", help="Another scheduler to calibrate with; repeatable.")
]
Selection = Annotated[str | None, typer.Option(help="Calls to look at: all, uniform:F, normal:F or density:F.")]
HardCases = Annotated[int | None, typer.Option(help="Samples of a second round, like those that are quantized worst.")]
Cache = Annotated[
    str | None, typer.Option(help="Feature caching: none, auto, every:N, programmed:N, … (docs/caching.md).")
]
CacheCut = Annotated[
    str | None, typer.Option(help="Where caching cuts: sublayers:FIRST-LAST, delta:FIRST-LAST or branch:INDEX.")
]
CacheMinPsnr = Annotated[float | None, typer.Option(help="Budget of --cache auto: dB to float with as many steps.")]
MaxTime = Annotated[
    float | None, typer.Option(help="Budget of --cache auto: milliseconds of a guided run of one sample.")
]
CacheSteps = Annotated[
    str | None, typer.Option(help="Step counts with cached programs, comma-separated; default: --steps.")
]
Keep = Annotated[list[str] | None, typer.Option(help="Module-path pattern to keep in float; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="The same as --keep.")]
Bits = Annotated[int | None, typer.Option(help="8, or fewer (simulated).")]
WeightMethod = Annotated[str | None, typer.Option(help="gptq, mse or minmax rounding of weights.")]
MaxSteps = Annotated[int | None, typer.Option(help="Programs for 1 to this many steps go into the bundle.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the calibration noise.")]
Classes = Annotated[list[int] | None, typer.Option("--class", help="Class label to calibrate on; repeatable.")]
Centre = Annotated[bool | None, typer.Option(help="Shift channels per group where that is free.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="A rule as in a recipe, e.g. '{match: \"*.ff.*\", activation_bits: 6}'; repeatable."),
]
DefaultGuidance = Annotated[float | None, typer.Option(help="Guidance of the bundle when a caller does not say.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Engine threads; 0 lets the engine choose.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder for results of stages, which later compiles reuse; default: user cache.")
]
Guard = Annotated[
    str | None, typer.Option(help="Latency guard: off, record (default), or revert what loses to float.")
]
MinPsnr = Annotated[
    float | None, typer.Option(help="PSNR to float in dB to reach; a bundle below it goes to OUT.rejected.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
LogFormat = Annotated[Log, typer.Option("--log", help="Progress as text or as JSON lines, on standard error.")]


def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundle goes.")],
    scheduler: Scheduler = None,
    recipe: RecipeFiles = None,
    dtype: Dtype = None,
    target: Targets = None,
    graph: Graphs = None,
    attention: Attention = None,
    groups: Groups = None,
    range_method: RangeMethod = None,
    guidance: Guidance = None,
    steps: Steps = None,
    samples: Samples = None,
    batch: Batch = None,
    size: Size = None,
    tokens: Tokens = None,
    controlnet: ControlNets = None,
    ip_adapter: Adapters = None,
    inputs: Inputs = None,
    code: Code = None,
    calib_set: CalibrationFile = None,
    calib_scheduler: CalibrationScheduler = None,
    class_: Classes = None,
    selection: Selection = None,
    hard_cases: HardCases = None,
    cache: Cache = None,
    cache_cut: CacheCut = None,
    cache_steps: CacheSteps = None,
    cache_min_psnr: CacheMinPsnr = None,
    max_time: MaxTime = None,
    rule: Rules = None,
    keep: Keep = None,
    exclude: Exclude = None,
    centre: Centre = None,
    activation_bits: Bits = None,
    weight_method: WeightMethod = None,
    max_steps: MaxSteps = None,
    default_guidance: DefaultGuidance = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to follow instead of the default plan.")] = None,
    seed: Seed = None,
    reference: Annotated[bool | None, typer.Option(help="Write the float twin beside the bundle.")] = None,
    threads: Threads = None,
    work: Work = None,
    guard: Guard = None,
    min_psnr: MinPsnr = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    quiet: Quiet = False,
    log: LogFormat = Log.text,
) -> None:
    """Compile MODEL to a quantized bundle."""
    from quantempo.pipeline import compile_model
    chosen = _recipe(
        recipe, precision=dtype, targets=target, graphs=graph, attention=attention, groups=groups, code=code,
        range_method=range_method, guidance=_guidance(guidance), steps=_steps(steps), samples=samples, batch=batch,
        calibration=calib_set, schedulers=calib_scheduler, selection=selection, hard_cases=hard_cases, keep=keep,
        exclude=exclude, activation_bits=activation_bits, weight_method=weight_method, cache=cache, cache_cut=cache_cut,
        cache_steps=_steps(cache_steps, "--cache-steps"), cache_min_psnr=cache_min_psnr, cache_max_ms=max_time,
        max_steps=max_steps, reference=reference, seed=seed, threads=threads, size=size, tokens=tokens, rules=rule,
        classes=class_, centre=centre, default_guidance=default_guidance, controlnets=controlnet,
        ip_adapters=ip_adapter, inputs=inputs)  # fmt: skip
    try:
        summary = compile_model(
            model, out, chosen, scheduler=scheduler, plan_file=plan, work=work, guard=guard, min_psnr=min_psnr,
            overwrite=overwrite, progress=_progress(quiet, log),
        )
    except KeyboardInterrupt as stop:
        typer.echo("interrupted; the same command goes on where it stopped", err=True)
        raise typer.Exit(1) from stop
    typer.echo(summary.text())


def plan_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes.")] = Path("plan.json"),
    scheduler: Scheduler = None,
    recipe: RecipeFiles = None,
    guidance: Guidance = None,
    steps: Steps = None,
    samples: Samples = None,
    batch: Batch = None,
    size: Size = None,
    tokens: Tokens = None,
    controlnet: ControlNets = None,
    ip_adapter: Adapters = None,
    inputs: Inputs = None,
    code: Code = None,
    calib_set: CalibrationFile = None,
    rule: Rules = None,
    keep: Keep = None,
    exclude: Exclude = None,
    centre: Centre = None,
    activation_bits: Bits = None,
    weight_method: WeightMethod = None,
    max_steps: MaxSteps = None,
    threads: Threads = None,
    work: Work = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
    quiet: Quiet = False,
    log: LogFormat = Log.text,
) -> None:
    """Write what a compile of MODEL would quantize and cost; edit it, then `compile --plan`."""
    from quantempo.planning import write_plan

    chosen = _recipe(
        recipe, guidance=_guidance(guidance), steps=_steps(steps), samples=samples, batch=batch,
        calibration=calib_set, rules=rule, keep=keep, exclude=exclude, centre=centre, activation_bits=activation_bits,
        weight_method=weight_method, max_steps=max_steps, threads=threads, size=size, tokens=tokens,
        controlnets=controlnet, ip_adapters=ip_adapter, inputs=inputs, code=code,
    )
    made = write_plan(
        model, out, chosen, scheduler=scheduler, work=work, overwrite=overwrite, progress=_progress(quiet, log)
    )
    typer.echo(made.text())


def stages_command(
    work: Work = None,
    keep: Annotated[float | None, typer.Option(help="Remove the oldest until this many gigabytes are left.")] = None,
) -> None:
    """List results of stages that later compiles reuse; with --keep remove what was not used for longest."""
    from quantempo.stages.listing import list_stages

    typer.echo(list_stages(work, keep))


def _recipe(files: list[Path] | None, **given: Any) -> Recipe:
    """The recipe of files and flags; a flag that was not given is `None`, or an empty list where it is repeatable."""
    from quantempo.recipe_file import read_recipe, read_rule

    flags = {
        name: tuple(map(_plain, value)) if isinstance(value, list) else _plain(value)
        for name, value in given.items()
        if value is not None and value != []
    }
    if "rules" in flags:
        flags["rules"] = tuple(read_rule(text, "--rule") for text in flags["rules"])
    return read_recipe(files or [], flags)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _guidance(text: str | None) -> tuple[float, ...] | None:
    from quantempo.calib.trajectories import guidance_range

    return None if text is None else guidance_range(text)


def _steps(text: str | None, flag: str = "--steps") -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a comma-separated list of whole numbers", param_hint=flag) from error


def _progress(quiet: bool, log: Log) -> Progress:
    from quantempo.progress import console_progress

    return console_progress(quiet, "json" if log is Log.json else "text")
