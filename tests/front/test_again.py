"""`quantempo reproduce` and `quantempo bench`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.errors import BundleError, NotReproduced, PlanError, RequestError
from quantempo.report.bench import bench
from quantempo.reproducing import Reproduction, reproduce
from quantempo.runtime.bundle import OpenBundle


def test_a_bundle_comes_out_the_same(cli: Any, compile_tiny: Any, tmp_path: Path) -> None:
    """A plan by pattern and labels of one's own are in the bundle."""
    made = compile_tiny(tmp_path / "one", keep=("*.ff.*",), classes=(1, 2)).bundle
    code, text, err = cli("reproduce", made.root, tiny_models.dit_pipeline(), "-o", tmp_path / "two", "--quiet")
    assert code == 0, err
    assert f"the same to the last byte: {len(made.manifest.files)} files, digest {made.digest}" in text


def test_a_difference_is_named(dit_bundle: OpenBundle) -> None:
    manifest = dit_bundle.manifest
    name = "tables.safetensors"
    then = dataclasses.replace(
        manifest, provenance={**manifest.provenance, "numpy": "1.0"},
        files={**manifest.files, name: dataclasses.replace(manifest.files[name], sha256="0" * 64)},
    )
    old = dataclasses.replace(dit_bundle, manifest=then, digest="1" * 64)
    provenance = (("numpy", "1.0", manifest.provenance["numpy"]),)
    with pytest.raises(NotReproduced, match=rf"other bytes in 1 files: {name}[\s\S]*numpy was 1.0, is \d"):
        Reproduction(old, dit_bundle, (name,), provenance).check()
    with pytest.raises(NotReproduced, match="another kind of CPU"):
        Reproduction(old, dit_bundle, (name,), ()).check()


def test_another_model_is_refused_with_both_digests(dit_bundle: OpenBundle, tmp_path: Path) -> None:
    model = tiny_models.unet()
    with pytest.raises(PlanError, match=r"a plan for the graph \w{12}…, wanted one for \w{12}…"):
        reproduce(dit_bundle.root, model, tmp_path / "out", scheduler=model / "scheduler")


def test_bench_times_both_for_people_and_for_machines(cli: Any, dit_bundle: OpenBundle) -> None:
    code, text, err = cli("bench", dit_bundle.root, "--rounds", 2, "--threads", 1)
    assert code == 0, err
    assert "medians of 2 rounds in turn" in text
    code, text, _ = cli("bench", dit_bundle.root, "--rounds", 2, "--threads", 1, "--json")
    facts = json.loads(text)
    assert (code, facts["bundle"], facts["rounds"]) == (0, dit_bundle.digest, 2)
    assert facts["speedup"] == pytest.approx(facts["float_ms_per_call"] / facts["int8_ms_per_call"], abs=1e-3)


def test_bench_says_what_it_cannot_time(dit_bundle: OpenBundle, compile_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found 0, wanted at least 1"):
        bench(dit_bundle.root, rounds=0)
    lean = compile_tiny(tmp_path / "lean", reference=False).bundle
    with pytest.raises(BundleError, match="no float reference"):
        bench(lean.root)
