"""Fidelity of the demo models in FP8 (E4M3), simulated: what a device's numbers will be, and nothing about its speed.

    python benchmarks/fp8_quality.py --json docs/fp8.json
    python benchmarks/fp8_quality.py --models dit --seeds 20 --calibration 64

Compiles both models with `precision="fp8"`, attention quantized and in float, and measures same-seed PSNR against the
float model at guidance 1.5 and 4 with 20 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantempo.demo import DEMO_RECIPE, MODEL
from quantempo.engines.simulation import SimulatedNotice
from quantempo.pipeline import compile_model
from quantempo.progress import console_progress
from quantempo.recipe import Recipe
from quantempo.report.measure import Fidelity, ReportOptions, Sampler, open_subject, sessions

UNET = Path(__file__).resolve().parent.parent / "tests" / "models" / "unet"
MODELS = {"dit": (MODEL, None, DEMO_RECIPE), "unet": (UNET / "unet", UNET / "scheduler", Recipe())}
BARS_DB = {1.5: 40.0, 4.0: 32.0}


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one model."""
    model, scheduler, recipe = MODELS[name]
    options = ReportOptions(steps=20, threads=args.threads)
    found: dict[str, Any] = {"seeds": args.seeds, "calibration_samples": args.calibration, "simulated": "FP8 (E4M3)"}
    for attention in ("quantized", "float"):
        chosen = replace(
            recipe, precision="fp8", attention=attention, samples=args.calibration, threads=args.threads, max_steps=50
        )
        out = folder / f"{name}-{attention}"
        summary = compile_model(
            model, out, chosen, scheduler=scheduler, work=args.work, progress=console_progress()
        )
        print(summary.text())
        rows = {}
        with sessions(open_subject(out), options) as (quantized, floating):
            for guidance, bar in BARS_DB.items():
                images = [Sampler(session, options).images(args.seeds, guidance) for session in (quantized, floating)]
                rows[f"{guidance:g}"] = {**asdict(Fidelity.of(*images)), "bar_db": bar}
                print(f"{name:5s} FP8 simulated, attention {attention:9s} guidance {guidance:<4g} "
                      f"{rows[f'{guidance:g}']['psnr_db']:6.2f} dB (bar {bar:g})", flush=True)  # fmt: skip
        found[f"attention_{attention}"] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="held-out seeds")
    parser.add_argument("--calibration", type=int, default=256, help="calibration samples")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--work", type=Path, help="folder for results of stages that another run reuses")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", SimulatedNotice)  # the output says so in every line
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        for name in args.models:
            results[name] = measure(name, args, Path(folder))
            results[name]["command"] = (
                f"python benchmarks/fp8_quality.py --models {name} --seeds {args.seeds} "
                f"--calibration {args.calibration} --json docs/fp8.json"
            )
            if args.json:
                args.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
