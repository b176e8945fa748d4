"""What a target refuses, what will be slow there, and what stays in higher precision: seconds, no device, no library.

Rules work on the structure of the graph alone; weights are not read.  A rule is a small function in `rules_quantizers`
or `rules_graph` and one line in the table below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantempo.engines import rules_graph, rules_quantizers
from quantempo.engines.onnx_graph import OnnxGraph
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.rules import Finding, Level, Subject
from quantempo.engines.targets import Backend, Target

__all__ = ["Finding", "Rule", "RULES", "check_graph", "check_structure", "refusals", "summary"]

_ALL: tuple[Backend, ...] = ("ort", "openvino", "tensorrt", "tensorrt_rtx")
_TRT: tuple[Backend, ...] = ("tensorrt", "tensorrt_rtx")
_COMPILERS: tuple[Backend, ...] = ("openvino", *_TRT)
_CPUS: tuple[Backend, ...] = ("ort", "openvino")
_ORDER: dict[Level, int] = {"refused": 0, "slow": 1, "kept": 2}


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Args:
        name: what findings carry.
        run: looks at a graph.
        backends: where it holds.
        only: capability that it is limited to; empty for all.
    """

    name: str
    run: Callable[[Subject], Iterator[Finding]]
    backends: tuple[Backend, ...]
    only: str = ""

    def applies(self, target: Target) -> bool:
        """Whether a target is concerned."""
        return target.backend in self.backends and self.only in ("", target.capability)


RULES = (
    Rule("library-version", rules_graph.library_version, _ALL),
    Rule("opset", rules_graph.opset, _ALL),
    Rule("inline-weights", rules_graph.inline_weights, _ALL),
    Rule("unsafe-path", rules_graph.unsafe_path, _ALL),
    Rule("contrib", rules_graph.contrib, _ALL),
    Rule("operator-set", rules_graph.operator_set, _TRT),
    Rule("group-norm", rules_graph.group_norm, ("tensorrt",)),
    Rule("group-norm-one", rules_graph.group_norm_one, ("tensorrt",)),
    Rule("attention", rules_graph.attention, _ALL),
    Rule("control-flow", rules_graph.control_flow, _TRT),
    Rule("float-type", rules_graph.float_type, _ALL),
    Rule("zero-point", rules_quantizers.zero_point, _TRT),
    Rule("scale", rules_quantizers.scale, _ALL),
    Rule("scale-type", rules_quantizers.scale_type, ("tensorrt",)),
    Rule("int32-bias", rules_quantizers.int32_bias, _TRT),
    Rule("scalar-input", rules_quantizers.scalar_input, _TRT),
    Rule("number-format", rules_quantizers.number_format, _ALL),
    Rule("runtime-scale", rules_quantizers.runtime_scale, _COMPILERS),
    Rule("channel-scale", rules_quantizers.channel_scale, _ALL),
    Rule("integer-convolution", rules_quantizers.integer_convolution, ("tensorrt_rtx",), only="7.5"),
    Rule("weight-axis", rules_quantizers.weight_axis, _ALL),
    Rule("scale-mul", rules_quantizers.scale_mul, _TRT),
    Rule("quantizer-before-activation", rules_quantizers.quantizer_before_activation, _ALL),
    Rule("detached-quantizer", rules_quantizers.detached_quantizer, ("tensorrt",), only="8.7"),
    Rule("saturation", rules_quantizers.saturation, _CPUS),
    Rule("bias-rank", rules_graph.bias_rank, ("ort",)),
    Rule("unfused", rules_graph.unfused, ("ort",)),
    Rule("weight-only", rules_graph.weight_only, ("ort",)),
    Rule("tiny-product", rules_graph.tiny_product, _ALL),
    Rule("kept-product", rules_graph.kept_product, _ALL),
)


def check_graph(graph: Path, target: Target, version: str | None = None) -> tuple[Finding, ...]:
    """Check a graph file for a target.

    Args:
        graph: ONNX file; its weight files need not be there.
        target: see `quantempo.engines.targets.target`.
        version: of the target's library, where it is known; otherwise the lowest of the profile's range counts.

    Returns:
        What was found, refusals first; empty where nothing was.

    Raises:
        EngineError: the file is not an ONNX model.
    """
    return check_structure(read_graph(graph), target, version)


def check_structure(graph: OnnxGraph, target: Target, version: str | None = None) -> tuple[Finding, ...]:
    """Check a graph that was read already."""
    subject = Subject(graph, target, version or target.versions[0] or "0")
    found = [finding for rule in RULES if rule.applies(target) for finding in rule.run(subject)]
    return tuple(sorted(found, key=lambda finding: _ORDER[finding.level]))


def refusals(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """What has to be mended before anything else."""
    return tuple(finding for finding in findings if finding.level == "refused")


def summary(findings: Iterable[Finding]) -> tuple[tuple[Level, str, int, Finding], ...]:
    """Findings by level and rule: how many, and the first of them."""
    findings = list(findings)
    counts = Counter((finding.level, finding.rule) for finding in findings)
    first: dict[tuple[Level, str], Finding] = {}
    for finding in findings:
        first.setdefault((finding.level, finding.rule), finding)
    return tuple((*key, counts[key], finding) for key, finding in first.items())
