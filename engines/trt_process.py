"""Builds in a process of their own.

The builder is native code that may abort, that keeps gigabytes after it is done, and that a refused build can leave in
a state in which the next one fails.  So each plan is built by a child, `python -m quantempo.engines.trt_process`, that
reads a job on standard input and writes its answer to the file that its argument names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quantempo import errors
from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.engines.tensorrt import BuildJob, Built, build_here
from quantempo.engines.trt_words import died
from quantempo.errors import EngineError, MissingExtra, QuantempoError


@dataclass(frozen=True)
class Refusal:
    """An error of ours, in its five parts, on its way back."""

    error: str
    where: str
    found: str
    wanted: str
    cause: str
    remedy: str

    def exception(self) -> QuantempoError:
        """The error again."""
        kind = getattr(errors, self.error, EngineError)
        if kind is MissingExtra:
            kind = EngineError
        raised: QuantempoError = kind(
            self.where, found=self.found, wanted=self.wanted, cause=self.cause, remedy=self.remedy
        )
        return raised


def build(job: BuildJob) -> Built:
    """Build a plan in a child process.

    Raises:
        EngineError: what `build_here` raises there, or how the child died.
    """
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "quantempo.engines.trt_process", str(answer)], input=canonical_json(job),
            capture_output=True, text=True, check=False,
        )
        if not answer.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()]
            raise died(f"{job.library} {Path(job.graph).name}", done.returncode, last[-1] if last else "")
        data = parse_json(answer.read_bytes(), "answer of the builder")
    if "error" in data:
        raise from_data(Refusal, data, "answer of the builder").exception()
    return from_data(Built, data, "answer of the builder")


def main() -> None:
    """The child."""
    job = from_data(BuildJob, json.loads(sys.stdin.read()), "job")
    try:
        text = canonical_json(build_here(job))
    except QuantempoError as error:
        text = canonical_json(
            Refusal(type(error).__name__, error.where, error.found, error.wanted, error.cause, error.remedy)
        )
    Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
