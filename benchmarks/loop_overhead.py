"""Milliseconds per engine call that the sampling loop spends outside the engine.

    python benchmarks/loop_overhead.py [--json FILE]

Latents of 4x64x64, batch 1, on the echo engine, whose own time is subtracted (the loop's clock splits it).  Programs:
DDIM-like (one `lin` of 3 terms), and the widest seen among diffusers schedulers (6 terms, 5 registers).  The figure is
the median (and the best) over 20 runs of 50 calls.  Measure on an idle core, pinned with `taskset -c 1`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import ClassInput, Denoiser
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Lin, Operation, State, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.runtime.loop import Loop, LoopRequest
from quantempo.runtime.rng import PhiloxNoise

SHAPE = (4, 64, 64)
CALLS = 50
RUNS = 21


def graph() -> EchoGraph:
    """The denoiser's contract."""
    sample = TensorSpec("sample", "float32", ("batch", *SHAPE))
    rows = TensorSpec("timestep", "float32", ("batch",)), TensorSpec("class_labels", "int64", ("batch",))
    return EchoGraph((sample, *rows, TensorSpec("scale_group", "int64", ())),
                     (TensorSpec("prediction", "float32", ("batch", *SHAPE)),))  # fmt: skip


def narrow(timestep: float) -> tuple[Operation, ...]:
    """A first-order step."""
    return (Lin(LATENTS, ((LATENTS, 0.99), (PREDICTION, -0.01), (LATENTS, 0.001))),)


def wide(timestep: float) -> tuple[Operation, ...]:
    """A multistep method: a prediction of x0, a history of three, six terms in the step."""
    return (
        Lin("r3", (("r2", 1.0),)), Lin("r2", (("r1", 1.0),)), Lin("r1", ((LATENTS, 1.1), (PREDICTION, -0.4))),
        Lin(LATENTS, ((LATENTS, 0.9), ("r1", 0.1), ("r2", -0.05), ("r3", 0.01), ("r0", 0.001), (PREDICTION, 0.02))),
    )


def program(kind: str) -> StepProgram:
    """50 calls of one kind."""
    update = {"narrow": narrow, "wide": wide}[kind]
    calls = tuple(
        Call(999.0 - 20 * i, {"sample": ((LATENTS, 0.9),)}, update(0.0), i) for i in range(CALLS)
    )
    history = tuple(State(f"r{i}", 0.0) for i in range(4)) if kind == "wide" else ()
    return StepProgram("Benchmark", CALLS, calls, (State(), *history))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    denoiser = Denoiser(SHAPE, (ClassInput("class_labels", 10, 10),), group_input="scale_group")
    partition = Partition(tuple(float(t) for t in range(50, 1000, 50)), 0.0, 999.0)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g.json"
        write_echo_graph(path, graph())
        loop = Loop({"full": open_engine("echo", path, EngineOptions())}, denoiser, partition)
        for kind in ("narrow", "wide"):
            for guidance in (1.0, 4.0):
                for mode in ("batched", "split") if guidance > 1 else ("batched",):
                    labels = np.array([3]), np.array([10])
                    request = LoopRequest(
                        1, (guidance,), PhiloxNoise.from_seeds(0, 1), conditioning={"class_labels": labels}, mode=mode,
                    )
                    runs = [loop.run(program(kind), request) for _ in range(RUNS)]
                    spent = [1e3 * (r.total_seconds - r.engine_seconds) / CALLS for r in runs[1:]]
                    results[f"{kind}, guidance {guidance:g}, {mode}"] = {
                        "median": round(statistics.median(spent), 4), "best": round(min(spent), 4),
                    }
    for name, figures in results.items():
        print(f"{name:28s} median {figures['median']:.3f}, best {figures['best']:.3f} ms per denoiser evaluation")
    if arguments.json:
        arguments.json.write_text(json.dumps({"loop_overhead_ms_per_call": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
