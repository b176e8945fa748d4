"""Reads the structure of an ONNX graph without the onnx package.

A protobuf message is a list of (field number, wire type, value).  A large weight costs one table entry, wherever it
lies: its bytes are skipped by their length.  Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.onnx_graph import BITS, DTYPES, READABLE_BYTES, Attribute, OnnxGraph, OnnxNode, OnnxTensor
from quantempo.errors import EngineError

_TYPED_DATA = (4, 10)
_VARINT_DATA = (5, 7, 11)
_NESTED = (6, 10, 11, 22, 23)

Span = tuple[int, int]


def read_graph(path: Path) -> OnnxGraph:
    """Read a graph file's structure; weights are neither read nor looked for.

    Raises:
        EngineError: the file is not an ONNX model.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).read()
    except (OSError, ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise _not_onnx(path, str(error) or type(error).__name__) from error


def _not_onnx(path: Path, found: str) -> EngineError:
    return EngineError(
        f"{path}", found=found, wanted="an ONNX graph file", cause="a wrong path, or a file that was cut short",
        remedy="compile the bundle again",
    )


class _Reader:
    """One pass over a mapped file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.nodes: list[OnnxNode] = []
        self.constants: dict[str, OnnxTensor] = {}
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self.types: dict[str, TensorSpec] = {}
        self.opsets: dict[str, int] = {}
        self.subgraphs: list[Span] = []
        self.locations: dict[str, None] = {}
        self.main_values: tuple[str, ...] = ()

    def read(self) -> OnnxGraph:
        parts: dict[int, list[Span]] = {7: [], 8: [], 25: []}
        for number, value in self.fields((0, self.size)):
            if number in parts:
                parts[number].append(_span(value))
        graphs, opsets, functions = parts.values()
        if not graphs:
            raise ValueError("no graph in it")
        for span in opsets:
            self.opset(span)
        for span in graphs:
            self.graph(span, main=True)
        self.main_values = tuple(name for node in self.nodes for name in node.outputs if name)
        at = 0
        while at < len(self.subgraphs):
            self.graph(self.subgraphs[at], main=False)
            at += 1
        for span in functions:
            for node in [_span(value) for number, value in self.fields(span) if number == 7]:
                self.node(node)
        return OnnxGraph(
            self.path, tuple(self.nodes), self.constants, self.inputs, self.outputs, self.types, self.opsets,
            self.size, at, tuple(self.locations), self.main_values,
        )

    def graph(self, span: Span, main: bool) -> None:
        for number, value in self.fields(span):
            if number == 1:
                self.node(_span(value))
            elif number == 5:
                tensor = self.tensor(_span(value), "")
                self.constants[tensor.name] = tensor
            elif number == 15:
                self.sparse(_span(value))
            elif number in (11, 12, 13):
                spec = self.value_info(_span(value), named=number != 13)
                place = self.types if number == 13 or not main else self.inputs if number == 11 else self.outputs
                if spec is not None:
                    place[spec.name] = spec
        if main:
            # Old files list initializers among the inputs.
            for name in set(self.inputs) & set(self.constants):
                del self.inputs[name]

    def node(self, span: Span) -> None:
        inputs, outputs = [], []
        words = {3: "", 4: "", 7: ""}
        attributes: dict[str, Attribute] = {}
        module = ""
        for number, value in self.fields(span):
            if number == 1:
                inputs.append(self.text(value))
            elif number == 2:
                outputs.append(self.text(value))
            elif number in words:
                words[number] = self.text(value)
            elif number == 5:
                name, attribute = self.attribute(_span(value), outputs)
                attributes[name] = attribute
            elif number == 9:
                module = self.module(_span(value)) or module
        domain = "" if words[7] == "ai.onnx" else words[7]
        node = OnnxNode(words[3], words[4], domain, tuple(inputs), tuple(outputs), attributes, module)
        held = attributes.get("value")
        if node.operator == "Constant" and outputs and isinstance(held, OnnxTensor):
            self.constants[outputs[0]] = held
            return
        self.nodes.append(node)

    def module(self, span: Span) -> str:
        key, text = "", ""
        for number, value in self.fields(span):
            if number == 1:
                key = self.text(value)
            elif number == 2:
                text = self.text(value)
        if key != "pkg.torch.onnx.name_scopes":
            return ""
        # The value is a list of nested scopes as Python writes it; the one before the last is the module.
        scopes = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
        return scopes[-2] if len(scopes) > 1 else ""

    def attribute(self, span: Span, outputs: list[str]) -> tuple[str, Attribute]:
        name, value = "", None
        integers: list[int] = []
        found: Attribute = None
        for number, value in self.fields(span):
            if number == 1:
                name = self.text(value)
            elif number == 2:
                found = float(struct.unpack("<f", self.bytes(value))[0])
            elif number == 3:
                found = _signed(value)
            elif number == 4:
                found = self.bytes(value).decode(errors="replace")
            elif number == 5:
                found = self.tensor(_span(value), outputs[0] if outputs else "")
            elif number == 8:
                integers += self.integers(value)
            elif number in _NESTED:
                self.nested(number, _span(value))
        return name, tuple(integers) if integers else found

    def nested(self, number: int, span: Span) -> None:
        """Graphs and further tensors inside an attribute."""
        if number in (6, 11):
            self.subgraphs.append(span)
        elif number == 10:
            self.tensor(span, "")
        else:
            self.sparse(span)

    def sparse(self, span: Span) -> None:
        """Values and indices of a sparse tensor; noted for the files that they may lie in."""
        for number, value in self.fields(span):
            if number in (1, 2):
                self.tensor(_span(value), "")

    def tensor(self, span: Span, default: str) -> OnnxTensor:
        name, dtype = default, 0
        dims: list[int] = []
        raw: bytes | None = None
        entries: dict[str, str] = {}
        numbers: list[int] = []
        typed = b""
        length = 0
        for number, value in self.fields(span):
            if number == 1:
                dims += self.integers(value)
            elif number == 2:
                dtype = _number(value)
            elif number == 8:
                name = self.text(value) or default
            elif number == 9:
                start, end = _span(value)
                length = end - start
                raw = self.data[start : min(end, start + READABLE_BYTES)]
            elif number == 13:
                self.external(_span(value), entries)
            elif number in _VARINT_DATA and len(numbers) <= READABLE_BYTES:
                numbers += self.integers(value)
            elif number in _TYPED_DATA and len(typed) <= READABLE_BYTES:
                typed += self.bytes(value)
        word = DTYPES.get(dtype, f"type{dtype}")
        if word.startswith("type"):
            raise ValueError(f"tensor {name!r} of an unknown type {dtype}")
        inline = raw if raw is not None else _packed(typed, numbers, word)
        return OnnxTensor(
            name, word, tuple(dims), entries.get("location"), int(entries.get("offset", 0) or 0),
            int(entries.get("length", 0) or 0) if entries else length or len(inline), self.path, inline,
        )

    def external(self, span: Span, entries: dict[str, str]) -> None:
        """One key and value of where a tensor's bytes lie."""
        pair = {number: self.text(value) for number, value in self.fields(span)}
        key, text = pair.get(1, ""), pair.get(2, "")
        entries[key] = text
        if key == "location":
            self.locations[text] = None

    def value_info(self, span: Span, named: bool) -> TensorSpec | None:
        name = ""
        dtype: str | None = None
        shape: tuple[int | str, ...] | None = None
        for number, value in self.fields(span):
            if number == 1:
                name = self.text(value)
            elif number == 2:
                for kind, tensor in self.fields(_span(value)):
                    if kind == 1:
                        dtype, shape = self.tensor_type(_span(tensor))
        if dtype is None or shape is None:
            # A value without a type (an output that was added to a finished graph) still has its name.
            return TensorSpec(name, dtype or "", ()) if named else None
        return TensorSpec(name, dtype, tuple(f"{name}.{i}" if d == "" else d for i, d in enumerate(shape)))

    def tensor_type(self, span: Span) -> tuple[str | None, tuple[int | str, ...] | None]:
        dtype, shape = None, None
        for number, value in self.fields(span):
            if number == 1:
                dtype = DTYPES.get(_number(value))
            elif number == 2:
                dims: list[int | str] = []
                for kind, dim in self.fields(_span(value)):
                    if kind == 1:
                        size: int | str = ""
                        for which, what in self.fields(_span(dim)):
                            size = _number(what) if which == 1 else self.text(what) if which == 2 else size
                        dims.append(size)
                shape = tuple(dims)
        return dtype, shape

    def opset(self, span: Span) -> None:
        domain, version = "", 0
        for number, value in self.fields(span):
            if number == 1:
                domain = self.text(value)
            elif number == 2:
                version = _number(value)
        self.opsets["" if domain == "ai.onnx" else domain] = version

    def text(self, value: int | Span) -> str:
        return self.bytes(value).decode()

    def bytes(self, value: int | Span) -> bytes:
        start, end = _span(value)
        return self.data[start:end]

    def integers(self, value: int | Span) -> list[int]:
        """A repeated integer: one value, or many in a packed field."""
        if isinstance(value, int):
            return [_signed(value)]
        at, end = value
        found = []
        while at < end:
            number, at = _varint(self.data, at)
            found.append(_signed(number))
        return found

    def fields(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """(field number, integer or place) of each field of a message."""
        at, end = span
        while at < end:
            tag, at = _varint(self.data, at)
            kind = tag & 7
            if kind == 0:
                number, at = _varint(self.data, at)
                yield tag >> 3, number
                continue
            if kind == 2:
                length, at = _varint(self.data, at)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"bytes that are no protobuf message (wire type {kind} at byte {at})")
            if at + length > end:
                raise ValueError(f"a field that ends at byte {at + length}, after its message ({end})")
            yield tag >> 3, (at, at + length)
            at += length


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
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


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def _number(value: int | Span) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number was expected")
    return value


def _signed(value: int | Span) -> int:
    number = _number(value)
    return number - (1 << 64) if number >> 63 else number


def _packed(typed: bytes, numbers: list[int], dtype: str) -> bytes:
    """The raw form of values that were written field by field."""
    if typed:
        return typed
    if not numbers or (dtype in BITS and dtype != "bfloat16") or dtype.startswith("float8"):
        return b""
    if dtype in ("float16", "bfloat16"):
        return np.array(numbers, "<u2").tobytes()
    return np.array(numbers).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
