"""What TensorRT says, put into our five parts: parser refusals, types that a GPU lacks, memory that ran out.

No engine library is needed here: the texts come from the builder's log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantempo.engines.onnx_graph import OnnxGraph, OnnxNode
from quantempo.errors import EngineError, nearest

_SKIPPED = re.compile(r"skipping tactic|insufficient (?:device )?memory|memory is insufficient", re.IGNORECASE)
_TIMED = re.compile(r"tactic(?: name)?: ?\S+.*\btime: ", re.IGNORECASE)
_NO_ROOM = re.compile(
    r"within workspace limit|insufficient (?:workspace|memory)|out of memory|outofmemory|bad_alloc|cannot allocate|"
    r"MEM_ALLOC_FAILED|failed to allocate", re.IGNORECASE,
)
_NO_TYPE = re.compile(r"HW-specific datatypes?: *([\w, ]+)")
_TURING = re.compile(r"Cannot compile operation '([^']*)' for Turing \(SM75\): (.*?)(?:\.|$|;|\])")
_NO_DRIVER = re.compile(
    r"CHECK\(status == CUDA_SUCCESS\)|no CUDA-capable device|CUDA initialization failure|driver|"
    r"Error Code 1: Cuda Runtime|graph_jit"
)


@dataclass(frozen=True)
class ParserError:
    """One complaint of the ONNX parser.

    Args:
        text: its own words.
        node, operator: of the ONNX graph; empty where it names none.
    """

    text: str
    node: str = ""
    operator: str = ""


@dataclass(frozen=True)
class Tactics:
    """How many ways to compute a layer were tried, and how many of them were left out for want of memory."""

    tried: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.skipped} of {self.tried + self.skipped} tactics skipped"


def count_tactics(lines: Iterable[str]) -> Tactics:
    """Tactics in a builder's verbose log."""
    tried = skipped = 0
    for line in lines:
        if _SKIPPED.search(line):
            skipped += 1
        elif _TIMED.search(line):
            tried += 1
    return Tactics(tried, skipped)


def parser_refusal(where: str, errors: Sequence[ParserError], graph: OnnxGraph) -> EngineError:
    """The parser does not take the graph: which node, of which module, and why."""
    first = errors[0] if errors else ParserError("no reason given")
    node = _node(first, graph)
    operator = first.operator or (node.op_type if node else "")
    place = f"node {first.node!r}" if first.node else "a node without a name"
    if node is not None:
        place += f" of module {module_path(node)!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return EngineError(
        where, found=f"{operator or 'an operator'} at {place} that the parser refuses: {_one_line(first.text)}{more}",
        wanted="operators that this version of TensorRT's ONNX parser has an importer for",
        cause="the graph was written for another target, or edited",
        remedy="run `quantempo check` for this target; keep the module in float, or compile the bundle again",
    )


def module_path(node: OnnxNode) -> str:
    """The module that a node came from: what the exporter noted, else the front of its name."""
    return node.module or (node.name or (node.outputs[0] if node.outputs else "")).rsplit("/", 1)[0]


def _node(error: ParserError, graph: OnnxGraph) -> OnnxNode | None:
    for node in graph.nodes:
        if error.node and error.node in (node.name, *node.outputs):
            return node
    return None


def build_failure(where: str, lines: Sequence[str], tactics: Tactics, *, memory: str, capability: str) -> EngineError:
    """The builder made no plan; its last words, and what they mean.

    Args:
        where: the graph.
        lines: errors that it logged.
        tactics: see `count_tactics`.
        memory: the limit that was set, for people; empty where none was.
        capability: of the device that was meant.
    """
    said = _one_line(lines[-1]) if lines else "nothing"
    text = "\n".join(lines)
    if match := _NO_TYPE.search(text):
        return EngineError(
            where, found=f"values of type {match.group(1).strip()}",
            wanted=f"types that compute capability {capability} has",
            cause="the GPU has no such number format; FP8 needs capability 8.9 or more",
            remedy="build an int8 graph for this device",
        )
    if match := _TURING.search(text):
        return EngineError(
            where, found=f"{match.group(2).strip()} at {match.group(1)!r}", wanted="products of float16 or INT8",
            cause="TensorRT-RTX has no float32 products for Turing",
            remedy="build a float16 graph: compile the bundle with the portable dialect in float16",
        )
    if _NO_ROOM.search(text) or (not lines and tactics.skipped):
        counted = f" ({tactics})" if tactics.skipped else ""
        return EngineError(
            where, found=f"no room to compute some layer{counted}: {said}",
            wanted=f"more memory than {memory}" if memory else "more free memory on the device",
            cause="each tactic needs scratch memory; those that do not fit are skipped, and here none was left",
            remedy="raise --memory, close what else uses the device, or build for a smaller largest batch (--shapes)",
        )
    if _NO_DRIVER.search(text):
        return EngineError(
            where, found=f"no usable GPU: {said}", wanted="a GPU and its driver",
            cause="this kind of build runs code on the device (TensorRT times kernels, and stripping weights compiles "
            "what refits them); TensorRT-RTX builds without a device otherwise, from version 1.5 on",
            remedy="build on the device, or use --weights bundle, which needs no GPU",
        )
    return EngineError(
        where, found=f"no engine: {said}", wanted="a graph that this version of TensorRT compiles",
        cause="a limit of this version, or a pattern that it does not know",
        remedy="look at the words above; `quantempo check` names what is known to go wrong",
    )


def skipped_notice(where: str, tactics: Tactics, memory: str) -> str | None:
    """What to tell a user whose engine was built although some tactics did not fit; `None` where all did."""
    if not tactics.skipped:
        return None
    limit = f"the limit of {memory}" if memory else "what the device had free"
    return (
        f"{where}: {tactics}: they need more scratch memory than {limit}. The engine is right, but may be slower than "
        "it could be; raise --memory, or build while nothing else uses the device"
    )


def died(where: str, code: int, last: str) -> EngineError:
    """The builder's process ended without an answer."""
    killed = code in (-9, 137)
    return EngineError(
        where, found=f"a builder that ended with {'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)}"
        + (f": {_one_line(last)}" if last else ""), wanted="an engine or a reason",
        cause="the system ran out of memory and ended it" if killed else "TensorRT aborted",
        remedy="free memory, or build for a smaller largest batch (--shapes)" if killed
        else "run `quantempo check` for this target: some graphs make the parser abort",
    )


def unknown_setting(where: str, found: str, known: Iterable[str]) -> EngineError:
    """A setting that the engine does not have."""
    names = sorted(known)
    return EngineError(
        f"{where}: settings", found=found, wanted=f"one of {', '.join(names)}",
        cause="a setting of another engine, or a misspelling", remedy=nearest(found.partition("=")[0], names),
    )


def _one_line(text: str, limit: int = 400) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
