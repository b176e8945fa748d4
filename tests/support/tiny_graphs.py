"""Float graphs of the tiny models, traced once per session, and small hand-written graphs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from support import tiny_models

from quantempo.export.families import Family, family_of
from quantempo.export.source import open_source
from quantempo.export.trace import FloatGraph, load_denoiser, trace_module

MODELS = ("dit_pipeline", "unet", "condition_unet")


@functools.cache
def traced(name: str) -> tuple[torch.nn.Module, Family, FloatGraph]:
    """Module, family and float graph of a tiny model; `name` is a function of `tiny_models`."""
    folder = getattr(tiny_models, name)()
    source = open_source(folder, folder / "scheduler")
    module, family = load_denoiser(source), family_of(source)
    return module, family, trace_module(module, family, Path(tempfile.mkdtemp(prefix="quantempo-trace-")))


def graph_of(text: str, weights: Mapping[str, NDArray[Any]] | None = None) -> ir.Model:
    """A model from ONNX text; values named in `weights` are turned from inputs into initializers."""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    for name, array in (weights or {}).items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(array), name=name)
        model.graph.initializers.add(value)
    return model


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Normally distributed float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
