"""What a compile costs: peak anonymous memory by stage, and calibration time against plain sampling.

    python benchmarks/compile_cost.py --json docs/compile_cost.json          # DiT-XL/2, 675 million random weights
    python benchmarks/compile_cost.py --layers 4                             # a quick look

Compiles a DiT with random weights on 2 samples of 4 steps in processes of their own, export included, and reads their
anonymous resident memory (RssAnon of /proc) twenty times a second; weights that are mapped from files do not count.
The float model samples the same trajectories on the same engine, and the two times are compared, the opening of the
engine included in both: in CPU seconds of one thread, which other work on the machine hardly changes, and in seconds by
the clock.  A scan of ranges, where a compile needs one (`ranges`), counts as calibration.  The latency guard runs as it
does by default, but for its rounds (here `--guard-rounds`) and the single regions, which hold two quantized graphs at a
time where the verdict holds a quantized one and a float one: that changes its time, and not its peak of memory.

With `--place` everything stays in a folder, and the work can be done in parts: `prepare` makes and traces the model,
`predict` asks `quantempo plan` what it expects, `time` calibrates and samples, and wants the machine for itself, `rest`
goes on to the end.  What a stage cost is kept there as soon as it has run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SAMPLES, STEPS, GUIDANCE = 2, 4, 1.5


FEWER_ROUNDS = """
from dataclasses import replace
from quantempo.cli import main
from quantempo.devices import guarding
guarding.TIMING = replace(guarding.TIMING, rounds={0}, warmup=1)
guarding.time_regions = lambda *words: ()
main()
"""


def make_model(folder: Path, layers: int) -> None:
    """A DiT-XL/2 with random weights and `layers` blocks, and a scheduler beside it."""
    import diffusers
    import torch

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, num_layers=layers, in_channels=4, out_channels=8,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )
    model.save_pretrained(folder)
    diffusers.DDIMScheduler(clip_sample=False, steps_offset=0).save_pretrained(folder / "scheduler")


def cpu_seconds(process: int) -> float:
    """CPU seconds of all threads of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Costs:
    """What each stage cost when it last ran, in a file that further parts go on with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, what: str, name: str, value: float) -> None:
        """Keep a figure."""
        self.data.setdefault(what, {})[name] = value
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def compiled(words: list[str], costs: Costs, until: str = "") -> None:
    """Run a compile, to the end of a stage or to its own end; what its stages cost goes to `costs`."""
    peaks: dict[str, int] = {}
    stage = ["between"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
            except (OSError, StopIteration):
                break
            peaks[stage[0]] = max(peaks.get(stage[0], 0), 1024 * int(line.split()[1]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    rest, stopped = [], False
    for line in process.stderr:
        if not line.startswith("{"):
            rest.append(line)
            continue
        event = json.loads(line)
        name = event.get("stage", "")
        if event["event"] == "start":
            stage[0], used = name, cpu_seconds(process.pid)
        elif event["event"] == "end":
            costs.put("cpu_seconds", name, round(cpu_seconds(process.pid) - used, 2))
            costs.put("seconds", name, event["seconds"])
            costs.put("peak_anonymous_bytes", name, peaks.get(name, 0))
            stage[0] = "between"
        if name == until and event["event"] in ("end", "reused"):
            process.terminate()
            stopped = True
            break
    process.stderr.close()
    watcher.join()
    costs.put("between", until or "end", peaks.get("between", 0))
    if process.wait() and not stopped:
        raise SystemExit("".join(rest))


def plain_sampling(bundle: Path, threads: int) -> tuple[float, float]:
    """Seconds and CPU seconds to open the float engine and to sample the trajectories of the calibration."""
    from quantempo.contracts.engine import EngineOptions
    from quantempo.engines.registry import open_engine
    from quantempo.runtime.bundle import read_bundle
    from quantempo.runtime.session import Session

    opened = read_bundle(bundle)
    started, used = time.perf_counter(), time.process_time()
    options = EngineOptions(threads=threads)
    with Session(opened, lambda path, given: open_engine("ort", path, given), options) as session:
        session(class_labels=[0] * SAMPLES, seed=0, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                output_type="latent")  # fmt: skip
        return time.perf_counter() - started, time.process_time() - used


def prepare(args: argparse.Namespace, place: Path, costs: Costs) -> None:
    """Make the model, trace it, and write its float bundle."""
    if not (place / "model").is_dir():
        me = [sys.executable, str(Path(__file__).resolve())]
        subprocess.run([*me, "--make", str(place / "model"), "--layers", str(args.layers)], check=True)
    compiled(compile_words(args, place, "bundle"), costs, until="plan")
    words = compile_words(args, place, "float", "--dtype", "float32")
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(args: argparse.Namespace, place: Path, costs: Costs) -> None:
    """Calibrate, then sample the same trajectories with the float bundle."""
    shutil.rmtree(place / "work" / "calibrate", ignore_errors=True)
    compiled(compile_words(args, place, "bundle"), costs, until="calibrate")
    me = [sys.executable, str(Path(__file__).resolve())]
    plain = subprocess.run(
        [*me, "--sample", str(place / "float"), "--threads", str(args.threads)], check=True, capture_output=True,
        text=True,
    )
    seconds, cpu = json.loads(plain.stdout)
    costs.put("seconds", "plain sampling", round(seconds, 2))
    costs.put("cpu_seconds", "plain sampling", round(cpu, 2))


def rest(args: argparse.Namespace, place: Path, costs: Costs) -> None:
    """The compile from there to its end."""
    compiled(compile_words(args, place, "bundle"), costs)
    size = sum(p.stat().st_size for p in (place / "bundle").rglob("*") if p.is_file())
    costs.put("found", "bundle_bytes", size)


def predict(args: argparse.Namespace, place: Path, costs: Costs) -> None:
    """What `quantempo plan` says before anything is calibrated."""
    words = compile_words(args, place, "plan.json", command="plan")
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads((place / "plan.json").read_text())["predictions"]
    for name in ("memory_bytes", "calibration_seconds", "bundle_bytes"):
        costs.put("predicted", name, found[name])


PARTS = {"prepare": prepare, "predict": predict, "time": measure, "rest": rest}


def compile_words(
    args: argparse.Namespace, place: Path, out: str, *more: str, command: str = "compile"
) -> list[str]:
    """The command line of a compile, or of another command that takes its words."""
    guard = ["--guard", args.guard] if command == "compile" else []
    recipe = {
        "samples": SAMPLES, "batch": SAMPLES, "steps": [STEPS], "guidance": [GUIDANCE], "threads": args.threads,
        "max_steps": STEPS, "classes": [1, 2],
    }
    (place / "recipe.json").write_text(json.dumps(recipe))
    start = [sys.executable, "-c", FEWER_ROUNDS.format(args.guard_rounds), command]
    return [*start, str(place / "model"), "-o", str(place / out),
            "--scheduler", str(place / "model" / "scheduler"), "--recipe", str(place / "recipe.json"),
            "--work", str(place / "work"), *guard, "--log", "json", "--overwrite", *more]  # fmt: skip


def facts(args: argparse.Namespace, place: Path, costs: Costs) -> dict[str, Any]:
    """What is known so far, with the ratios of what was measured."""
    data = costs.data
    weights = sum(p.stat().st_size for p in (place / "model").glob("*.safetensors"))
    found: dict[str, Any] = {
        "layers": args.layers, "guard": args.guard, "guard_rounds": args.guard_rounds, "weights_bytes": weights,
        "threads": args.threads, **data,
        "command": f"python benchmarks/compile_cost.py --layers {args.layers} --threads {args.threads} "
        "--json docs/compile_cost.json",
    }
    peaks = [*data.get("peak_anonymous_bytes", {}).values(), *data.get("between", {}).values()]
    if peaks:
        found["memory_ratio"] = round(max(peaks) / weights, 3)
        others = {name: peak for name, peak in data["peak_anonymous_bytes"].items() if name != "latency guard"}
        found["memory_ratio_without_guard"] = round(max([*others.values(), *data["between"].values()]) / weights, 3)
    for name, times in (("time_ratio", data.get("seconds", {})), ("cpu_time_ratio", data.get("cpu_seconds", {}))):
        if "plain sampling" in times:
            calibration = times["calibrate"] + times.get("ranges", 0.0)
            found[name] = round(calibration / times["plain sampling"], 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--guard", default="record", help="latency guard of the compile: off, record or revert")
    parser.add_argument("--guard-rounds", type=int, default=1)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--place", type=Path, help="folder to work in, which is kept")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_model(args.make, args.layers)
    if args.sample:
        return print(json.dumps(plain_sampling(args.sample, args.threads)))
    with tempfile.TemporaryDirectory(prefix="quantempo-cost-") as folder:
        place = args.place or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        costs = Costs(place / "costs.json")
        for part in args.parts:
            PARTS[part](args, place, costs)
        found = facts(args, place, costs)
    for stage, peak in found["peak_anonymous_bytes"].items():
        print(f"{stage:<10} {peak / 1e9:6.2f} GB {found['cpu_seconds'][stage]:7.1f} s of CPU")
    print({name: value for name, value in found.items() if "ratio" in name})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
