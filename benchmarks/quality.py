"""Fidelity of the demo models: groups against the best single scale, float as the reference.

    python benchmarks/quality.py --json docs/quality.json
    python benchmarks/quality.py --samples 20 --population 0          # a quick look

Compiles the demo DiT and the demo UNet, then measures same-seed PSNR on held-out seeds at several guidance scales,
step counts and schedulers, all from one calibration, and accuracy and Fréchet distance over a large population.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantempo.contracts.program import StepProgram
from quantempo.demo import DEMO_RECIPE, JUDGE, MODEL
from quantempo.pipeline import compile_model
from quantempo.progress import console_progress
from quantempo.recipe import Recipe
from quantempo.report.measure import (
    Fidelity,
    ReportOptions,
    Sampler,
    measure_populations,
    open_judge,
    open_subject,
    session_with_table,
    sessions,
    single_scale_tables,
)
from quantempo.runtime.session import Session

ROOT = Path(__file__).resolve().parent.parent
UNET = ROOT / "tests" / "models" / "unet"
UNET_RECIPE = Recipe(range_method="percentile")
"""Its activations have long tails: min-max, best on the DiT, loses to a single clipped scale at guidance 4 here."""
SOURCES = {"dit": (MODEL, None, DEMO_RECIPE), "unet": (UNET / "unet", UNET / "scheduler", UNET_RECIPE)}
"""Model, scheduler folder where it is not the model's own, recipe."""


FIRST_SEED = 10_000
"""Of the held-out seeds: no recipe was chosen on these, and calibration draws from 1 000 000 up."""


@dataclass(frozen=True)
class Case:
    """One way to sample; the headline cases get the full number of seeds."""

    name: str
    guidance: float
    steps: int = 20
    scheduler: str = ""

    def samples(self, args: argparse.Namespace) -> int:
        """How many seeds."""
        headline = self.steps == 20 and not self.scheduler
        return int(args.samples if headline else min(args.samples, args.other_samples))

    def program(self, session: Session) -> StepProgram | None:
        """The program of another scheduler; `None` for the bundle's own."""
        if not self.scheduler:
            return None
        import diffusers

        from quantempo.export.sampler import trace_program

        config = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
        stock = getattr(diffusers, self.scheduler).from_config(config)
        return trace_program(stock, self.steps)


CASES = (
    Case("DDIM 20 steps, guidance 1.5", 1.5),
    Case("DDIM 20 steps, guidance 4", 4.0),
    Case("DDIM 10 steps, guidance 1.5", 1.5, 10),
    Case("DDIM 50 steps, guidance 1.5", 1.5, 50),
    Case("DDIM 10 steps, guidance 4", 4.0, 10),
    Case("DDIM 50 steps, guidance 4", 4.0, 50),
    Case("DPM-Solver++ 2M 20 steps, guidance 1.5", 1.5, 20, "DPMSolverMultistepScheduler"),
    Case("DPM-Solver++ 2M 20 steps, guidance 4", 4.0, 20, "DPMSolverMultistepScheduler"),
)


def measure(bundle: Path, plain: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one bundle.

    Args:
        bundle: with groups.
        plain: the same model compiled without centred channels; single scales are measured on both, since one centre
            for all timesteps helps some of them and hurts others.
        args: of the command line.
    """
    subject = open_subject(bundle)
    base = ReportOptions(samples=args.samples, population=args.population, threads=args.threads)
    partition = subject.bundle.manifest.partition
    assert partition is not None
    facts: dict[str, Any] = {"groups": partition.groups}

    def images(session: Session, case: Case) -> Any:
        options = ReportOptions(steps=case.steps, threads=args.threads)
        return Sampler(session, options, case.program(session)).images(
            case.samples(args), case.guidance, first_seed=FIRST_SEED
        )

    with sessions(subject, base) as (quantized, floating):
        reference = {case.name: images(floating, case) for case in CASES}
        rows: dict[str, dict[str, Any]] = {
            case.name: {
                "groups": asdict(Fidelity.of(images(quantized, case), reference[case.name])),
                "single": {},
                "samples": case.samples(args),
            }
            for case in CASES
        }
        if args.population:
            judge = open_judge(JUDGE)
            facts["population"] = asdict(measure_populations(quantized, floating, judge, base))
    for rival, note in ((subject, ", centred"), (open_subject(plain), "")):
        for method, table in single_scale_tables(rival).items():
            with session_with_table(rival, table, base) as session:
                for case in CASES:
                    found = Fidelity.of(images(session, case), reference[case.name])
                    rows[case.name]["single"][method + note] = asdict(found)
            print(f"  single scale, {method}{note}: done", flush=True)
    for row in rows.values():
        best = max(row["single"], key=lambda m: row["single"][m]["psnr_db"])
        row["best_single"] = {"method": best, "psnr_db": row["single"][best]["psnr_db"]}
        row["gain_db"] = row["groups"]["psnr_db"] - row["best_single"]["psnr_db"]
    return {**facts, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="held-out seeds")
    parser.add_argument("--other-samples", type=int, default=50, help="seeds of the other step counts and schedulers")
    parser.add_argument("--population", type=int, default=1000, help="images for accuracy and Fréchet distance")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=["dit", "unet"], default=["dit", "unet"])
    parser.add_argument("--json", type=Path, help="written after each model; the other model's figures stay")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        for name in args.models:
            model, scheduler, recipe = SOURCES[name]
            bundle = Path(folder) / name
            summary = compile_model(model, bundle, recipe, scheduler=scheduler, progress=console_progress())
            print(summary.text(), flush=True)
            plain = Path(folder) / f"{name}-plain"
            compile_model(model, plain, dataclasses.replace(recipe, centre=False), scheduler=scheduler)
            results[name] = measure(bundle, plain, args)
            results[name]["command"] = (
                f"python benchmarks/quality.py --models {name} --samples {args.samples} --other-samples "
                f"{args.other_samples} --population {args.population} --json docs/quality.json"
            )
            for case, row in results[name]["cases"].items():
                best = row["best_single"]
                print(f"{name:5s} {case:42s} groups {row['groups']['psnr_db']:6.2f} dB   best single "
                      f"{best['psnr_db']:6.2f} dB ({best['method']})   {row['gain_db']:+.2f}")
            if "population" in results[name]:
                print(f"{name:5s} {results[name]['population']}")
            if args.json:
                args.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
