"""The structure of a model's graph from its configuration alone: seconds, no weights read, none in memory.

Parameters are allocated and never touched, so the system gives them no memory; what is written refers to a weight file
that is not there.  Such a graph is for rules and plans, not for running.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from quantempo.contracts.plan import QuantPlan
from quantempo.errors import ExportError
from quantempo.export.classes import find_class, make
from quantempo.export.families import family_of
from quantempo.export.graph_files import INLINE_BYTES
from quantempo.export.sites import default_plan
from quantempo.export.source import open_structure
from quantempo.export.trace import trace_model
from quantempo.export.unfold import DIALECT, kept_when_unfolded

ABSENT = "weights.absent"
"""The weight file that a structure refers to."""


def trace_structure(model: Path, target: Path) -> QuantPlan:
    """Write the float graph of a model directory in normal form, without weights.

    Args:
        model: a pipeline or denoiser directory; only configuration files are read.
        target: the ONNX file to be.

    Returns:
        The default plan for the graph, bound to no digest, with what each dialect keeps.

    Raises:
        NotAModelDirectory, UnsupportedModel: see `quantempo.export.source.open_structure`.
        ExportError: the model cannot be made or traced.
    """
    source = open_structure(model)
    family = family_of(source)
    made = find_class(source.class_name)
    try:
        with torch.device("meta"):
            module = make(made, source.config)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(
            str(source.denoiser), found=f"a configuration that diffusers refuses ({error})",
            wanted=f"one of a {source.class_name}", cause="it was edited, or belongs to another version of diffusers",
            remedy="load the model in diffusers by itself",
        ) from error
    module = module.to_empty(device="cpu").eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            # Equal weights would be shared, and layers with them; one number each costs one page of memory.
            parameter.view(-1)[:1] = index + 1.0
    graph = trace_model(module, family)
    offset = 0
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= INLINE_BYTES:
            value.const_value = ir.ExternalTensor(
                ABSENT, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "", base_dir=target.parent,
            )
            offset += tensor.nbytes
    target.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    plan = default_plan(graph, "")
    return replace(plan, dialects={DIALECT: kept_when_unfolded(graph, plan)})
