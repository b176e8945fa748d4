"""The structure of an ONNX graph, without its weights.

What rules and engines need: nodes, constants (type, shape and place), inputs and outputs with their symbolic sizes,
operator sets, weight files.  `onnx_reader` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.tensors import TensorSpec

DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1", 24: "float8e8m0", 25: "uint2", 26: "int2",
}
"""TensorProto.DataType by number; numpy's words where numpy has the type."""

BITS = {"uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2, "bfloat16": 16}
_NOT_NUMPY = ("string", "complex64", "complex128")
READABLE_BYTES = 1 << 20
"""Constants up to this size can be read; larger ones are weights."""

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
        locations: the weight files as written in it, by whatever tensor refers to them.
        main_values: what the nodes of the main graph write.
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
    locations: tuple[str, ...] = ()
    main_values: tuple[str, ...] = ()

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


def _numpy_word(dtype: str) -> str:
    return "O" if dtype == "string" else dtype
