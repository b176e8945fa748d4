"""Families from example inputs: for every class that has no file of its own, and for inputs that a user supplies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantempo.contracts.manifest import ArrayInput
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import ExportError, nearest
from quantempo.export.classes import find_class
from quantempo.export.families.base import (
    BATCH,
    PREDICTION,
    SAMPLE,
    TIMESTEP,
    Arrays,
    Family,
    Feeds,
    first_tensor,
)

SAMPLE_NAMES = ("sample", "hidden_states", "latents", "x", "z", "image_latent", "decoder_input_tokens")
"""What `forward` calls the noisy sample, the first that it has."""
TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t", "r", "decoder_noise_time", "sigma")
Output = Callable[[Any], torch.Tensor]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor inside nested arguments.

    Args:
        path: argument, then keys and positions.
        name: of its graph input; `None` for a constant of the graph.
        dtype: torch's type of the argument.
        shape: with `batch` and its multiples by name.
        value: of a constant.
    """

    path: Path
    name: str | None
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    value: torch.Tensor | None = None


def family_of_example(
    module: nn.Module, sets: Sequence[Mapping[str, Any]], *, output: int | str | Output = 0, sample: str = "",
    timestep: str = "", constants: Sequence[str] = (),
) -> Family:
    """A family from the keyword arguments of example calls.

    Args:
        module: the denoiser.
        sets: one or two sets of arguments of `forward`: tensors or arrays, nested in dicts, lists and tuples, and plain
            Python values, which become part of the graph.  Axes that differ between two sets are dynamic and must
            differ as the batch does; with one set, the first axes of the sample's size are.
        output: which output is the prediction: position, name, or a function of what `forward` returns.
        sample: the argument that is the noisy sample, where its name does not tell.
        timestep: the argument that is the timestep, likewise.
        constants: tensor arguments that become part of the graph too; both sets hold the same values of them.

    Raises:
        ExportError: the arguments do not fit `forward` or each other.
    """
    where = f"example inputs of {type(module).__name__}"
    names = _parameters(module)
    for given in sets:
        _check_arguments(where, names, given)
    if len(sets) == 1:
        sets = (sets[0], _second(where, sets[0], _role(sets[0], sample, SAMPLE_NAMES)))
    roles = {_role(sets[0], sample, SAMPLE_NAMES): SAMPLE, _role(sets[0], timestep, TIMESTEP_NAMES): TIMESTEP}
    leaves = _leaves(where, sets, roles, constants)
    inputs = tuple(TensorSpec(leaf.name, _graph_type(leaf.dtype), leaf.shape) for leaf in leaves if leaf.name)
    if not inputs:
        raise _refuse(where, "no tensor", "the noisy sample, at least", "give tensors with a batch of 2 or more")
    feeds = tuple(_feeds(leaves, given) for given in sets)
    fixed = {"return_dict": False} if "return_dict" in names and "return_dict" not in sets[0] else {}
    arguments = _arguments(sets[0], {leaf.path: leaf for leaf in leaves}, fixed)
    family = Family(
        type(module).__name__, (), arguments, prediction=_selected(output), border=(inputs, TensorSpec("", "", ())),
        sets=feeds,
    )
    return _with_result(module, family, leaves)


SETTINGS = ("timestep_scale", "timestep_offset", "prediction_scale", "output_select")
"""Keys of a file with an example call that are no arguments."""


def family_of_inputs(class_name: str, path: FilePath, code: FilePath | None = None) -> Family:
    """The family of a class from a file with one example call.

    Args:
        class_name: the denoiser's class.
        path: `.npz`; the keys are arguments of `forward`, with `argument.key` and `argument.0` for nested ones.  Arrays
            of rank 0 are Python numbers.  `forward` gets `timestep_offset + timestep_scale * t` for a sampler's
            timestep `t`; the sampler gets the prediction times `prediction_scale`.  `output_select` is the position
            or name of the output that is the prediction.
        code: Python file that defines the class.

    Returns:
        A family whose inputs all carry the batch; tensors without it become part of the graph.

    Raises:
        UnsupportedModel: there is no such class.
        ExportError: the arrays do not fit its `forward`.
    """
    made = find_class(class_name, code)
    where = f"example inputs {path} of {class_name}"
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    settings = {name: arrays.pop(name).item() for name in SETTINGS if name in arrays}
    scale, offset = float(settings.get("timestep_scale", 1.0)), float(settings.get("timestep_offset", 0.0))
    given = _nested(arrays)
    known = inspect.signature(made.forward).parameters
    names = {name: parameter for name, parameter in known.items() if name != "self"}
    _check_arguments(where, names, given)
    sample, timestep = _role(given, "", SAMPLE_NAMES), _role(given, "", TIMESTEP_NAMES)
    sets = (given, _second(where, given, sample))
    tensors, batch = _tensors(given), len(_tensors(given)[(sample,)])
    constants = [_dotted(p) for p, t in tensors.items() if p != (timestep,) and (t.ndim == 0 or len(t) != batch)]
    leaves = _leaves(where, sets, {sample: SAMPLE, timestep: TIMESTEP}, constants)
    fixed = {"return_dict": False} if "return_dict" in names else {}
    inner = _arguments(given, {leaf.path: leaf for leaf in leaves}, fixed)
    shaped = {leaf.name: leaf for leaf in leaves if leaf.name}
    extra = tuple(
        ArrayInput(name, _graph_type(leaf.dtype), leaf.shape[1:], guided=leaf.dtype.is_floating_point)
        for name, leaf in shaped.items() if name not in (SAMPLE, TIMESTEP)
    )
    shape = tuple(int(d) for d in shaped[SAMPLE].shape[1:])
    feeds = []
    for each in sets:
        fed = dict(_feeds(leaves, each))
        rows = len(fed[SAMPLE])
        times = np.broadcast_to((np.asarray(fed.get(TIMESTEP, 1.0), np.float32) - offset) / scale, (rows,))
        feeds.append({**fed, TIMESTEP: np.array(times, np.float32)})

    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        time = feeds[TIMESTEP] if scale == 1.0 else feeds[TIMESTEP] * scale
        return inner({**feeds, TIMESTEP: time if offset == 0.0 else time + offset})

    prediction = _scaled(_selected(settings.get("output_select", 0)), float(settings.get("prediction_scale", 1.0)))
    return Family(class_name, shape, arguments, arrays=extra, sets=tuple(feeds), prediction=prediction)


def _scaled(
    prediction: Callable[[Any, Feeds], torch.Tensor], scale: float
) -> Callable[[Any, Feeds], torch.Tensor]:
    return prediction if scale == 1.0 else lambda returned, feeds: prediction(returned, feeds) * scale


def _nested(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """`{"a.b": x, "c.0": y}` to `{"a": {"b": x}, "c": [y]}`."""
    root: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split(".")
        place = root
        for part in above:
            place = place.setdefault(part, {})
        place[last] = array.item() if array.ndim == 0 else array

    def listed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {key: listed(item) for key, item in value.items()}
        if inner and all(key.isdecimal() for key in inner):
            return [inner[key] for key in sorted(inner, key=int)]
        return inner

    return {name: listed(value) for name, value in root.items()}


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _check_arguments(where: str, names: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    for name in given:
        if name not in names and not open_ended:
            raise _refuse(f"{where}, {name!r}", "an argument that forward does not have", ", ".join(names),
                          nearest(name, names))
    for name, parameter in names.items():
        plain = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if plain and parameter.default is inspect.Parameter.empty and name not in given:
            raise _refuse(f"{where}, {name!r}", "no value", "one, since forward has no default for it",
                          f"add {name} as the model's pipeline passes it")


def _role(given: Mapping[str, Any], said: str, known: Sequence[str]) -> str:
    return said or next((name for name in known if name in given), "")


def _walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested arguments, depth first."""
    if isinstance(value, Mapping):
        for key in value:
            yield from _walk(value[key], (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
    else:
        yield path, value


def _tensors(given: Mapping[str, Any]) -> dict[Path, torch.Tensor]:
    found: dict[Path, torch.Tensor] = {}
    for path, value in _walk(given):
        if isinstance(value, torch.Tensor):
            found[path] = value.detach()
        elif isinstance(value, np.ndarray):
            found[path] = torch.from_numpy(np.array(value))
    return found


def _second(where: str, given: Mapping[str, Any], sample: str) -> Mapping[str, Any]:
    """Another set with one sample more."""
    tensors = _tensors(given)
    first = next((tensor for path, tensor in tensors.items() if path[0] == sample), None)
    if first is None or first.ndim == 0:
        raise _refuse(where, "no sample", f"a tensor named {', '.join(SAMPLE_NAMES)}", "name it with sample=...")
    batch = len(first)
    if batch == 1:
        raise _size_one(where, (sample,))
    generator = torch.Generator().manual_seed(0)

    def grown(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        rows = torch.cat([tensor[1:], tensor[:1], tensor[:1]])
        if not rows.is_floating_point():
            return rows
        noise = torch.randn(rows.shape, generator=generator)
        return rows + (0.1 * noise * rows.float().std()).to(rows.dtype)

    changed = {path: grown(tensor) for path, tensor in tensors.items()}
    rebuilt: Mapping[str, Any] = _rebuilt(given, lambda path, value: changed.get(path, value))
    return rebuilt


def _rebuilt(value: Any, leaf: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    if isinstance(value, Mapping):
        return {key: _rebuilt(item, leaf, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_rebuilt(item, leaf, (*path, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return leaf(path, value)


def _leaves(
    where: str, sets: Sequence[Mapping[str, Any]], roles: Mapping[str, str], constants: Sequence[str]
) -> list[Leaf]:
    first, second = _tensors(sets[0]), _tensors(sets[1])
    if list(first) != list(second):
        other = ", ".join(sorted({*map(_dotted, first)} ^ {*map(_dotted, second)}))
        raise _refuse(where, f"tensors in one set only: {other}", "the same nesting in both", "make them alike")
    batches = _batches(first, second, roles)
    names = _names(list(first), roles)
    leaves = []
    for path, tensor in first.items():
        shape = _shape(f"{where}, {_dotted(path)}", tensor, second[path], batches)
        constant = path[0] in constants or _dotted(path) in constants
        if constant and not torch.equal(tensor, second[path]):
            place = f"{where}, {_dotted(path)}"
            raise _refuse(place, "other values in the second set", "one constant", "make them alike")
        leaves.append(Leaf(path, None if constant else names[path], tensor.dtype, shape, tensor if constant else None))
    return leaves


def _batches(
    first: Mapping[Path, torch.Tensor], second: Mapping[Path, torch.Tensor], roles: Mapping[str, str]
) -> tuple[int, int]:
    """The batch sizes of both sets: of the sample's first axis that differs, or of any."""
    ordered = sorted(first, key=lambda path: roles.get(str(path[0])) != SAMPLE)
    for path in ordered:
        for a, b in zip(first[path].shape, second[path].shape, strict=False):
            if a != b:
                return a, b
    return 0, 0


def _shape(
    where: str, first: torch.Tensor, second: torch.Tensor, batches: tuple[int, int]
) -> tuple[int | str, ...]:
    if first.ndim != second.ndim or first.dtype != second.dtype:
        raise _refuse(where, "another rank or type in the second set", "the same in both", "make them alike")
    dims: list[int | str] = []
    for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
        if a == b:
            dims.append(a)
            continue
        if 1 in (a, b):
            raise _size_one(where, (axis,))
        factor = a // batches[0]
        if (factor * batches[0], factor * batches[1]) != (a, b):
            raise _refuse(
                f"{where}, axis {axis}", f"sizes {a} and {b} with batches {batches[0]} and {batches[1]}",
                "multiples of the batch", "let the sets differ in batch size alone",
            )
        dims.append(BATCH if factor == 1 else f"{factor}*{BATCH}")
    return tuple(dims)


def _names(paths: Sequence[Path], roles: Mapping[str, str]) -> dict[Path, str]:
    """A graph input's name: the role; else the last key where that is unique, else the whole path."""

    def short(path: Path) -> str:
        if len(path) == 1:
            return roles.get(str(path[0]), str(path[0]))
        keys = [index for index, part in enumerate(path) if isinstance(part, str)]
        return "_".join(map(str, path[keys[-1] :]))

    wishes = [short(path) for path in paths]
    return {
        path: wish if wishes.count(wish) == 1 else "_".join(map(str, path))
        for path, wish in zip(paths, wishes, strict=True)
    }


def _graph_type(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float32"
    return "bool" if dtype == torch.bool else "int64"


def _feeds(leaves: Sequence[Leaf], given: Mapping[str, Any]) -> Arrays:
    tensors = _tensors(given)
    return {leaf.name: _array(tensors[leaf.path]) for leaf in leaves if leaf.name}


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    wide = tensor.float() if tensor.is_floating_point() else tensor
    found: NDArray[Any] = np.asarray(wide.numpy(), _graph_type(tensor.dtype))
    return found


def _arguments(
    template: Mapping[str, Any], leaves: Mapping[Path, Leaf], fixed: Mapping[str, Any]
) -> Callable[[Feeds], Mapping[str, Any]]:
    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        def leaf(path: Path, value: Any) -> Any:
            here = leaves.get(path)
            if here is None:
                return value
            if here.name is None:
                assert here.value is not None
                return here.value.float() if here.value.is_floating_point() else here.value
            # A model that is traced in float32 takes no half-precision arguments.
            return feeds[here.name] if here.dtype.is_floating_point else feeds[here.name].to(here.dtype)

        return {**_rebuilt(template, leaf), **fixed}

    return arguments


def _selected(output: int | str | Output) -> Callable[[Any, Feeds], torch.Tensor]:
    def prediction(returned: Any, feeds: Feeds) -> torch.Tensor:
        if isinstance(output, str):
            return first_tensor(returned[output] if isinstance(returned, Mapping) else getattr(returned, output), feeds)
        if callable(output):
            return output(returned)
        found = returned if isinstance(returned, (tuple, list)) else [returned]
        return first_tensor(found[output], feeds) if output else first_tensor(found, feeds)

    return prediction


def _with_result(module: nn.Module, family: Family, leaves: Sequence[Leaf]) -> Family:
    """The family with shapes of sample and prediction, which one run of the module on each set tells."""
    import dataclasses

    wrapper = family.wrap(module)
    shapes, batches = [], []
    for number, feeds in enumerate(family.sets):
        with torch.no_grad():
            args = [torch.from_numpy(np.array(feeds[spec.name])) for spec in family.inputs()]
            try:
                shapes.append(tuple(map(int, wrapper(*args)[0].shape)))
            except Exception as error:
                raise _cannot_run(family, number, error) from error
        batches.append(next((len(feeds[s.name]) for s in family.inputs() if s.shape[:1] == (BATCH,)), 0))
    shape = _shape(
        f"prediction of {family.class_name}", torch.empty(shapes[0], device="meta"),
        torch.empty(shapes[1], device="meta"), (batches[0], batches[1]),
    )
    sample = next((leaf.shape for leaf in leaves if leaf.name == SAMPLE), ())
    assert family.border is not None
    return dataclasses.replace(
        family, sample_shape=tuple(d for d in sample[1:] if isinstance(d, int)),
        border=(family.border[0], TensorSpec(PREDICTION, "float32", shape)),
    )


def _cannot_run(family: Family, number: int, error: Exception) -> ExportError:
    """The error for an example call that the module itself refuses."""
    words = " ".join(str(error).split())[:200]
    return ExportError(
        f"example inputs of {family.class_name}, set {number}", found=f"{type(error).__name__}: {words}",
        wanted="arguments that forward runs on",
        cause="Python values are those of set 0, such as a list with an entry per sample" if number
        else "an argument is missing or has another shape than the model's configuration asks for",
        remedy="give two sets of equal batch size" if number else "call the model with these arguments by itself first",
    )


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _size_one(where: str, place: Path) -> ExportError:
    wanted = "2 or more, since torch takes a size of 1 for a constant"
    remedy = "give examples with batches of 2 and 3"
    return _refuse(f"{where}, {_dotted(place)}", "size 1 on a dynamic axis", wanted, remedy)


def _refuse(where: str, found: str, wanted: str, remedy: str) -> ExportError:
    return ExportError(where, found=found, wanted=wanted, cause="the example does not describe one call", remedy=remedy)
