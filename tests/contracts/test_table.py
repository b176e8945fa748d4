from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantempo.contracts.partition import Partition
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import ScaleMissing

PARTITION = Partition((5.0,), 0.0, 10.0)


def _scales(groups: int = 2, **changes: Any) -> TensorScales:
    arrays: dict[str, Any] = {
        "scale": np.linspace(0.1, 0.2, groups, dtype=np.float32),
        "zero_point": np.arange(groups, dtype=np.int32) + 100,
        "symmetric_scale": np.linspace(0.3, 0.4, groups, dtype=np.float32),
    }
    return TensorScales(**{**arrays, **changes})


def test_each_form_has_its_zero_point() -> None:
    scale, point = _scales().pick(False, 8)
    assert scale[1] == np.float32(0.2)
    assert point.tolist() == [100, 101]
    scale, point = _scales().pick(True, 8)
    assert scale[0] == np.float32(0.3)
    assert point.tolist() == [128, 128]
    assert _scales().pick(True, 6)[1].tolist() == [32, 32]


@pytest.mark.parametrize(
    "bad", [np.float32([0.1, 0.0]), np.float32([0.1, -1]), np.float32([np.nan, 1]), np.float32([np.inf, 1])]
)
@pytest.mark.parametrize("name", ["scale", "symmetric_scale"])
def test_scales_that_cannot_divide_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match="finite and above zero"):
        _scales(**{name: bad})


def test_scales_of_another_type_or_length_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        _scales(scale=np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="differ in length"):
        _scales(zero_point=np.zeros(3, np.int32))


def test_a_missing_tensor_has_no_default_scale() -> None:
    table = ScaleTable(PARTITION, {"x": _scales()})
    assert table.of("x").zero_point[0] == 100
    with pytest.raises(ScaleMissing, match=r"tensor 'y'[\s\S]*no scales[\s\S]*calibrate with this plan"):
        table.of("y")


def test_a_table_of_another_partition_is_an_error() -> None:
    with pytest.raises(ScaleMissing, match="found 3 groups, wanted 2 groups"):
        ScaleTable(PARTITION, {"x": _scales(3)}).of("x")


def test_arrays_round_trip_also_for_names_with_separators() -> None:
    table = ScaleTable(PARTITION, {"b|c/0": _scales(), "a": _scales(scale=np.float32([1, 2]))})
    flat = table.arrays()
    assert list(flat)[:3] == ["a|scale", "a|zero_point", "a|symmetric_scale"]
    back = ScaleTable.from_arrays(PARTITION, flat)
    assert sorted(back.tensors) == ["a", "b|c/0"]
    for name, array in back.arrays().items():
        assert np.array_equal(array, flat[name])
        assert array.dtype == flat[name].dtype
