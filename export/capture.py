"""A torch module as an ONNX model: captured by torch.export, decomposed, translated by torch.onnx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import BatchLoop, ExportError
from quantempo.export.decompositions import decompose
from quantempo.export.families.base import Flat
from quantempo.export.messages import first_line, quiet
from quantempo.export.tracked_data import TrackedData

OPSET = 21
"""The first with native GroupNormalization and the last before attention becomes one operator."""

PLAIN_PROCESSORS_REMEDY = "set diffusers' own with set_default_attn_processor() or set_attn_processor(...)"


def capture(
    wrapper: nn.Module, args: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ir.Model:
    """The ONNX model of a module with flat inputs, as the exporter writes it.

    Raises:
        ExportError: the module cannot be traced, or torch.onnx does not know one of its operations.
    """
    try:
        with quiet(), torch.no_grad():
            with TrackedData():
                program = torch.export.export(
                    wrapper, args, dynamic_shapes=_dynamic_shapes(wrapper, inputs), strict=False
                )
            decompose(program)
            export: Any = torch.onnx.export
            translated = export(
                program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False,
                input_names=[spec.name for spec in inputs], output_names=[spec.name for spec in outputs],
            )
    except ExportError:
        raise
    except Exception as error:
        # Whatever the exporter raises means the same to a user: this module cannot be traced.
        raise untraceable(wrapper, error) from error
    model: ir.Model = translated.model
    return model


def untraceable(wrapper: nn.Module, error: BaseException) -> ExportError:
    """The error for a module that cannot be traced."""
    denoiser = getattr(wrapper, "denoiser", wrapper)
    foreign = foreign_processors(denoiser)
    kind = ExportError
    cause, remedy = "torch.onnx does not know an operation of this model", "try another torch version"
    if foreign:
        cause = f"attention processors that are not diffusers' own: {', '.join(foreign)}"
        remedy = PLAIN_PROCESSORS_REMEDY
    elif "code specialized it to be a constant" in str(error) or _counts_batch(error):
        kind = BatchLoop
        cause = "the model's Python loops over the samples of a batch, or computes with their number"
        remedy = "give two example sets of equal batch size, so that the batch is fixed"
    return kind(
        f"tracing {type(denoiser).__name__}", found=f"{type(error).__name__}: {first_line(error)}",
        wanted="a graph", cause=cause, remedy=remedy + "; the full error is the one above in the traceback",
    )


def _counts_batch(error: BaseException) -> bool:
    """Whether Python did with a symbolic size what it can do with numbers alone."""
    return isinstance(error, (TypeError, AttributeError)) and any(word in str(error) for word in ("SymInt", "SymFloat"))


def foreign_processors(module: nn.Module) -> tuple[str, ...]:
    """Classes of attention processors that do not come from diffusers."""
    found = (getattr(each, "processor", None) for each in module.modules())
    kinds = {type(each) for each in found if each is not None}
    return tuple(sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("diffusers.")))


def _dynamic_shapes(wrapper: nn.Module, inputs: Sequence[TensorSpec]) -> Any:
    """torch.export's description of the axes that carry a name."""
    each = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs
    )
    # The tensors of a flat denoiser are one variadic parameter.
    return (each,) if isinstance(wrapper, Flat) else each
