"""Scales of a ModelOpt checkpoint: both forms, and nothing taken that does not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantempo.calib.modelopt import FLOOR, FlooredScale, import_maxima, read_maxima
from quantempo.contracts.partition import Partition
from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share, Site
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import CalibrationError


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file with types that numpy does not have."""
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def scale(value: float) -> tuple[str, list[int], bytes]:
    return "F32", [], struct.pack("<f", value)


def test_maxima_of_a_state_dictionary(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    one, two = np.array(3.5, np.float32), np.array([2.0], np.float32)
    save_file({
        "blocks.0.to_q.input_quantizer._amax": one, "blocks.0.ff.input_quantizer._amax": two,
        "blocks.0.to_q.weight_quantizer._amax": np.ones((8, 1), np.float32), "blocks.0.to_q.weight": np.ones((8, 4)),
    }, file)  # fmt: skip
    assert read_maxima(file) == {"blocks.0.to_q": 3.5, "blocks.0.ff": 2.0}


def test_scales_of_an_exported_checkpoint(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "m.safetensors", {
        "a.input_scale": scale(0.5), "a.weight": ("F8_E4M3", [2, 2], b"\0" * 4), "a.weight_scale": scale(0.1),
        "b.input_scale": scale(0.25), "b.weight": ("I8", [2, 2], b"\0" * 4),
    })  # fmt: skip
    assert read_maxima(file) == {"a": 0.5 * 448, "b": 0.25 * 127}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": ("F32", [1], b"\0" * 4)}, "1 tensors, none of them a scale"),
        ({"a.input_scale": scale(1.0)}, "a scale beside a weight of type none, wanted one of F8_E4M3, I8"),
        ({"a.input_scale": scale(1.0), "a.weight": ("U8", [1], b"\0")}, "type U8"),
        ({"a.input_quantizer._amax": ("F32", [2], b"\0" * 8)}, "found 2 values, wanted one finite number"),
        ({"a.input_quantizer._amax": scale(float("nan"))}, "found nan, wanted one finite"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        read_maxima(write_raw(tmp_path / "m.safetensors", tensors))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"PK\x03\x04" + b"\0" * 64)
    with pytest.raises(CalibrationError, match=r"(?s)wanted a safetensors file.*Likely cause: a pickle"):
        read_maxima(tmp_path / "m.pt")
    with pytest.raises(CalibrationError, match="wanted a safetensors file"):
        read_maxima(tmp_path / "nothing.safetensors")


def site(name: str, tensor: str) -> Site:
    return Site(name, "full", "matmul", tensor, f"{name}/product", f"{name}.weight", name, 16, 16, 3)


def plan() -> QuantPlan:
    sites = (site("k", "x"), site("q", "x"), site("out", "y"), site("kept", "z"), site("ff", "w"), site("few", "v"))
    decisions = {
        "k": Quantize(), "q": Share("k"), "out": Quantize(), "kept": Keep("r"), "ff": Quantize(),
        "few": Quantize(activation_bits=4),
    }
    return QuantPlan("m", sites, decisions, centred=("w",))


def table() -> ScaleTable:
    def calibrated(centre: bool = False) -> TensorScales:
        scales = np.array([0.1, 0.2], np.float32)
        moved = np.zeros((2, 16), np.float32) if centre else None
        return TensorScales(scales, np.array([100, 120], np.int32), scales * np.float32(1.1), moved)

    tensors = {"x": calibrated(), "y": calibrated(), "w": calibrated(True), "v": calibrated()}
    return ScaleTable(Partition((500.0,), 0.0, 999.0), tensors)


def test_maxima_become_symmetric_scales_in_every_group() -> None:
    imported = import_maxima(table(), plan(), {"k": 12.7, "q": 25.4, "few": 7.0, "kept": 1.0, "ff": 1.0})
    assert imported.taken == ("v", "x")
    assert imported.left == {"w": "centred: its scales are those of other values", "y": "not in the checkpoint"}
    x, v = imported.table.of("x"), imported.table.of("v")
    np.testing.assert_allclose(x.scale, [0.2, 0.2], rtol=1e-6)
    assert list(x.zero_point) == [128, 128]
    np.testing.assert_array_equal(x.scale, x.symmetric_scale)
    np.testing.assert_allclose(v.scale, [1.0, 1.0], rtol=1e-6)
    assert list(v.zero_point) == [8, 8]
    np.testing.assert_array_equal(imported.table.of("y").scale, table().of("y").scale)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_scale_that_is_not_above_zero_is_floored_and_told(value: float) -> None:
    with pytest.warns(FlooredScale, match="1 scales of the checkpoint are not above zero .* least: y"):
        imported = import_maxima(table(), plan(), {"out": value})
    assert imported.table.of("y").scale[0] == np.float32(FLOOR / 127)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match="modules such as other, wanted modules such as k"):
        import_maxima(table(), plan(), {"other": 1.0})
