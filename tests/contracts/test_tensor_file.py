from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantempo.contracts.tensor_file import DTYPES, map_tensors, write_tensors
from quantempo.errors import DataError

RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    **{name: RNG.integers(0, 2, (3, 5)).astype(name) for name in sorted(DTYPES, reverse=True)},
    "empty": np.zeros((0, 4), np.float32), "scalar": np.array(2.5), "transposed": np.arange(6.0).reshape(2, 3).T,
}
SPECS = {name: (str(array.dtype), array.shape) for name, array in TENSORS.items()}


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", SPECS, TENSORS.values())
    found = load_file(tmp_path / "a")
    assert sorted(found) == sorted(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_a_file_of_the_package_is_mapped(tmp_path: Path) -> None:
    save_file({name: a.copy("C") for name, a in TENSORS.items()}, tmp_path / "a", metadata={"a": "b"})
    found = map_tensors(tmp_path / "a")
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)
    assert not found["float32"].flags.writeable


def test_tensors_are_taken_one_after_another(tmp_path: Path) -> None:
    alive = [0]

    class Big:
        def __init__(self) -> None:
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    def made() -> Iterator[Any]:
        for _ in range(4):
            keeper = Big()
            assert alive[0] <= 2
            array = np.zeros(3, np.int8)
            yield array
            del keeper

    write_tensors(tmp_path / "a", {str(i): ("int8", (3,)) for i in range(4)}, made())
    assert len(map_tensors(tmp_path / "a")) == 4


@pytest.mark.parametrize(
    "given", [[np.zeros(3, np.int8)], [np.zeros((3, 1), np.float32)], [], [np.zeros(3, np.float32)] * 2]
)
def test_what_was_not_announced_leaves_no_file(tmp_path: Path, given: list[Any]) -> None:
    (tmp_path / "a").write_bytes(b"older")
    with pytest.raises(ValueError, match=r"announced|argument"):
        write_tensors(tmp_path / "a", {"x": ("float32", (3,))}, given)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"older")]


@pytest.mark.parametrize(
    "content", [b"", b"1234", (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        map_tensors(tmp_path / "a")
