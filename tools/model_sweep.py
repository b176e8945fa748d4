"""Takes a tiny model of every denoiser class of the installed diffusers to INT8 on ONNX Runtime and OpenVINO.

Each class runs in a process of its own, so that a crash or an endless loop is a finding and not the end.  Writes
docs/models.json and docs/model-coverage.md (the page made from it):

    python tools/model_sweep.py                  # all of them: 10 to 20 s a class on one core
    python tools/model_sweep.py --resume         # those that are not in docs/models.json yet
    python tools/model_sweep.py Flux UNet2DModel # classes with these words, printed, nothing written
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TIMEOUT = 150
PATIENCE = 6
"""Seconds of waiting per second of processor time: other programs may be using the machine."""
LIBRARIES = ("diffusers", "torch", "onnx", "onnxscript", "onnxruntime", "openvino")
FIELDS = (
    "status", "stage", "float_error", "sqnr_db", "groups", "quantized", "kept", "cache", "cause", "seconds",
)
ENOUGH = 70
"""Classes that have to be covered."""
REASONS = {
    "SanaWMTransformer3DModel": "its attention is in bfloat16, whatever the type of the model",
    "Transformer2DModel": "OpenVINO's own: docs/reproducers/openvino_vector_split.py",
}
"""What was found behind a cause, by class."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="classes whose names hold one of these; all without")
    parser.add_argument("--json", type=Path, default=None, help="write here (default: docs/models.json for all)")
    parser.add_argument("--resume", action="store_true", help="keep what the file already holds")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds of processor time per class")
    parser.add_argument("--float", action="store_true", help="end with the float graph")
    options = parser.parse_args(arguments)
    from support.zoo import ZOO

    names = [n for n in sorted(ZOO) if not options.words or any(word in n for word in options.words)]
    path = options.json or (None if options.words else ROOT / "docs" / "models.json")
    found: dict[str, Any] = {}
    if options.resume and path is not None and path.exists():
        found = json.loads(path.read_text())["classes"]
    prepare()
    for name in names:
        if name in found:
            continue
        found[name] = in_process(name, options.timeout, options.float)
        print(line(name, found[name]), flush=True)
        if path is not None:
            write(path, found, sorted(ZOO))
    counts = Counter(f["status"] for f in found.values())
    print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    if path is None or options.float or options.words:
        return 0 if set(counts) <= {"covered", "float"} else 1
    if counts["covered"] < ENOUGH:
        print(f"{counts['covered']} classes are covered, wanted at least {ENOUGH}")
        return 1
    return 0


def prepare() -> None:
    """Import everything and start the exporter once; the processes are forks of this one."""
    import logging
    import warnings

    import diffusers.models.transformers
    import diffusers.models.unets
    import torch
    from support.zoo.measure import warm_up

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for name in dir(package):
            getattr(package, name)
    warm_up()


def child(name: str, answer: Connection, seconds: int, float_only: bool) -> None:
    """Measure one class in this process."""
    from support.zoo import ZOO
    from support.zoo.measure import measure

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with tempfile.TemporaryDirectory() as folder:
        answer.send(asdict(measure(ZOO[name], Path(folder), float_only)))


def in_process(name: str, timeout: int, float_only: bool = False) -> dict[str, Any]:
    """Measure one class in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, theirs, timeout, float_only))
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE * timeout):
            return {**blank(), "cause": f"longer than {PATIENCE * timeout} s"}
        data = ours.recv()
    except EOFError:
        process.join()
        return {**blank(), "cause": f"the process ended with {process.exitcode}"}
    finally:
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()
    return {field: data[field] for field in FIELDS}


def blank() -> dict[str, Any]:
    """A class of which nothing is known."""
    return {
        "status": "refused", "stage": "process", "float_error": None, "sqnr_db": {}, "groups": 0, "quantized": 0,
        "kept": 0, "cache": "", "cause": "", "seconds": 0.0,
    }


def line(name: str, finding: dict[str, Any]) -> str:
    """A finding in one line."""
    error = "" if finding["float_error"] is None else f" float {finding['float_error']:.1e}"
    ratios = "".join(f" {engine} {value} dB" for engine, value in finding["sqnr_db"].items())
    sites = f" sites {finding['quantized']}+{finding['kept']}"
    cause = f" [{finding['stage']}] {finding['cause']}" if finding["cause"] else ""
    return f"{name} {finding['status']} {finding['seconds']} s{error}{ratios}{sites}{cause}"


def write(path: Path, found: dict[str, Any], known: Sequence[str]) -> None:
    """The file and, beside it, the page.

    Args:
        path: of the file.
        found: what was measured, by class.
        known: all classes of the zoo.
    """
    counts = Counter(finding["status"] for finding in found.values())
    data = {
        "libraries": {name: version(name) for name in LIBRARIES}, "counts": dict(sorted(counts.items())),
        "not measured": [name for name in known if name not in found],
        "classes": {name: found[name] for name in sorted(found)},
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_name("model-coverage.md" if path.name == "models.json" else f"{path.stem}.md").write_text(page(data))


def page(data: dict[str, Any]) -> str:
    """The table for people."""
    versions = ", ".join(f"{name} {found}" for name, found in data["libraries"].items())
    counts = ", ".join(f"{n} {status}" for status, n in data["counts"].items())
    rows = [row(name, finding) for name, finding in data["classes"].items()]
    return "\n".join([
        "# Denoiser classes", "",
        *textwrap.wrap(
            "Made by `python tools/model_sweep.py`: a tiny model of each denoiser class of diffusers, with random "
            "weights, is traced, compared with the module on two input sets of different batch sizes, calibrated with "
            f"two timestep groups{single_groups(data)}, and lowered to INT8 for ONNX Runtime (dialect `ort`) and "
            "OpenVINO (dialect `portable`).  *Covered*: float error at most 1e-4, both INT8 graphs run, and one call "
            "on inputs that calibration has not seen reaches at least 20 dB against the module.  *Partial*: the float "
            "graph is right, something after it is not.", 118,
        ), "",
        "Tiny random models say that a class works, not how well a trained one can be quantized.", "",
        f"{counts}.  {versions}.", "", *unmeasured(data["not measured"]),
        "| class | status | float error | ORT, dB | OpenVINO, dB | sites quantized + kept | cache cut | cause |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows, "",
    ])  # fmt: skip


def single_groups(data: dict[str, Any]) -> str:
    """The classes that have no timestep per call, and so one group."""
    alone = [name for name, finding in data["classes"].items() if finding["groups"] == 1]
    return f" (one where a call has no timestep of its own: {', '.join(alone)})" if alone else ""


def unmeasured(names: Sequence[str]) -> list[str]:
    """What a run that was cut short did not come to."""
    if not names:
        return []
    text = textwrap.fill(f"Not measured yet ({len(names)}; `--resume` goes on with them): {', '.join(names)}.", 118)
    return [*text.splitlines(), ""]


def row(name: str, finding: dict[str, Any]) -> str:
    """One class."""
    error = "" if finding["float_error"] is None else f"{finding['float_error']:.1e}"
    ratios = [finding["sqnr_db"].get(engine, "") for engine in ("ort", "openvino")]
    cause = "; ".join(filter(None, (REASONS.get(name, "") if finding["cause"] else "", finding["cause"])))
    cause = cause.replace("|", "/")
    cache = cut(finding["cache"]).replace("|", "/")
    sites = f"{finding['quantized']} + {finding['kept']}"
    return f"| {name} | {finding['status']} | {error} | {ratios[0]} | {ratios[1]} | {sites} | {cache} | {cause} |"


def cut(found: str) -> str:
    """The cut of a class in a few words, or what stands against one."""
    kind = re.match(r"(Feature|Delta|Sublayer)Cut\(", found)
    if kind:
        blocks = re.search(r"blocks='([^']+)'|tensors=\('([^']+)'", found)
        of = f" of `{next(filter(None, blocks.groups()))}`" if blocks else ""
        return {"Feature": "feature", "Delta": "delta", "Sublayer": "sublayers"}[kind[1]] + of
    return re.sub(r"cut '[^']*', |\. Likely cause:.*", "", found)


if __name__ == "__main__":
    sys.exit(main())
