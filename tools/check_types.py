"""Run `mypy --strict` over the installed shape and over the scripts, and fail when it saw fewer files than there are.

A checker that cannot resolve the mapped packages reports success after reading almost nothing; the count catches that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quantempo", "export", "calib", "engines", "runtime")
SCRIPTS = ("benchmarks", "tools")
"""Folders of files that are run, and that import each other by their bare names."""


def main() -> int:
    package = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in FOLDERS)
    scripts = [str(path) for folder in SCRIPTS for path in sorted((ROOT / folder).glob("*.py"))]
    return check(["-p", "quantempo"], package) or check(scripts, len(scripts))


def check(what: list[str], wanted: int) -> int:
    """The exit status of one run, which has to read at least so many files."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *what],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "MYPYPATH": os.pathsep.join(str(ROOT / folder) for folder in (*SCRIPTS, "tests"))},
    )
    print(done.stdout, done.stderr, sep="", end="")
    match = re.search(r"(\d+) source files?", done.stdout)
    seen = int(match.group(1)) if match else 0
    if done.returncode == 0 and seen < wanted:
        print(f"mypy read {seen} files of {wanted}: the link tree is stale; run tools/link_tree.py")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
