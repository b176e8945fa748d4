"""`quantempo.load` keeps compiled engines where it should, and `auto` finds the fastest engine once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantempo
from quantempo.devices import choosing
from quantempo.devices.choosing import candidates, choose_engine, chosen, example_feeds
from quantempo.devices.opening import bundle_dialect, cache_folder, denoiser_graph, trim
from quantempo.engines import openvino, ort
from quantempo.engines.cache import EngineCache
from quantempo.engines.cpu import CpuFeatures
from quantempo.engines.guard import Choice, Timed, Timing
from quantempo.errors import EngineError, RequestError
from quantempo.runtime.bundle import OpenBundle

CALL = {"class_labels": [3], "seed": 5, "num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "np"}
NEEDS_OPENVINO = pytest.mark.skipif("openvino" not in candidates(), reason="openvino is not installed")
QUICK = Timing(rounds=1, warmup=1, sample_s=0.001)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    real = ort.save_optimized

    def counted(graph: Path, *rest: Any) -> Path:
        calls.append(graph)
        return real(graph, *rest)

    monkeypatch.setattr(ort, "save_optimized", counted)
    return calls


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_second_load_of_a_bundle_optimizes_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, builds: list[Path], kind: str
) -> None:
    bundle: OpenBundle = request.getfixturevalue(f"{kind}_bundle")
    builds.clear()  # a compile looks at optimized graphs, too
    images = []
    for given in (False, tmp_path / "cache", tmp_path / "cache"):
        with quantempo.load(bundle.root, threads=1, cache=given) as session:
            images.append(session(**CALL).images)
        count = len({graph.name for graph in builds})
        assert len(builds) == (0 if given is False else count), "a second load has to call no builder"
    assert len(builds) >= (2 if kind == "dit" else 1), "denoiser and decoder"
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[0])


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTEMPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantempo" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/not/allowed")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "quantempo" / "engines"
    monkeypatch.setenv("QUANTEMPO_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder(False) is None
    monkeypatch.setenv("QUANTEMPO_CACHE", "off")
    assert cache_folder() is None
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_written_to_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("QUANTEMPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled engines are not kept: .* cannot be made"):
        assert cache_folder() is None
    with pytest.raises(EngineError, match=r"engine cache .*file"):
        cache_folder(tmp_path / "file" / "x")


def test_a_cache_that_others_can_write_to_is_refused(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o770)
    monkeypatch.setenv("QUANTEMPO_CACHE", str(place))
    with pytest.raises(EngineError, match="a folder that others can write to"):
        quantempo.load(dit_bundle.root)
    quantempo.load(dit_bundle.root, cache=False).close()


def test_the_cache_keeps_to_a_size(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    quantempo.load(dit_bundle.root, cache=tmp_path / "c").close()
    assert trim(tmp_path / "c") == ()
    assert len(trim(tmp_path / "c", 0)) >= 1
    assert EngineCache(tmp_path / "c").entries() == ()


def test_every_engine_gets_the_graph_that_suits_it(dit_bundle: OpenBundle) -> None:
    assert bundle_dialect("ort", dit_bundle) == "ort"
    assert bundle_dialect("openvino", dit_bundle) == "portable"
    assert denoiser_graph("openvino", dit_bundle).file == "graphs/full.portable-f32.onnx"
    with pytest.raises(RequestError, match="graphs of the dialects ort, portable, wanted one that the engine"):
        denoiser_graph("nothing", dit_bundle)


def test_example_feeds_are_legal(dit_bundle: OpenBundle) -> None:
    denoiser = dit_bundle.manifest.denoiser
    feeds = example_feeds(denoiser, denoiser_graph("ort", dit_bundle), rows=3)
    assert feeds["sample"].shape == (3, *denoiser.latents_shape)
    assert feeds["scale_group"].shape == ()
    assert feeds["class_labels"].max() < denoiser.classes[0].count
    assert {name: array.dtype.name for name, array in feeds.items()} == {
        "sample": "float32", "timestep": "float32", "class_labels": "int64", "scale_group": "int64",
    }


def test_a_choice_is_measured_once_and_remembered(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_engine(dit_bundle, threads=1, cache=tmp_path / "c", timing=QUICK)
    assert first.label in candidates()
    assert {item.label for item in first.timed} == set(candidates())
    monkeypatch.setattr(choosing, "pick_fastest", lambda *_: pytest.fail("measured again"))
    assert choose_engine(dit_bundle, threads=1, cache=tmp_path / "c") == first
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        choose_engine(dit_bundle, threads=2, cache=tmp_path / "c")


@pytest.mark.parametrize("winner", ["ort", "openvino"])
def test_auto_runs_the_engine_that_won(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    if winner not in candidates():
        pytest.skip(f"{winner} is not installed")
    choice = Choice(winner, (Timed(winner, winner, 1.0),))
    monkeypatch.setattr(choosing, "pick_fastest", lambda *_: choice)
    with quantempo.load(dit_bundle.root, engine="auto", threads=1, cache=tmp_path / "c") as session:
        automatic = session(**CALL).images
    with quantempo.load(dit_bundle.root, engine=winner, threads=1, cache=tmp_path / "c") as session:
        np.testing.assert_array_equal(session(**CALL).images, automatic)


def test_auto_takes_no_settings_but_that_types_are_measured(dit_bundle: OpenBundle) -> None:
    words = r"engine 'auto': found settings precision=f32, wanted no settings, or precision=auto"
    with pytest.raises(RequestError, match=words):
        quantempo.load(dit_bundle.root, engine="auto", settings={"precision": "f32"})


@NEEDS_OPENVINO
def test_auto_measures_float_types_only_where_that_was_asked_for(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 costs fidelity, so it never wins by speed alone unless the caller wants that."""
    monkeypatch.setattr(openvino, "native_precision", lambda: "bf16")
    monkeypatch.setattr(choosing, "candidates", lambda: ("ort", "openvino"))
    timed: list[list[str]] = []

    def pick(variants: Any, timing: Any) -> Choice:
        timed.append([variant.label for variant in variants])
        return Choice(timed[-1][-1], (Timed(timed[-1][-1], "openvino", 1.0),))

    monkeypatch.setattr(choosing, "pick_fastest", pick)
    assert chosen(choose_engine(dit_bundle, cache=tmp_path / "c")) == ("openvino", {})
    asked = {"precision": "auto"}
    found = choose_engine(dit_bundle, settings=asked, cache=tmp_path / "c")
    assert chosen(found) == ("openvino", {"precision": "bf16"})
    assert [label for label in timed[1] if label not in timed[0]] == ["openvino precision=bf16"]
    with quantempo.load(dit_bundle.root, engine="auto", settings=asked, cache=tmp_path / "c") as session:
        assert session._options.settings["precision"] == "bf16"


@NEEDS_OPENVINO
def test_auto_passes_over_an_engine_that_would_saturate(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "cpu_features", lambda: CpuFeatures("x86", ("avx2",)))
    found = choose_engine(dit_bundle, threads=1, cache=tmp_path / "c", timing=QUICK)
    assert found.label == "ort"
    (refused,) = (item for item in found.timed if item.label == "openvino")
    assert "without VNNI" in refused.refused


def test_openvino_compiles_once_per_size(
    dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "openvino" not in candidates():
        pytest.skip("openvino is not installed")
    from quantempo.engines.openvino import OpenVinoEngine

    built: list[str] = []
    real = OpenVinoEngine._build

    def counted(self: OpenVinoEngine, sizes: Any) -> Any:
        built.append(self.name)
        return real(self, sizes)

    monkeypatch.setattr(OpenVinoEngine, "_build", counted)
    images = []
    for _ in range(2):
        with quantempo.load(dit_bundle.root, engine="openvino", threads=1, cache=tmp_path / "c") as session:
            images.append(session(**CALL).images)
    assert len(built) == 2, "denoiser and decoder, once each"
    np.testing.assert_array_equal(images[1], images[0])
