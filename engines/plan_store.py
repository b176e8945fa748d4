"""Compiled plans without the weights that the bundle holds already.

A plan repeats the bundle's weights, byte for byte for the most part.  `pack` keeps what is new, compressed, and notes
where the rest lies in the weight files; `unpack` puts the same bytes together again, and a digest proves it.  Unlike
the builder's own weight stripping, nothing is refitted: the restored plan *is* the plan that was built, and packing
works on a machine without a GPU.

Equal stretches are found as in delta compression: both sides are sampled at places that their own content chooses, so
that equal bytes are sampled alike wherever they lie; equal samples are then grown in both directions.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quantempo.contracts.codec import digest
from quantempo.engines.onnx_reader import read_graph
from quantempo.errors import DigestMismatch, EngineError

SHORTEST = 64
"""A stretch below this length costs about as much to note as to keep."""
_SAMPLE_BITS = 5
_WORDS = 4
_STEP = 1 << 16
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
Bytes = NDArray[np.uint8]


def weight_sources(graph: Path) -> dict[str, Bytes]:
    """The bytes that a graph's plans repeat: its weight files as they are, and their convolutions channels last.

    TensorRT stores a convolution's weights as (output, height, width, input), ONNX as (output, input, height, width).
    """
    structure = read_graph(graph)
    files: dict[str, Bytes] = {}
    turned: dict[str, list[Bytes]] = {}
    tensors = [t for t in structure.constants.values() if t.location is not None and t.safe and t.length]
    for tensor in sorted(tensors, key=lambda t: (str(t.location), t.offset)):
        name = str(tensor.location)
        if name not in files:
            files[name] = np.memmap(graph.parent / name, np.uint8, "r")
        width, rest = divmod(tensor.length, max(1, tensor.size))
        if len(tensor.shape) == 4 and rest == 0 and tensor.shape[2:] != (1, 1):
            stored = files[name][tensor.offset : tensor.offset + tensor.length].reshape(*tensor.shape, width)
            turned.setdefault(f"{name}, channels last", []).append(stored.transpose(0, 2, 3, 1, 4).reshape(-1))
    return {**files, **{name: np.concatenate(parts) for name, parts in turned.items()}}


def pack(plan: bytes, sources: Mapping[str, Bytes]) -> bytes:
    """The plan as references into the bundle's weights, and the compressed rest.

    Args:
        plan: a serialized engine.
        sources: bytes by the name under which `unpack` will be given them, see `weight_sources`.
    """
    data = np.frombuffer(plan, np.uint8)
    names = sorted(sources)
    runs = _runs(data, [sources[name] for name in names])
    kept = np.ones(len(data), np.bool_)
    for start, _, _, length in runs:
        kept[start : start + length] = False
    tensors = {
        "runs": np.frombuffer(zlib.compress(np.array(runs, "<i8").tobytes(), 9), np.uint8),
        "rest": np.frombuffer(zlib.compress(data[kept].tobytes(), 6), np.uint8),
    }
    # One entry: the format's writer keeps several in no fixed order.
    head = {"files": names, "sha256": digest(plan), "size": len(plan)}
    return save(tensors, {"plan": json.dumps(head, sort_keys=True)})


def unpack(packed: bytes, sources: Mapping[str, Bytes], where: str = "packed plan") -> bytes:
    """The plan that was packed.

    Raises:
        EngineError: the text is no packed plan, or a weight file is missing.
        DigestMismatch: the weight files are not those that the plan was packed against.
    """
    try:
        tensors = load(packed)
        metadata = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])["__metadata__"]
        head = json.loads(metadata["plan"])
        names, size = head["files"], head["size"]
        runs = np.frombuffer(zlib.decompress(tensors["runs"].tobytes()), "<i8").reshape(-1, 4)
        rest = np.frombuffer(zlib.decompress(tensors["rest"].tobytes()), np.uint8)
    except (SafetensorError, KeyError, ValueError, zlib.error) as error:
        raise EngineError(
            where, found=f"bytes that are no packed plan ({error})", wanted="a file that `quantempo build` wrote",
            cause="the file is damaged or was cut short", remedy="run: quantempo build again",
        ) from error
    missing = [name for name in names if name not in sources]
    if missing:
        raise EngineError(
            where, found=f"no weights {missing[0]!r}", wanted="the bundle that the plan was built from",
            cause="the plan was moved to another bundle", remedy="run: quantempo build again",
        )
    plan = _restored(size, runs, rest, [sources[name] for name in names])
    if plan is None or digest(plan) != head["sha256"]:
        raise DigestMismatch(
            where, found="a restored plan with another digest", wanted=f"{head['sha256'][:12]}…",
            cause="the weight files are not those that the plan was built from", remedy="run: quantempo build again",
        )
    return plan


def _restored(size: int, runs: NDArray[Any], rest: Bytes, files: list[Any]) -> bytes | None:
    """The bytes, or `None` where the references do not fit."""
    out = np.empty(size, np.uint8)
    end = used = 0
    for start, file, source, length in runs.tolist():
        fits = 0 <= file < len(files) and source >= 0 and source + length <= len(files[file])
        if not fits or not end <= start <= start + length <= size or used + start - end > len(rest):
            return None
        out[end:start] = rest[used : used + start - end]
        used += start - end
        out[start : start + length] = files[file][source : source + length]
        end = start + length
    if used + size - end != len(rest):
        return None
    out[end:] = rest[used:]
    return out.tobytes()


def _runs(data: Bytes, files: list[Any]) -> list[tuple[int, int, int, int]]:
    """Stretches (place in the plan, file, place in the file, length), in order and without overlap."""
    found = [_samples(np.asarray(file)) for file in files]
    prints = np.concatenate([f for f, _ in found]) if found else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(found)), [len(f) for f, _ in found])
    place = np.concatenate([p for _, p in found]) if found else np.empty(0, np.int64)
    order = np.argsort(prints, kind="stable")
    prints, owner, place = prints[order], owner[order], place[order]
    if not len(prints):
        return []
    mine, at = _samples(data)
    order = np.argsort(at, kind="stable")
    mine, at = mine[order], at[order]
    hit = np.searchsorted(prints, mine)
    hit[hit == len(prints)] = 0
    equal = prints[hit] == mine
    at, hit = at[equal], hit[equal]
    runs: list[tuple[int, int, int, int]] = []
    end = index = 0
    while index < len(at):
        spot, file, source = int(at[index]), int(owner[hit[index]]), int(place[hit[index]])
        other = files[file]
        back = _common(data[end:spot][::-1], other[:source][::-1])
        length = back + _common(data[spot:], other[source:])
        if length >= SHORTEST:
            runs.append((spot - back, file, source - back, length))
            end = spot - back + length
            index = int(np.searchsorted(at, end))
        else:
            index += 1
    return runs


def _samples(data: Bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Fingerprints of 32 bytes, at the places where a hash of the first eight has its top bits clear."""
    prints, places = [], []
    for shift in range(8):
        words = data[shift : shift + (len(data) - shift) // 8 * 8]
        if len(words) < 8 * _WORDS:
            continue
        whole = np.ascontiguousarray(words).view("<u8")
        first = whole[: len(whole) - _WORDS + 1]
        # The addend keeps runs of zeros, of which plans have many, from being sampled everywhere.
        chosen = np.flatnonzero((first * _MIX[0] + _MIX[1]) >> np.uint64(64 - _SAMPLE_BITS) == 0)
        mixed = whole[chosen] * _MIX[0]
        for word in range(1, _WORDS):
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ whole[chosen + word]) * _MIX[word % 2]
        prints.append(mixed)
        places.append(chosen.astype(np.int64) * 8 + shift)
    if not prints:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    return np.concatenate(prints), np.concatenate(places)


def _common(one: Bytes, other: Bytes) -> int:
    """Length of the common beginning."""
    limit, done, step = min(len(one), len(other)), 0, 256
    while done < limit:
        stop = min(done + step, limit)
        differs = one[done:stop] != other[done:stop]
        if differs.any():
            return done + int(differs.argmax())
        done, step = stop, min(step * 4, _STEP * 16)
    return done
