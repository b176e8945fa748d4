"""Feature caching on the demo models: the naive stack, with a programmed schedule, and with corrections.

    python benchmarks/caching.py --model dit --work WORK --json docs/caching.json
    python benchmarks/caching.py --model unet --work WORK --json docs/caching.json
    python benchmarks/caching.py --model dit --part times --work WORK --json docs/caching.json       # then
    python benchmarks/caching.py --model dit --part equal-time --work WORK --json docs/caching.json

Every variant runs the same held-out seeds, whose final latents are compared with those of the float model at the same
number of steps.  Cases that the JSON file holds already are left out, and of the others what the folder WORK holds, so
an interrupted run goes on where it stopped.

The rows are nested.  *naive* is INT8 with groups and reuse at every N-th call, nothing else: one scale table and no
corrections.  *programmed* has the schedule that is best without corrections instead.  *corrected* has that schedule,
scales of its own for reusing calls, and all corrections that the guard keeps.  *full* is what
`compile --cache programmed:N` makes: the same, with the schedule that is best with corrections.  Further rows on
demand: *dps* is CacheQuant's schedule, without corrections; *even* has the corrections on the even schedule; *shared*
and *apart* are *full* with the model's own scales everywhere, and with scales of their own for refreshing calls too;
*uncached* is INT8.

`equal-time` compares the 50-step rows with the float model at as many steps as fit in the same time, at batch 32; `tap`
compares calibration samples chosen from cached trajectories with uniform draws; `dynamic` runs the policies that decide
at run time; `noise` has a sampler that adds noise of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from caching_noise import noise_effect
from caching_results import Latents, compare, read, write
from caching_tap import tap_effect
from numpy.typing import NDArray
from quality import FIRST_SEED, SOURCES

from quantempo.calib.cache.history import HistoryCorrection, correct_by_history
from quantempo.calib.cache.noise_floor import judge
from quantempo.calib.cache.program_rows import LATENTS_VECTORS, PREDICTION_VECTORS, correct_every_call
from quantempo.calib.cache.schedules import Schedule, every
from quantempo.calib.trajectories import TrajectoryBatch
from quantempo.contracts.cache import FULL, Cut, reuse_name
from quantempo.contracts.codec import canonical_json, digest
from quantempo.contracts.program import LATENTS, PREDICTION, StepProgram
from quantempo.export.variants import consumed
from quantempo.pipeline import open_parts
from quantempo.progress import console_progress
from quantempo.quality import psnr_db
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_corrections import fit_corrections
from quantempo.stages.cache_images import decoder_of
from quantempo.stages.cache_runs import (
    CacheParts,
    CacheSettings,
    VariantBench,
    fitted_corrections,
    fitting_batches,
    graph_corrections,
)
from quantempo.stages.cache_schedules import ScheduleSearch, scheduled
from quantempo.stages.cache_stage import CHECKS, SAMPLES
from quantempo.stages.caching import variant_tables
from quantempo.stages.conditioning import deal_labels
from quantempo.stages.dynamic_caching import fit_dynamic
from quantempo.stages.store import open_store

ROWS = ("naive", "programmed", "corrected", "full")
MORE_ROWS = ("dps", "even", "shared", "apart", "uncached")
CASES = ((20, 2), (20, 3), (50, 3), (50, 2), (50, 5))
LABELS = 256
"""As many as the demo recipes calibrate with, whatever `--calibration` says: held-out runs take the first of them."""


class Stopped(Exception):
    """The time is up."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model cut for caching, its bench, and what is compared."""

    name: str
    parts: CacheParts
    cut: Cut
    bench: VariantBench
    settings: CacheSettings
    samples: int
    batch: int
    folder: Path | None = None
    stop_after: float = math.inf
    kept: dict[int, ScheduleSearch] = field(default_factory=dict)

    def reference(self, program: StepProgram) -> Latents:
        """Final latents of the float model, computed once."""
        name = f"float-{program.steps}-{self.samples}.npy"
        return self.once(self.folder and self.folder / name, lambda: self.latents("float", program))

    def once(self, path: Path | None, make: Callable[[], Latents]) -> Latents:
        """What a file holds, or what is made and kept there."""
        if path is not None and path.exists():
            found: Latents = np.load(path)
            return found
        self.pause()
        found = make()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, found)
        return found

    def pause(self) -> None:
        """Go on with another part, unless the time is up."""
        if time.process_time() > self.stop_after:
            raise Stopped

    def schedules(self, program: StepProgram) -> ScheduleSearch:
        """The search for schedules of a number of steps."""
        if program.steps not in self.kept:
            self.kept[program.steps] = ScheduleSearch(self.bench, self.settings, program)
        return self.kept[program.steps]

    def batches(self, program: StepProgram) -> tuple[TrajectoryBatch, ...]:
        """The held-out trajectories."""
        denoiser = self.parts.manifest.denoiser
        held = replace(self.settings, samples=self.samples, batch=self.batch)
        found = fitting_batches(held, program.steps, denoiser.classes[0].count if denoiser.classes else None)
        start = FIRST_SEED - found[0].seeds[0]
        return tuple(replace(batch, seeds=tuple(seed + start for seed in batch.seeds)) for batch in found)

    def latents(self, mode: Any, program: StepProgram, vectors: Mapping[str, Any] | None = None) -> Latents:
        """Final latents of all held-out runs."""
        loop = self.bench.loop(mode, vectors or self.bench.identity_vectors(len(program.calls)))
        return np.concatenate([self.bench.run(loop, program, b).astype(np.float64) for b in self.batches(program)])

    def counted(self, program: StepProgram) -> tuple[Latents, float]:
        """Final latents of all held-out runs, and the share of their rows that reused."""
        loop = self.bench.loop("quantized", {})
        seen: Counter[str] = Counter()

        def watch(call: Observation, outputs: Any) -> None:
            seen[call.graph] += len(call.samples)

        found = [self.bench.run(loop, program, b, watch).astype(np.float64) for b in self.batches(program)]
        return np.concatenate(found), seen[reuse_name(0)] / (seen[reuse_name(0)] + seen[FULL])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SOURCES), required=True)
    parser.add_argument("--cut", default="", help="as compile --cache-cut")
    parser.add_argument("--samples", type=int, default=200, help="held-out seeds")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--calibration", type=int, help="trajectories that scales are from; default: the recipe's")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS",
                        help="of CPU time: stop after the part in work; the same command goes on there")
    parser.add_argument("--fit", type=int, default=SAMPLES, help="trajectories that corrections are fitted on")
    parser.add_argument("--checks", type=int, default=CHECKS, help="trajectories that the guard judges by")
    parser.add_argument("--cases", nargs="+", default=[f"{s}:{n}" for s, n in CASES], help="STEPS:N or STEPS:N:SAMPLES")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, *MORE_ROWS], help="variants")
    parser.add_argument("--rounds", type=int, default=3, help="of `times`")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 32, 64], help="samples that `tap` selects")
    parser.add_argument("--draws", type=int, default=200, help="selections of `tap`, of each size")
    parser.add_argument("--part", choices=["quality", *PARTS], default="quality")
    parser.add_argument("--work", type=Path, help="folder for results of stages")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        subject = open_subject(args, Path(folder))
        if args.part != "quality":
            PARTS[args.part](subject, args)
            note_command(args)
        else:
            with suppress(Stopped):
                for case in args.cases:
                    steps, interval, *samples = map(int, case.split(":"))
                    measure_case(replace(subject, samples=(samples or [args.samples])[0]), steps, interval, args)
        subject.bench.close()


def note_command(args: argparse.Namespace) -> None:
    """Keep what a part was measured with."""
    words = f"--model {args.model} --part {args.part} --samples {args.samples} --fit {args.fit} --checks {args.checks}"
    words += f" --calibration {args.calibration}" if args.calibration else ""
    words += f" --rounds {args.rounds}" if args.part == "times" else ""
    results = read(args.json)
    results["commands"] = sorted({*results.get("commands", ()), f"python benchmarks/caching.py {words}"})
    write(args.json, results)


def open_subject(args: argparse.Namespace, folder: Path) -> Subject:
    """The quantized model, from the store or calibrated."""
    model, scheduler, recipe = SOURCES[args.model]
    samples = args.calibration or recipe.samples
    recipe = dataclasses.replace(
        recipe, cache="every:2", cache_cut=args.cut, threads=1, samples=samples,
        batch=min(recipe.batch, samples // len(recipe.guidance)),
    )
    with open_store(args.work, console_progress()) as store:
        parts, graphs, keys = open_parts(store, Path(model), scheduler, recipe)
    corrections = fitted_corrections(graphs.cut, consumed(parts.exported.graph, graphs.cut))
    bench = VariantBench(parts, folder, {reuse_name(0): graphs.cut}, graph_corrections(corrections))
    settings = CacheSettings(
        "every:2", graphs.cut, corrections, samples=args.fit, checks=args.checks, batch=min(32, args.fit),
        labels=deal_labels(parts.manifest.denoiser, dataclasses.replace(parts.recipe, samples=LABELS)),
    )
    key = digest(canonical_json([keys, args.cut, args.fit, args.checks]))[:16]
    kept = args.work and args.work / "cases" / key
    return Subject(args.model, parts, graphs.cut, bench, settings, args.samples, args.batch, kept, args.stop_after)


def measure_case(subject: Subject, steps: int, interval: int, args: argparse.Namespace) -> None:
    """One number of steps and one interval: all variants that the file does not hold yet."""
    key = f"{subject.name} {steps} steps, N={interval}{f', {args.cut}' if args.cut else ''}"
    done = read(args.json).get("quality", {}).get(key, {})
    wanted = list(args.rows)
    if set(wanted) <= set(done.get("variants", {})) and done.get("samples") == subject.samples:
        return
    wanted += [name for name in done.get("variants", {}) if name not in wanted]
    settings, plain = subject.settings, subject.parts.exported.program(steps)
    reference = subject.reference(plain)
    case = Case(subject, plain, interval)
    made = {name: case.latents(name) for name in wanted}
    row = {
        "samples": subject.samples, "steps": steps, "interval": interval, "guidance": settings.guidance,
        "cut": subject.cut.kind, "guard": case.known["guard"], "kept": case.known["kept"],
        "fitted_on": settings.samples, "schedules": case.known["schedules"],
        **compare(decoder_of(subject.parts), made, reference),
        "command": f"python benchmarks/caching.py --model {args.model} --cases {steps}:{interval} --samples "
        f"{subject.samples} --fit {args.fit} --checks {args.checks}" + (f" --cut {args.cut}" if args.cut else "")
        + (f" --calibration {args.calibration}" if args.calibration else "")
        + (f" --rows {' '.join(wanted)}" if tuple(wanted) != ROWS else ""),
    }
    results = read(args.json)
    results.setdefault("quality", {})[key] = row
    write(args.json, results)
    print(key, {k: (round(v["psnr_db"], 2), v["final_latent_mse"]) for k, v in row["variants"].items()}, row["paired"],
          flush=True)


class Case:
    """What one case needs, each part kept in the work folder as soon as it is there.

    Args:
        subject: of which the case is.
        plain: the uncached program.
        interval: mean number of calls per refresh.
    """

    def __init__(self, subject: Subject, plain: StepProgram, interval: int) -> None:
        self.subject, self.plain, self.interval = subject, plain, interval
        self._folder = subject.folder and subject.folder / f"{plain.steps}-{interval}"
        self._file = self._folder and self._folder / "known.json"
        self.known: dict[str, Any] = {"guard": {}, "kept": {}, "schedules": {}, **read(self._file)}

    def schedule(self, name: str) -> Schedule:
        """A schedule: `even`, `dps`, or `plain` and `corrected`, the programmed ones without and with corrections."""
        if name not in self.known["schedules"]:
            self.subject.pause()
            search = self.subject.schedules(self.plain)
            policy = {"even": "every", "dps": "dps"}.get(name, "programmed")
            self.known["schedules"][name] = list(search.schedule(policy, self.interval, name == "corrected"))
            self._keep()
        return tuple(self.known["schedules"][name])

    def latents(self, name: str) -> Latents:
        """Final latents of a variant's held-out runs."""
        file = f"{name}-{self.subject.samples}.npy"
        return self.subject.once(self._folder and self._folder / file, lambda: self._run(name))

    def _run(self, name: str) -> Latents:
        subject, bench, plain = self.subject, self.subject.bench, self.plain
        if name == "uncached":
            bench.quantize(dict.fromkeys(bench.set.variants, subject.parts.table))
            return subject.latents("quantized", plain)
        which = {"naive": "even", "even": "even", "dps": "dps", "programmed": "plain", "corrected": "plain"}
        refreshes = self.schedule(which.get(name, "corrected"))
        subject.pause()
        cached = scheduled(bench, plain, refreshes)
        if name in ("naive", "programmed", "dps"):
            bench.quantize(dict.fromkeys(bench.set.variants, subject.parts.table))
            return subject.latents("quantized", cached)
        twins = {"corrected": "full", "full": "corrected"}
        if name in twins and self.schedule("plain") == self.schedule("corrected"):
            twin = self._folder and self._folder / f"{twins[name]}-{subject.samples}.npy"
            if twin is not None and twin.exists():
                for kind in ("guard", "kept"):
                    self.known[kind][name] = self.known[kind][twins[name]]
                self._keep()
                found: Latents = np.load(twin)
                return found
        floor = judge(refreshes, subject.schedules(plain).floor_facts(self.interval))
        scales: Any = {"shared": "shared", "apart": "apart"}.get(name, "reuse")
        settings = replace(subject.settings, scales=scales)
        bench.quantize(variant_tables(bench, settings, {plain.steps: cached}))
        fit = fit_corrections(bench, settings, plain, cached, refreshes, floor)
        self.known["guard"][name] = fit.report()["final_latent_mse"]
        self.known["kept"][name] = list(fit.kept)
        self._keep()
        return subject.latents("quantized", fit.program, fit.vectors)

    def _keep(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        write(self._file, self.known)


def times(subject: Subject, args: argparse.Namespace) -> None:
    """Milliseconds of whole runs of 32 guided samples at 50 steps: INT8 with reuse, INT8, and float.

    Reusing programs have the operations of their corrections: linear forms at reusing calls, gain and bias of every
    prediction, and in the graph what the guard kept in the 50-step rows.  The numbers in them do not matter.
    """
    plain = subject.parts.exported.program(50)
    batch = replace(subject, samples=32, batch=32).batches(plain)[0]
    quality = read(args.json)["quality"]
    kept = {name for n in (2, 3, 5) for name in quality.get(f"{subject.name} 50 steps, N={n}", {}).get("kept", {}).get(
        "full", ())}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        bench = VariantBench(subject.parts, Path(folder), {reuse_name(0): subject.cut}, graph_corrections(kept))
        bench.quantize_plainly()
        there, vectors = replace(subject, bench=bench), corrected_vectors(bench, 50)
        runs: dict[str, tuple[Any, StepProgram]] = {"float": ("float", plain), "int8": ("quantized", plain)}
        runs |= {f"N={n}": ("quantized", corrected_program(there, plain, every(50, n), kept)) for n in (2, 3, 5)}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, (mode, program) in runs.items():
                loop = bench.loop(mode, vectors)
                started = time.perf_counter()
                bench.run(loop, program, batch)
                if turn:
                    found[name].append(1e3 * (time.perf_counter() - started))
        bench.close()
    made = {name: statistics.median(values) for name, values in found.items()}
    results = read(args.json)
    results.setdefault("times", {})[subject.name] = {"batch": 32, "steps": 50, "ms": made, "corrections": sorted(kept)}
    write(args.json, results)
    print(made)


def corrected_program(subject: Subject, plain: StepProgram, refreshes: Schedule, kept: set[str]) -> StepProgram:
    """A program with all operations that corrections of its predictions add."""
    program = scheduled(subject.bench, plain, refreshes)
    calls = len(plain.calls)
    if "history" in kept:
        history = HistoryCorrection(np.tile([1.0, 0.1, -0.1, 0.01], (calls, 1)), np.ones(calls), np.ones(calls))
        sample = subject.parts.manifest.denoiser.sample_input
        program = correct_by_history(program, history, refreshes, sample)
    for name, register, rows in (("prediction", PREDICTION, PREDICTION_VECTORS), ("latents", LATENTS, LATENTS_VECTORS)):
        if name in kept:
            program = correct_every_call(program, register, rows)
    return program


def corrected_vectors(bench: VariantBench, calls: int) -> dict[str, NDArray[np.float32]]:
    """Gains of 1 and biases of 0 for everything that a program may correct."""
    channels = bench.parts.manifest.denoiser.latents_shape[0]
    found = bench.identity_vectors(calls)
    for gain, bias in (PREDICTION_VECTORS, LATENTS_VECTORS):
        found[gain], found[bias] = np.ones((calls, channels), np.float32), np.zeros((calls, channels), np.float32)
    return found


def equal_time(subject: Subject, args: argparse.Namespace) -> None:
    """The 50-step rows beside the float model with as many steps as fit in their time, rounded up."""
    results = read(args.json)
    ms = results["times"][subject.name]["ms"]
    plain = subject.parts.exported.program(50)
    decode = decoder_of(subject.parts)
    reference = decode(subject.reference(plain))
    rows = {}
    for interval in (2, 3, 5):
        row = results["quality"].get(f"{subject.name} 50 steps, N={interval}")
        if row is None or "full" not in row["variants"]:
            continue
        steps = math.ceil(50 * ms[f"N={interval}"] / ms["float"])
        images = decode(subject.reference(subject.parts.exported.program(steps)))
        rival = float(psnr_db(images, reference).mean())
        best = row["variants"]["full"]["psnr_db"]
        rows[f"N={interval}"] = {
            "float_steps": steps, "float_psnr_db": rival, "psnr_db": best, "gain_db": best - rival,
            "samples": subject.samples, "ms": ms[f"N={interval}"], "float_ms": steps * ms["float"] / 50,
        }
    results = read(args.json)
    results.setdefault("equal_time", {})[subject.name] = rows
    write(args.json, results)
    print(rows)


def dynamic(subject: Subject, args: argparse.Namespace) -> None:
    """Policies that decide at run time, reusing at two calls of five: fidelity, and what other thresholds reuse."""
    decode, plain = decoder_of(subject.parts), subject.parts.exported.program(20)
    reference = decode(subject.reference(plain))
    rows = {}
    for policy in ("teacache:0.4", "firstblock:0.4"):
        with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
            asked = replace(subject.settings, policy=policy)
            fit = fit_dynamic(subject.parts, asked, Path(folder), (20,))
            (Path(folder) / "bench").mkdir()
            bench = VariantBench(subject.parts, Path(folder) / "bench", fit.plan.cuts, (), fit.plan.probe)
            bench.quantize(dict.fromkeys(bench.set.variants, subject.parts.table))
            there = replace(subject, bench=bench)
            shares = {}
            for factor in (0.0, 0.5, 1.0, 2.0):
                program = with_threshold(fit.programs[20], factor)
                few = there if factor == 1.0 else replace(there, samples=16, batch=16)
                made, share = few.counted(program)
                shares[str(factor)] = share
                if factor == 1.0:
                    psnr = float(psnr_db(decode(made), reference).mean())
            bench.close()
        rows[policy] = {"psnr_db": psnr, "samples": subject.samples, "reused_by_threshold": shares,
                        "threshold": fit.report["steps"]["20"]["threshold"]}
        print(policy, rows[policy], flush=True)
    results = read(args.json)
    results.setdefault("dynamic", {})[subject.name] = rows
    write(args.json, results)


def with_threshold(program: StepProgram, factor: float) -> StepProgram:
    """The program with all thresholds multiplied."""
    calls = [
        call if call.decide is None
        else replace(call, decide=replace(call.decide, threshold=factor * call.decide.threshold))
        for call in program.calls
    ]  # fmt: skip
    return replace(program, calls=tuple(calls))


PARTS = {"times": times, "equal-time": equal_time, "dynamic": dynamic, "tap": tap_effect, "noise": noise_effect}


if __name__ == "__main__":
    main()
