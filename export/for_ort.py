"""Rewrites that only ONNX Runtime has a use for: float or quantized, they make its graphs faster and change nothing."""

from __future__ import annotations

import onnx_ir as ir

from quantempo.export.ort_attention import fuse_attention
from quantempo.export.passes import GroupNormToInstanceNorm


def for_onnxruntime(model: ir.Model) -> ir.Model:
    """A copy of a float graph in the form that ONNX Runtime runs fastest.

    `lower_ort` does the same to its result, so that float and INT8 are compared on equal terms.
    """
    copy = model.clone()
    tune(copy)
    return copy


def tune(model: ir.Model) -> None:
    """Fused attention and group normalization by instance normalization, in place."""
    GroupNormToInstanceNorm().apply(model)
    fuse_attention(model)
