"""Run the tests of the C++ runtime under sanitizers: memory, leaks and undefined behaviour, then threads.

    python tools/cpp_sanitizers.py [--json docs/cpp_sanitizers.json] [--only address,undefined|thread] [-- PYTEST WORDS]

Each build is a folder of its own under build/.  A finding ends the program that it was found in with an exit code and
words that the tests do not accept.  Engines are not built with sanitizers: runtime/cpp/tests/tsan.txt says what of
theirs is not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("address,undefined", "thread")
BUILD = "from support.cpp_library import build_for_tests; build_for_tests()"
"""Before the tests, whose time is limited."""
TIMEOUT = 1800
"""Seconds a test: sanitizers are slow, and other jobs may share the machine."""


def options(sanitizer: str) -> dict[str, str]:
    """What the sanitizers are asked for: to end the program at the first finding."""
    known = ROOT / "runtime/cpp/tests/tsan.txt"
    return {
        "QUANTEMPO_CPP_SANITIZE": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=1:exitcode=99",
        "TBB_ENABLE_SANITIZERS": "1",  # else OpenVINO's threads open a library in a way that AddressSanitizer ends
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
        # Of an engine's mutex only the unlocking is seen where the compiler made it a jump out of the engine.
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode=99:report_mutex_bugs=0:suppressions={known}",
    }


def run(sanitizer: str, words: list[str]) -> dict[str, Any]:
    """The tests with one build."""
    started = time.monotonic()
    # OpenVINO is a dozen libraries with a scheduler of their own, more than ThreadSanitizer can be told to overlook.
    chosen = ["-k", "not openvino"] if sanitizer == "thread" else []
    command = [
        sys.executable, "-m", "pytest", "tests/cpp", "-q", "-m", "not full", "-p", "no:cacheprovider",
        f"--timeout={TIMEOUT}", *chosen, *words,
    ]
    environment = {**os.environ, **options(sanitizer)}
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT / "tests", env=environment, check=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return {**counts, "clean": done.returncode == 0, "seconds": round(time.monotonic() - started)}


def main() -> int:
    """Run both, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=SANITIZERS)
    parser.add_argument("words", nargs="*", help="further words for pytest")
    arguments = parser.parse_args()
    file: Path | None = arguments.json
    results: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    for sanitizer in SANITIZERS:
        if arguments.only in (None, sanitizer):
            results[sanitizer] = run(sanitizer, arguments.words)
            print(sanitizer, results[sanitizer], flush=True)
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(found["clean"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
