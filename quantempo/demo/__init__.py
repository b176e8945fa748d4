"""The trained model in the box, and the job that shows what quantempo does with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quantempo.progress import Progress, SilentProgress
from quantempo.recipe import Recipe

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "dit"
"""A class-conditional DiT on 8×8 digits enlarged to 32×32; stock diffusers loads it as a `DiTPipeline`."""
JUDGE = FOLDER / "judge.onnx"
"""A digit classifier; see `quantempo.quality.Judge`."""
DEMO_RECIPE = Recipe(
    # Quantized one block at a time, blocks 0 and 4 cost most; in both, a few channels of the normalized input vary much
    # more than the rest at every timestep, so no scale suits them all (docs/calibration.md).
    keep=(
        "transformer_blocks.[04].ff.net.0.proj",
        "transformer_blocks.4.attn1.to_[qkv]",
    ),
)


def run_demo(out: Path, overwrite: bool = False, threads: int = 0, progress: Progress | None = None) -> str:
    """Compile the demo model to INT8 in `out`, sample it and report.

    Returns:
        What to show the user.

    Raises:
        OutputExists: `out` is taken.
    """
    import quantempo
    from quantempo.pipeline import compile_model
    from quantempo.report import ReportOptions, write_report
    from quantempo.runtime.images import grid

    progress = progress or SilentProgress()
    recipe = dataclasses.replace(DEMO_RECIPE, threads=threads)
    summary = compile_model(MODEL, out, recipe, overwrite=overwrite, progress=progress)
    with progress.stage("sample"), quantempo.load(out, threads=threads) as session:
        digits = [digit for digit in range(10) for _ in range(8)]
        images = session(class_labels=digits, seed=0, num_inference_steps=20, guidance_scale=1.5).images
    report = write_report(
        out,
        ReportOptions(samples=50, population=200, guidance=(1.5, 4.0), judge=JUDGE, threads=threads, worst=5),
        progress=progress,
    )
    grid(list(images), columns=8).save(out / "report" / "samples.png")
    return "\n".join([summary.text(), "", report.text(), f"pictures: {out / 'report' / 'samples.png'}"])
