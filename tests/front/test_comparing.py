"""Engines side by side: the same inputs, errors that are what they say, and every pair of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantempo.devices.comparing import (
    CEILING_DB,
    CompareOptions,
    common_tensors,
    compare_engines,
    record_feeds,
    tensor_errors,
)
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.registry import installed_backends
from quantempo.errors import RequestError
from quantempo.runtime.bundle import OpenBundle, read_bundle

BOTH = ("ort", "openvino")
QUICK = CompareOptions(seeds=2, steps=3, calls=2, threads=1)
pytestmark = pytest.mark.skipif("openvino" not in installed_backends(), reason="openvino is not installed")


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_engines_agree_better_with_each_other_than_the_bar_asks(request: pytest.FixtureRequest, kind: str) -> None:
    bundle: OpenBundle = request.getfixturevalue(f"{kind}_bundle")
    found = compare_engines(bundle.root, BOTH, QUICK)
    pairs = {(p.first, p.second): p for p in found.images}
    assert set(pairs) == {("ort", "openvino"), ("ort", "float"), ("openvino", "float")}
    to_float = min(pairs["ort", "float"].mean_db, pairs["openvino", "float"].mean_db)
    assert pairs["ort", "openvino"].mean_db >= to_float - 4
    assert all(p.worst_db <= p.mean_db for p in found.images)
    assert [item.tensor for item in found.outputs] == ["prediction"]
    assert found.outputs[0].db > 20
    assert found.sites, "inner tensors are compared"
    assert list(found.sites) == sorted(found.sites, key=lambda item: item.db)
    assert {item.site.split(",")[0] for item in found.sites} <= {s.id for s in _plan_sites(bundle)}
    text = found.text()
    assert "ort (ort) against openvino (portable), 2 calls, 2 seeds, 3 steps" in text
    assert f"{found.outputs[0].db:.2f} dB" in text


def _plan_sites(bundle: OpenBundle):  # type: ignore[no-untyped-def]
    from quantempo.inspection import load_plan

    plan = load_plan(bundle)
    assert plan is not None
    return plan.quantized()


def test_sites_are_tensors_of_both_graphs(dit_bundle: OpenBundle) -> None:
    taps = common_tensors(dit_bundle, BOTH)
    for dialect in ("ort", "portable"):
        graph = read_graph(dit_bundle.path(f"graphs/full.{dialect}-f32.onnx"))
        assert set(taps) <= {name for node in graph.nodes for name in node.outputs}
    named = {what.split(",")[0] for what in taps.values()}
    assert len(named) >= len(_plan_sites(dit_bundle)) // 2


def test_feeds_are_those_of_a_real_run(dit_bundle: OpenBundle) -> None:
    feeds = record_feeds(dit_bundle, "ort", CompareOptions(steps=5, calls=3, threads=1))
    assert len(feeds) == 3
    program = dit_bundle.program(5)
    steps = [float(feed["timestep"][0]) for feed in feeds]
    assert steps == [program.calls[i].timestep for i in (0, 2, 4)]
    assert len({int(feed["scale_group"]) for feed in feeds}) > 1
    assert feeds[0]["sample"].std() == pytest.approx(1.0, abs=0.2)


def test_an_error_is_the_relative_two_norm(dit_bundle: OpenBundle) -> None:
    feeds = record_feeds(dit_bundle, "ort", QUICK)
    (same,) = tensor_errors(dit_bundle, ("ort", "ort"), feeds, (), threads=1)
    assert (same.relative, same.db, same.largest) == (0.0, CEILING_DB, 0.0)
    (other,) = tensor_errors(dit_bundle, BOTH, feeds, (), threads=1)
    assert 0 < other.relative < 0.1
    assert other.db == pytest.approx(-20 * np.log10(other.relative))


def test_a_planted_difference_is_found_at_its_site(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    """One weight scale is changed in the portable graph alone: the site's result is the worst tensor."""
    import onnx

    from quantempo.contracts.codec import canonical_json
    from quantempo.contracts.manifest import FileEntry
    from quantempo.engines.cache import file_entry

    site = next(s for s in _plan_sites(dit_bundle) if s.id.endswith("ff.net.2"))
    copy = tmp_path / "copy"
    import dataclasses
    import shutil

    shutil.copytree(dit_bundle.root, copy)
    graph = copy / "graphs" / "full.portable-f32.onnx"
    model = onnx.load(graph, load_external_data=False)
    (scale,) = (t for t in model.graph.initializer if t.name == f"{site.weight}.scale")
    assert scale.raw_data, "small tensors lie in the graph file"
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) * np.float32(1.5)).tobytes()
    graph.write_bytes(model.SerializeToString())
    name = "graphs/full.portable-f32.onnx"
    files = {**dit_bundle.manifest.files, name: FileEntry(*dataclasses.astuple(file_entry(graph)))}
    (copy / "manifest.json").write_text(canonical_json(dataclasses.replace(dit_bundle.manifest, files=files)))
    read_bundle(copy)
    found = compare_engines(copy, BOTH, QUICK)
    assert any(site.id in item.site and item.site.endswith("result") for item in found.sites[:3]), found.text()
    assert found.outputs[0].db < compare_engines(dit_bundle.root, BOTH, QUICK).outputs[0].db - 10


@pytest.mark.parametrize("engines", [("ort",), ("ort", "ort"), ("ort", "openvino", "echo")])
def test_a_comparison_has_two_sides(dit_bundle: OpenBundle, engines: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="wanted two different engines"):
        compare_engines(dit_bundle.root, engines)
