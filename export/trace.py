"""From a diffusers module to a float ONNX graph in normal form."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

from quantempo.contracts.plan import Site
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import ExportError
from quantempo.export.families import Family, family_of
from quantempo.export.families.base import Flat
from quantempo.export.passes import normal_form, run_passes
from quantempo.export.sites import find_sites
from quantempo.export.source import ModelSource

OPSET = 21
"""The first with native GroupNormalization and the last before attention becomes one operator."""
TRACE_BATCH = 2
"""Sizes 0 and 1 would be taken for constants."""
TOLERANCE = 1e-4
Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Path, Arrays], Arrays]
"""Runs a graph file on feeds; injected, so that this package needs no engine."""


@dataclass(frozen=True)
class FloatGraph:
    """A float graph on disk.

    Args:
        path: the ONNX file; its weights are in `data`, beside it.
        data: the weight file.
        inputs, outputs: its contract.
        sites: what can be quantized.
        digest: SHA-256 over both files.
    """

    path: Path
    data: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[Site, ...]
    digest: str


def load_denoiser(source: ModelSource) -> nn.Module:
    """The denoiser in float32 and evaluation mode, from local safetensors alone."""
    return load_component(source.class_name, source.denoiser, source.variant)


def load_component(class_name: str, folder: Path, variant: str | None = None) -> nn.Module:
    """A diffusers model from a folder, in float32 (float16 weights are widened) and evaluation mode.

    Raises:
        ExportError: diffusers cannot load it.
    """
    try:
        with _quiet():
            module, loading = getattr(diffusers, class_name).from_pretrained(
                str(folder), torch_dtype=torch.float32, variant=variant, local_files_only=True, use_safetensors=True,
                low_cpu_mem_usage=False, output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ExportError(
            str(folder), found=f"weights that diffusers cannot load ({_first_line(error)})", wanted=f"a {class_name}",
            cause="configuration and weights do not belong together, or a file is damaged",
            remedy="load it in diffusers by itself, and copy the model directory again",
        ) from error
    # diffusers fills missing weights with random numbers and goes on.
    missing = sorted({*loading.get("missing_keys", ()), *map(str, loading.get("mismatched_keys", ()))})
    if missing:
        raise ExportError(
            str(folder), found=f"{len(missing)} weights missing or of another shape, such as {missing[0]}",
            wanted=f"all weights of a {class_name}", cause="configuration and weights do not belong together",
            remedy="copy the model directory again",
        )
    loaded: nn.Module = module.eval()
    return loaded


def trace(source: ModelSource, work: Path) -> FloatGraph:
    """The float graph of a model directory's denoiser, written into `work`."""
    return trace_module(load_denoiser(source), family_of(source), work)


def trace_module(module: nn.Module, family: Family, work: Path, name: str = "denoiser") -> FloatGraph:
    """The float graph of a denoiser in memory.

    Args:
        module: the bare denoiser; its attention processors are set to the plain ones, it goes to evaluation mode.
        family: how to feed it.
        work: folder for `NAME.onnx` and `NAME.onnx.data`.
        name: file name without suffix.
    """
    args = _prepared(module, family)
    graph = GraphFile(work, name, family.kept_channels)
    return export_graph(family.wrap(module), args, family.inputs(), family.outputs(), graph)


def trace_model(module: nn.Module, family: Family, name: str = "denoiser") -> ir.Model:
    """The float graph of a denoiser in normal form, in memory; arguments as for `trace_module`."""
    args = _prepared(module, family)
    return _normal_model(family.wrap(module), args, family.inputs(), family.outputs(), name, family.kept_channels)


def _prepared(module: nn.Module, family: Family) -> tuple[torch.Tensor, ...]:
    """Example arguments."""
    plain_attention(module)
    example = family.sets[0] if family.sets else family.example(TRACE_BATCH)
    return tuple(torch.from_numpy(np.array(example[spec.name])) for spec in family.inputs())


@dataclass(frozen=True)
class GraphFile:
    """Where a graph is written, and how many output channels it keeps."""

    work: Path
    name: str
    channels: int | None = None


def export_graph(
    wrapper: nn.Module,
    args: tuple[torch.Tensor, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: GraphFile,
) -> FloatGraph:
    """Export a module with flat inputs, bring the graph into normal form and write it.

    Raises:
        ExportError: the exporter or a pass failed.
    """
    model = _normal_model(wrapper, args, inputs, outputs, target.name, target.channels)
    target.work.mkdir(parents=True, exist_ok=True)
    path = target.work / f"{target.name}.onnx"
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    ir.save(model, path, external_data=data.name)
    digest = hashlib.sha256()
    for file in (path, data):
        if file.exists():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return FloatGraph(path, data, tuple(inputs), tuple(outputs), find_sites(model), digest.hexdigest())


def _normal_model(
    wrapper: nn.Module, args: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
    name: str, channels: int | None,
) -> ir.Model:
    model = _export(wrapper.eval(), args, inputs, outputs)
    model.graph.name = name
    run_passes(model, normal_form(channels))
    _finish(model, inputs, outputs)
    return model


def plain_attention(module: nn.Module) -> None:
    """Scaled-dot-product attention with separate projections: no fused QKV, no vendor kernels."""
    model: Any = module
    if hasattr(module, "unfuse_qkv_projections") and getattr(module, "original_attn_processors", None) is not None:
        model.unfuse_qkv_projections()
    if hasattr(module, "set_attn_processor"):
        model.set_attn_processor(AttnProcessor2_0())


def _export(
    wrapper: nn.Module, args: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            export: Any = torch.onnx.export
            program = export(
                wrapper, args, dynamo=True, optimize=False, opset_version=OPSET, verbose=False,
                input_names=[spec.name for spec in inputs], output_names=[spec.name for spec in outputs],
                dynamic_shapes=_dynamic_shapes(wrapper, inputs),
            )
    except Exception as error:
        # Whatever the exporter raises means the same to a user: this module cannot be traced.
        name = type(getattr(wrapper, "denoiser", wrapper)).__name__
        raise ExportError(
            f"tracing {name}", found=f"{type(error).__name__}: {_first_line(error)}",
            wanted="a graph", cause="torch.onnx does not know an operation of this model",
            remedy="try another torch version; the full error is the one above in the traceback",
        ) from error
    model: ir.Model = program.model
    return model


def _dynamic_shapes(wrapper: nn.Module, inputs: Sequence[TensorSpec]) -> Any:
    """torch.export's description of the axes that carry a name."""
    each = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs
    )
    # The tensors of a flat denoiser are one variadic parameter.
    return (each,) if isinstance(wrapper, Flat) else each


def _finish(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """State the shapes at the border, infer those inside, and check the contract."""
    graph = model.graph
    for values, specs in ((graph.inputs, inputs), (graph.outputs, outputs)):
        names = [value.name for value in values]
        if names != [spec.name for spec in specs]:
            raise ExportError(
                f"graph {graph.name!r}", found=f"values {names}", wanted=str([spec.name for spec in specs]),
                cause="the exporter dropped an input that the model does not use", remedy="report it with config.json",
            )
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)
    with _quiet():
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for value, spec in zip(graph.outputs, outputs, strict=True):
        value.shape = ir.Shape(spec.shape)


def verify(
    graph: FloatGraph, reference: Callable[[Arrays], Arrays], feeds: Sequence[Arrays], run: Run,
    tolerance: float = TOLERANCE,
) -> float:
    """Compare a graph with its torch module.

    Args:
        graph: the graph.
        reference: what the module returns for feeds, by output name.
        feeds: input sets to try.
        run: an engine.
        tolerance: largest allowed relative error, `|graph - torch| / |torch|` over an output (2-norms).

    Returns:
        The largest relative error.

    Raises:
        ExportError: it is larger, or not a number.
    """
    worst = 0.0
    for index, feed in enumerate(feeds):
        wanted, found = reference(feed), run(graph.path, feed)
        for spec in graph.outputs:
            error = relative_error(found[spec.name], wanted[spec.name])
            if not error <= tolerance:
                raise ExportError(
                    f"graph {graph.path.name}, output {spec.name!r}, input set {index}",
                    found=f"a relative error of {error:.3g} against torch", wanted=f"at most {tolerance:g}",
                    cause="a pass or the exporter changed the computation, or the weights overflow float32",
                    remedy="report it with config.json",
                )
            worst = max(worst, error)
    return worst


def verify_denoiser(graph: FloatGraph, module: nn.Module, family: Family, run: Run) -> float:
    """`verify` on two input sets, one with another batch size than the trace's."""
    return verify_known(graph, known_outputs(module, family), run)


def known_outputs(module: nn.Module, family: Family) -> list[tuple[Arrays, Arrays]]:
    """What a denoiser returns for two input sets, so that the module can be let go before an engine loads the graph."""
    reference = torch_reference(module, family)
    return [(feed, reference(feed)) for feed in family.examples()]


def verify_known(graph: FloatGraph, known: Sequence[tuple[Arrays, Arrays]], run: Run) -> float:
    """`verify` against `known_outputs`."""
    outputs = iter([wanted for _, wanted in known])
    return verify(graph, lambda _: next(outputs), [feed for feed, _ in known], run)


def torch_reference(module: nn.Module, family: Family) -> Callable[[Arrays], Arrays]:
    """The denoiser as a function of numpy arrays, with the kept output channels."""
    wrapper = family.wrap(module).eval()

    def reference(feeds: Arrays) -> Arrays:
        with torch.no_grad():
            args = [torch.from_numpy(np.array(feeds[spec.name])) for spec in family.inputs()]
            outputs = wrapper(*args)
        (spec,) = family.outputs()
        prediction = outputs[0] if family.kept_channels is None else outputs[0][:, : family.kept_channels]
        return {spec.name: prediction.numpy()}

    return reference


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """2-norm of the difference over the 2-norm of `wanted`; NaN where either is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = np.linalg.norm(np.subtract(found, wanted, dtype=np.float64))
    return float(difference / max(float(np.linalg.norm(wanted.astype(np.float64))), 1e-30))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No notes of the exporter on the user's terminal; errors still are raised."""
    names = ("torch.onnx", "torch.export", "diffusers", "onnx_ir", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    with Path(os.devnull).open("w") as sink, warnings.catch_warnings(), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
