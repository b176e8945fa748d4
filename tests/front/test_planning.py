from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from quantempo import planning
from quantempo.calib.gram import GramCollector
from quantempo.contracts.engine import EngineOptions, dtype_of
from quantempo.engines.registry import open_engine
from quantempo.errors import OutputExists, PlanError
from quantempo.pipeline import compile_model
from quantempo.planning import gram_bytes, graph_bytes, predict, write_plan
from quantempo.progress import SilentProgress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.stages.calibration import Taps
from quantempo.stages.model import export_model, open_model, plan_stage
from quantempo.stages.store import StageStore, default_root


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
    assert "not counted: the rounding of weights, writing, the latency guard" in text


def test_the_predicted_disk_space_is_that_of_weights_programs_and_statistics(
    written: Any, dit_bundle: OpenBundle
) -> None:
    counted = ("*.bin", "*.data", "*.safetensors", "programs/*.json")
    found = sum(p.stat().st_size for words in counted for p in dit_bundle.root.rglob(words) if p.is_file())
    assert written.predictions.bundle_bytes == pytest.approx(found, rel=0.1)


def test_predicted_memory_has_what_calibration_holds(
    written: Any, dit_bundle: OpenBundle, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak at size is measured by benchmarks/compile_cost.py; tests/repo/test_benchmarks.py compares the two."""
    store = StageStore(default_root(), SilentProgress())
    with store:
        exported = export_model(open_model(tiny_models.dit_pipeline(), None, small, {}), store)
        plan, taps = plan_stage(store, exported, small, None)
    collector = GramCollector(taps.products)
    widths = {site.tensor: site.k for site in plan.sites}
    collector.observe(0.0, {name: np.ones((1, widths[name]), np.float32) for name in taps.products})
    assert gram_bytes(plan, taps) == sum(square.nbytes for square in collector._squares.values()) > 0

    def memory(**changes: Any) -> int:
        return predict(exported, plan, taps, replace(small, **changes), {}).memory_bytes

    whole = memory()
    assert whole == written.predictions.memory_bytes
    assert whole - memory(weight_method="mse") == gram_bytes(plan, taps)
    rows = 2 * small.batch  # guidance doubles them
    tapped = sum(4 * np.prod(shape[1:]) for shape in tapped_shapes(dit_bundle, taps))
    assert memory(samples=64, batch=2 * small.batch) - whole == pytest.approx(planning.WORKING_SHARE * rows * tapped)
    monkeypatch.setattr(planning, "LARGE_BYTES", 0)
    assert whole - memory() == graph_bytes(exported.graph), "large weights stay in their file"


def tapped_shapes(bundle: OpenBundle, taps: Taps) -> list[tuple[int, ...]]:
    """The shapes of the tapped tensors in a call of the float model with one row."""
    path = bundle.root / "reference" / "graphs" / "full.float-f32.onnx"
    engine = open_engine("ort", path, EngineOptions(threads=1, extra_outputs=taps.observed))
    try:
        feeds = {n: np.zeros([d if isinstance(d, int) else 1 for d in s.shape], dtype_of(s))
                 for n, s in engine.inputs.items()}  # fmt: skip
        outputs = engine.run(feeds)
        return [outputs[name].shape for name in taps.observed]
    finally:
        engine.close()


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
