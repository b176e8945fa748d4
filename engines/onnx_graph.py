"""The structure of an ONNX graph, read without the onnx package and without its weights.

Where `onnx_file` answers single questions, this is the whole picture that rules and engines need: nodes, constants
(type, shape and place, not their values), inputs and outputs with their symbolic sizes, operator sets.  A large weight
costs one table entry, wherever it lies.  Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import EngineError

DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1", 24: "float8e8m0", 25: "uint2", 26: "int2",
}
"""TensorProto.DataType by number; numpy's words where numpy has the type."""

BITS = {"uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2, "bfloat16": 16}
_NOT_NUMPY = ("string", "complex64", "complex128")
_TYPED_DATA = {4: "<f4", 10: "<f8"}
_VARINT_DATA = (5, 7, 11)
READABLE_BYTES = 1 << 20
"""Constants up to this size can be read; larger ones are weights."""

Span = tuple[int, int]
Attribute = Union[int, float, str, tuple[int, ...], "OnnxTensor", None]


@dataclass(frozen=True)
class OnnxTensor:
    """A constant.

    Args:
        name: of the initializer, or of the output of the Constant node that holds it.
        dtype: a word of `DTYPES`.
        shape: its sizes.
        location: the file that holds the values; `None` inside the graph file.
        offset, length: place in that file.
        origin: the graph file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str | None
    offset: int
    length: int
    origin: Path = field(repr=False)
    inline: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("float8") else 0)
        return (self.size * bits + 7) // 8 if bits else self.size * np.dtype(_numpy_word(self.dtype)).itemsize

    @property
    def safe(self) -> bool:
        """Whether the values lie in the graph file or below its folder."""
        place = PurePosixPath(self.location or "")
        return not (place.is_absolute() or ".." in place.parts or "\\" in str(place) or ":" in str(place))

    def values(self) -> NDArray[Any] | None:
        """The values where they are small, within reach, and of a type that numpy has."""
        found = self.sample(self.size) if self.nbytes <= READABLE_BYTES else None
        return found.reshape(self.shape) if found is not None and found.size == self.size else None

    def sample(self, count: int) -> NDArray[Any] | None:
        """The first values, in storage order; `None` where they are out of reach or numpy lacks the type."""
        if self.dtype in _NOT_NUMPY or self.dtype in BITS or self.dtype.startswith("float8") or not self.safe:
            return None
        kind = np.dtype(self.dtype).newbyteorder("<")
        wanted = min(count, self.size) * kind.itemsize
        raw = self.inline[:wanted]
        if self.location is not None:
            try:
                with (self.origin.parent / self.location).open("rb") as file:
                    file.seek(self.offset)
                    raw = file.read(wanted)
            except OSError:
                return None
        return np.frombuffer(raw, kind) if len(raw) == wanted else None


@dataclass(frozen=True)
class OnnxNode:
    """One operation; inputs that are left out are empty strings.

    Args:
        module: path of the module that the exporter noted, or empty.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    module: str = ""

    @property
    def operator(self) -> str:
        """Type, with the domain in front where it is not ONNX's own."""
        return f"{self.domain}.{self.op_type}" if self.domain else self.op_type

    @property
    def where(self) -> str:
        """How a person finds it: module path, node name, or what it writes."""
        return self.module or self.name or next((name for name in self.outputs if name), self.operator)

    def input(self, index: int) -> str:
        """The name of an input; empty where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name)
        return value if isinstance(value, int) else default


@dataclass(frozen=True)
class OnnxGraph:
    """A graph file's structure.

    Args:
        nodes: of the main graph and, after them, of subgraphs and local functions.
        constants: initializers and Constant nodes by name.
        inputs, outputs: of the main graph; an unnamed free size is called `NAME.AXIS`.
        types: element type and shape of inner values, as far as the file says.
        opsets: version by domain; ONNX's own is `""`.
        file_bytes: size of the graph file.
        subgraphs: number of graphs inside nodes.
    """

    path: Path
    nodes: tuple[OnnxNode, ...]
    constants: Mapping[str, OnnxTensor]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    types: Mapping[str, TensorSpec]
    opsets: Mapping[str, int]
    file_bytes: int
    subgraphs: int = 0

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return self.opsets.get("", 0)

    @cached_property
    def producers(self) -> Mapping[str, OnnxNode]:
        """The node that writes a value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[OnnxNode, ...]]:
        """The nodes that read a value."""
        found: dict[str, list[OnnxNode]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def producer(self, name: str) -> OnnxNode | None:
        """The node that writes a value; `None` for inputs and constants."""
        return self.producers.get(name)

    def dtype(self, name: str) -> str | None:
        """Element type of a value, as far as the file says."""
        if name in self.constants:
            return self.constants[name].dtype
        spec = self.inputs.get(name) or self.types.get(name) or self.outputs.get(name)
        return spec.dtype if spec is not None else None

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """Shape of a value, as far as the file says."""
        if name in self.constants:
            return self.constants[name].shape
        spec = self.inputs.get(name) or self.types.get(name) or self.outputs.get(name)
        return spec.shape if spec is not None else None

    def origin(self, name: str) -> OnnxTensor | None:
        """The constant that a value is made of, seen through what only reshapes, casts or dequantizes."""
        while name not in self.constants:
            node = self.producers.get(name)
            if node is None or node.op_type not in _PASSING or not node.inputs:
                return None
            if not all(other in self.constants for other in node.inputs[1:] if other):
                return None
            name = node.inputs[0]
        return self.constants[name]

    def is_constant(self, name: str) -> bool:
        """Whether a value is fixed when the graph is loaded."""
        return self.origin(name) is not None

    def products(self) -> tuple[OnnxNode, ...]:
        """All matrix products and convolutions."""
        return tuple(node for node in self.nodes if node.op_type in PRODUCTS and not node.domain)

    def quantized_products(self) -> tuple[OnnxNode, ...]:
        """Products both of whose operands come out of a DequantizeLinear."""
        return tuple(node for node in self.products() if all(self.dequantizer(node.input(i)) for i in (0, 1)))

    def dequantizer(self, name: str) -> OnnxNode | None:
        """The DequantizeLinear that a value comes from, seen through transposes and reshapes."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Cast"):
            node = self.producers.get(node.input(0))
        return node if node is not None and node.op_type == "DequantizeLinear" else None


PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_PASSING = frozenset({"DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast", "Identity", "Unsqueeze"})


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


def _numpy_word(dtype: str) -> str:
    return "O" if dtype == "string" else dtype


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
        at = 0
        while at < len(self.subgraphs):
            self.graph(self.subgraphs[at], main=False)
            at += 1
        for span in functions:
            for node in [_span(value) for number, value in self.fields(span) if number == 7]:
                self.node(node)
        return OnnxGraph(
            self.path, tuple(self.nodes), self.constants, self.inputs, self.outputs, self.types, self.opsets,
            self.size, at,
        )

    def graph(self, span: Span, main: bool) -> None:
        for number, value in self.fields(span):
            if number == 1:
                self.node(_span(value))
            elif number == 5:
                tensor = self.tensor(_span(value), "")
                self.constants[tensor.name] = tensor
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
            elif number in (6, 11):
                self.subgraphs.append(_span(value))
            elif number == 8:
                integers += self.integers(value)
        return name, tuple(integers) if integers else found

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
                pair = {n: self.text(v) for n, v in self.fields(_span(value))}
                entries[pair.get(1, "")] = pair.get(2, "")
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
            number, at = self.varint(at)
            found.append(_signed(number))
        return found

    def fields(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """(field number, integer or place) of each field of a message."""
        at, end = span
        while at < end:
            tag, at = self.varint(at)
            kind = tag & 7
            if kind == 0:
                number, at = self.varint(at)
                yield tag >> 3, number
                continue
            if kind == 2:
                length, at = self.varint(at)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"bytes that are no protobuf message (wire type {kind} at byte {at})")
            if at + length > end:
                raise ValueError(f"a field that ends at byte {at + length}, after its message ({end})")
            yield tag >> 3, (at, at + length)
            at += length

    def varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = self.data[at]
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
