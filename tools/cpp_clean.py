"""Time the C++ runtime on a clean clone in an empty folder: environment, configure, build, test.

    python tools/cpp_clean.py [--json docs/cpp_clean.json] [--conditions WORDS]

Needs what `apt install cmake g++ zlib1g-dev python3-venv` brings; everything else comes from pip.  The tests are those
of tests/cpp that `make test` runs.  Wall-clock seconds and, since other jobs may share the machine, CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ".venv/bin/python"
HEADERS = "import nlohmann_json, pathlib; print(pathlib.Path(nlohmann_json.__file__).parent / 'include')"


def steps(clone: Path) -> dict[str, list[str]]:
    """The commands, in order."""
    return {
        "environment": [sys.executable, "tools/setup_environment.py", ".venv"],
        "configure": [
            "bash", "-c",
            "cmake -S runtime/cpp -B build/cpp -DQUANTEMPO_TESTS=ON "
            f'-DNLOHMANN_JSON_INCLUDE="$({PYTHON} -c "{HEADERS}")"',
        ],
        "build": ["cmake", "--build", "build/cpp", "-j", str(os.cpu_count() or 1)],
        "test": [PYTHON, "-m", "pytest", "tests/cpp", "-q", "-m", "not full"],
    }  # fmt: skip


def computed() -> float:
    """CPU seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Run all of it; a step that fails ends the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--conditions", default="idle machine", help="what else ran, for the page")
    arguments = parser.parse_args()
    results: dict[str, object] = {"cores": os.cpu_count(), "conditions": arguments.conditions}
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "quantempo"
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
        for name, command in steps(clone).items():
            started, before = time.monotonic(), computed()
            done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
            seconds = time.monotonic() - started
            total += seconds
            results[name] = {"seconds": round(seconds, 1), "cpu_seconds": round(computed() - before, 1)}
            last = (done.stdout or done.stderr).strip().splitlines()[-1:]
            print(name, results[name], *last, flush=True)
            if done.returncode != 0:
                print(done.stdout[-5000:], done.stderr[-5000:])
                return 1
            if name == "test":
                results["tests"] = last[0]
    results["seconds"] = round(total, 1)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
