"""Checks of feeds and sizes that all backends share, so that all of them say the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from quantempo.contracts.engine import dtype_of
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import EngineError, nearest


def symbols(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """The symbolic dimensions of some tensors, in order of appearance."""
    return tuple(dict.fromkeys(d for spec in specs.values() for d in spec.shape if isinstance(d, str)))


def shown(shape: tuple[int | str, ...]) -> str:
    """A shape as people write it."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def check_names(where: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, Any]) -> None:
    """Refuse a missing input and an extra input, each with its own sentence."""
    missing = sorted(set(specs) - set(feeds))
    if missing:
        raise EngineError(
            f"{where}: inputs", found=f"no value for {', '.join(map(repr, missing))}",
            wanted=f"a value for each of {', '.join(map(repr, specs))}", cause="the call leaves an input out",
            remedy=f"pass {missing[0]!r}",
        )
    extra = sorted(set(feeds) - set(specs))
    if extra:
        raise EngineError(
            f"{where}: inputs", found=f"a value for {', '.join(map(repr, extra))}, which the graph does not have",
            wanted=f"only {', '.join(map(repr, specs)) or 'none'}", cause="a misspelt name, or another graph's input",
            remedy=nearest(extra[0], specs),
        )


def shared_misfit(
    where: str, spec: TensorSpec, shape: tuple[int, ...], found: object, found_shape: tuple[int, ...], place: str = ""
) -> EngineError:
    """The refusal of another binding's buffer.

    Args:
        where: the engine.
        spec: the tensor that wants it, of this shape.
        shape: see `spec`.
        found: type of the buffer, of this shape.
        found_shape: see `found`.
        place: where it has to lie, if that is part of it.
    """
    return EngineError(
        f"{where}: shared buffer {spec.name!r}", found=f"{found} {shown(found_shape)}",
        wanted=" ".join(filter(None, (spec.dtype, shown(shape), place))),
        cause="the two graphs do not fit each other", remedy="bind both with the same sizes and engine",
    )


def check_array(where: str, spec: TensorSpec, array: NDArray[Any], shape: tuple[int | str, ...]) -> None:
    """Refuse an array of another type or shape; symbolic dimensions of `shape` take any size of at least one.

    Raises:
        EngineError: with the nearest legal shape.
    """
    if array.dtype != dtype_of(spec):
        raise EngineError(
            f"{where}: input {spec.name!r}", found=f"type {array.dtype}", wanted=f"type {spec.dtype}",
            cause="engines do not convert types", remedy=f"pass array.astype({spec.dtype!r})",
        )
    fits = array.ndim == len(shape) and all(
        (n == d) if isinstance(d, int) else n >= 1 for n, d in zip(array.shape, shape, strict=True)
    )
    if not fits:
        legal = nearest_shape(array.shape, shape)
        raise EngineError(
            f"{where}: input {spec.name!r}", found=f"shape {shown(array.shape)}", wanted=f"shape {shown(shape)}",
            cause="the array was made for another graph, batch or resolution",
            remedy=f"the nearest shape that the graph takes is {shown(legal)}",
        )


def nearest_shape(found: tuple[int, ...], wanted: tuple[int | str, ...]) -> tuple[int, ...]:
    """The legal shape closest to a wrong one: fixed dimensions as wanted, symbolic ones as found (at least 1)."""
    if len(found) == len(wanted):
        return tuple(d if isinstance(d, int) else max(1, n) for n, d in zip(found, wanted, strict=True))
    return tuple(d if isinstance(d, int) else 1 for d in wanted)


def sizes_of(where: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The size of each symbolic dimension that a set of host arrays implies, after checking names, types and shapes.

    Raises:
        EngineError: also where one symbol would have two sizes.
    """
    check_names(where, specs, feeds)
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, spec in specs.items():
        check_array(where, spec, feeds[name], spec.shape)
        for size, symbol in zip(feeds[name].shape, spec.shape, strict=True):
            if not isinstance(symbol, str):
                continue
            if sizes.setdefault(symbol, size) != size:
                raise EngineError(
                    f"{where}: input {name!r}", found=f"{symbol} = {size}",
                    wanted=f"{symbol} = {sizes[symbol]}, as in {origin[symbol]!r}",
                    cause="two inputs disagree about one dimension", remedy=f"pass the same {symbol} in both",
                )
            origin.setdefault(symbol, name)
    return sizes


def check_sizes(where: str, specs: Mapping[str, TensorSpec], sizes: Mapping[str, int]) -> None:
    """Refuse sizes that leave a symbol open, name one that the graph does not have, or are below one.

    Raises:
        EngineError.
    """
    known = symbols(specs)
    for symbol in known:
        if symbol not in sizes:
            raise EngineError(
                f"{where}: bind", found=f"no size for {symbol!r}", wanted=f"a size for each of {', '.join(known)}",
                cause="the graph's shape is symbolic there", remedy=f"pass {{{symbol!r}: 1}} or more",
            )
    for symbol, size in sizes.items():
        if symbol not in known:
            raise EngineError(
                f"{where}: bind", found=f"a size for {symbol!r}, which the graph does not have",
                wanted=f"sizes for {', '.join(known) or 'nothing'}", cause="the graph was exported with fixed shapes",
                remedy=nearest(symbol, known),
            )
        if size < 1:
            raise EngineError(
                f"{where}: bind", found=f"{symbol} = {size}", wanted=f"{symbol} of at least 1",
                cause="an empty batch", remedy=f"the nearest legal size is {symbol} = 1",
            )
