"""Linear forms that pass for tensors: what a scheduler is given while it is traced.

A `Row` is a float64 tensor of shape (1, 1, 1, WIDTH).  Element *i* is the coefficient of basis vector *i*, which
stands for a whole tensor of the loop (the sample, the prediction, a noise draw, a register).  The scheduler's own
arithmetic acts on the coefficients.  `RowMode` sees every torch call while it is entered and lets a row through
only where the operation is linear by construction, so that nothing non-linear can slip by; it draws basis vectors for
noise, and turns a clamp with constant bounds into a fresh basis vector.  Nothing is patched: leaving the mode leaves
torch as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

WIDTH = 64
SHAPE = (1, 1, 1, WIDTH)
FLOAT32_MAX = 3.4028234663852886e38
"""The bound that stands for "no bound" on one side of a clamp: JSON holds no infinity and registers are float32."""


class NotLinear(Exception):
    """An operation on a row that is not linear.

    Args:
        found: the operation.
        reason: why it has no place in a step program.
    """

    def __init__(self, found: str, reason: str) -> None:
        super().__init__(f"{found}: {reason}")
        self.found, self.reason = found, reason


class Row(torch.Tensor):
    """A linear form.  Outside a `RowMode` it can only be carried around."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse arithmetic that no mode watches; metadata and copies pass."""
        if func.__name__ in {"__get__", "__repr__", "size", "dim", "__format__", "__hash__"}:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotLinear(_shown(func), "a traced tensor was used outside the traced step")


class RowSink(Protocol):
    """What keeps the operations that the mode meets."""

    def noise(self) -> Row:
        """A fresh standard normal tensor."""

    def clamp(self, source: Row, low: float, high: float) -> Row:
        """`min(max(source, low), high)` as a new basis vector."""


def coefficients(row: Row) -> list[float]:
    """The coefficient of each basis vector.

    Raises:
        NotLinear: if one is not finite.
    """
    with torch._C.DisableTorchFunctionSubclass():
        values: list[float] = row.reshape(-1).tolist()
    if not math.isfinite(sum(values)):
        raise not_finite()
    return values


def not_finite() -> NotLinear:
    """The verdict on a scheduler whose own numbers are infinite or not a number."""
    return NotLinear("a coefficient that is not finite", "the scheduler itself divides by zero or overflows here")


def unit(slot: int) -> Row:
    """Basis vector `slot`."""
    data = torch.zeros(WIDTH, dtype=torch.float64)
    data[slot] = 1.0
    return _wrap(data.reshape(SHAPE))


def zero() -> Row:
    """The zero form."""
    return _wrap(torch.zeros(SHAPE, dtype=torch.float64))


def is_row_shaped(row: Row) -> bool:
    """Whether a row still has the shape of the sample."""
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(row.shape) == SHAPE


# Operations by what they ask of their operands.  Everything that is not named here is refused.
_STRUCTURAL = frozenset((
    "neg", "__neg__", "clone", "detach", "contiguous", "view", "view_as", "reshape", "reshape_as", "unsqueeze",
    "squeeze", "flatten", "expand", "expand_as", "__getitem__", "stack", "cat", "concat", "transpose", "permute",
    "movedim", "chunk", "split", "unbind", "sum",
))  # fmt: skip
_CASTS = frozenset(["to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"])
_ADDITIVE = frozenset(["add", "sub", "subtract", "__add__", "__radd__", "__sub__", "__rsub__", "rsub", "lerp"])
_ADDITIVE_IN_PLACE = frozenset(["add_", "sub_", "__iadd__", "__isub__"])
_SCALING = frozenset(
    ["mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "__div__"]
)
_SCALING_IN_PLACE = frozenset(["mul_", "div_", "__imul__", "__itruediv__", "__idiv__"])
_CONTRACTIONS = frozenset(["einsum", "tensordot", "matmul", "__matmul__", "__rmatmul__"])
_CLAMPS = frozenset(["clamp", "clip", "clamp_min", "clamp_max", "clamp_", "clip_"])
_CONSTANTS = frozenset(["ones_like", "full_like", "new_ones", "new_full", "new_tensor", "new_empty"])
_QUERIES = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "stride",
    "element_size", "get_device", "__repr__", "__format__", "__hash__", "is_contiguous",
))  # fmt: skip
_READS = frozenset((
    "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__array__", "__contains__", "__eq__", "__ne__",
    "__lt__", "__le__", "__gt__", "__ge__", "eq", "ne", "lt", "le", "gt", "ge", "any", "all", "isnan", "isinf",
    "isfinite", "equal", "allclose",
))  # fmt: skip
_NORMAL = frozenset(("randn", "randn_like"))
_OTHER_NOISE = frozenset((
    "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "normal_", "uniform_", "bernoulli",
    "bernoulli_", "multinomial", "poisson", "exponential_", "cauchy_", "log_normal_",
))  # fmt: skip


class RowMode(TorchFunctionMode):
    """Lets linear operations on rows through, records noise and clamps in `sink`, refuses the rest."""

    def __init__(self, sink: RowSink) -> None:
        super().__init__()
        self._sink = sink

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Dispatch one torch call (the mode itself is off in here)."""
        options = kwargs or {}
        name = func.__name__
        if name in _NORMAL:
            return self._draw(name, args, options)
        if name in _OTHER_NOISE:
            raise NotLinear(_shown(func), "it draws random numbers that are not standard normal")
        if Row not in types:
            return func(*args, **options)
        with torch._C.DisableTorchFunctionSubclass():
            return self._on_rows(func, name, args, options)

    def _draw(self, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Row:
        with torch._C.DisableTorchFunctionSubclass():
            if name == "randn_like":
                shape = tuple(args[0].shape)
            else:
                sizes = args if args else (options["size"],)
                shape = tuple(sizes[0]) if not isinstance(sizes[0], int) else tuple(sizes)
        if shape != SHAPE:
            raise NotLinear(f"noise of shape {shape}", "noise must have the sample's shape")
        return self._sink.noise()

    def _on_rows(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        if name == "__get__" or name in _STRUCTURAL:
            return _wrap_all(func(*args, **options), func)
        if name in _CASTS:
            return args[0]  # coefficients stay in float64 whatever precision the scheduler works in
        if name in _SCALING or name in _SCALING_IN_PLACE:
            _check_scaling(func, name, args)
            return _finish(func, args, options, in_place=name in _SCALING_IN_PLACE)
        if name in _ADDITIVE or name in _ADDITIVE_IN_PLACE:
            _check_sum(func, name, args)
            return _finish(func, args, options, in_place=name in _ADDITIVE_IN_PLACE)
        if name in _CONTRACTIONS:
            if sum(1 for _ in _rows(args)) != 1:
                raise NotLinear(_shown(func), "it multiplies two traced tensors with each other")
            return _wrap_all(func(*args, **options), func)
        if name in _CLAMPS:
            return self._clamp(func, name, args, options)
        return _harmless_or_refused(func, name, args, options)

    def _clamp(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Row:
        low, high = _bounds(func, name, args, options)
        if not isinstance(args[0], Row) or tuple(args[0].shape) != SHAPE:
            raise NotLinear(_shown(func), "it does not clamp a tensor of the sample's shape")
        result = self._sink.clamp(args[0], low, high)
        if name.endswith("_"):
            args[0].copy_(result)
            return args[0]
        return result


def _harmless_or_refused(func: Callable[..., Any], name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    if name in _QUERIES or name in _CONSTANTS:
        return func(*args, **options)
    if name in {"zeros_like", "new_zeros"}:
        return _wrap_all(func(*args, **options), func)
    if name in _READS:
        raise NotLinear(_shown(func), "the scheduler looks at the values of a tensor, so its step depends on the data")
    raise NotLinear(_shown(func), "it is not a linear operation")


def _finish(func: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any], *, in_place: bool) -> Row:
    if not in_place:
        return _wrap(func(*args, **options))
    if not isinstance(args[0], Row):
        raise NotLinear(_shown(func), "it writes a traced tensor into a constant one")
    func(*args, **options)
    return args[0]


def _check_scaling(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> None:
    left, right = args[0], args[1]
    if isinstance(left, Row) and isinstance(right, Row):
        raise NotLinear(_shown(func), "it combines two traced tensors by a product or quotient")
    if isinstance(right, Row) and "div" in name:
        raise NotLinear(_shown(func), "it divides by a traced tensor")
    factor = right if isinstance(left, Row) else left
    wide = isinstance(factor, torch.Tensor) and factor.ndim > 0 and factor.shape[-1] != 1
    if wide and bool((factor != factor[..., :1]).any()):
        raise NotLinear(_shown(func), "the factor differs from element to element, as a mask does")


def _check_sum(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> None:
    if name == "lerp":
        if not (isinstance(args[0], Row) and isinstance(args[1], Row)) or isinstance(args[2], Row):
            raise NotLinear(_shown(func), "its weight is a traced tensor, or an end is a constant")
        return
    for item in args[:2]:
        constant = torch.zeros(()) if isinstance(item, Row) else torch.as_tensor(item)
        if not bool(torch.isfinite(constant).all()):
            raise not_finite()
        if bool(constant.any()):
            raise NotLinear(_shown(func), "it adds a constant, which makes the step affine")


def _bounds(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[float, float]:
    given = [*args[1:], None, None][:2]
    if name == "clamp_max":
        given.reverse()
    low, high = options.get("min", given[0]), options.get("max", given[1])
    return _bound(func, low, -FLOAT32_MAX), _bound(func, high, FLOAT32_MAX)


def _bound(func: Callable[..., Any], value: Any, default: float) -> float:
    if isinstance(value, Row) or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise NotLinear(_shown(func), "its bounds depend on the data or differ from element to element")
    bound = default if value is None else float(value)
    if math.isnan(bound):
        raise NotLinear(_shown(func), "a bound is not a number")
    return max(-FLOAT32_MAX, min(FLOAT32_MAX, bound))


def _rows(value: Any) -> Iterator[Row]:
    if isinstance(value, Row):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _rows(item)


def _wrap(data: torch.Tensor) -> Row:
    return data.as_subclass(Row)  # type: ignore[no-any-return, call-overload, unused-ignore]


def _wrap_all(value: Any, func: Callable[..., Any]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[-1] != WIDTH:
            raise NotLinear(_shown(func), "it mixes the elements of a tensor with each other")
        return _wrap(value)
    if isinstance(value, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in value):
        return type(value)(_wrap_all(item, func) for item in value)
    return value


def _shown(func: Callable[..., Any]) -> str:
    return f"torch operation {func.__name__.strip('_')!r} on a tensor of the loop"
