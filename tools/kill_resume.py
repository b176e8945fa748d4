"""Kill a compile at random moments and let it go on: the bundle must come out the same to the last byte.

    python tools/kill_resume.py --json docs/kill_resume.json       # the demo model, 30 kills

Every fourth kill comes at a moment drawn evenly over a whole compile that starts from an empty store of stages.  The
others come within one stage, in turn: calibration, weight rounding, writing (which lowers the graphs, copies, syncs and
renames), and a stage drawn at random; the store then holds what a compile has made when that stage begins.  Moments are
drawn in CPU time, evenly over what an undisturbed compile spends there, so that other work on the machine does not push
them to the front.  After the kill (SIGKILL) the same command runs to its end.  An older bundle lies at the target:
after the kill it has to be whole and unchanged, or already be the new one.

Compiles run in forks of this process, which has imported everything once; that saves most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantempo.contracts.codec import canonical_json
from quantempo.demo import DEMO_RECIPE, MODEL
from quantempo.errors import QuantempoError
from quantempo.runtime.bundle import file_digest, read_bundle

TICK = os.sysconf("SC_CLK_TCK")
BEGIN = "begin"
"""What happens before the first stage."""
IN_TURN = ("calibrate", "weights", "write", "any")


@dataclass(frozen=True)
class Moment:
    """When to kill: after `fraction` of the CPU time of `stage`; `whole` counts from an empty store."""

    stage: str
    fraction: float
    whole: bool


@dataclass(frozen=True)
class Round:
    """One kill.

    Args:
        stage: that was running.
        after_s: CPU seconds since it began.
        whole: whether the store had been empty.
        older: `older` or `newer`: which bundle lay at the target after the kill; anything else is a failure.
        same: whether the next run gave the same bytes.
        left: files beside the target that were left at the end.
    """

    stage: str
    after_s: float
    whole: bool
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
    """The compile, without the program's name."""
    words = ["compile", str(args.model), "-o", str(out), "--recipe", str(args.recipe), "--work", str(work),
             "--overwrite", "--guard", "off", "--log", "json"]  # fmt: skip
    return [*words, *(["--scheduler", str(args.scheduler)] if args.scheduler else [])]


class Compile:
    """A compile in a fork of this process, and its log so far."""

    def __init__(self, words: list[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `running`
        self.process = os.fork()
        if self.process == 0:
            _be_the_command(words, self._log.fileno())
        self.code: int | None = None

    def stages(self) -> list[str]:
        """Stages that began, in order."""
        lines = [line for line in self.text().splitlines(keepends=True) if line[0] == "{" and line.endswith("}\n")]
        return [event["stage"] for event in map(json.loads, lines) if event["event"] == "start"]

    def text(self) -> str:
        """The whole log."""
        # The fork writes where this file's own position is, so it must not be moved.
        file = self._log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def cpu(self) -> float:
        """CPU seconds of all its threads."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def ended(self) -> bool:
        """Whether it ended by itself; `code` is set then."""
        if self.code is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is not None

    def close(self) -> None:
        """Kill it, if it still runs."""
        if self.code is None:
            os.kill(self.process, 9)
            os.waitpid(self.process, 0)
        self._log.close()


def _be_the_command(words: list[str], log: int) -> None:
    """In the fork: run the command line and end."""
    from quantempo.cli import main

    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 70
    try:
        sys.argv = ["quantempo", *words]
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def running(words: list[str]) -> Iterator[Compile]:
    """A compile that is gone when the block ends."""
    started = Compile(words)
    try:
        yield started
    finally:
        started.close()


def whole(words: list[str]) -> dict[str, float]:
    """Run a compile to its end; CPU seconds of each stage."""
    spent: dict[str, float] = {}
    with running(words) as compile_:
        marks = [(BEGIN, 0.0)]
        used = 0.0
        while not compile_.ended():
            for name in compile_.stages()[len(marks) - 1 :]:
                marks.append((name, used))
            if compile_.code is None:
                used = compile_.cpu()
            time.sleep(0.02)
        if compile_.code:
            raise SystemExit(compile_.text())
        for (name, start), (_, end) in zip(marks, [*marks[1:], ("", used)], strict=True):
            spent[name] = spent.get(name, 0.0) + end - start
    return spent


def killed(words: list[str], moment: Moment, spent: dict[str, float]) -> float | None:
    """Start a compile and kill it at a moment; CPU seconds into the stage, `None` where it ended before."""
    wait, began = moment.fraction * spent[moment.stage], 0.0 if moment.stage == BEGIN else None
    with running(words) as compile_:
        while not compile_.ended():
            used = compile_.cpu()
            if began is None and moment.stage in compile_.stages():
                began = used
            if began is not None and used - began >= wait:
                return used - began
            time.sleep(0.002)
    return None


def draw_moment(draw: random.Random, index: int, spent: dict[str, float]) -> Moment:
    """See the top of the file."""
    if index % 4 == 3:
        at = draw.uniform(0, sum(spent.values()))
        for stage, seconds in spent.items():
            if at <= seconds:
                return Moment(stage, at / max(seconds, 1e-9), True)
            at -= seconds
    stage = IN_TURN[(index - index // 4) % len(IN_TURN)]
    return Moment(draw.choice(list(spent)) if stage == "any" else stage, draw.random(), False)


def one_round(args: argparse.Namespace, place: Path, moment: Moment, spent: dict[str, float],
              wanted: dict[str, str]) -> Round | None:  # fmt: skip
    """Kill, look, go on, compare; `None` where the compile had ended before the kill."""
    out, work = place / "bundle", place / "work"
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "older", out)
    work.mkdir()
    names = list(spent)
    for stage in () if moment.whole else names[: names.index(moment.stage)]:
        if (place / "whole-work" / stage).is_dir():
            shutil.copytree(place / "whole-work" / stage, work / stage)
    before = tree(out)
    after = killed(command(args, out, work), moment, spent)
    if after is None:
        return None
    state = "broken"
    try:
        read_bundle(out)
        found = tree(out)
        state = "older" if found == before else "newer" if found == wanted else "changed"
    except (QuantempoError, OSError):
        pass
    whole(command(args, out, work))
    left = tuple(sorted(p.name for p in place.iterdir() if p.name.startswith(".")))
    left += tuple(sorted(p.relative_to(work).as_posix() for p in work.rglob("*.partial")))
    return Round(moment.stage, round(after, 2), moment.whole, state, tree(out) == wanted, left)


def report(args: argparse.Namespace, rounds: list[Round], spent: dict[str, float]) -> None:
    """Write what is known so far."""
    if args.json:
        facts = {"kills": len(rounds), "clean": sum(r.clean for r in rounds), "seed": args.seed,
                 "samples": args.samples, "cpu_seconds": {name: round(t, 2) for name, t in spent.items()},
                 "command": "python tools/kill_resume.py --json docs/kill_resume.json",
                 "rounds": [asdict(r) for r in rounds]}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def load_everything() -> None:
    """Import what a compile imports, so that forks need not; nothing here starts a thread."""
    import diffusers  # noqa: F401
    import torch.onnx  # noqa: F401

    import quantempo.export.families
    import quantempo.export.trace
    import quantempo.pipeline  # noqa: F401
    from quantempo.engines import ort

    ort.version()  # imports the library


def main() -> int:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scheduler", type=Path)
    parser.add_argument("--recipe", type=Path, help="recipe file; by default the demo's with fewer samples")
    parser.add_argument("--samples", type=int, default=24, help="calibration samples of the default recipe")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    load_everything()
    with tempfile.TemporaryDirectory(prefix="quantempo-kills-") as folder:
        place = Path(folder)
        if args.recipe is None:
            args.recipe = place / "recipe.json"
            less = replace(DEMO_RECIPE, samples=args.samples, batch=4, steps=(8,), threads=1, max_steps=8)
            args.recipe.write_text(canonical_json(less))
        spent = whole(command(args, place / "older", place / "whole-work"))
        wanted = tree(place / "older")
        shutil.rmtree(place / "older" / "report", ignore_errors=True)  # a sidecar, so that old and new bundle differ
        print(f"CPU seconds: {', '.join(f'{name} {seconds:.1f}' for name, seconds in spent.items())}", flush=True)
        rounds: list[Round] = []
        while len(rounds) < args.kills:
            moment = draw_moment(draw, len(rounds), spent)
            found = one_round(args, place, moment, spent, wanted)
            if found is None:
                print(f"    ended before the kill in {moment.stage}; another moment is drawn", flush=True)
                continue
            rounds.append(found)
            print(f"{len(rounds):3} killed {found.after_s:5.2f} s into {found.stage}"
                  f"{' of a whole compile' if found.whole else ''}: {'clean' if found.clean else found}", flush=True)
            report(args, rounds, spent)
    clean = sum(r.clean for r in rounds)
    print(f"{clean} of {len(rounds)} clean")
    return 0 if clean == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
