"""The little of the ONNX file format that opening a graph needs, read without the onnx package.

A protobuf message is a list of (field number, wire type, value).  The walk skips what it does not need by length, so a
large file costs only its table of contents.  Field numbers are those of onnx.proto: ModelProto.graph = 7;
GraphProto.node = 1, initializer = 5, input = 11, output = 12, value_info = 13; NodeProto.output = 2, op_type = 4,
attribute = 5, domain = 7; AttributeProto.g = 6, t = 5, graphs = 11; TensorProto.external_data = 13;
StringStringEntryProto.key = 1, value = 2; ValueInfoProto.name = 1.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from quantempo.errors import EngineError, UnsafePath, nearest

_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5


def operators(path: Path) -> Counter[str]:
    """How often each operator type occurs in a graph file, subgraphs included.

    Operators outside the default domain are written `domain.Type`.

    Raises:
        EngineError: the file is not an ONNX model.
    """
    counts: Counter[str] = Counter()
    with _Opened(path) as data:
        for graph in _graphs(data, path):
            for start, end in _children(data, graph, 1):
                fields = {n: bytes(data[a:b]).decode() for n, a, b in _fields(data, start, end) if n in (4, 7)}
                domain = fields.get(7, "")
                operator = fields.get(4, "?")
                counts[operator if domain in ("", "ai.onnx") else f"{domain}.{operator}"] += 1
    return counts


def value_names(path: Path) -> list[str]:
    """The names of all node outputs of the main graph."""
    names = []
    with _Opened(path) as data:
        for graph in _main_graphs(data, path):
            for start, end in _children(data, graph, 1):
                names += [bytes(data[a:b]).decode() for n, a, b in _fields(data, start, end) if n == 2]
    return names


def external_files(path: Path) -> tuple[str, ...]:
    """The weight files that a graph refers to, as written in it.

    Raises:
        UnsafePath: a location that is absolute, climbs out of the graph's folder or has a backslash.
    """
    names: dict[str, None] = {}
    with _Opened(path) as data:
        for graph in _graphs(data, path):
            for tensor in _tensors(data, graph):
                for entry in _children(data, tensor, 13):
                    pair = {n: bytes(data[a:b]).decode() for n, a, b in _fields(data, *entry)}
                    if pair.get(1) == "location":
                        names[pair.get(2, "")] = None
    for name in names:
        if not name or "\\" in name or ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UnsafePath(
                f"{path.name}: external data", found=f"location {name!r}", wanted="a path below the graph's folder",
                cause="the graph was made or changed by somebody else's tool", remedy="do not use this graph",
            )
    return tuple(names)


def with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """The bytes of a graph with further inner tensors as graph outputs.

    In protobuf, a second occurrence of a message field is merged into the first; so it is enough to append one more
    `graph` field that holds nothing but the outputs.  Their types are left to the engine's shape inference.

    Raises:
        EngineError: no node writes such a tensor.
    """
    known = set(value_names(path))
    for name in names:
        if name not in known:
            raise EngineError(
                f"{path.name}: extra output {name!r}", found="no such tensor", wanted="an output of a node",
                cause="the name belongs to another graph", remedy=nearest(name, known),
            )
    outputs = b"".join(_message(12, _message(1, name.encode())) for name in names)
    return path.read_bytes() + _message(7, outputs)


def _message(field: int, body: bytes) -> bytes:
    return _encode(field << 3 | _LEN) + _encode(len(body)) + body


def _encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Opened:
    """A file mapped read-only for the length of a `with` block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> mmap.mmap:
        try:
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise _not_onnx(self._path, str(error)) from error
        return self._map

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _not_onnx(path: Path, found: str) -> EngineError:
    return EngineError(
        f"{path}", found=found, wanted="an ONNX graph file", cause="a wrong path, or a file that was cut short",
        remedy="compile the bundle again",
    )


Span = tuple[int, int]


def _main_graphs(data: mmap.mmap, path: Path) -> list[Span]:
    try:
        graphs = _children(data, (0, len(data)), 7)
    except (IndexError, ValueError) as error:
        raise _not_onnx(path, f"bytes that are no protobuf message ({error})") from error
    if not graphs:
        raise _not_onnx(path, "no graph in it")
    return graphs


def _graphs(data: mmap.mmap, path: Path) -> Iterator[Span]:
    """The main graph and all subgraphs."""
    pending = _main_graphs(data, path)
    while pending:
        graph = pending.pop()
        yield graph
        for node in _children(data, graph, 1):
            for attribute in _children(data, node, 5):
                pending += [(a, b) for n, a, b in _fields(data, *attribute) if n in (6, 11)]


def _tensors(data: mmap.mmap, graph: Span) -> Iterator[Span]:
    yield from _children(data, graph, 5)
    for node in _children(data, graph, 1):
        for attribute in _children(data, node, 5):
            yield from _children(data, attribute, 5)


def _children(data: mmap.mmap, span: Span, number: int) -> list[Span]:
    return [(a, b) for n, a, b in _fields(data, *span) if n == number]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field; other fields are skipped."""
    at = start
    while at < end:
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == _LEN:
            length, at = varint(data, at)
            if at + length > end:
                raise ValueError(f"a field that ends at byte {at + length}, after its message ({end})")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")


def varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A protobuf number at a position, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


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
