from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.errors import DataError, EngineError

X = TensorSpec("x", "float32", ("batch", 3, 4))
T = TensorSpec("t", "float32", ("batch",))
Y = TensorSpec("y", "float32", ("batch", 3, 4))
TAP = TensorSpec("tap", "float32", ("batch", 7))


def opened(folder: Path, graph: EchoGraph, options: EngineOptions | None = None):  # type: ignore[no-untyped-def]
    write_echo_graph(folder / "g.json", graph)
    return open_engine("echo", folder / "g.json", options)


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4), "t": np.array([3.0, 500.0], np.float32)}


def test_it_is_deterministic_and_another_seed_is_another_function(tmp_path: Path) -> None:
    runs = [opened(tmp_path, EchoGraph((X, T), (Y,), seed)).run(feeds())["y"] for seed in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])


def test_it_is_smooth_in_sample_and_timestep(tmp_path: Path) -> None:
    engine = opened(tmp_path, EchoGraph((X, T), (Y,)))
    base = engine.run(feeds())["y"]
    near = engine.run({"x": feeds()["x"] + np.float32(1e-3), "t": feeds()["t"] + np.float32(1e-2)})["y"]
    assert 0 < np.abs(near - base).max() < 5e-3


def test_outputs_of_other_sizes_are_resampled(tmp_path: Path) -> None:
    wide = TensorSpec("wide", "float32", ("batch", 1, 9, 8))
    out = opened(tmp_path, EchoGraph((X, T), (Y, wide))).run(feeds())
    assert out["wide"].shape == (2, 1, 9, 8)
    assert out["y"].shape == (2, 3, 4)


def test_inner_tensors_come_only_when_asked(tmp_path: Path) -> None:
    graph = EchoGraph((X, T), (Y,), inner=(TAP,))
    plain, tapped = opened(tmp_path, graph), opened(tmp_path, graph, EngineOptions(extra_outputs=("tap",)))
    assert list(plain.outputs) == ["y"]
    out = tapped.run(feeds())
    assert out["tap"].shape == (2, 7)
    assert np.array_equal(out["y"], plain.run(feeds())["y"])


def test_with_device_buffers_host_access_is_refused(tmp_path: Path) -> None:
    engine = opened(tmp_path, EchoGraph((X, T), (Y,)), EngineOptions(settings={"host": "false"}))
    assert not engine.host
    with pytest.raises(EngineError, match="found a request for host memory, wanted upload or download"):
        _ = engine.bind({"batch": 1}).inputs["x"].array


def test_a_file_that_is_no_echo_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text("[]")
    with pytest.raises(DataError, match=r"g\.json: found \[\], wanted an object \(EchoGraph\)"):
        open_engine("echo", tmp_path / "g.json")
