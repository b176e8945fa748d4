"""Operators that torch.onnx translates wrongly or not at all, written as others: exact, on the captured program."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from quantempo.export.complex_pairs import real_pairs
from quantempo.export.fx_edit import Builder, Rewrite, aten, is_tensor, rewrite, value_of
from quantempo.export.higher_order import inline_regions
from quantempo.export.masked_assignment import masked_assignment


def decompose(program: ExportedProgram) -> None:
    """Apply all rules, in place."""
    inline_regions(program)
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


def _argsort(node: Node, build: Builder) -> Node | None:
    """`argsort`: the second result of a sort."""
    given = dict(zip(("self", "dim", "descending"), node.args, strict=False)) | dict(node.kwargs)
    source = given["self"]
    if _is_bool(source):
        source = build(aten.to.dtype, source, torch.int32)  # truth values have no order in ONNX
    ordered = build(aten.sort.default, source, given.get("dim", -1), given.get("descending", False))
    return build(operator.getitem, ordered, 1)


def _index(node: Node, build: Builder) -> Node | None:
    """ONNX's indices are 64 bits wide; torch takes 32 as well."""
    names = ("self", "indices", "values", "accumulate")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    places = given.pop("indices")
    if not any(is_tensor(place) and value_of(place).dtype == torch.int32 for place in places):
        return None
    wide = [
        build(aten.to.dtype, place, torch.int64) if is_tensor(place) and value_of(place).dtype == torch.int32 else place
        for place in places
    ]
    return build(node.target, given.pop("self"), wide, *given.values())  # type: ignore[arg-type]


def _index_put(node: Node, build: Builder) -> Node | None:
    """Writing to places: a choice where a mask says which."""
    made = masked_assignment(node, build)
    return _index(node, build) if made is None else made


def _copy(node: Node, build: Builder) -> Node | None:
    """`copy_` of less than there is: torch repeats it, its translation does not."""
    target, source, *more = node.args
    wanted = value_of(target).shape
    if value_of(source).shape == wanted:
        return None
    return build(aten.copy_.default, target, build(aten.expand.default, source, list(wanted)), *more)


def _sqrt(node: Node, build: Builder) -> Node | None:
    """Torch takes roots of whole numbers; no engine has a kernel for them."""
    if value_of(node.args[0]).dtype.is_floating_point:
        return None
    return build(aten.sqrt.default, build(aten.to.dtype, node.args[0], value_of(node).dtype))


def _item(node: Node, build: Builder) -> Node | None:
    """A part of `split` along the batch, which ONNX would make a sequence: a slice."""
    source, index = node.args
    if not isinstance(source, Node) or source.target is not aten.split.Tensor:
        return None
    whole, size = source.args[:2]
    dim: Any = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    place: Any = index
    if isinstance(value_of(whole).shape[dim], int) or not isinstance(size, int):
        return None
    last = place % len(value_of(source)) == len(value_of(source)) - 1
    return build(aten.slice.Tensor, whole, dim, place * size, sys.maxsize if last else (place + 1) * size)


def _cat(node: Node, build: Builder) -> Node | None:
    """Joining with nothing: engines refuse to reshape empty tensors, which the model's Python made for a case of it."""
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    sizes = [value_of(part).shape for part in parts]
    kept = [part for part, size in zip(parts, sizes, strict=True) if not (len(size) and _nothing(size[dim]))]
    if len(kept) in (0, len(parts)):
        return None
    result = kept[0] if len(kept) == 1 else build(aten.cat.default, kept, dim)
    wanted = value_of(node).dtype
    return build(aten.to.dtype, result, wanted)  # an empty part may have had a wider type


def _nothing(size: Any) -> bool:
    return isinstance(size, int) and size == 0


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
    aten.argsort.default: _argsort,
    aten.argsort.stable: _argsort,
    aten.cat.default: _cat,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten.copy_.default: _copy,
    aten.einsum.default: _einsum,
    aten.sqrt.default: _sqrt,
    operator.getitem: _item,
}
