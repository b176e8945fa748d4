"""What calibration is conditioned on: arrays or labels, from the caller or from a file."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.codec import digest, parse_json
from quantempo.contracts.manifest import ArrayInput, Denoiser
from quantempo.errors import RequestError, nearest
from quantempo.recipe import Recipe
from quantempo.runtime.request import check_pinned

Arrays = Mapping[str, NDArray[Any]]
NEGATIVE = "negative_"
"""Before the name of what the unconditional branch takes."""
KINDS = (".npz", ".txt", ".json")


def resolve(
    recipe: Recipe, denoiser: Denoiser, arrays: Arrays, encode: Callable[[Sequence[str]], Arrays] | None = None
) -> tuple[Recipe, Arrays]:
    """The recipe with the labels, and the arrays, that its calibration file holds; both checked.

    Args:
        recipe: names the file.
        denoiser: what the model takes.
        arrays: the caller's.
        encode: prompts to arrays, for a model that takes text.

    Raises:
        RequestError: the file, an array or a label is not what the model takes.
    """
    if recipe.calibration:
        path = Path(recipe.calibration)
        where = f"calibration set {path}"
        if arrays:
            raise _refuse(where, "arrays beside it", "one source of conditioning", "leave one of them out")
        if path.suffix not in KINDS or not path.is_file():
            found = "no such file" if path.suffix in KINDS else f"a file of type {path.suffix or 'none'}"
            raise _refuse(where, found, "a file of type " + " or ".join(KINDS), "see docs/recipe.md for the formats")
        if path.suffix == ".npz":
            arrays, labels = read_arrays(path), recipe.classes
            if not arrays:
                raise _empty(where, "no array", "write the model's conditioning with np.savez(FILE, NAME=…)")
        elif not denoiser.classes and denoiser.arrays and encode is not None:
            arrays, labels = encode(_entries(path)), recipe.classes
        else:
            labels = _read_labels(path, denoiser)
        # A bundle's recipe names no path of this machine.
        recipe = dataclasses.replace(recipe, classes=labels, calibration="")
        check_arrays(denoiser, arrays, recipe.guidance, where)
    else:
        check_arrays(denoiser, arrays, recipe.guidance)
    return recipe, arrays


def read_arrays(path: Path, what: str = "calibration set") -> Arrays:
    """The arrays of a .npz file by name; one row for the unconditional branch becomes as many as its partner has.

    Raises:
        RequestError: no such file, or not arrays of numbers.
    """
    if not path.is_file():
        raise RequestError(
            f"{what} {path}", found="no such file", wanted="a .npz file", cause="the path is misspelt",
            remedy="write one with np.savez; docs/recipe.md says what is in it",
        )
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            return _with_every_row({name: file[name] for name in file.files})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _refuse(
            f"{what} {path}", f"a file that numpy cannot read ({error})", "arrays of numbers",
            "write it again with np.savez, without Python objects",
        ) from error


def _with_every_row(arrays: Arrays) -> Arrays:
    """The same arrays, with one row of `negative_NAME` (an empty prompt, say) repeated for each row of `NAME`."""
    found = dict(arrays)
    for name, array in arrays.items():
        partner = arrays.get(name.removeprefix(NEGATIVE))
        if name.startswith(NEGATIVE) and partner is not None and partner.ndim and array.ndim and len(array) == 1:
            found[name] = np.repeat(array, len(partner), axis=0)
    return found


def _read_labels(path: Path, denoiser: Denoiser) -> tuple[int, ...]:
    where = f"calibration set {path}"
    if not denoiser.classes:
        wanted = ", ".join(array.name for array in denoiser.arrays) or "no conditioning"
        raise _refuse(
            where, "labels", f"what this model takes: {wanted}",
            "write the arrays to a .npz file" if denoiser.arrays else "leave the file out",
        )
    (classes,) = denoiser.classes[:1]
    numbers = {name: int(label) for label, name in classes.names.items()}
    return tuple(
        _label(f"{where}, entry {i + 1}", item, numbers, classes.count) for i, item in enumerate(_entries(path))
    )


def _entries(path: Path) -> list[Any]:
    """The lines of a text file that are not empty, or the items of a JSON list."""
    where = f"calibration set {path}"
    if path.suffix == ".json":
        listed = parse_json(path.read_bytes(), where)
        if not isinstance(listed, list):
            remedy = "write a list of labels, names or prompts"
            raise _refuse(where, f"JSON of type {type(listed).__name__}", "a list", remedy)
    else:
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not listed:
        raise _empty(where, "no entry", "write one label, class name or prompt per line")
    return listed


def _label(where: str, word: Any, numbers: Mapping[str, int], count: int) -> int:
    if isinstance(word, str) and word in numbers:
        return numbers[word]
    if isinstance(word, int) or (isinstance(word, str) and word.isdecimal()):
        if 0 <= int(word) < count:
            return int(word)
        raise _refuse(where, str(word), f"0 to {count - 1}", "the model has no such class; choose another label")
    raise _refuse(where, repr(word), f"a class name or 0 to {count - 1}", nearest(str(word), numbers))


def check_arrays(
    denoiser: Denoiser, arrays: Arrays, guidance: Sequence[float] = (), where: str = "calibration"
) -> None:
    """Refuse conditioning arrays that the model does not take, each for its own reason.

    Args:
        denoiser: what the model takes.
        arrays: conditioning by input name.
        guidance: scales that are used; where all are 1 or less, the unconditional branch is not run.
        where: for messages.

    Raises:
        RequestError: a name too many or missing, another shape or type, no row, values that are not finite, or
            different numbers of rows.
    """
    unguided = bool(guidance) and max(guidance) <= 1.0
    wanted = {
        name: array
        for array in denoiser.arrays
        for name in (array.name, *([f"{NEGATIVE}{array.name}"] if array.guided else []))
        if name == array.name or name in arrays or not unguided
    }
    for pinned in denoiser.pinned:
        if pinned.name in arrays:
            check_pinned(pinned, arrays[pinned.name], where)
    arrays = {name: array for name, array in arrays.items() if name not in {p.name for p in denoiser.pinned}}
    for name in arrays:
        if name not in wanted:
            known = "only " + ", ".join(wanted) if wanted else "none: this model takes no arrays"
            raise _refuse(
                f"{where}, array {name!r}", "a name that the model does not have", known,
                nearest(name, wanted) if wanted else "leave the arrays out",
            )
    _check_all_there(where, wanted, arrays)
    for name, spec in wanted.items():
        _check_array(f"{where}, array {name!r}", arrays[name], spec)
    rows = {name: len(arrays[name]) for name in wanted}
    if len(set(rows.values())) > 1:
        raise _refuse(
            where, "arrays of " + ", ".join(f"{n} rows ({name})" for name, n in rows.items()), "as many rows in each",
            "give every sample a row in every array",
        )


def _check_all_there(where: str, wanted: Mapping[str, ArrayInput], arrays: Arrays) -> None:
    """Refuse missing arrays, all of them at once."""
    missing = {name: spec for name, spec in wanted.items() if name not in arrays}
    if not missing:
        return
    several = len(missing) > 1
    raise RequestError(
        f"{where}, input{'s' if several else ''} {', '.join(map(repr, missing))}", found="no array",
        wanted="; ".join(f"{name}: {s.dtype} of shape {_rows_of(s)}" for name, s in missing.items()),
        cause="this denoiser takes conditioning that quantempo cannot make up",
        remedy=f"write a .npz file, numpy.savez(FILE, {', '.join(f'{name}=…' for name in wanted)}); pass it as "
        "--calib-set to calibrate, as --inputs to sample and to report"
        + (", or take guidance 1, which has no unconditional branch" if any(n != s.name for n, s in missing.items())
           else ""),
    )  # fmt: skip


def _rows_of(spec: ArrayInput) -> str:
    return f"(samples, {', '.join(map(str, spec.shape))})"


def _check_array(where: str, array: NDArray[Any], spec: ArrayInput) -> None:
    shape = _rows_of(spec)
    fits = array.ndim == len(spec.shape) + 1 and all(
        isinstance(d, str) or d == n for d, n in zip(spec.shape, array.shape[1:], strict=True)
    )
    if not fits:
        remedy = "encode the prompts as the model's pipeline does"
        raise _refuse(where, f"shape {array.shape}", f"shape {shape}", remedy)
    if str(array.dtype) != spec.dtype:
        raise _refuse(where, f"type {array.dtype}", spec.dtype, f"convert it with .astype({spec.dtype!r})")
    if not len(array):
        raise _refuse(where, "no row", "at least one sample", "the set is empty; add samples")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _refuse(where, "NaN or infinity", "finite values", "look at how the array was made")


def arrays_digest(arrays: Arrays) -> Mapping[str, str]:
    """Type, shape and SHA-256 of each array."""
    return {
        name: f"{a.dtype} {a.shape} {digest(np.ascontiguousarray(a).tobytes())}" for name, a in sorted(arrays.items())
    }


def deal_labels(denoiser: Denoiser, recipe: Recipe) -> tuple[int, ...]:
    """A class for each sample: the recipe's, or those that have names, dealt out in a fixed shuffled order."""
    classes: Sequence[int] = recipe.classes
    if not classes and denoiser.classes:
        classes = sorted(int(label) for label in denoiser.classes[0].names)
    if not classes:
        return ()
    order = np.random.Generator(np.random.Philox(recipe.seed)).permutation(recipe.samples)
    return tuple(classes[int(i) % len(classes)] for i in order)


def _empty(where: str, found: str, remedy: str) -> RequestError:
    return RequestError(where, found=found, wanted="at least one", cause="the set is empty", remedy=remedy)


def _refuse(where: str, found: str, wanted: str, remedy: str) -> RequestError:
    return RequestError(where, found=found, wanted=wanted, cause="the file was made for another model", remedy=remedy)
