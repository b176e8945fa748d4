"""Operators that torch.onnx translates wrongly or not at all, written as others: exact, on the captured program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from quantempo.export.complex_pairs import real_pairs
from quantempo.export.fx_edit import Builder, Rewrite, aten, is_tensor, rewrite, value_of


def decompose(program: ExportedProgram) -> None:
    """Apply all rules, in place."""
    real_pairs(program)
    rewrite(program, RULES)


def _squeeze(node: Node, build: Builder) -> Node | None:
    """`squeeze(dim)` on a size other than 1 returns its input; ONNX's Squeeze is an error there."""
    source: Any = node.args[0]
    shape = value_of(source).shape
    dims: Any = node.args[1]
    several = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    single = [d for d in several if isinstance(shape[d], int) and shape[d] == 1]
    if len(single) == len(several):
        return None
    result = build(aten.alias.default, source)
    for dim in sorted((d % len(shape) for d in single), reverse=True):
        result = build(aten.squeeze.dim, result, dim)
    return result


def _is_bool(argument: Any) -> bool:
    if is_tensor(argument):
        return bool(value_of(argument).dtype == torch.bool)
    return isinstance(argument, bool)


def _choose(build: Builder, condition: Any, yes: Any, no: Any) -> Node:
    """`condition ? yes : no` of truth values: (condition and yes) or (not condition and no)."""
    chosen = None
    if not isinstance(yes, bool) or yes:
        chosen = condition if isinstance(yes, bool) else build(aten.logical_and.default, condition, yes)
    rest = None
    if not isinstance(no, bool) or no:
        inverse = build(aten.logical_not.default, condition)
        rest = inverse if isinstance(no, bool) else build(aten.logical_and.default, inverse, no)
    if chosen is None and rest is None:
        never = build(aten.logical_not.default, condition)
        return build(aten.logical_and.default, condition, never)
    if chosen is None or rest is None:
        only = chosen if chosen is not None else rest
        return build(aten.alias.default, only)
    return build(aten.logical_or.default, chosen, rest)


def _where(node: Node, build: Builder) -> Node | None:
    """No engine has a kernel for Where on truth values."""
    if len(node.args) != 3 or not (_is_bool(node.args[1]) and _is_bool(node.args[2])):
        return None
    return _choose(build, *node.args)


def _masked_fill(node: Node, build: Builder) -> Node | None:
    """The same for `masked_fill`."""
    source, mask, fill = node.args
    if not _is_bool(source):
        return None
    if not is_tensor(fill):
        fill = bool(fill)
    made = _choose(build, mask, fill, source)
    wanted = value_of(node).shape
    return made if value_of(made).shape == wanted else build(aten.expand.default, made, list(wanted))


def _sort(node: Node, build: Builder) -> Node | None:
    """`sort(stable=...)`: ONNX's TopK keeps the order of equal values."""
    given = dict(zip(("self", "stable", "dim", "descending"), node.args, strict=False)) | dict(node.kwargs)
    dim, descending = given.get("dim", -1), given.get("descending", False)
    return build(aten.sort.default, given["self"], dim, descending)


def _einsum(node: Node, build: Builder) -> Node | None:
    """Torch promotes operands of different types; ONNX's Einsum takes one type."""
    operands: Any = node.args[1]
    kinds = [value_of(operand).dtype for operand in operands]
    if len(set(kinds)) < 2:
        return None
    wanted = functools.reduce(torch.promote_types, kinds)
    same = [build(aten.to.dtype, operand, wanted) for operand in operands]
    return build(aten.einsum.default, node.args[0], same)


RULES: Mapping[Any, Rewrite] = {
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.sort.stable: _sort,
    aten.einsum.default: _einsum,
}
