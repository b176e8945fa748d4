"""What opening a graph file needs: its weight files, checked, and inner tensors as further outputs.

Reads and writes the file without the onnx package; `onnx_reader` has the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from quantempo.engines.onnx_reader import read_graph
from quantempo.errors import EngineError, UnsafePath, nearest

_GRAPH, _OUTPUT, _NAME = 7, 12, 1
"""Field numbers: ModelProto.graph, GraphProto.output, ValueInfoProto.name."""


def external_files(path: Path) -> tuple[str, ...]:
    """The weight files that a graph refers to, as written in it; subgraphs and functions included.

    Raises:
        UnsafePath: a location that is absolute, climbs out of the graph's folder or has a backslash.
        EngineError: the file is not an ONNX model.
    """
    names = read_graph(path).locations
    for name in names:
        if not name or "\\" in name or ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UnsafePath(
                f"{path.name}: external data", found=f"location {name!r}", wanted="a path below the graph's folder",
                cause="the graph was made or changed by somebody else's tool", remedy="do not use this graph",
            )
    return names


def with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """The bytes of a graph with further inner tensors as graph outputs.

    In protobuf, a second occurrence of a message field is merged into the first; so it is enough to append one more
    `graph` field that holds nothing but the outputs.  Their types are left to the engine's shape inference.

    Raises:
        EngineError: no node writes such a tensor.
    """
    check_written(path, names)
    outputs = b"".join(_message(_OUTPUT, _message(_NAME, name.encode())) for name in names)
    return path.read_bytes() + _message(_GRAPH, outputs)


def check_written(path: Path, names: Sequence[str]) -> None:
    """Refuse names that no node of the main graph writes.

    Raises:
        EngineError: names the nearest.
    """
    known = set(read_graph(path).main_values) if names else set()
    for name in names:
        if name not in known:
            raise EngineError(
                f"{path.name}: extra output {name!r}", found="no such tensor", wanted="an output of a node",
                cause="the name belongs to another graph", remedy=nearest(name, known),
            )


def _message(field: int, body: bytes) -> bytes:
    """A length-delimited field."""
    return _encode(field << 3 | 2) + _encode(len(body)) + body


def _encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def check_external_files(graph: Path) -> None:
    """Refuse a graph whose weight files are missing, or are reached through a link.

    Raises:
        UnsafePath, EngineError.
    """
    for name in external_files(graph):
        # Each folder on the way counts: a link to a folder leaves the bundle as well as a link to a file.
        steps = [graph.parent.joinpath(*Path(name).parts[: i + 1]) for i in range(len(Path(name).parts))]
        if any(step.is_symlink() for step in steps):
            raise UnsafePath(
                f"{graph.name}: external data", found=f"{name!r} is a link", wanted="a plain file",
                cause="the folder was put together by hand", remedy="copy the file to where the link is",
            )
        if not steps[-1].is_file():
            raise EngineError(
                f"{graph.name}: external data", found=f"no file {name!r}", wanted=f"it next to {graph.name}",
                cause="the graph was copied without its weights", remedy="copy the weight file as well",
            )
