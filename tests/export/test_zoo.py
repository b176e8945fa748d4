"""Every denoiser class of diffusers: the zoo knows them all, and some go all the way here (the rest in the sweep)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.zoo import NOT_DENOISERS, ZOO, denoiser_classes
from support.zoo.measure import ENOUGH_DB, measure, sqnr_db

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = (
    "AllegroTransformer3DModel",  # five dimensions, masks, nested tuples of rotary tables
    "AnyFlowTransformer3DModel",  # two timesteps per frame, complex rotary positions
)


def test_the_zoo_has_an_entry_for_every_denoiser_class_of_the_library() -> None:
    assert not set(denoiser_classes()) - set(ZOO)
    assert not set(NOT_DENOISERS) & set(ZOO)


def test_no_prediction_of_a_zoo_model_is_degenerate() -> None:
    """Layers that start at zero would make every graph right and every quantization perfect."""
    for name in SAMPLE:
        entry = ZOO[name]
        first, second = (_predict(entry.build(), given) for given in entry.examples())
        assert first.std() > 0.1, name
        assert (first[0] - second[0]).std() > 0.1, name


def _predict(model: torch.nn.Module, given: dict[str, object]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**given, return_dict=False)[0]
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", [SAMPLE[0], pytest.param(SAMPLE[1], marks=pytest.mark.full)])
def test_a_class_goes_all_the_way_to_int8_on_two_engines(name: str, tmp_path: Path) -> None:
    found = measure(ZOO[name], tmp_path)
    assert found.status == "covered", found
    assert found.float_error is not None
    assert found.float_error <= 1e-4
    assert found.groups == 2
    assert min(found.sqnr_db.values()) >= ENOUGH_DB


def test_a_failure_is_a_finding_with_its_cause(tmp_path: Path) -> None:
    entry = ZOO["UNet2DModel"]
    broken = type(entry)(entry.class_name, {**entry.config, "no_such_option": 1}, entry.inputs)
    found = measure(broken, tmp_path)
    assert (found.status, found.stage) == ("refused", "build")
    assert "no_such_option" in found.cause


def test_sqnr_is_minus_infinity_where_the_result_is_not_finite() -> None:
    assert sqnr_db(np.ones(3), np.array([1.0, np.nan, 1.0])) == float("-inf")
    assert sqnr_db(np.array([10.0, 0.0]), np.array([10.0, 1.0])) == pytest.approx(20.0)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_sweep_reaches_its_bars_and_knows_every_class() -> None:
    """At least 70 classes are covered, older versions lose at most three, and no class of the library is missing."""
    sweep = json.loads((ROOT / "docs" / "models.json").read_text())
    classes = sweep["classes"]
    assert set(denoiser_classes()) <= set(classes)
    assert not sweep["not measured"]
    covered = [name for name, finding in classes.items() if finding["status"] == "covered"]
    assert sweep["counts"]["covered"] == len(covered) >= tool("model_sweep").ENOUGH == 70
    for name in covered:
        finding = classes[name]
        assert finding["float_error"] <= 1e-4, name
        assert set(finding["sqnr_db"]) == {"ort", "openvino"}, name
        assert min(finding["sqnr_db"].values()) >= ENOUGH_DB, name
    assert all(finding["cause"] for name, finding in classes.items() if name not in covered)
    for run in json.loads((ROOT / "docs" / "models_versions.json").read_text())["runs"]:
        assert len(run["lost"]) <= 3
        assert not run["not run"]


def test_the_sweep_fails_where_a_class_is_not_covered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = tool("model_sweep")
    monkeypatch.setattr(sweep, "prepare", lambda: None)
    statuses = {"UNet2DModel": "covered", "UNet1DModel": "partial"}
    monkeypatch.setattr(
        sweep, "in_process", lambda name, *_: {**sweep.blank(), "status": statuses.get(name, "refused")}
    )
    assert sweep.main(["UNet2DModel"]) == 0
    assert sweep.main(["UNet1DModel"]) == 1
    few = tmp_path / "few.json"
    assert sweep.main(["--json", str(few)]) == 1
    assert json.loads(few.read_text())["counts"]["covered"] == 1


def test_reproducers_that_the_page_names_are_there() -> None:
    named = [word for reason in tool("model_sweep").REASONS.values() for word in reason.split() if "/" in word]
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_the_page_of_coverage_is_made_from_its_file() -> None:
    data = json.loads((ROOT / "docs" / "models.json").read_text())
    assert (ROOT / "docs" / "model-coverage.md").read_text() == tool("model_sweep").page(data)


def test_older_versions_are_compared_with_what_is_covered_with_the_newest() -> None:
    def classes(**found):
        return {"libraries": {}, "classes": {n: {"status": s, "cause": c} for n, (s, c) in found.items()}}

    good, bad = ("covered", ""), ("partial", "9 dB")
    newest = classes(A=good, B=good, C=bad, D=good, E=good)
    older = classes(A=good, B=("refused", "no operation"), C=good, D=("refused", "LookupError: no class D"))
    run = tool("model_versions").compared(newest, older)
    assert (run["expected"], run["covered"], run["lost"]) == (2, 1, {"B": "no operation"})
    assert (run["absent"], run["not run"], run["extent"]) == (["D"], ["E"], "int8")
