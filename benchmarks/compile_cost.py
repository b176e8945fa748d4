"""What a compile costs: peak anonymous memory by stage, and calibration time against plain sampling.

    python benchmarks/compile_cost.py --json docs/compile_cost.json          # DiT-XL/2, 675 million random weights
    python benchmarks/compile_cost.py --layers 4                             # a quick look

Compiles a DiT with random weights on 2 samples of 4 steps in a process of its own, export included, and reads the
process's anonymous resident memory (RssAnon of /proc) twenty times a second; weights that are mapped from files do not
count.  Then the float reference samples the same trajectories on the same engine, and the two times are compared, the
opening of the engine included in both: in CPU seconds of one thread, which other work on the machine hardly changes,
and in seconds by the clock.  With `--place` the model and the results of stages stay for another run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SAMPLES, STEPS, GUIDANCE = 2, 4, 1.5


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


def peak_by_stage(words: list[str]) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    """Run a compile; peak anonymous bytes, seconds and CPU seconds of each stage."""
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    stage = ["before"]
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
    rest = []
    for line in process.stderr:
        if not line.startswith("{"):
            rest.append(line)
            continue
        event = json.loads(line)
        if event["event"] == "start":
            stage[0] = event["stage"]
            cpu[event["stage"]] = -cpu_seconds(process.pid)
        elif event["event"] == "end":
            cpu[event["stage"]] += cpu_seconds(process.pid)
            seconds[event["stage"]] = event["seconds"]
            stage[0] = "between"
    watcher.join()
    if process.wait():
        raise SystemExit("".join(rest))
    return peaks, seconds, cpu


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


def measure(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Everything, in processes of its own."""
    me = [sys.executable, str(Path(__file__).resolve())]
    if not (place / "model").is_dir():
        subprocess.run([*me, "--make", str(place / "model"), "--layers", str(args.layers)], check=True)
    weights = sum(p.stat().st_size for p in (place / "model").glob("*.safetensors"))
    recipe = {
        "samples": SAMPLES, "batch": SAMPLES, "steps": [STEPS], "guidance": [GUIDANCE], "threads": args.threads,
        "max_steps": 4, "classes": [1, 2],
    }
    (place / "recipe.json").write_text(json.dumps(recipe))
    words = [sys.executable, "-m", "quantempo.cli", "compile", str(place / "model"), "-o", str(place / "bundle"),
             "--scheduler", str(place / "model" / "scheduler"), "--recipe", str(place / "recipe.json"),
             "--work", str(place / "work"), "--guard", args.guard, "--log", "json", "--overwrite"]  # fmt: skip
    peaks, seconds, cpu = peak_by_stage(words)
    plain = subprocess.run(
        [*me, "--sample", str(place / "bundle" / "reference"), "--threads", str(args.threads)], check=True,
        capture_output=True, text=True,
    )
    sampling, sampling_cpu = json.loads(plain.stdout)
    return {
        "layers": args.layers, "guard": args.guard, "weights_bytes": weights, "threads": args.threads,
        "peak_anonymous_bytes": peaks, "seconds": seconds,
        "cpu_seconds": {name: round(value, 2) for name, value in cpu.items()},
        "memory_ratio": round(max(peaks.values()) / weights, 3),
        "sampling_seconds": round(sampling, 2), "sampling_cpu_seconds": round(sampling_cpu, 2),
        "time_ratio": round(seconds.get("calibrate", 0.0) / sampling, 3),
        "cpu_time_ratio": round(cpu.get("calibrate", 0.0) / sampling_cpu, 3),
        "command": f"python benchmarks/compile_cost.py --layers {args.layers} --threads {args.threads}",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--guard", default="off", help="latency guard of the compile: off, record or revert")
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
        facts = measure(args, place)
    for stage, peak in facts["peak_anonymous_bytes"].items():
        print(f"{stage:<10} {peak / 1e9:6.2f} GB {facts['seconds'].get(stage, 0):7.1f} s")
    print(f"peak {facts['memory_ratio']} × the weights ({facts['weights_bytes'] / 1e9:.2f} GB); "
          f"calibration {facts['cpu_time_ratio']} × sampling in CPU time, {facts['time_ratio']} × by the clock")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
