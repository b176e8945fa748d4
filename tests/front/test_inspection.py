from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantempo.errors import BundleError
from quantempo.inspection import describe, load_plan, render, site_counts, sizes
from quantempo.runtime.bundle import OpenBundle, read_bundle


def test_facts_agree_with_the_bundle(dit_bundle: OpenBundle) -> None:
    facts, plan = describe(dit_bundle.root), load_plan(dit_bundle)
    assert plan is not None
    assert facts["digest"] == dit_bundle.digest
    assert facts["precision"] == "int8"
    assert facts["sites"] == site_counts(plan)
    assert facts["sites"]["total"] == facts["sites"]["quantized"] + facts["sites"]["kept"] == len(plan.sites)
    assert sum(facts["kept"].values()) == facts["sites"]["kept"]
    assert facts["scales"]["groups"] == 4
    assert facts["steps"] == [1, 6]
    assert facts["scheduler"] == "DDIMScheduler"
    assert {graph["dialect"] for graph in facts["graphs"].values()} == {"ort", "portable", "float"}
    assert json.loads(json.dumps(facts)) == facts


def test_sizes_are_those_on_disk(dit_bundle: OpenBundle) -> None:
    measured = sizes(dit_bundle)
    on_disk = sum((dit_bundle.root / name).stat().st_size for name in dit_bundle.manifest.files)
    assert measured["bundle_bytes"] == on_disk
    reference = read_bundle(dit_bundle.root / "reference")
    assert measured["float_bytes"] == sum((reference.root / name).stat().st_size for name in reference.manifest.files)


def test_text_names_sites_reasons_and_versions(dit_bundle: OpenBundle) -> None:
    facts = describe(dit_bundle.root)
    text = render(facts)
    assert f"{facts['sites']['quantized']} of {facts['sites']['total']} quantized" in text
    for reason, count in facts["kept"].items():
        assert f"{count} × {reason}" in text
    assert "4 groups over timesteps 0 to 750" in text
    assert "onnxruntime" in text
    assert f"manifest {dit_bundle.digest[:12]}" in text


def test_a_float_bundle_has_no_sites_to_show(dit_bundle: OpenBundle) -> None:
    facts = describe(dit_bundle.root / "reference")
    assert not {"sites", "scales", "kept"} & set(facts)
    assert "float_bytes" not in facts["size"]
    assert "float32" in render(facts)


def test_inspecting_verifies(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    copy: Any = tmp_path / "copy"
    shutil.copytree(dit_bundle.root, copy)
    (copy / "plan.json").unlink()
    with pytest.raises(BundleError, match=r"plan.json: found no such file"):
        describe(copy)
