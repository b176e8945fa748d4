"""Run `mypy --strict` over the installed shape and fail when it saw fewer files than there are.

A checker that cannot resolve the mapped packages reports success after reading almost nothing; the count catches that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quantempo", "export", "calib", "engines", "runtime")


def main() -> int:
    sources = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in FOLDERS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "quantempo"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    print(done.stdout, done.stderr, sep="", end="")
    match = re.search(r"(\d+) source files?", done.stdout)
    seen = int(match.group(1)) if match else 0
    if done.returncode == 0 and seen < sources:
        print(f"mypy read {seen} files of {sources}: the link tree is stale; run tools/link_tree.py")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
