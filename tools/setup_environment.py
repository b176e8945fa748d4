"""Create a virtual environment with everything that compiling, testing and the demo need.

    python tools/setup_environment.py .venv

The CPU build of torch is enough.  Where the package index also carries CUDA builds of the newest torch, asking for
`torch==2.13.0` first keeps gigabytes of CUDA libraries away; another torch that is already installed is left alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"


def run(*words: str) -> int:
    print("+", " ".join(words), flush=True)
    return subprocess.run(words, check=False).returncode


def main() -> int:
    if sys.version_info < (3, 11):
        print(f"Python {sys.version.split()[0]} found, 3.11 or newer wanted for compiling; set PYTHON=python3.11")
        return 2
    root = Path(__file__).resolve().parent.parent
    folder = Path(sys.argv[1]).resolve()
    python = folder / "bin" / "python"
    if not python.exists() and run(sys.executable, "-m", "venv", str(folder)):
        return 1
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if run(str(python), "-c", "import torch") and run(*pip, TORCH):
        return 1
    return run(*pip, "--editable", f"{root}[cpu,compile,dev]")


if __name__ == "__main__":
    sys.exit(main())
