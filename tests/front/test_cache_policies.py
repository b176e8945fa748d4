"""`compile --cache` with policies that choose: by a search, by masks, or while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

import quantempo
from quantempo.contracts.program import INDICATOR
from quantempo.errors import RequestError
from quantempo.inspection import describe
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.report.caching import fit_report, policy_lines
from quantempo.report.measure import ReportOptions
from quantempo.report.write import write_report
from quantempo.runtime.bundle import OpenBundle
from quantempo.stages import cache_search, cache_times

SMALL: dict[str, Any] = {"samples": 8, "batch": 4, "steps": (6,), "guidance": (1.5,), "max_steps": 6, "threads": 1}
CALL: dict[str, Any] = {"class_labels": [1, 2], "guidance_scale": 1.5, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


def compiled(folder: Path, policy: str, out: Path | None = None, which: str = "dit", **changes: Any) -> OpenBundle:
    recipe = Recipe(**{**SMALL, "cache": policy, **changes})
    model = tiny_models.dit_pipeline() if which == "dit" else tiny_models.unet()
    return compile_model(
        model, out or folder / f"{which}-{policy.replace(':', '-')}", recipe, work=folder / "work", guard="off",
        scheduler=None if which == "dit" else model / "scheduler",
    ).bundle


@pytest.mark.parametrize("policy", [pytest.param("masks:0.5", marks=pytest.mark.full), "greedy:0.5"])
def test_masks_reuse_their_share_in_a_bounded_number_of_variants(folder: Path, policy: str) -> None:
    bundle = compiled(folder, policy)
    cuts = describe(bundle.root)["cache"]["cuts"]
    assert 1 <= len(cuts) <= 4
    assert {cut["kind"] for cut in cuts.values()} == {"sublayers"}
    program = bundle.cached_program(6)
    assert [call.graph == "full" for call in program.calls][::2] == [True] * 3
    assert {call.graph for call in program.calls} <= {"full", *cuts}
    with quantempo.load(bundle.root, threads=1) as session:
        cached = session(num_inference_steps=6, seed=3, feature_cache="plan", **CALL)
        plain = session(num_inference_steps=6, seed=3, feature_cache="none", **CALL)
    assert cached.timings.reused > 0
    assert 0 < np.abs(cached.latents - plain.latents).max() < np.abs(plain.latents).max()


@pytest.mark.parametrize("which", ["dit", "unet"])
@pytest.mark.parametrize("policy", ["teacache:0.4", "firstblock:0.4"])
def test_a_bundle_decides_while_it_runs_for_each_sample_by_itself(folder: Path, policy: str, which: str) -> None:
    bundle = compiled(folder, policy, which=which)
    for dialect in ("ort-f32", "portable-f32"):
        assert [spec.name for spec in bundle.manifest.graphs[f"probe.{dialect}"].outputs] == [INDICATOR]
    assert bundle.manifest.vectors is None
    assert describe(bundle.root)["cache"]["reused"] == {"6": 0.4}
    assert fit_report(bundle)["steps"]["6"]["max_consecutive"] <= 4
    with quantempo.load(bundle.root, threads=1) as session:
        both = session(num_inference_steps=6, seed=[3, 4], feature_cache="plan", **CALL)
        alone = [
            session(
                num_inference_steps=6, seed=[seed], feature_cache="plan", **{**CALL, "class_labels": [label]}
            ).latents[0]
            for seed, label in ((3, 1), (4, 2))
        ]
    assert 0 < both.timings.reused < both.timings.rows
    np.testing.assert_array_equal(both.latents, np.stack(alone))


@pytest.fixture(scope="module")
def few(monkeypatch_module: pytest.MonkeyPatch) -> None:
    monkeypatch_module.setattr(cache_search, "CANDIDATES", ("every:2", "programmed:3", "teacache:0.4", "masks:2.0"))
    monkeypatch_module.setattr(cache_times, "TIMED_RUNS", 1)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_auto_keeps_its_budget_and_shows_what_it_chose_from(folder: Path, few: None) -> None:
    bundle = compiled(folder, "auto", cache_max_ms=1e6)
    searched = fit_report(bundle)["auto"]
    rows = {row["name"]: row for row in searched["table"]}
    assert {"none", "every:2", "programmed:3", "teacache:0.4"} <= set(rows)
    assert "at most 1" in searched["left_out"]["masks:2.0"]  # a candidate that cannot be fitted is no error
    assert all(row["predicted_ms"] > 0 for row in rows.values())
    assert all(row["measured_ms"] > 0 for row in rows.values() if row["kind"] == "plan")
    assert any(row["kind"] == "fewer_steps" for row in rows.values())
    (taken,) = [row for row in rows.values() if row["taken"]]
    assert taken["pareto"]
    assert not taken["loses_to_fewer_steps"]
    # With time to spare the most faithful of what is eligible is taken.
    eligible = [row for row in rows.values() if row["kind"] == "plan" and not row["loses_to_fewer_steps"]]
    assert taken["psnr_db"] == max(row["psnr_db"] for row in eligible)
    assert any(line.startswith("  *p") for line in policy_lines(searched))


@pytest.mark.full
def test_the_report_shows_the_table(folder: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # On so small a model float with fewer steps may win; what is shown does not depend on it.
    monkeypatch.setattr(cache_search, "loses_to_fewer_steps", lambda *given: False)
    monkeypatch.setattr(cache_search, "choose", lambda rows, **budget: next(r for r in rows if r.name == "every:2"))
    bundle = compiled(folder, "auto", tmp_path / "auto", seed=5)
    options = ReportOptions(samples=4, steps=6, batch=4, timing_rounds=1, worst=0, single_scale=False, threads=1)
    summary = write_report(bundle.root, options)
    facts = json.loads((summary.folder / "report.json").read_text())
    assert facts["cache"]["policy"] == "every:2"
    assert {row["name"] for row in facts["cache"]["auto"]["table"]} >= {"every:2", "programmed:3", "none"}
    assert "policies at 6 steps, budget: none" in summary.text()


@pytest.mark.full
def test_where_every_plan_loses_nothing_is_cached(
    folder: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_fits(*given: Any, **budget: Any) -> Any:
        raise RequestError("cache budget", found="", wanted="", cause="", remedy="")

    monkeypatch.setattr(cache_search, "choose", none_fits)
    bundle = compiled(folder, "auto", tmp_path / "out", seed=7)
    assert bundle.manifest.cache is None
    assert fit_report(bundle)["auto"]["policy"] == "none"


@pytest.mark.full
def test_an_impossible_budget_is_refused_and_the_nearest_policy_named(folder: Path, tmp_path: Path, few: None) -> None:
    with pytest.raises(RequestError, match=r"(?s)at least 200 dB and at most 0.001 ms"):
        compiled(folder, "auto", tmp_path / "out", cache_min_psnr=200.0, cache_max_ms=0.001)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"cache": "masks:1.5"}, "'masks:1.5'.*at most 1"), ({"cache": "mask:0.5"}, "'mask:0.5'.*masks"),
     ({"cache": "teacache:1"}, "'teacache:1'.*0 to 1"), ({"cache": "firstblock"}, "firstblock:0.5"),
     ({"cache": "every:2", "cache_max_ms": 5.0}, "every:2 with a budget"),
     ({"cache": "none", "cache_min_psnr": 5.0}, "none with a budget"),
     ({"cache": "auto", "cache_max_ms": -1.0}, "-1 ms"), ({"cache_cut": "sublayer:1-2"}, "sublayers:FIRST-LAST")],
)  # fmt: skip
def test_words_that_mean_nothing_are_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=f"(?s){words}"):
        compiled(tmp_path, changes.get("cache", "every:2"), **{k: v for k, v in changes.items() if k != "cache"})
    assert list(tmp_path.iterdir()) == []


def test_masks_need_sublayers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"(?s)delta cut.*cut of sublayers"):
        compiled(folder, "greedy:0.5", tmp_path / "out", cache_cut="delta:0-0")
