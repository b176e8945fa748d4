"""Every scheduler class of the installed diffusers is exact or refused with a reason, as docs/schedulers.json says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantempo.export.sampler import scheduler_classes

ROOT = Path(__file__).resolve().parents[2]


def _sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scheduler_sweep", ROOT / "tools" / "scheduler_sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SWEEP = _sweep()
CLASSES = scheduler_classes()
DOCUMENT = json.loads((ROOT / "docs" / "schedulers.json").read_text())
ENTRIES: list[dict[str, Any]] = DOCUMENT["entries"]
BY_CASE = {(e["class"], json.dumps(e["options"], sort_keys=True)): e for e in ENTRIES}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_default_options_are_as_documented(name: str) -> None:
    documented = BY_CASE[name, "{}"]
    steps = tuple(documented["steps"]) or SWEEP.STEPS[:1]
    entry = SWEEP.run_case(name, CLASSES[name], {}, steps)
    assert entry["status"] == documented["status"], entry["reason"]
    if entry["status"] == "exact":
        assert entry["error"] <= SWEEP.LIMIT
        assert entry["steps"] == documented["steps"]
    else:
        assert "UNEXPLAINED" not in entry["reason"]
        assert entry["reason"] == documented["reason"]


@pytest.mark.parametrize("name", sorted({e["class"] for e in ENTRIES if e["status"] == "exact"}))
def test_some_options_are_as_documented(name: str) -> None:
    cases = SWEEP.cases(name, CLASSES[name])[1:]
    for case in cases[:: max(1, len(cases) // 4)][:4]:
        documented = BY_CASE[name, json.dumps(case, sort_keys=True)]
        steps = tuple(documented["steps"][:1]) or SWEEP.STEPS[:1]
        entry = SWEEP.run_case(name, CLASSES[name], case, steps)
        assert entry["status"] == documented["status"], (case, entry["reason"])
        assert "UNEXPLAINED" not in entry["reason"]


def test_the_document_covers_every_class_and_every_case() -> None:
    assert {e["class"] for e in ENTRIES} == set(CLASSES)
    for name, cls in CLASSES.items():
        if any(words in BY_CASE[name, "{}"]["reason"] for words in SWEEP.INTERFACE):
            continue
        for case in SWEEP.cases(name, cls):
            assert (name, json.dumps(case, sort_keys=True)) in BY_CASE


def test_enough_classes_are_exact_and_none_is_unexplained() -> None:
    assert len({e["class"] for e in ENTRIES if e["status"] == "exact"}) >= 33
    for entry in ENTRIES:
        assert entry["status"] in ("exact", "refused")
        assert "UNEXPLAINED" not in entry["reason"]
        if entry["status"] == "exact":
            assert entry["error"] <= DOCUMENT["made_with"]["limit"] == 1e-5
        else:
            assert entry["reason"]


def test_the_page_is_made_from_the_document() -> None:
    assert (ROOT / "docs" / "schedulers.md").read_text() == SWEEP.page(ENTRIES)


def test_the_document_is_sorted_and_canonical() -> None:
    assert (ROOT / "docs" / "schedulers.json").read_text() == SWEEP.document(ENTRIES)
    keys = [(e["class"], json.dumps(e["options"], sort_keys=True)) for e in ENTRIES]
    assert keys == sorted(keys)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_whole_sweep_of_a_class_is_as_documented(name: str) -> None:
    for entry in SWEEP.sweep_class(name, CLASSES[name]):
        documented = BY_CASE[name, json.dumps(entry["options"], sort_keys=True)]
        assert (entry["status"], entry["steps"]) == (documented["status"], documented["steps"]), entry
