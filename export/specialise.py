"""Python that looks at the contents of tensors: lengths, flags, masks, expert routing.

A trace has no contents.  Where a model cannot be traced for that reason, it is run twice for real, and what Python saw
is noted (`record`): each number, truth value or set of positions, and the graph inputs that it came from.  Tracing then
answers with these notes (`replaying`).  The graph is right only for the same answers, so the inputs behind them are
*pinned*: they are no longer inputs of the graph, their contents are part of its contract, and a caller who passes
others is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from quantempo.errors import BatchLoop, ExportError
from quantempo.export.capture import PLAIN_PROCESSORS_REMEDY, foreign_processors
from quantempo.export.families.base import BATCH, SAMPLE, TIMESTEP, Family, Feeds

NUMBERS = {
    "item", "__bool__", "__int__", "__float__", "__index__", "tolist", "numpy", "equal", "allclose", "is_nonzero",
    "__contains__",
}  # fmt: skip
"""Functions that return contents to Python."""
POSITIONS = {"nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "masked_select"}
"""Functions whose results have a size that depends on contents."""
FACTORISATIONS = {"linalg_qr", "qr", "linalg_svd", "svd", "linalg_eigh", "linalg_cholesky", "linalg_inv", "inverse"}
"""Functions that ONNX does not have; of weights they are constants."""
FACTORIES = {"arange", "zeros", "ones", "full", "empty", "linspace", "randn", "rand"}
SIZED = {"split", "split_with_sizes", "narrow", "repeat", "expand", "view", "reshape", "pad"}
"""Functions that take sizes, which may be given as tensors; those of `SIZED` after a tensor that they work on."""


@dataclass(frozen=True, eq=False)
class Event:
    """What Python saw once.

    Args:
        name: of the function.
        result: its result: numbers, or tensors.
        sources: the graph inputs that it depends on.
        asker: the function that asked, with its file and line.
    """

    name: str
    result: Any
    sources: frozenset[str]
    asker: str = ""

    def same(self, other: Event) -> bool:
        """Whether two runs saw the same."""
        return self.name == other.name and _equal(self.result, other.result)


def specialised(module: nn.Module, family: Family, sets: Sequence[Mapping[str, NDArray[Any]]]) -> Family | None:
    """The family with answers for its trace, and with the inputs pinned that they depend on.

    Args:
        module: the denoiser.
        family: how it is fed.
        sets: two input sets; the first is the one that it will be traced with.

    Returns:
        `None` where Python looks at no contents.

    Raises:
        ExportError: it looks at the sample or the timestep, or at something else that differs between the sets.
    """
    wrapper, names = family.wrap(module).eval(), [spec.name for spec in family.inputs()]
    seen = []
    for given in sets:
        feeds = {name: torch.from_numpy(np.array(given[name])) for name in names}
        seen.append(record(functools.partial(wrapper, *feeds.values()), feeds))
    first, second = seen
    if not first:
        return None
    where = f"tracing {family.class_name}"
    sources = frozenset[str]().union(*(event.sources for event in first))
    askers = {name: _Asker.of(first, name, foreign_processors(module)) for name in sources}
    pinned = {name: _pinned(where, family, name, sets, askers[name]) for name in sorted(sources, key=_samples_first)}
    if len(first) != len(second) or not all(a.same(b) for a, b in zip(first, second, strict=True)):
        odd = next((a.name for a, b in zip(first, second, strict=False) if not a.same(b)), "a loop")
        raise BatchLoop(
            where, found=f"{odd} with another result for another batch",
            wanted="Python that sees the same in both example sets",
            cause="a graph has one path, which the example inputs decide",
            remedy="give two example sets of equal batch size and equal lengths and masks",
        )
    inner = family.arguments

    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        rows = feeds[SAMPLE].shape[0] if SAMPLE in feeds else 1  # len() would fix it
        constants = {}
        for spec in family.all_inputs():
            if spec.name in pinned:
                row = torch.from_numpy(pinned[spec.name])
                batched = spec.shape[:1] == (BATCH,)
                constants[spec.name] = row.expand(rows, *row.shape) if batched else row
        return inner({**feeds, **constants})

    return dataclasses.replace(
        family, pinned={**family.pinned, **pinned}, arguments=arguments, tracing=lambda: replaying(first)
    )


def _samples_first(name: str) -> tuple[bool, str]:
    """An order in which what cannot be helped comes first."""
    return name not in (SAMPLE, TIMESTEP), name


@dataclass(frozen=True)
class _Asker:
    """Who looks at an input first, and what to do about it where that is an attention processor of another package."""

    name: str
    remedy: str

    @classmethod
    def of(cls, events: Sequence[Event], source: str, foreign: Sequence[str]) -> _Asker:
        name = next(event.asker for event in events if source in event.sources)
        kind = name.partition(".")[0]
        if kind not in foreign:
            return cls(name, "")
        return cls(f"the attention processor {name}", f"{PLAIN_PROCESSORS_REMEDY}, or ")


def _pinned(
    where: str, family: Family, name: str, sets: Sequence[Mapping[str, NDArray[Any]]], asker: _Asker
) -> NDArray[Any]:
    """The content of an input that Python looks at: one row, which all samples share."""
    spec = next(spec for spec in family.all_inputs() if spec.name == name)
    place = f"{where}, input {name!r}"
    if name in (SAMPLE, TIMESTEP):
        raise _refuse(
            place, f"Python that looks at its contents, in {asker.name}", "torch operations",
            f"{asker.remedy}take the branch out of it",
        )
    contents = [row for given in sets for row in (given[name] if spec.shape[:1] == (BATCH,) else [given[name]])]
    if any(not np.array_equal(contents[0], other) for other in contents[1:]):
        raise _refuse(
            place, f"Python that looks at its contents, which differ from sample to sample, in {asker.name}",
            "one content for all",
            f"{asker.remedy}give example inputs in which every row holds the content that the graph is for",
        )
    return np.array(contents[0])


def _refuse(where: str, found: str, wanted: str, remedy: str) -> ExportError:
    return ExportError(
        where, found=found, wanted=wanted, cause="a graph has one path, which the example inputs decide", remedy=remedy
    )


def record(run: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> list[Event]:
    """Run a module and note what Python sees of its tensors.

    Args:
        run: runs it on `inputs`.
        inputs: the graph inputs.
    """
    mode = _Recorder(inputs)
    with torch.no_grad(), mode:
        run()
    return mode.events


@contextlib.contextmanager
def replaying(events: Sequence[Event]) -> Iterator[None]:
    """Answer Python's questions from notes, in their order."""
    with _Replayer(events):
        yield


def function_name(function: Any) -> str:
    """The bare name of a torch function."""
    return str(getattr(function, "__name__", function)).removeprefix("torch.")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)


class _Asked(TorchFunctionMode):
    """Finds the questions; what is answered is the subclasses' business."""

    def answer(self, name: str, compute: Callable[[], Any], sources: Sequence[Any]) -> Any:
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = function_name(func)
        if name in NUMBERS or name in POSITIONS or name in FACTORISATIONS:
            return self.answer(name, functools.partial(func, *args, **options), [*args, *options.values()])
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._index(args[1]), *args[2:])
        elif name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            return self._repeat(args, options)
        elif name in FACTORIES or name in SIZED:
            kept = 1 if name in SIZED else 0
            args = (*args[:kept], *(self._size(item) for item in args[kept:]))
            options = {key: self._size(item) for key, item in options.items()}
        return self.passed(func, args, options)

    def passed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _size(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point():
            return self.answer("size", lambda: int(value), [value])
        if isinstance(value, (tuple, list)):
            return type(value)(self._size(item) for item in value)
        return value

    def _index(self, index: Any) -> Any:
        """The index with positions for masks, and numbers for the bounds of slices."""
        parts = index if isinstance(index, tuple) else (index,)
        changed: list[Any] = []
        for part in parts:
            if isinstance(part, slice):
                changed.append(slice(*(self._size(bound) for bound in (part.start, part.stop, part.step))))
            elif isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.ndim:
                changed.extend(self.answer("mask", functools.partial(part.nonzero, as_tuple=True), [part]))
            else:
                changed.append(part)
        return tuple(changed) if isinstance(index, tuple) or len(changed) > 1 else changed[0]

    def _repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, repeats = args[:2]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if dim is None:
            source, dim = source.flatten(), 0
        counts = source.shape[dim]
        rows = self.answer(
            "repeat_interleave", lambda: torch.arange(int(counts)).repeat_interleave(repeats.cpu()), [repeats]
        )
        return source.index_select(dim, rows)


class _Recorder(_Asked):
    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._sources: Any = WeakTensorKeyDictionary()
        for name, tensor in inputs.items():
            self._sources[tensor] = frozenset({name})

    def answer(self, name: str, compute: Callable[[], Any], sources: Sequence[Any]) -> Any:
        with torch._C.DisableTorchFunction():
            result = compute()
        behind = self._behind(sources)
        if name not in FACTORISATIONS or not behind:
            self.events.append(Event(name, _kept(result), behind, _asker()))
        self._note(result, behind)
        return result

    def passed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        behind = self._behind([*args, *kwargs.values()])
        if behind:
            self._note(result, behind)
            name = function_name(func)
            if args and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
                self._note([args[0], args[0]._base], behind)
        return result

    def _behind(self, arguments: Sequence[Any]) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for tensor in _tensors(arguments):
            for each in (tensor, tensor._base):
                if each is not None:
                    found |= self._sources.get(each, frozenset())
        return found

    def _note(self, result: Any, behind: frozenset[str]) -> None:
        if behind:
            for tensor in _tensors(result):
                self._sources[tensor] = self._sources.get(tensor, frozenset()) | behind


def _asker() -> str:
    """The function of a model that is running: `Class.method (file.py:12)`."""
    frame = inspect.currentframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("torch", "quantempo"):
            code = frame.f_code
            return f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"
        frame = frame.f_back
    return "the model"


def _kept(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.detach().clone()
    if isinstance(result, (tuple, list)):
        kept = [_kept(item) for item in result]
        return kept if isinstance(result, list) else tuple(kept)
    return result


class _Replayer(_Asked):
    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        self._left = iter(events)
        self._items: list[Any] = []

    def answer(self, name: str, compute: Callable[[], Any], sources: Sequence[Any]) -> Any:
        if name in FACTORISATIONS and any(True for _ in _tensors(sources)) is False:
            return compute()
        if name == "item" and self._items:
            return self._items.pop(0)
        event = next(self._left, None)
        if name == "item" and event is not None and event.name == "tolist":
            # Tensors without contents make their lists item by item.
            first, *self._items = np.asarray(event.result).ravel().tolist()
            return first
        if event is None or event.name != name:
            raise RuntimeError(
                f"the trace asks for {name}, where the example run asked for {event.name if event else 'nothing'}"
            )
        return event.result
