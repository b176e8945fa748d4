"""What a compiled engine runs, as a list of kernels with the types of their operands.

Two sources: the text that TensorRT-RTX's compiler leaves in its plans, which can be read without a GPU, and the JSON
of TensorRT's engine inspector, which needs a loaded engine.  Both need a build with detailed profiling verbosity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantempo.errors import EngineError

INTEGERS = frozenset({"int8", "uint8"})
FLOATS8 = frozenset({"fp8"})


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes.

    Args:
        dtype: `int8`, `fp8`, `half`, `bf16`, `float`, …; `?` where the source does not say.
        constant: whether it is a weight or another stored value.
        size: number of elements; 0 where unknown.
    """

    name: str
    dtype: str
    constant: bool = False
    size: int = 0

    @property
    def narrow(self) -> bool:
        """Whether it is quantized."""
        return self.dtype in INTEGERS or self.dtype in FLOATS8


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Args:
        kind: as the compiler calls it: `fully_connected`, `corrltn` (a convolution), `function`, …
        layers: names of the ONNX nodes that it computes.
        inner: part of a fused kernel that is in the list too.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    layers: tuple[str, ...]
    inner: bool = False

    @property
    def product(self) -> bool:
        """Whether it is a matrix product or a convolution, or an attention made of two products."""
        return self.kind in _PRODUCTS or self.attention

    @property
    def sizes_only(self) -> bool:
        """Whether it works on sizes instead of tensors: single integers and truth values, or waiting for a stream.

        A graph with a free batch has hundreds of them, and they say nothing about its speed.
        """
        operands = (*self.inputs, *self.outputs)
        return not self.product and all(o.dtype in _SIZES and o.size <= 1 for o in operands)

    @property
    def attention(self) -> bool:
        """Whether it is a whole attention in one kernel."""
        return "mha" in self.name.lower()


_SIZES = frozenset({"int64", "int32", "bool"})
_PRODUCTS = frozenset({"fully_connected", "corrltn", "convolution", "gemm", "caskgemm", "caskconvolution", "matmul"})
_PROGRAM = b"header {\n"
_TENSOR = re.compile(r"^ *(?:sub_)?tensor=\{(.*)\}$", re.MULTILINE)
_KERNEL = re.compile(r"^ *(\w+)=\{(.*)\}$", re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def plan_kernels(plan: bytes) -> tuple[Kernel, ...]:
    """The kernels of a TensorRT-RTX plan.

    Raises:
        EngineError: the plan holds no such list.
    """
    programs = [_Program(text) for text in _programs(plan)]
    constants = {name for program in programs for name, operand in program.tensors.items() if operand.constant}
    kernels = [kernel for program in programs for kernel in program.kernels(constants)]
    if not kernels:
        raise EngineError(
            "fusion gate", found=f"a plan of {len(plan)} bytes without a kernel list",
            wanted="the text that the compiler leaves in a plan",
            cause="the plan is cut short, or this version of TensorRT-RTX writes it in another form",
            remedy="build again with detailed profiling verbosity, and with a version that the target names",
        )
    return tuple(kernels)


def _programs(plan: bytes) -> Iterator[str]:
    start = plan.find(_PROGRAM)
    while start >= 0:
        end = plan.find(b"\0", start)
        end = len(plan) if end < 0 else end
        yield plan[start:end].decode("utf-8", "replace")
        start = plan.find(_PROGRAM, end)


class _Program:
    """One list of kernels, and the tensors that they name."""

    def __init__(self, text: str) -> None:
        head, _, self._body = text.partition("\nmain {\n")
        # The compiler spells out a fusion, which is one kernel of the engine, as a program for any device.
        self._inner = "accelerators={*}" in head.partition("descriptors {")[0]
        operands = (_operand(match.group(1)) for match in _TENSOR.finditer(head))
        self.tensors = {operand.name: operand for operand in operands}

    def kernels(self, constants: set[str]) -> Iterator[Kernel]:
        """The kernels in order; `constants` are the stored values of the whole plan."""

        def look_up(names: list[str]) -> tuple[Operand, ...]:
            found = (self.tensors.get(name, Operand(name, "?")) for name in names)
            return tuple(Operand(o.name, o.dtype, o.name in constants, o.size) for o in found)

        for match in _KERNEL.finditer(self._body):
            kind, fields = match.groups()
            inputs = _names(fields, "input_args") or _names(fields, "input")
            outputs = _names(fields, "output_args") or _names(fields, "output")
            layers = tuple(_LAYER.findall(fields))
            yield Kernel(_word(fields, "name"), kind, look_up(inputs), look_up(outputs), layers, self._inner)


def _operand(fields: str) -> Operand:
    size = 1
    for number in _inside(fields, "dims").split():
        size *= int(number) if number.isdecimal() else 0
    return Operand(_word(fields, "name"), _dtype(_word(fields, "type")), "const_payload_size=" in fields, size)


def _dtype(word: str) -> str:
    """One word per type: the compiler says `fp8_e4m3`, the inspector `FP8`."""
    lower = word.lower()
    return next((kind for kind in ("fp8", "uint8", "int8", "bf16", "half", "float") if kind in lower), lower or "?")


def _word(fields: str, key: str) -> str:
    found = re.search(rf'(?:^|\s){key}=(?:"([^"]*)"|(\S+))', fields)
    return (found.group(1) or found.group(2) or "") if found else ""


def _inside(fields: str, key: str) -> str:
    found = re.search(rf"(?:^|\s){key}=\{{([^}}]*)\}}", fields)
    return found.group(1) if found else ""


def _names(fields: str, key: str) -> list[str]:
    return re.findall(r'"([^"]*)"', _inside(fields, key))


def inspector_kernels(text: str) -> tuple[Kernel, ...]:
    """The kernels in TensorRT's engine inspector output (`LayerInformationFormat.JSON`).

    Raises:
        EngineError: the text is no such JSON, or was made without detailed profiling verbosity.
    """
    try:
        layers = json.loads(text)["Layers"]
        found = tuple(_inspected(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            "fusion gate", found=f"inspector output that cannot be read ({type(error).__name__}: {error})",
            wanted="JSON with a list `Layers` of objects",
            cause="the engine was built without detailed profiling verbosity, or the text is cut short",
            remedy="build with ProfilingVerbosity.DETAILED and ask for LayerInformationFormat.JSON",
        ) from error
    return found


def _inspected(layer: Any) -> Kernel:
    inputs = [_inspected_operand(operand) for operand in layer.get("Inputs", [])]
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Count", 0):
        stored = Operand("weights", _dtype(str(weights.get("Type", "?"))), True, int(weights["Count"]))
        inputs = [*inputs[:1], stored, *inputs[1:]]
    outputs = tuple(_inspected_operand(operand) for operand in layer.get("Outputs", []))
    names = tuple(_LAYER.findall(str(layer.get("Metadata", ""))))
    kind = str(layer.get("LayerType", "?")).lower()
    return Kernel(str(layer["Name"]), kind, tuple(inputs), outputs, names)


def _inspected_operand(operand: Any) -> Operand:
    size = 1
    for number in operand.get("Dimensions", []):
        size *= max(int(number), 0)
    name = str(operand["Name"])
    dtype = _dtype(str(operand.get("Format/Datatype", operand.get("Datatype", "?"))))
    return Operand(name, dtype, "const" in name, size)
