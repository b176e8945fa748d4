"""The arguments of a call, checked against the bundle and brought into the loop's form.

Every refusal names the nearest legal value.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.manifest import ArrayInput, ClassInput, Manifest, PinnedInput
from quantempo.errors import RequestError, nearest
from quantempo.runtime.guidance import Mode
from quantempo.runtime.rng import NoiseSource, PhiloxNoise
from quantempo.runtime.torch_rng import TorchGenerator, TorchNoise

Array = NDArray[Any]
Float32s = NDArray[np.float32]
RNGS = ("philox", "torch-cpu")
MODES = ("batched", "split")
CALL_ARGUMENTS = (
    "class_labels", "num_inference_steps", "guidance_scale", "guidance_rescale", "seed", "generator", "latents",
    "output_type", "callback_on_step_end", "rng", "batch_size", "program", "guidance_mode", "feature_cache",
)
"""The parameters of `Session.__call__`, to name the nearest when one is misspelt."""


@dataclass(frozen=True, eq=False)
class Request:
    """Arguments as the caller gave them; see `Session.__call__`."""

    class_labels: Any = None
    guidance_scale: float | Sequence[float] | None = None
    guidance_rescale: float = 0.0
    seed: int | Sequence[int] | None = None
    generator: Any = None
    latents: Float32s | None = None
    rng: str | None = None
    batch_size: int | None = None
    guidance_mode: Mode | None = None
    arrays: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Resolved:
    """Arguments in the loop's form.

    Args:
        seeds: what to pass as `seed` to repeat the call; `None` with a generator.
        seed_per_sample: for observers; with one seed for the batch, all entries are that seed.
        store: puts the caller's generators where the run left them.
    """

    batch: int
    guidance: tuple[float, ...]
    rescale: float
    mode: Mode
    noise: NoiseSource
    latents: Float32s | None
    conditioning: Mapping[str, tuple[Array, Array | None]]
    seeds: int | tuple[int, ...] | None
    seed_per_sample: tuple[int, ...]
    store: Callable[[], None]


def _refuse(where: str, found: str, wanted: str, remedy: str, cause: str = "a value of another kind") -> RequestError:
    return RequestError(where, found=found, wanted=wanted, cause=cause, remedy=remedy)


def resolve(request: Request, manifest: Manifest) -> Resolved:
    """Check a call.

    Raises:
        RequestError.
    """
    denoiser = manifest.denoiser
    arrays = dict(request.arrays)
    if request.class_labels is not None:
        if not denoiser.classes:
            raise _refuse(
                "class_labels", "labels", "none: this model is not conditioned on classes",
                "leave class_labels out (on the command line: --class)",
                "the bundle was made from another kind of model",
            )
        arrays.setdefault(denoiser.classes[0].name, request.class_labels)
    for pinned in denoiser.pinned:
        if pinned.name in arrays:
            check_pinned(pinned, arrays.pop(pinned.name))
    _check_names(arrays, manifest)
    labels = {c.name: _labels(c, arrays) for c in denoiser.classes}
    given = {n: _array(spec, n, arrays[n]) for spec in denoiser.arrays for n in _names(spec) if n in arrays}
    batch = _batch(request, labels, given, manifest)
    guidance = _guidance(request.guidance_scale, batch, manifest, set(given))
    conditioning: dict[str, tuple[Array, Array | None]] = {}
    for spec in denoiser.classes:
        row = _spread(labels[spec.name], batch)
        conditioning[spec.name] = (row, None if spec.null is None else np.full(batch, spec.null, np.int64))
    for each in denoiser.arrays:
        conditioning[each.name] = _pair(each, given, batch)
    noise, seeds, per_sample, store = _noise(request, batch)
    rescale = _rescale(request.guidance_rescale)
    latents = _latents(request.latents, batch, denoiser.latents_shape)
    mode = _mode(request.guidance_mode, guidance, denoiser.max_batch)
    return Resolved(batch, guidance, rescale, mode, noise, latents, conditioning, seeds, per_sample, store)


def check_pinned(pinned: PinnedInput, value: Any, where: str = "call") -> None:
    """Refuse an input whose contents are not those that the graphs were made for.

    Raises:
        RequestError: some row differs.
    """
    wanted = np.array(pinned.values, pinned.dtype).reshape(pinned.shape)
    array = np.asarray(value)
    if array.shape[max(array.ndim - wanted.ndim, 0) :] != wanted.shape or not (array == wanted).all():
        shown = np.array2string(wanted, threshold=12)
        raise _refuse(
            f"{where}, {pinned.name}", "other contents", f"{shown} in every row",
            f"leave {pinned.name} out, or compile the model again with example inputs that hold these contents",
            "the model's Python branches on them, and the graphs hold one branch",
        )


def _names(spec: ArrayInput) -> tuple[str, ...]:
    return (spec.name, f"negative_{spec.name}") if spec.guided else (spec.name,)


def _check_names(arrays: Mapping[str, Any], manifest: Manifest) -> None:
    denoiser = manifest.denoiser
    known = {c.name for c in denoiser.classes} | {n for spec in denoiser.arrays for n in _names(spec)}
    for name in arrays:
        if name == "timesteps":
            raise _refuse(
                name, "a list of timesteps", "num_inference_steps or program=",
                "trace a step program for these timesteps with the extra 'compile' and pass it as program=",
                "a bundle replays step programs and has no scheduler",
            )
        if name not in known:
            raise _refuse(
                "call", f"an unknown argument {name!r}",
                f"call arguments, or inputs of this bundle ({', '.join(sorted(known)) or 'it has none'})",
                nearest(name, {*known, *CALL_ARGUMENTS}), "a misspelling, or an argument of another pipeline",
            )
    for spec in denoiser.arrays:
        if spec.name not in arrays:
            raise _refuse(
                spec.name, "no value", f"an array {spec.dtype} (batch, {', '.join(map(str, spec.shape))})",
                f"pass {spec.name}=...", "the model is conditioned on it",
            )
    for each in denoiser.classes:
        if each.name not in arrays:
            raise _refuse(
                "class_labels", "no value", f"labels 0 to {each.count - 1}", "pass class_labels=0, or one per sample",
                "the model is conditioned on classes",
            )


def _labels(spec: ClassInput, arrays: Mapping[str, Any]) -> NDArray[np.int64]:
    value = arrays[spec.name]
    items: Iterable[Any] = [value] if isinstance(value, (str, int)) or np.ndim(value) == 0 else list(value)
    return np.array([_label(spec, item) for item in items], np.int64)


def _label(spec: ClassInput, item: Any) -> int:
    if isinstance(item, str):
        by_name = {shown: int(label) for label, shown in spec.names.items()}
        if item not in by_name:
            raise _refuse(
                "class_labels", repr(item), "a name of a class of this model",
                nearest(item, by_name) if by_name else f"pass a number, 0 to {spec.count - 1}", "an unknown class name",
            )
        return by_name[item]
    if hasattr(item, "item"):
        item = item.item()  # scalars of numpy, torch and the like
    if isinstance(item, bool) or not isinstance(item, int):
        raise _refuse("class_labels", repr(item), f"whole numbers, 0 to {spec.count - 1}, or names", "pass an int")
    if not 0 <= item < spec.count:
        close = min(max(item, 0), spec.count - 1)
        raise _refuse(
            "class_labels", str(item), f"labels 0 to {spec.count - 1}", f"the nearest legal label is {close}",
            f"the model knows {spec.count} classes",
        )
    return item


def _array(spec: ArrayInput, name: str, value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype.kind != np.dtype(spec.dtype).kind:
        raise _refuse(name, f"type {array.dtype}", f"type {spec.dtype}", f"pass {name}.astype({spec.dtype!r})")
    fits = array.ndim == len(spec.shape) + 1 and all(
        isinstance(d, str) or n == d for n, d in zip(array.shape[1:], spec.shape, strict=True)
    )
    if not fits:
        same_rank = array.ndim == len(spec.shape) + 1
        sizes = array.shape[1:] if same_rank else (1,) * len(spec.shape)
        legal = tuple(n if isinstance(d, str) else d for n, d in zip(sizes, spec.shape, strict=True))
        legal = (array.shape[0] if same_rank else 1, *legal)
        raise _refuse(
            name, f"shape {array.shape}", f"shape (batch, {', '.join(map(str, spec.shape))})",
            f"the nearest legal shape is {legal}", "the array was made for another model",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _refuse(name, "NaN or infinity", "finite numbers", "look at what made the array")
    return array.astype(spec.dtype, copy=False)


def _batch(request: Request, labels: Mapping[str, Array], given: Mapping[str, Array], manifest: Manifest) -> int:
    """The number of samples; everything that tells one must agree, and a single value spreads over the batch."""
    told: dict[str, int] = {}
    if request.batch_size is not None:
        told["batch_size"] = int(request.batch_size)
    for name, array in (*labels.items(), *given.items()):
        told[name] = len(array)
    if request.latents is not None and np.ndim(request.latents):
        told["latents"] = len(request.latents)
    for name, value in (("seed", request.seed), ("generator", request.generator)):
        if isinstance(value, (list, tuple, np.ndarray)):
            told[name] = len(value)
    if request.guidance_scale is not None and np.ndim(request.guidance_scale):
        told["guidance_scale"] = len(np.asarray(request.guidance_scale))
    several = {name: n for name, n in told.items() if n != 1 or name == "batch_size"}
    batch = max(several.values(), default=1)
    for name, size in several.items():
        if size != batch:
            other = next(n for n, s in several.items() if s == batch)
            raise _refuse(
                name, f"{size} samples", f"{batch}, as in {other}", f"pass 1 or {batch} of them",
                "two arguments disagree about the batch",
            )
    limit = manifest.denoiser.max_batch
    if batch < 1 or (limit is not None and batch > limit):
        legal = 1 if batch < 1 else limit
        raise _refuse(
            "batch", f"{batch} samples", f"1 to {limit}" if limit else "at least 1",
            f"the nearest legal batch is {legal}; split the call",
            f"the bundle was compiled for at most {limit} rows" if limit else "an empty list of samples",
        )
    return batch


def _spread(array: Array, batch: int) -> Array:
    return np.repeat(array, batch, axis=0) if len(array) == 1 and batch > 1 else array


def _pair(spec: ArrayInput, given: Mapping[str, Array], batch: int) -> tuple[Array, Array | None]:
    positive = _spread(given[spec.name], batch)
    negative = given.get(f"negative_{spec.name}")
    if negative is not None and negative.shape[1:] != positive.shape[1:]:
        raise _refuse(
            f"negative_{spec.name}", f"shape {negative.shape}", f"shape {positive.shape}",
            f"pad it to the shape of {spec.name}", "both branches run in one graph with one set of shapes",
        )
    return positive, None if negative is None else _spread(negative, batch)


def _guidance(value: Any, batch: int, manifest: Manifest, given: set[str]) -> tuple[float, ...]:
    denoiser = manifest.denoiser
    negatives = [f"negative_{s.name}" for s in denoiser.arrays if s.guided]
    possible = any(c.null is not None for c in denoiser.classes) or any(n in given for n in negatives)
    if value is None:
        value = manifest.default_guidance if possible else 1.0
    scales = np.asarray(value, dtype=np.float64).reshape(-1)
    scales = np.repeat(scales, batch) if scales.size == 1 else scales
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise _refuse("guidance_scale", str(value), "finite numbers of at least 0", "1.0 means no guidance")
    if (scales > 1.0).any() and not possible:
        remedy = f"pass {negatives[0]}=..." if negatives else "the nearest legal value is 1.0"
        raise _refuse(
            "guidance_scale", f"{scales.max():g}", "1.0", remedy, "the call has no unconditional branch to guide with"
        )
    return tuple(float(s) for s in scales)


def _rescale(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        close = 0.0 if not isinstance(value, (int, float)) or not value > 0.0 else 1.0
        raise _refuse("guidance_rescale", repr(value), "a number from 0 to 1", f"the nearest legal value is {close}")
    return float(value)


def _mode(value: Any, guidance: Sequence[float], limit: int | None) -> Mode:
    if value is None:
        rows = len(guidance) + sum(scale > 1.0 for scale in guidance)
        return "batched" if limit is None or rows <= limit else "split"
    if value not in MODES:
        raise _refuse("guidance_mode", repr(value), "'batched' or 'split'", nearest(str(value), MODES), "a misspelling")
    mode: Mode = value
    return mode


def _latents(value: Any, batch: int, shape: tuple[int, ...]) -> Float32s | None:
    if value is None:
        return None
    array = np.asarray(value)
    wanted = (batch, *shape)
    if array.shape not in (wanted, (1, *shape)):
        raise _refuse(
            "latents", f"shape {array.shape}", f"shape {wanted}", f"the nearest legal shape is {wanted}",
            "latents of another model or resolution; a bundle is compiled for one resolution",
        )
    if array.dtype != np.float32 or not np.isfinite(array).all():
        found = f"type {array.dtype}" if array.dtype != np.float32 else "NaN or infinity"
        raise _refuse("latents", found, "finite float32", "pass latents.astype('float32'), without NaN")
    return _spread(array, batch)


def _seed(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise _refuse("seed", repr(value), "a whole number, or one per sample", "pass an int")
    if not 0 <= value < 2**64:
        close = 0 if value < 0 else 2**64 - 1
        raise _refuse("seed", str(value), "0 to 2**64 - 1", f"the nearest legal seed is {close}", "seeds have 64 bits")
    return int(value)


def _noise(
    request: Request, batch: int
) -> tuple[NoiseSource, int | tuple[int, ...] | None, tuple[int, ...], Callable[[], None]]:
    rng = request.rng if request.rng is not None else ("philox" if request.generator is None else "torch-cpu")
    if rng not in RNGS:
        raise _refuse("rng", repr(rng), "'philox' or 'torch-cpu'", nearest(str(rng), RNGS), "a misspelling")
    if request.generator is not None:
        return _generators(request, batch, rng)
    if request.seed is None:
        seeds: int | tuple[int, ...] = secrets.randbits(63)
    elif isinstance(request.seed, (list, tuple, np.ndarray)):
        several = tuple(_seed(s) for s in request.seed)
        # A list is a list even when it has one entry: its sample has a seed of its own.
        seeds = several * batch if len(several) == 1 else several
    else:
        seeds = _seed(request.seed)
    per_sample = (seeds,) * batch if isinstance(seeds, int) else seeds
    source = PhiloxNoise if rng == "philox" else TorchNoise
    return source.from_seeds(seeds, batch), seeds, per_sample, lambda: None


def _generators(
    request: Request, batch: int, rng: str
) -> tuple[NoiseSource, None, tuple[int, ...], Callable[[], None]]:
    if request.seed is not None or rng != "torch-cpu":
        found = "seed and generator" if request.seed is not None else f"a generator with rng={rng!r}"
        raise _refuse("generator", found, "one source of noise", "leave one of them out", "two sources of noise")
    given = request.generator if isinstance(request.generator, (list, tuple)) else [request.generator]
    copies = [TorchGenerator.continuing(g) for g in given]

    def store() -> None:
        for original, copy in zip(given, copies, strict=True):
            copy.store(original)

    initial = tuple(int(g.initial_seed()) for g in given)
    if len(copies) == 1 and batch > 1 and isinstance(request.generator, (list, tuple)):
        raise _refuse("generator", "a list of 1", f"a list of {batch}", "pass the generator itself, or one per sample")
    return TorchNoise(copies, batch), None, initial * batch if len(initial) == 1 else initial, store
