"""Closed profiles of what a bundle can be made for.

A profile says, before any work, which number formats a device computes in, which dialect and float type it reads, which
operator sets and library versions are meant, and which patterns are known to go wrong there, each with the public
report of it.  There is no open-ended target: an unknown name is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from quantempo.engines.cpu import CpuFeatures, IntegerTypes, cpu_features, integer_types
from quantempo.errors import EngineError, PlanError, RequestError, nearest

Backend = Literal["ort", "openvino", "tensorrt", "tensorrt_rtx"]
NumberFormat = Literal["int8", "int8-weights", "int4-weights", "fp8", "nvfp4", "float16", "bfloat16", "float32"]
Dialect = Literal["float", "ort", "portable", "unfold", "fp8"]
FloatType = Literal["float32", "float16", "bfloat16"]

SHORT: dict[FloatType, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Float types in the names of graphs, `VARIANT.DIALECT-TYPE`."""

_TENSOR_CORES = IntegerTypes(8, True, "integer cores add into 32 bits")


@dataclass(frozen=True)
class KnownBad:
    """A pattern that goes wrong on a target.

    Args:
        pattern: what the graph holds.
        effect: what happens.
        thread: public report, `owner/repository#number` or a documentation page.
        rule: the rule of `check` that finds it; empty where a graph does not show it.
    """

    pattern: str
    effect: str
    thread: str
    rule: str = ""


@dataclass(frozen=True)
class Target:
    """One profile.

    Args:
        name: what `--target` takes.
        title: for people.
        backend: engine that runs it.
        formats: number formats that it computes in, best first.
        graphs: dialect and float type of the graphs that it reads, best first.
        opset: lowest and highest version of ONNX's own operators.
        library: the library's name.
        versions: from (inclusive) and to (exclusive); an empty end is open.
        capability: CUDA compute capability; empty for a CPU.
        integers: what its integer products take without loss; `compile --target` stores weights accordingly.
        known_bad: see there.
        notes: one sentence each.
    """

    name: str
    title: str
    backend: Backend
    formats: tuple[NumberFormat, ...]
    graphs: tuple[tuple[Dialect, FloatType], ...]
    opset: tuple[int, int]
    library: str
    versions: tuple[str, str]
    capability: str = ""
    integers: IntegerTypes = _TENSOR_CORES
    known_bad: tuple[KnownBad, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tensorrt(self) -> bool:
        """Whether graphs go through TensorRT's ONNX parser."""
        return self.backend in ("tensorrt", "tensorrt_rtx")

    @property
    def kinds(self) -> tuple[str, ...]:
        """`graphs` as names, `DIALECT-TYPE`."""
        return tuple(f"{dialect}-{SHORT[kind]}" for dialect, kind in self.graphs)


_SLOW_QDQ = KnownBad(
    "quantizers around fused attention, or around products with K or N under 16",
    "the INT8 engine is slower than the FP16 one", "NVIDIA/TensorRT#3724, NVIDIA/TensorRT#2905", "tiny-product",
)
_ZERO_POINT = KnownBad(
    "UINT8 or non-zero zero points, DynamicQuantizeLinear", "the parser refuses the graph",
    "NVIDIA/TensorRT#4698, NVIDIA/TensorRT#3963", "zero-point",
)
_SCALE = KnownBad("a scale that is not above zero", "the parser aborts", "NVIDIA-AI-IOT/Lidar_AI_Solution#182", "scale")
_BIAS = KnownBad(
    "a bias stored as INT32 with a DequantizeLinear", "the parser refuses the node",
    "onnx/onnx-tensorrt#850, microsoft/onnxruntime#14229", "int32-bias",
)
_RMS = KnownBad(
    "RMSNormalization (opset 23)", "the parser has no importer before 10.15", "NVIDIA/TensorRT#4639", "operator-set"
)
_ATTENTION = KnownBad(
    "the Attention operator (opset 23)", "cannot be quantized inside; fails to build on some releases",
    "NVIDIA/TensorRT#4705", "attention",
)
_PLAN = KnownBad(
    "an engine file from another GPU or library version", "it does not load",
    "NVIDIA/TensorRT#564, NVIDIA/TensorRT#4259",
)
_GROUP_NORM = KnownBad(
    "GroupNormalization of opset 21 (scale and bias per channel)", "the parser of TensorRT before 10.9 fails",
    "NVIDIA/TensorRT#4336", "group-norm",
)
_GROUP_NORM_ONE = KnownBad(
    "GroupNormalization with one group", "computes instance normalization instead (10.16)", "NVIDIA/TensorRT#4756",
    "group-norm-one",
)
_ORIN_DQ = KnownBad(
    "Reshape, Transpose or Slice between a quantizer and its product",
    "Orin's compiler cannot infer the type; Thor's can", "NVIDIA/TensorRT#4832", "detached-quantizer",
)
_JETSON = KnownBad(
    "FP8 or FP4 on Orin", "engines cannot be built: the GPU has no such type", "NVIDIA/Isaac-GR00T#575",
    "number-format",
)
_NO_FP8 = KnownBad(
    "FP8 on Ampere or Turing", "the build ends in an error", "NVIDIA/Model-Optimizer#70", "number-format"
)
_FLAGS = KnownBad(
    "FP8 or FP4 asked for with builder flags instead of types in the graph", "computes in float without a word",
    "NVIDIA/TensorRT#4590",
)
_COMMON = (_SLOW_QDQ, _ZERO_POINT, _SCALE, _BIAS, _ATTENTION)

_FLOATS: tuple[FloatType, ...] = ("float16", "bfloat16", "float32")
_TURING: tuple[NumberFormat, ...] = ("int8", "int8-weights", "int4-weights", "float16", "float32")
_AMPERE: tuple[NumberFormat, ...] = (*_TURING[:4], "bfloat16", "float32")
_FP8: tuple[NumberFormat, ...] = ("fp8", *_AMPERE)

_CPU = Target(
    "cpu", "this CPU, ONNX Runtime", "ort", ("int8", "int8-weights", "float32"),
    (("ort", "float32"), ("portable", "float32"), ("float", "float32")), (13, 23), "onnxruntime", ("1.23", "2"),
    known_bad=(
        KnownBad(
            "U8 activations and 8-bit weights without VNNI", "sums saturate: wrong numbers",
            "microsoft/onnxruntime#6004, microsoft/onnxruntime#14642", "saturation",
        ),
        KnownBad("FP8 quantizers", "the session cannot be made", "microsoft/onnxruntime#22269", "number-format"),
        KnownBad("INT8 graphs without fusion", "slower than float32", "microsoft/onnxruntime#20052", "unfused"),
    ),
    notes=("Half-precision graphs are emulated on x86: ship float32.",),
)
_OPENVINO = Target(
    "openvino", "this CPU, OpenVINO", "openvino", ("int8", "int8-weights", "bfloat16", "float32"),
    (("portable", "float32"), ("float", "float32")), (13, 23), "openvino", ("2025.0", ""),
    known_bad=(
        KnownBad(
            "8-bit weights without VNNI", "sums saturate: wrong numbers", "openvinotoolkit/openvino#25342", "saturation"
        ),
    ),
    notes=("The rest of the graph may compute in bfloat16 (setting `precision`).",),
)


def _gpu(
    name: str, title: str, capability: str, formats: tuple[NumberFormat, ...], *known_bad: KnownBad, rtx: bool = False
) -> Target:
    floats = tuple(kind for kind in _FLOATS if kind in formats)
    dialects: tuple[Dialect, ...] = ("fp8", "portable") if "fp8" in formats else ("portable",)
    pairs = ((dialect, kind) for dialect in dialects for kind in floats)
    graphs = tuple(pair for pair in pairs if pair != ("fp8", "float32"))
    if rtx:
        return Target(
            name, title, "tensorrt_rtx", formats, graphs, (13, 24), "tensorrt_rtx", ("1.4", "2"), capability,
            known_bad=(*_COMMON, *known_bad),
            notes=("Quantized graphs build and keep integer products; how fast they are was not measured by us.",),
        )
    return Target(
        name, title, "tensorrt", formats, graphs, (13, 24), "tensorrt", ("10.13", "12"), capability,
        known_bad=(*_COMMON, _RMS, _GROUP_NORM_ONE, _PLAN, *known_bad),
    )


_ORIN = _gpu("orin-jp7", "Jetson Orin, JetPack 7", "8.7", _AMPERE, _ORIN_DQ, _JETSON)
_BLACKWELL: tuple[NumberFormat, ...] = ("nvfp4", *_FP8)
_TARGETS = {
    target.name: target
    for target in (
        _CPU,
        _OPENVINO,
        replace(
            _ORIN, name="orin-jp6", title="Jetson Orin, JetPack 6", versions=("10.3", "10.14"), opset=(13, 21),
            formats=_TURING, graphs=(("portable", "float16"), ("portable", "float32")),
            known_bad=(*_COMMON, _RMS, _GROUP_NORM, _ORIN_DQ, _JETSON, _PLAN),
            notes=(
                "TensorRT 10.3 documents opset 9 to 20; of opset 21 it reads the quantizers.",
                "Scales must be constants of the data's type.",
            ),
        ),
        replace(_ORIN, versions=("10.13", "12"), notes=("TensorRT 11.2 and 11.3 do not exist for Jetson.",)),
        _gpu("thor", "Jetson Thor", "11.0", _BLACKWELL, _FLAGS),
        _gpu("ampere", "A100, A10, A30, A40", "8.0", _AMPERE, _NO_FP8),
        _gpu("ada", "L4, L40, RTX 6000 Ada", "8.9", _FP8),
        _gpu("hopper", "H100, H200", "9.0", _FP8),
        _gpu("blackwell", "B100, B200", "10.0", _BLACKWELL),
        replace(
            _gpu("rtx-turing", "GeForce RTX 20", "7.5", _TURING, _NO_FP8, rtx=True),
            graphs=(("unfold", "float16"), ("portable", "float16")), notes=(
                "float32 products do not build for Turing: float16 alone.",
                "INT8 convolutions are missing (TensorRT for RTX 1.7.1): dialect `unfold` makes products of them.",
            ),
        ),
        _gpu("rtx-a100", "A100, A30 with TensorRT for RTX", "8.0", _AMPERE, _NO_FP8, rtx=True),
        _gpu("rtx-ampere", "GeForce RTX 30", "8.6", _AMPERE, _NO_FP8, rtx=True),
        _gpu("rtx-ada", "GeForce RTX 40", "8.9", _FP8, rtx=True),
        _gpu("rtx-blackwell", "GeForce RTX 50", "12.0", _BLACKWELL, rtx=True),
        _gpu("rtx-spark", "DGX Spark", "12.1", _BLACKWELL, rtx=True),
    )
}


def targets() -> tuple[str, ...]:
    """All target names."""
    return tuple(_TARGETS)


def target(name: str, cpu: CpuFeatures | None = None) -> Target:
    """A profile by name; `cpu` and `openvino` are completed with what the CPU can do.

    Args:
        name: among `targets()`.
        cpu: the CPU that is meant; by default the one that this process runs on.

    Raises:
        RequestError: there is no such target.
    """
    known = _TARGETS.get(name)
    if known is None:
        raise RequestError(
            "target", found=repr(name), wanted=f"one of {', '.join(_TARGETS)}",
            cause="a misspelling, or a target of a newer version", remedy=nearest(name, _TARGETS),
        )
    if known.capability:
        return known
    return replace(known, integers=integer_types(cpu or cpu_features()))


def require_format(profile: Target, wanted: NumberFormat) -> None:
    """Refuse a number format that a target lacks, before any work.

    Raises:
        PlanError: with the formats that the target has.
    """
    if wanted not in profile.formats:
        raise PlanError(
            f"target {profile.name!r}", found=f"number format {wanted!r}",
            wanted=f"one of {', '.join(profile.formats)}",
            cause=f"{profile.title} has no kernels for it", remedy=f"use {profile.formats[0]!r}, the best that it has",
        )


def version_fits(profile: Target, version: str) -> bool:
    """Whether a library version is in the profile's range."""
    low, high = profile.versions
    found = parse_version(version)
    return (not low or found >= parse_version(low)) and (not high or found < parse_version(high))


def require_version(profile: Target, installed: str) -> None:
    """Refuse a library outside a profile's range.

    Raises:
        EngineError: with the range.
    """
    if not version_fits(profile, installed):
        low, high = profile.versions
        package = profile.library.replace("_", "-")
        raise EngineError(
            f"target {profile.name!r}", found=f"{profile.library} {installed}",
            wanted=f"{profile.library} from {low or 'any'}{f' to below {high}' if high else ' on'}",
            cause="this range was tried or is documented; outside it graphs may not open, or compute wrongly",
            remedy=f"install a version of the range, e.g.: pip install '{package}>={low}{f',<{high}' if high else ''}'",
        )


def parse_version(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    found = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(part) for part in found.group().split(".")) if found else ()
