"""Kill a compile at random moments and let it go on: the bundle must come out the same to the last byte.

    python tools/kill_resume.py --json docs/kill_resume.json       # the demo model, 30 kills

Each round starts from a store of stages that holds the traces alone (so that most of the time is left for calibration,
weights and writing) or, every third round, from an empty one.  The process is killed (SIGKILL) at a moment drawn
evenly over the time that an undisturbed compile takes; then the same command runs to its end.  An older bundle lies at
the target: after the kill it has to be whole and unchanged, or already be the new one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantempo.contracts.codec import canonical_json
from quantempo.demo import DEMO_RECIPE, MODEL
from quantempo.errors import QuantempoError
from quantempo.runtime.bundle import file_digest, read_bundle

TRACES = ("sampler", "denoiser", "decoder")


@dataclass(frozen=True)
class Round:
    """One kill.

    Args:
        after_s: seconds from the start to the kill.
        stage: the last stage that had begun, as the log says.
        from_traces: whether traces were there already.
        older: `older` or `newer`: which bundle lay at the target after the kill; anything else is a failure.
        same: whether the next run gave the same bytes.
        left: files beside the target that were left at the end.
    """

    after_s: float
    stage: str
    from_traces: bool
    older: str
    same: bool
    left: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Nothing lost and nothing left."""
        return self.same and self.older in ("older", "newer") and not self.left


def tree(root: Path) -> dict[str, str]:
    """The digest of every file; latencies, which differ from run to run, are not measured here."""
    return {p.relative_to(root).as_posix(): file_digest(p) for p in sorted(root.rglob("*")) if p.is_file()}


def command(args: argparse.Namespace, out: Path, work: Path) -> list[str]:
    """The compile."""
    words = [sys.executable, "-m", "quantempo.cli", "compile", str(args.model), "-o", str(out), "--recipe",
             str(args.recipe), "--work", str(work), "--overwrite", "--guard", "off", "--log", "json"]  # fmt: skip
    return [*words, *(["--scheduler", str(args.scheduler)] if args.scheduler else [])]


def killed(words: list[str], after: float) -> tuple[str, bool]:
    """Start a compile and kill it; the last stage that its log names, and whether it had still been running."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stderr=log, stdout=subprocess.DEVNULL)
        try:
            process.wait(after)
            running = False
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            running = True
        log.seek(0)
        stages = [json.loads(line)["stage"] for line in log if '"start"' in line and line.endswith("}\n")]
    return stages[-1] if stages else "before the first stage", running


def one_round(args: argparse.Namespace, place: Path, after: float, from_traces: bool, wanted: dict[str, str],
              older: Path) -> Round:  # fmt: skip
    """Kill, look, go on, compare."""
    out, work = place / "bundle", place / "work"
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(older, out)
    work.mkdir()
    if from_traces:
        for stage in TRACES:
            if (place / "whole-work" / stage).is_dir():
                shutil.copytree(place / "whole-work" / stage, work / stage)
    before = tree(out)
    stage, _ = killed(command(args, out, work), after)
    state = "broken"
    try:
        read_bundle(out)
        found = tree(out)
        state = "older" if found == before else "newer" if found == wanted else "changed"
    except (QuantempoError, OSError):
        pass
    subprocess.run(command(args, out, work), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    left = tuple(sorted(p.name for p in place.iterdir() if p.name.startswith(".")))
    left += tuple(sorted(p.relative_to(work).as_posix() for p in work.rglob("*.partial")))
    return Round(round(after, 2), stage, from_traces, state, tree(out) == wanted, left)


def report(args: argparse.Namespace, rounds: list[Round], times: list[float]) -> None:
    """Write what is known so far."""
    if args.json:
        facts = {"kills": len(rounds), "clean": sum(r.clean for r in rounds), "seed": args.seed,
                 "samples": args.samples, "seconds": [round(t, 1) for t in times],
                 "rounds": [asdict(r) for r in rounds]}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scheduler", type=Path)
    parser.add_argument("--recipe", type=Path, help="recipe file; by default the demo's with fewer samples")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of the default recipe")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="quantempo-kills-") as folder:
        place = Path(folder)
        if args.recipe is None:
            args.recipe = place / "recipe.json"
            less = replace(DEMO_RECIPE, samples=args.samples, batch=4, steps=(10,), threads=1)
            args.recipe.write_text(canonical_json(less))
        times = []
        for work in ("whole-work", "whole-work"):  # the second time from traces
            for stage in ("plan", "calibrate", "scales", "weights"):
                shutil.rmtree(place / work / stage, ignore_errors=True)
            started = time.perf_counter()
            subprocess.run(command(args, place / "whole", place / work), check=True, stderr=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        wanted = tree(place / "whole")
        older = place / "older"
        shutil.copytree(place / "whole", older)
        shutil.rmtree(older / "report", ignore_errors=True)
        rounds = []
        for index in range(args.kills):
            from_traces = index % 3 != 2
            after = draw.uniform(0.05, 0.98) * times[1 if from_traces else 0]
            rounds.append(one_round(args, place, after, from_traces, wanted, older))
            print(f"{index + 1:3} killed after {after:6.1f} s in {rounds[-1].stage}: "
                  f"{'clean' if rounds[-1].clean else rounds[-1]}", flush=True)
            report(args, rounds, times)
    clean = sum(r.clean for r in rounds)
    print(f"{clean} of {len(rounds)} clean; undisturbed: {times[0]:.1f} s, from traces {times[1]:.1f} s")
    return 0 if clean == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
