"""Fuzz everything of the C++ runtime that reads a bundle's bytes, one target after the other.

    python tools/cpp_fuzz.py --minutes 5 --json docs/cpp_fuzz.json [--only manifest,graph] [--work FOLDER]

Needs clang (libFuzzer).  `--minutes` are CPU minutes a target, in turns of one minute that add up: a run that was
stopped goes on where it was, as long as the code is the same.  A target runs on the seeds of runtime/cpp/fuzz/corpus
and on what earlier turns found (`--work`), with AddressSanitizer, leaks included, and UndefinedBehaviorSanitizer.  A
finding leaves its input in the work folder and ends the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.cpp_library import SOURCE, configure_and_build  # noqa: E402

TARGETS = ("manifest", "program", "split program", "vectors", "table", "graph", "record", "cached program")
"""In the order of `Input` in runtime/cpp/fuzz/mutate.hpp."""
TURN = 1.0
"""CPU minutes of a target until the next one has its turn."""
SEEDS = SOURCE / "fuzz" / "corpus"
ENGINES = ("ort", "ort_api", "openvino", "tensorrt", "library", "backends", "settings")
APART = ("c_api", "session", "images", "cpu", *ENGINES)
"""Sources that read no bytes of a bundle: what is changed there does not concern the targets."""


def code_digest() -> str:
    """What the targets were built from."""
    state = hashlib.sha256()
    for file in sorted((*SOURCE.glob("src/**/*.[ch]pp"), *SOURCE.glob("fuzz/*.[ch]pp"))):
        if file.stem not in APART:
            state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()


def build() -> Path:
    """The fuzzer."""
    folder = configure_and_build(
        ROOT / "build" / "cpp-fuzz-clang", "-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++",
        "-DQUANTEMPO_FUZZ=ON", "-DQUANTEMPO_EXAMPLES=OFF", "-DQUANTEMPO_TESTS=OFF",
        "-DQUANTEMPO_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    )
    return folder / "fuzz-bundle"


def cpu_seconds(process: int) -> float:
    """User and system time of a process that runs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(program: Path, number: int, minutes: float, work: Path) -> dict[str, Any]:
    """One target for so many CPU minutes."""
    found, findings = work / TARGETS[number].replace(" ", "-"), work / "findings"
    for folder in (found, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS.iterdir():
        if seed.read_bytes()[0] == number:
            shutil.copy(seed, found)
    command = [program, found, "-timeout=1800", "-max_len=20000", "-rss_limit_mb=2048", "-print_final_stats=1"]
    environment = {
        **os.environ, "QUANTEMPO_FUZZ_TARGET": str(number), "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "ASAN_OPTIONS": "detect_leaks=1",
    }  # fmt: skip
    log = work / f"{found.name}-{os.getpid()}.log"
    with log.open("w") as out:
        words = [*(str(word) for word in command), f"-artifact_prefix={findings}/{found.name}-"]
        running = subprocess.Popen(words, stderr=out, stdout=out, env=environment)
        used = 0.0
        while running.poll() is None:
            used = max(used, cpu_seconds(running.pid))
            if used > 60 * minutes:
                running.send_signal(signal.SIGUSR1)  # it ends by itself, with its figures
                running.wait(timeout=1800)
            time.sleep(1)
    said = log.read_text(errors="replace")
    inputs = re.search(r"number_of_executed_units: (\d+)", said)
    edges = re.findall(r"\bcov: (\d+)", said)
    return {
        "cpu_minutes": round(used / 60, 2), "inputs": int(inputs.group(1)) if inputs else 0,
        "edges": int(edges[-1]) if edges else 0, "findings": 0 if running.returncode == 0 else 1,
    }  # fmt: skip


def read(file: Path | None, code: str) -> dict[str, Any]:
    """The figures of this code so far."""
    data: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    return data if data.get("code") == code else {"code": code, "targets": {}}


def add(file: Path | None, code: str, name: str, turn: dict[str, Any]) -> dict[str, Any]:
    """The figures with those of a turn, stored."""
    results = read(file, code)
    before = results["targets"].get(name, {"cpu_minutes": 0.0, "inputs": 0, "edges": 0, "findings": 0})
    total = {key: before[key] + turn[key] for key in ("cpu_minutes", "inputs", "findings")}
    total |= {"cpu_minutes": round(total["cpu_minutes"], 2), "edges": max(before["edges"], turn["edges"])}
    results["targets"][name] = total
    results["targets"] = {target: results["targets"][target] for target in TARGETS if target in results["targets"]}
    results["cpu_minutes"] = round(sum(each["cpu_minutes"] for each in results["targets"].values()), 2)
    results["inputs"] = sum(each["inputs"] for each in results["targets"].values())
    results["findings"] = sum(each["findings"] for each in results["targets"].values())
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def main() -> int:
    """Turns until each target had its minutes; the figures are stored after each turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cpp-fuzz-corpus")
    arguments = parser.parse_args()
    program, code, chosen = build(), code_digest(), arguments.only.split(",")
    results = read(arguments.json, code)
    while True:
        had = {name: results["targets"].get(name, {}).get("cpu_minutes", 0.0) for name in TARGETS if name in chosen}
        name = min(had, key=lambda each: had[each])
        if had[name] >= arguments.minutes:
            return 0
        turn = fuzz(program, TARGETS.index(name), min(TURN, arguments.minutes - had[name]), arguments.work)
        results = add(arguments.json, code, name, turn)
        print(name, turn, flush=True)
        if turn["findings"]:
            return 1


if __name__ == "__main__":
    sys.exit(main())
