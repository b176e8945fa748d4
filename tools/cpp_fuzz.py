"""Fuzz everything of the C++ runtime that reads a bundle's bytes, one target after the other.

    python tools/cpp_fuzz.py --minutes 5 --json docs/cpp_fuzz.json [--only manifest,graph] [--work FOLDER]

Needs clang (libFuzzer).  `--minutes` are CPU minutes a target.  A target runs on the seeds of runtime/cpp/fuzz/corpus
and on what earlier runs found (`--work`), with AddressSanitizer, leaks included, and UndefinedBehaviorSanitizer.  A
target whose figures are of the same code is not run again; a finding leaves its input in the work folder and fails the
run.
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
SEEDS = SOURCE / "fuzz" / "corpus"
ENGINES = ("ort", "openvino", "tensorrt", "library", "backends", "settings")
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
        "-DQUANTEMPO_FUZZ=ON", "-DQUANTEMPO_EXAMPLES=OFF", "-DQUANTEMPO_SANITIZE=address,undefined",
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
    log = work / f"{found.name}.log"
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


def main() -> int:
    """Run what has no figures of this code yet, and store after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cpp-fuzz-corpus")
    arguments = parser.parse_args()
    file: Path | None = arguments.json
    results: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    program, code = build(), code_digest()
    if results.get("code") != code:
        results = {"code": code, "targets": {}}
    for number, name in enumerate(TARGETS):
        if name not in arguments.only.split(",") or results["targets"].get(name, {}).get("findings") == 0:
            continue
        results["targets"][name] = fuzz(program, number, arguments.minutes, arguments.work)
        print(name, results["targets"][name], flush=True)
        if file is not None:
            file.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(found["findings"] for found in results["targets"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
