"""Plans without the weights that the bundle holds: the same bytes come back, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from quantempo.engines.plan_store import pack, unpack
from quantempo.errors import DigestMismatch, EngineError

Sources = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def sources() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 256, 40_000, np.uint8) for name in ("a.bin", "b.bin")}


def plan_of(sources: Sources) -> bytes:
    """Code, a whole file, zeros, a stretch at an odd place, interleaved rows, a tail."""
    rng = np.random.default_rng(2)
    rows = sources["b.bin"][:8000].reshape(20, 400)
    mixed = np.concatenate([rows[:, :200], sources["a.bin"][:4000].reshape(20, 200), rows[:, 200:]], 1)
    parts = [rng.integers(0, 256, 501, np.uint8), sources["a.bin"], np.zeros(3000, np.uint8),
             sources["b.bin"][1237:30_111], mixed.reshape(-1), rng.integers(0, 256, 77, np.uint8)]  # fmt: skip
    return np.concatenate(parts).tobytes()


def test_the_same_bytes_come_back_from_far_fewer(sources: Sources) -> None:
    plan = plan_of(sources)
    packed = pack(plan, sources)
    assert unpack(packed, sources) == plan
    assert len(packed) < 0.05 * len(plan)
    assert pack(plan, sources) == packed


@pytest.mark.parametrize("plan", [b"", b"short", bytes(range(256)) * 3])
def test_plans_that_share_nothing_come_back_too(plan: bytes, sources: Sources) -> None:
    assert unpack(pack(plan, sources), sources) == plan
    assert unpack(pack(plan, {}), {}) == plan


def test_changed_weights_are_refused(sources: Sources) -> None:
    packed = pack(plan_of(sources), sources)
    other = {name: array.copy() for name, array in sources.items()}
    other["a.bin"][20_000] ^= 1
    with pytest.raises(DigestMismatch, match="weight files are not those"):
        unpack(packed, other)
    with pytest.raises(DigestMismatch, match="weight files are not those"):
        unpack(packed, {**sources, "a.bin": sources["a.bin"][:1000]})
    with pytest.raises(EngineError, match=r"no weights 'b\.bin'"):
        unpack(packed, {"a.bin": sources["a.bin"]})


@pytest.mark.parametrize("cut", [0, 5, 60, -20])
def test_damaged_files_are_refused(cut: int, sources: Sources) -> None:
    packed = pack(plan_of(sources), sources)
    with pytest.raises(EngineError, match="no packed plan"):
        unpack(packed[:cut], sources)


def test_references_outside_the_files_are_refused(sources: Sources) -> None:
    import json
    import zlib

    packed = pack(plan_of(sources), sources)
    tensors: dict[str, Any] = load(packed)
    head = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])["__metadata__"]
    runs = np.frombuffer(zlib.decompress(tensors["runs"].tobytes()), "<i8").reshape(-1, 4).copy()
    runs[0, 2] = -5
    tensors["runs"] = np.frombuffer(zlib.compress(runs.tobytes()), np.uint8)
    with pytest.raises(DigestMismatch):
        unpack(save(tensors, head), sources)
