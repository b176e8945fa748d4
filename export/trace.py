"""From a diffusers module to a float ONNX graph in normal form."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from diffusers.models import attention_processor
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass
from safetensors import SafetensorError
from torch import nn

from quantempo.contracts.plan import Site
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import BatchLoop, ExportError
from quantempo.export.capture import capture
from quantempo.export.classes import find_class, make
from quantempo.export.dense_experts import dense_experts
from quantempo.export.families import Family, family_of
from quantempo.export.families.adapters import load_adapters
from quantempo.export.families.base import single
from quantempo.export.families.unet2d_condition import CONTROL_CLASS, ControlledUNet
from quantempo.export.flex_attention import plain_flex_attention
from quantempo.export.messages import first_line, quiet
from quantempo.export.passes import normal_form, run_passes
from quantempo.export.sites import find_sites
from quantempo.export.source import ModelSource, weight_files
from quantempo.export.specialise import specialised

logger = logging.getLogger(__name__)
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
        pinned: contents of inputs for which alone the graph is right; it does not take them.
    """

    path: Path
    data: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[Site, ...]
    digest: str
    pinned: Arrays = field(default_factory=dict)


def load_denoiser(source: ModelSource) -> nn.Module:
    """The denoiser in float32 and evaluation mode, from local safetensors alone, with what was added to it."""
    module = load_component(source.class_name, source.denoiser, source.variant, source.parts.code)
    if source.parts.adapters:
        load_adapters(module, source.parts.adapters)
    if source.parts.controlnets:
        folders = source.parts.controlnets
        controls = [load_component(CONTROL_CLASS, folder, weight_files(folder)[1]) for folder in folders]
        module = ControlledUNet(module, controls).eval()
    return module


def load_component(
    class_name: str, folder: Path, variant: str | None = None, code: Path | None = None
) -> nn.Module:
    """A model from a folder, in float32 (float16 weights are widened) and evaluation mode.

    Args:
        class_name: of diffusers, or of `code`.
        folder: with `config.json` and safetensors files.
        variant: of the files.
        code: Python file that defines the class.

    Raises:
        ExportError: it cannot be loaded.
    """
    made: Any = find_class(class_name, code)
    if not hasattr(made, "from_pretrained"):
        return load_plain(made, folder)
    try:
        with quiet():
            # All is float32 here, so nothing has to be kept in it; diffusers would ask for another package.
            same: Any = type(class_name, (made,), {"_keep_in_fp32_modules": None})
            module, loading = same.from_pretrained(
                str(folder), torch_dtype=torch.float32, variant=variant, local_files_only=True, use_safetensors=True,
                low_cpu_mem_usage=False, output_loading_info=True,
            )
            module.__class__ = made
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ExportError(
            str(folder), found=f"weights that diffusers cannot load ({_beginning(error)})", wanted=f"a {class_name}",
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


def _beginning(error: Exception) -> str:
    """The first words of an error; torch names the weights only after the first line."""
    return " ".join(str(error).split())[:300]


def load_plain(kind: type[nn.Module], folder: Path) -> nn.Module:
    """A torch module that is no diffusers model: `config.json` holds the arguments of its class.

    Raises:
        ExportError: class, configuration and weights do not belong together.
    """
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    try:
        module = make(kind, json.loads((folder / "config.json").read_bytes()))
        for file in weight_files(folder)[0]:
            weights |= load_file(file)
        module.load_state_dict(weights)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ExportError(
            str(folder), found=f"weights that do not fit the class ({_beginning(error)})", wanted=f"a {kind.__name__}",
            cause="config.json does not hold the arguments of the class, or the weights are another model's",
            remedy="write config.json with '_class_name' and these arguments, and the state_dict with "
            "safetensors.torch.save_file",
        ) from error
    return module.float().eval()


def trace(source: ModelSource, work: Path) -> FloatGraph:
    """The float graph of a model directory's denoiser, written into `work`."""
    return trace_module(load_denoiser(source), family_of(source), work)


def trace_module(module: nn.Module, family: Family, work: Path, name: str = "denoiser") -> FloatGraph:
    """The float graph of a denoiser in memory.

    Args:
        module: the bare denoiser, in evaluation mode; its attention processors are set to the plain ones.
        family: how to feed it.
        work: folder for `NAME.onnx` and `NAME.onnx.data`.
        name: file name without suffix.

    Raises:
        ExportError: it cannot be traced; names the module's class, and attention processors where they are to blame.
    """
    _refuse_overflow(module)
    traced, model = _traced(module, family, name)
    graph = _written(model, traced.inputs(), traced.outputs(), work, name)
    return dataclasses.replace(graph, pinned=traced.pinned)


def trace_model(module: nn.Module, family: Family, name: str = "denoiser") -> ir.Model:
    """The float graph of a denoiser in normal form, in memory; arguments as for `trace_module`."""
    return _traced(module, family, name)[1]


def _traced(module: nn.Module, family: Family, name: str) -> tuple[Family, ir.Model]:
    """The graph, and the family with what had to be fixed for it: contents of inputs, or the batch."""
    _refuse_training(module)
    plain_attention(module)
    try:
        traced, model = _attempts(module, family, name)
    except BatchLoop as loop:
        alone = single(family)
        if alone.all_inputs() == family.all_inputs():  # the batch is fixed already
            raise
        logger.info("%s: traced for a batch of one, since %s", family.class_name, loop.found)
        traced, model = _attempts(module, alone, name)
    _check_influence(module, traced, model)
    return traced, model


def _attempts(module: nn.Module, family: Family, name: str) -> tuple[Family, ir.Model]:
    """Trace as it is, or else with answers to what Python asks of contents.

    Raises:
        BatchLoop: what Python does depends on the batch.
        ExportError: anything else.
    """
    example = family.sets[0] if family.sets else family.example(TRACE_BATCH)

    def attempt(family: Family) -> ir.Model:
        args = tuple(torch.from_numpy(np.array(example[spec.name])) for spec in family.inputs())
        with tracing_context(), dense_experts(module):
            model = capture(family.wrap(module).eval(), args, family.inputs(), family.outputs())
        return _normal_model(model, family.inputs(), family.outputs(), name, family.kept_channels)

    try:
        return family, attempt(family)
    except BatchLoop:
        raise
    except ExportError as error:
        # Python that looks at contents cannot be traced; running the model tells whether that is the reason.
        special = _answered(module, family, (example, family.examples()[1]))
        if special is None:
            raise
        logger.info("%s: traced for the example's contents, since %s", family.class_name, error.found)
        return special, attempt(special)


def _answered(module: nn.Module, family: Family, sets: Sequence[Arrays]) -> Family | None:
    """`specialised`; `None` too where the model cannot be run while its questions are noted."""
    try:
        with tracing_context():
            return specialised(module, family, sets)
    except ExportError:
        raise
    except Exception as error:
        logger.info("%s: cannot be run on the example: %s", family.class_name, first_line(error))
        return None


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise ExportError(
            f"denoiser {type(module).__name__}", found="a model in training mode", wanted="evaluation mode",
            cause="dropout and the like are random in training mode, and a graph is not",
            remedy="call model.eval() first",
        )


def _refuse_overflow(module: nn.Module) -> None:
    """Refuse weights that are not numbers."""
    where = f"denoiser {type(module).__name__}"
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ExportError(
                f"{where}, weight {name!r}", found="infinity or NaN", wanted="finite numbers",
                cause="half-precision weights overflowed when the checkpoint was converted (float16 ends at 65504)",
                remedy="take the float32 or bfloat16 weights of the model",
            )


def _check_influence(module: nn.Module, family: Family, model: ir.Model) -> None:
    """Refuse a graph that does not read one of its inputs.

    Raises:
        ExportError: says whether the module reads it, which makes the graph wrong, or not, which makes the input idle.
    """
    idle = [value.name for value in model.graph.inputs if not value.uses() and not value.is_graph_output()]
    if not idle:
        return
    wrapper, example = family.wrap(module).eval(), dict(family.examples()[0])
    names = [spec.name for spec in family.inputs()]
    for name in idle:
        found = []
        for array in (example[str(name)], _other(example[str(name)])):
            feeds = {**example, str(name): array}
            with torch.no_grad():
                found.append(wrapper(*(torch.from_numpy(np.array(feeds[each])) for each in names))[0].numpy())
        if relative_error(found[1], found[0]) != 0.0:
            raise ExportError(
                f"graph of {family.class_name}, input {name!r}",
                found="an input that the module reads and the graph does not", wanted="what the module computes",
                cause="the exporter lost a part of the computation", remedy="report it with config.json",
            )
    raise ExportError(
        f"graph of {family.class_name}",
        found=f"inputs that neither module nor graph reads: {', '.join(map(str, idle))}",
        wanted="inputs that the prediction depends on",
        cause="the model's configuration does not use them, or a constant stands in their place",
        remedy="leave them out",
    )


def _other(array: NDArray[Any]) -> NDArray[Any]:
    """Other legal contents: flags turned, whole numbers in another order, floating-point numbers moved."""
    if array.dtype == np.bool_:
        return ~array
    if array.dtype.kind in "iu":
        return np.asarray(np.where(array > 0, array - 1, array + 1), array.dtype)
    return np.asarray(array * 1.5 + 0.25, array.dtype)


def export_graph(
    wrapper: nn.Module,
    args: tuple[torch.Tensor, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    work: Path,
    name: str,
) -> FloatGraph:
    """Export a module with flat inputs, bring the graph into normal form and write it.

    Raises:
        ExportError: the exporter or a pass failed.
    """
    model = _normal_model(capture(wrapper.eval(), args, inputs, outputs), inputs, outputs, name, None)
    return _written(model, inputs, outputs, work, name)


def _written(
    model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], work: Path, name: str
) -> FloatGraph:
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.onnx"
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
    model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], name: str, channels: int | None
) -> ir.Model:
    model.graph.name = name
    run_passes(model, normal_form(channels))
    _finish(model, inputs, outputs)
    return model


PLAIN_PROCESSORS = {
    **dict.fromkeys(
        ("AttnProcessor", "XFormersAttnProcessor", "SlicedAttnProcessor", "FusedAttnProcessor2_0", "AttnProcessorNPU",
         "XLAFlashAttnProcessor2_0"), "AttnProcessor2_0",
    ),
    **dict.fromkeys(
        ("AttnAddedKVProcessor", "XFormersAttnAddedKVProcessor", "SlicedAttnAddedKVProcessor"),
        "AttnAddedKVProcessor2_0",
    ),
}  # fmt: skip
"""Attention processors of diffusers that compute the same as a plainer one, which is traced."""


def plain_attention(module: nn.Module) -> None:
    """Scaled-dot-product attention with separate projections: no fused QKV, no vendor kernels.

    Processors that compute something of their own stay.
    """
    model: Any = module
    if hasattr(module, "unfuse_qkv_projections") and getattr(module, "original_attn_processors", None) is not None:
        model.unfuse_qkv_projections()
    for layer in module.modules():
        attention: Any = layer
        plain = PLAIN_PROCESSORS.get(type(getattr(layer, "processor", None)).__name__)
        if plain is not None and hasattr(layer, "set_processor"):
            attention.set_processor(getattr(attention_processor, plain)())


@contextlib.contextmanager
def tracing_context() -> Iterator[None]:
    """Attention in diffusers by torch's own operator, whatever the environment asks for."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_flex_attention())
        try:
            from diffusers.models.attention_dispatch import attention_backend
        except ImportError:  # before diffusers 0.35
            pass
        else:
            stack.enter_context(attention_backend("native"))
        yield


def _finish(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """State the shapes at the border, infer those inside, and check the contract."""
    graph = model.graph
    for values, specs in ((graph.inputs, inputs), (graph.outputs, outputs)):
        names = [value.name for value in values]
        if names != [spec.name for spec in specs]:
            raise ExportError(
                f"graph {graph.name!r}", found=f"values {names}", wanted=str([spec.name for spec in specs]),
                cause="the exporter dropped an input or output", remedy="report it with config.json",
            )
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)
    with quiet():
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
        # A graph with a fixed batch takes the first rows; a sample does not depend on those beside it.
        taken = {spec.name: np.array(first_rows(feed[spec.name], spec)) for spec in graph.inputs}
        wanted, found = reference(feed), run(graph.path, taken)
        for spec in graph.outputs:
            error = relative_error(found[spec.name], first_rows(wanted[spec.name], spec))
            if not error <= tolerance:
                raise ExportError(
                    f"graph {graph.path.name}, output {spec.name!r}, input set {index}",
                    found=f"a relative error of {error:.3g} against torch", wanted=f"at most {tolerance:g}",
                    cause="a pass or the exporter changed the computation, or the weights overflow float32",
                    remedy="report it with config.json",
                )
            worst = max(worst, error)
    return worst


def first_rows(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """The part of an array that a graph with a fixed batch takes or returns: the first samples."""
    return array[tuple(slice(size if isinstance(size, int) else None) for size in spec.shape)]


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
