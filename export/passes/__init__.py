"""Exact graph passes, one per file, and the lists in which they are run."""

from __future__ import annotations

from quantempo.export.passes.attention import CollapseTransposes, MergeAttentionScales
from quantempo.export.passes.base import GraphPass, Violation, run_passes
from quantempo.export.passes.cut_output import CutOutputChannels
from quantempo.export.passes.einsum_to_transpose import EinsumToTranspose
from quantempo.export.passes.exporter_metadata import KeepModulePaths
from quantempo.export.passes.fold_constants import FoldConstants
from quantempo.export.passes.gelu_as_sigmoid import GeluAsSigmoid
from quantempo.export.passes.group_norm import GroupNormToInstanceNorm
from quantempo.export.passes.name_values import NameValues
from quantempo.export.passes.remove_dead import RemoveDead
from quantempo.export.passes.remove_no_ops import RemoveNoOps
from quantempo.export.passes.share_subexpressions import ShareConstants, ShareSubexpressions
from quantempo.export.passes.slice_of_concat import SliceOfConcat
from quantempo.export.passes.split_conv_bias import SplitConvBias
from quantempo.export.passes.split_sequences import SplitSequences
from quantempo.export.passes.unsqueeze_before_split import UnsqueezeBeforeSplit
from quantempo.export.passes.weights import FoldWeightTransposes, GemmToMatMul

__all__ = ["GeluAsSigmoid", "GraphPass", "GroupNormToInstanceNorm", "Violation", "normal_form", "run_passes"]


def normal_form(output_channels: int | None = None) -> tuple[GraphPass, ...]:
    """The passes that turn an exported graph into the form that the lowerings take.

    Every linear layer is `MatMul(x, W)` with a stored [k, n] weight, every convolution a Conv without bias; a bias is
    an Add of a stored [n] or [1, C, 1, 1].  All names come from module paths.

    Args:
        output_channels: cut the output to that many channels; `None` keeps all.
    """
    cut: tuple[GraphPass, ...] = () if output_channels is None else (CutOutputChannels(output_channels),)
    return (
        KeepModulePaths(),
        FoldConstants(),
        SplitSequences(),
        EinsumToTranspose(),
        RemoveDead(),
        RemoveNoOps(),
        ShareConstants(),
        ShareSubexpressions(),
        GemmToMatMul(),
        FoldWeightTransposes(),
        SplitConvBias(),
        SliceOfConcat(),
        CollapseTransposes(),
        MergeAttentionScales(),
        UnsqueezeBeforeSplit(),
        *cut,
        RemoveNoOps(),
        RemoveDead(),
        RemoveNoOps(),
        ShareConstants(),
        ShareSubexpressions(),
        RemoveDead(),
        NameValues(),
    )
