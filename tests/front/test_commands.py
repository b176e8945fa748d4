"""Commands about engines and devices."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

import quantempo
from quantempo.contracts.step_policy import StepPolicy
from quantempo.devices.choosing import candidates
from quantempo.runtime.bundle import OpenBundle, read_bundle

QUICK = ("--samples", "2", "--steps", "3", "--calls", "2", "--threads", "1")
needs_openvino = pytest.mark.skipif("openvino" not in candidates(), reason="openvino is not installed")


def test_check_ends_with_1_where_something_is_refused(cli: Any, dit_bundle: OpenBundle) -> None:
    code, out, _ = cli("check", dit_bundle.root, "--target", "cpu")
    assert code == 0
    assert "checked: full.ort-f32, decoder.float-f32" in out
    code, out, _ = cli("check", dit_bundle.root, "--target", "orin-jp6", "--json")
    assert code == 1
    assert {item["rule"] for item in json.loads(out)["findings"]} >= {"group-norm"}
    code, _, err = cli("check", dit_bundle.root, "--target", "orin")
    assert code == 1
    assert "did you mean 'orin-jp" in err


@needs_openvino
def test_compare_prints_a_table_or_json(cli: Any, dit_bundle: OpenBundle) -> None:
    code, out, _ = cli("compare", dit_bundle.root, *QUICK)
    assert code == 0
    assert "ort (ort) against openvino (portable)" in out
    code, out, _ = cli("compare", dit_bundle.root, *QUICK, "--no-sites", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["sites"] == []
    assert len(facts["images"]) == 3
    code, _, err = cli("compare", dit_bundle.root, "--engines", "ort")
    assert code == 1
    assert "two different engines" in err


def test_cache_explain_tells_a_hit_from_a_miss(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    code, out, _ = cli("cache", "explain", dit_bundle.root, "--folder", folder)
    assert code == 0
    assert "full.ort-f32: miss" in out
    assert "no earlier entry to compare with" in out
    quantempo.load(dit_bundle.root, cache=folder).close()
    code, out, _ = cli("cache", "explain", dit_bundle.root, "--folder", folder)
    assert "full.ort-f32: hit" in out
    for part in ("backend: ort", "version: ", "device: ", "graph: ", "flags.optimization: all"):
        assert part in out


def test_cache_explain_names_what_changed(
    cli: Any, dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantempo.engines import ort
    from quantempo.engines.cpu import CpuFeatures

    folder = tmp_path / "c"
    quantempo.load(dit_bundle.root, cache=folder).close()
    monkeypatch.setattr(ort, "cpu_features", lambda: CpuFeatures("arm", ("dotprod",)))
    _, out, _ = cli("cache", "explain", dit_bundle.root, "--folder", folder)
    changed = out.split("full.ort-f32: miss")[1].split("changed against")[1].split("\n")
    assert changed[1].startswith("  device: arm-")
    assert "(was x86-" in changed[1] or "(was other-" in changed[1]
    assert not changed[2].startswith("  "), "nothing else changed"


def test_cache_prune_empties(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    quantempo.load(dit_bundle.root, cache=tmp_path / "c").close()
    code, out, _ = cli("cache", "prune", "--keep", "0", "--folder", tmp_path / "c")
    assert code == 0
    assert re.search(r"[1-9]\d* entries removed", out)


def test_float_steps_gain_a_graph_and_hardly_a_byte(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = cli("float-steps", dit_bundle.root, "-o", out, "--first", 1, "--last", 2)
    assert code == 0, err
    assert "the first 1 and the last 2 steps" in text
    made = read_bundle(out)
    assert {"float.ort-f32", "float.portable-f32"} <= set(made.manifest.graphs)
    assert [call.graph for call in made.program(5).calls] == ["float", "full", "full", "float", "float"]

    def weights(bundle: OpenBundle) -> int:
        return sum(e.size for name, e in bundle.manifest.files.items() if name.startswith("graphs/weights.int8"))

    assert weights(made) == weights(dit_bundle), "INT8 weights are stored once"
    code, text, _ = cli("float-steps", out)
    assert json.loads(text)["diffusion_step_policy"] == StepPolicy(1, 2).data()
    code, _, err = cli("float-steps", out, "-o", tmp_path / "again", "--first", 1)
    assert code == 1
    assert "found a bundle with float steps" in err


@pytest.mark.parametrize("engine", candidates())
def test_float_steps_come_closer_to_the_float_model(
    dit_bundle: OpenBundle, unet_bundle: OpenBundle, tmp_path: Path, engine: str
) -> None:
    """With every step in float only the weights' rounding is left, whatever the engine."""
    from quantempo.devices.float_steps import with_float_steps
    from quantempo.quality import psnr_db

    if engine not in ("ort", "openvino"):
        pytest.skip("no engine for float32 graphs")
    call: dict[str, Any] = {
        "class_labels": [1, 2], "seed": [0, 1], "num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "np",
    }
    for bundle in (dit_bundle, unet_bundle):
        made = with_float_steps(bundle.root, tmp_path / bundle.root.name, StepPolicy(4, 0))
        images = {}
        for name, root, backend in (
            ("float", bundle.root / "reference", "ort"), ("int8", bundle.root, engine), ("a16", made.root, engine),
        ):
            with quantempo.load(root, engine=backend, threads=1) as session:
                images[name] = session(**call).images
        closer = psnr_db(images["a16"], images["float"]).mean() - psnr_db(images["int8"], images["float"]).mean()
        assert closer > 0, f"{bundle.root.name}: {closer:.2f} dB"


def test_a_policy_is_taken_from_a_checkpoint(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    runtime = {"runtime": {"diffusion_step_policy": StepPolicy(2, 1).data()}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": runtime}))
    code, _, err = cli("float-steps", dit_bundle.root, "-o", tmp_path / "b", "--policy", tmp_path)
    assert code == 0, err
    assert [c.graph for c in read_bundle(tmp_path / "b").program(4).calls] == ["float", "float", "full", "float"]
    code, _, err = cli("float-steps", dit_bundle.root, "-o", tmp_path / "c", "--policy", tiny_models.unet())
    assert code == 1
    assert "wanted quantization_config.runtime.diffusion_step_policy" in err


def test_scales_are_imported(cli: Any, dit_bundle: OpenBundle, maxima: Path, tmp_path: Path) -> None:
    code, out, err = cli("import-scales", dit_bundle.root, maxima, "-o", tmp_path / "b")
    assert code == 0, err
    made = read_bundle(tmp_path / "b")
    table, before = made.scale_table(), dit_bundle.scale_table()
    assert table is not None
    assert before is not None
    taken = [name for name, scales in before.tensors.items() if scales.centre is None]
    assert f"{len(taken)} tensors with the checkpoint's scales" in out
    for name in taken:
        assert np.all(table.of(name).scale == table.of(name).scale[0])
        np.testing.assert_allclose(table.of(name).scale[0], before.of(name).symmetric_scale.max(), rtol=1e-6)
        assert np.all(table.of(name).zero_point == 128)
    for name in set(before.tensors) - set(taken):
        assert f"kept as they were: {name} (centred" in out
        np.testing.assert_array_equal(table.of(name).scale, before.of(name).scale)
    with quantempo.load(made.root, threads=1) as session:
        assert np.isfinite(session(class_labels=[1], seed=0, num_inference_steps=3, output_type="np").images).all()
    code, text, err = cli("report", made.root, "--samples", 2, "--steps", 2, "--worst", 0)
    assert code == 0, err
    assert "guidance 1.5" in text
