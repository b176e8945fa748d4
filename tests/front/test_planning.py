from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.errors import OutputExists, PlanError
from quantempo.pipeline import compile_model
from quantempo.planning import write_plan
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle


@pytest.fixture
def written(small: Recipe, tmp_path: Path) -> Any:
    return write_plan(tiny_models.dit_pipeline(), tmp_path / "plan.json", small)


def test_a_plan_says_what_will_be_done_before_anything_is_calibrated(written: Any) -> None:
    assert {run.stage for run in written.stages} == {"sampler", "denoiser", "decoder", "plan"}
    data = json.loads(written.path.read_text())
    kept = {name: d["reason"] for name, d in data["decisions"].items() if d["kind"] == "keep"}
    assert kept
    assert all(kept.values()), "every kept site has its reason"
    text = written.text()
    assert f"{len(written.plan.quantized())} of {len(written.plan.sites)} sites will be quantized" in text
    for reason in kept.values():
        assert reason in text
    predictions = data["predictions"]
    assert predictions["calls"] == 2 * 4, "two batches of four steps"
    assert predictions["rows"] == 2 * 4 * 4 * 2, "guidance doubles the rows"
    assert predictions["calibration_seconds"] > 0


def test_the_predicted_disk_space_is_about_right(written: Any, dit_bundle: OpenBundle) -> None:
    found = sum(p.stat().st_size for p in dit_bundle.root.rglob("*") if p.is_file())
    # A tiny model is mostly graph and alignment, which is not predicted.
    assert 0.3 * found < written.predictions.bundle_bytes < 1.5 * found


def test_an_edited_plan_is_compiled_from(written: Any, small: Recipe, tmp_path: Path) -> None:
    data = json.loads(written.path.read_text())
    name = next(s.id for s in written.plan.quantized() if s.module.endswith("ff.net.2"))
    data["decisions"][name] = {"kind": "keep", "reason": "by hand"}
    written.path.write_text(json.dumps(data))
    model = tiny_models.dit_pipeline()
    made = compile_model(model, tmp_path / "bundle", small, plan_file=written.path)
    assert made.quantized == len(written.plan.quantized()) - 1
    assert {run.stage for run in made.stages if not run.reused} <= {"plan", "calibrate", "scales", "weights"}
    stored = json.loads((tmp_path / "bundle" / "plan.json").read_text())
    assert stored["decisions"][name] == {"kind": "keep", "reason": "by hand"}
    assert "predictions" not in stored


def test_a_plan_for_another_model_is_refused_with_both_digests(
    written: Any, small: Recipe, tmp_path: Path
) -> None:
    model = tiny_models.unet()
    with pytest.raises(PlanError) as caught:
        compile_model(model, tmp_path / "out", small, scheduler=model / "scheduler", plan_file=written.path)
    assert f"found a plan for the graph {written.plan.model[:12]}…, wanted one for " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_older_plan_is_not_overwritten(written: Any, small: Recipe) -> None:
    with pytest.raises(OutputExists, match="--overwrite"):
        write_plan(tiny_models.dit_pipeline(), written.path, small)


def test_the_command_writes_a_plan(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    words = ("plan", tiny_models.dit_pipeline(), "-o", out, "--keep", "*.ff.*", "--samples", 32, "--steps", 4)
    code, text, err = cli(*words, "--guidance", "1.5..3", "--max-steps", 6, "--batch", 4, "--threads", 1)
    assert code == 0, err
    assert "kept by pattern '*.ff.*'" in text
    decisions = json.loads(out.read_text())["decisions"]
    assert sum(d.get("reason") == "kept by pattern '*.ff.*'" for d in decisions.values()) > 0
