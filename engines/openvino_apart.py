"""What OpenVINO makes of a graph, found out in a process of its own.

OpenVINO's compiler is native code that dies on some graphs (seen: a segmentation fault in 2026.4.1), and a compile that
only wants to look at its work must not die with it.  One child serves all graphs of this process; it ends with it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantempo.contracts.engine import EngineOptions
from quantempo.errors import EngineError, QuantempoError

_LOCK = threading.Lock()
_child: subprocess.Popen[str] | None = None


def integer_layers(graph: Path, sizes: Mapping[str, int]) -> frozenset[str]:
    """`quantempo.engines.openvino.integer_layers`, whatever OpenVINO does.

    Args:
        graph: an ONNX file.
        sizes: of the symbolic dimensions.

    Raises:
        EngineError: OpenVINO refuses the graph, or dies of it.
    """
    with _LOCK:
        child = _started()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps({"graph": str(graph.resolve()), "sizes": dict(sizes)}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = child.wait()
            _stop()
            raise EngineError(
                f"openvino {graph.name}", found=f"its compiler died ({_how(code)})",
                wanted="a graph that OpenVINO compiles", cause="a mistake in this version of OpenVINO",
                remedy="run this model with the engine 'ort', or try another version of openvino",
            )
    answer = json.loads(line)
    if "refused" in answer:
        raise EngineError(
            answer["where"], found=answer["refused"], wanted="a graph that OpenVINO compiles",
            cause="the graph and this version of OpenVINO do not fit", remedy="run this model with the engine 'ort'",
        )
    return frozenset(answer["layers"])


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _started() -> subprocess.Popen[str]:
    global _child
    if _child is None or _child.poll() is not None:
        _stop()
        _child = subprocess.Popen(
            [sys.executable, "-m", "quantempo.engines.openvino_apart"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
    return _child


@atexit.register
def _stop() -> None:
    global _child
    child, _child = _child, None
    if child is not None:
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was not sent to a dead child
                    stream.close()
        child.wait()


def main() -> None:
    """The child: a request a line on standard input, an answer a line on standard output."""
    # Native code may print: what it writes there must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    from quantempo.engines import openvino

    try:
        return {"layers": sorted(openvino.integer_layers(Path(request["graph"]), EngineOptions(), request["sizes"]))}
    except QuantempoError as error:
        return {"where": error.where, "refused": error.found}


if __name__ == "__main__":
    main()
