"""What a bundle must fulfil so that its cached programs can be replayed: manifest, vectors and programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.manifest import MANIFEST_NAME, GraphEntry, Manifest
from quantempo.contracts.program import INDICATOR, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.contracts.variants import Variant, Vectors, check_variants
from quantempo.errors import BundleError, DataError, nearest

CACHE, CORRECTIONS = "feature-cache-1", "corrections-1"


def denoisers(manifest: Manifest, dialect: str) -> dict[str, GraphEntry]:
    """The denoiser graphs of one dialect by variant, float32 before narrower types; probes are among them."""
    ends = {manifest.denoiser.prediction, INDICATOR}
    found = [
        entry for name, entry in manifest.graphs.items()
        if name != manifest.decoder.graph and entry.dialect == dialect and ends & {s.name for s in entry.outputs}
    ]
    chosen: dict[str, GraphEntry] = {}
    for entry in sorted(found, key=lambda e: e.float_type != "float32"):
        chosen.setdefault(entry.variant, entry)
    return chosen


def check_features(manifest: Manifest) -> None:
    """Refuse graphs whose features do not fit together, and a manifest that hides what a reader must know.

    Raises:
        BundleError: a feature that is no input or output of its graph, that no variant of the dialect writes, that
            differs between two variants, or whose rows are not those of the batch; a feature or vectors without the
            entry in `requires` that keeps older readers away.
    """
    for needed, used in ((CACHE, _caches(manifest)), (CORRECTIONS, manifest.vectors is not None)):
        if used and needed not in manifest.requires:
            raise _refuse("requires", f"no {needed!r}", f"{needed!r}, which the bundle uses")
    for steps in manifest.cache.programs if manifest.cache is not None else ():
        if not steps.isdecimal() or steps != str(int(steps)):
            raise _refuse("cache.programs", f"the key {steps!r}", "a number of steps")
    for dialect in sorted({entry.dialect for entry in manifest.graphs.values()}):
        entries = denoisers(manifest, dialect).values()
        written = {feature: spec for entry in entries for feature, spec in _written(entry)}
        for entry in entries:
            for feature in entry.reads:
                _check_read(entry, feature, written, manifest.denoiser.sample_input)


def _written(entry: GraphEntry) -> Iterator[tuple[str, TensorSpec]]:
    outputs = {spec.name: spec for spec in entry.outputs}
    for feature in entry.writes:
        if feature not in outputs:
            raise _refuse(_graph(entry), f"feature {feature!r} written", "an output of that name")
        yield feature, outputs[feature]


def _check_read(entry: GraphEntry, feature: str, written: Mapping[str, TensorSpec], sample: str) -> None:
    inputs = {spec.name: spec for spec in entry.inputs}
    if feature not in inputs:
        raise _refuse(_graph(entry), f"feature {feature!r} read", "an input of that name")
    if feature not in written:
        found = f"feature {feature!r}, which no variant writes"
        raise _refuse(_graph(entry), found, "a variant that writes it", nearest(feature, written))
    spec, other = inputs[feature], written[feature]
    if spec != other:
        found, wanted = (f"{s.dtype} {s.shape}" for s in (spec, other))
        raise _refuse(_graph(entry), f"feature {feature!r} as {found}", f"{wanted}, as it is written")
    if sample in inputs and spec.shape[:1] != inputs[sample].shape[:1]:
        found = f"feature {feature!r} of shape {spec.shape}"
        raise _refuse(_graph(entry), found, f"rows of the batch ({inputs[sample].shape[0]}) first")


def _caches(manifest: Manifest) -> bool:
    return manifest.cache is not None or any(entry.reads or entry.writes for entry in manifest.graphs.values())


def _graph(entry: GraphEntry) -> str:
    return f"graphs, {entry.file}"


def read_vectors(path: Path, name: str) -> dict[str, NDArray[np.float32]]:
    """The arrays of a vectors file.

    Raises:
        BundleError: not a safetensors file, or an array that is not finite float32 of shape (rows, channels).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _refuse(name, f"a file that safetensors refuses ({error})", "a safetensors file") from error
    for key, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 2 or not array.size:
            raise _refuse(f"{name}: {key!r}", f"{array.dtype} {array.shape}", "float32 of shape (rows, channels)")
        if not np.isfinite(array).all():
            raise _refuse(f"{name}: {key!r}", "NaN or infinity", "finite numbers")
    return arrays


def check_cached(manifest: Manifest, programs: Iterator[tuple[int, str, StepProgram]], vectors: Vectors) -> None:
    """Refuse cached programs that none of the bundle's dialects can replay, or that lie under another step count.

    Args:
        manifest: checked before.
        programs: step count, file and content of each.
        vectors: of the bundle.

    Raises:
        BundleError, DataError.
    """
    dialects = sorted({entry.dialect for entry in manifest.graphs.values()})
    sets = [{n: Variant.of(e) for n, e in denoisers(manifest, d).items()} for d in dialects]
    for steps, name, program in programs:
        for what, found, wanted in (
            ("steps", str(program.steps), str(steps)),
            ("scheduler", program.scheduler, manifest.programs.scheduler),
        ):
            if found != wanted:
                raise _refuse(f"{name}: {what}", found, f"{wanted}, as in the manifest")
        refusals: list[DataError] = []
        for variants in sets:
            try:
                check_variants(program, variants, vectors, manifest.denoiser.latents_shape[0], name)
            except DataError as error:
                refusals.append(error)
        if len(refusals) == len(sets):
            # Of a dialect without variants one only learns that it has none.
            raise refusals[max(range(len(sets)), key=lambda i: len(sets[i]))]


def _refuse(where: str, found: str, wanted: str, remedy: str = "compile the bundle again") -> BundleError:
    return BundleError(
        f"{MANIFEST_NAME}.{where}" if "/" not in where and ":" not in where else where, found=found, wanted=wanted,
        cause="the bundle was changed by hand, or put together from two", remedy=remedy,
    )
