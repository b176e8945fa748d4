"""`compile --min-psnr`: a bundle that is not good enough is kept aside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.contracts.table import ScaleTable
from quantempo.errors import OutputExists, RequestError
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_writer import aside
from quantempo.stages import quantizers

WORDS = (
    "--samples", 8, "--batch", 4, "--steps", 4, "--guidance", "1.5", "--max-steps", 6, "--threads", 1, "--guard", "off",
)


@pytest.fixture(scope="module")
def bar(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What a sound bundle reaches, but for one dB."""
    out = tmp_path_factory.mktemp("sound") / "bundle"
    recipe = Recipe(samples=8, batch=4, steps=(4,), guidance=(1.5,), max_steps=6, threads=1)
    compile_model(tiny_models.dit_pipeline(), out, recipe, guard="off", min_psnr=1.0)
    return float(json.loads((out / "report" / "report.json").read_text())["quality"]["psnr_db"]) - 1.0


def test_a_bundle_that_is_good_enough_is_written_with_its_report(cli: Any, tmp_path: Path, bar: float) -> None:
    out = tmp_path / "bundle"
    code, text, err = cli("compile", tiny_models.dit_pipeline(), "-o", out, *WORDS, "--min-psnr", bar)
    assert code == 0, err
    assert f"wrote {out}" in text
    verdict = json.loads((out / "report" / "report.json").read_text())["verdict"]
    assert verdict == {"min_psnr_db": bar, "passed": True}
    read_bundle(out)
    assert not aside(out).exists()


def test_a_bundle_that_is_not_goes_aside_and_the_older_one_stays(
    cli: Any, dit_bundle: OpenBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bar: float
) -> None:
    """One scale eight times too small, and a bar that the sound bundle reaches."""
    import shutil

    out = tmp_path / "bundle"
    shutil.copytree(dit_bundle.root, out)
    build = quantizers.build_table

    def broken(*args: Any, **named: Any) -> ScaleTable:
        table = build(*args, **named)
        tensor = sorted(table.tensors)[0]
        scales = table.of(tensor)
        worse = dataclasses.replace(scales, scale=scales.scale / 8)
        return ScaleTable(table.partition, {**table.tensors, tensor: worse})

    monkeypatch.setattr(quantizers, "build_table", broken)
    command = ("compile", tiny_models.dit_pipeline(), "-o", out, *WORDS, "--work", tmp_path / "work", "--overwrite")
    code, _, err = cli(*command, "--min-psnr", bar)
    assert code == 1, err
    assert "QualityNotReached" in err
    assert f"wanted at least {bar:.2f} dB" in err
    assert f"this bundle lies at {aside(out)}, and nothing was changed at its target" in err
    assert read_bundle(out).digest == dit_bundle.digest
    rejected = read_bundle(aside(out))
    assert rejected.digest != dit_bundle.digest
    assert not json.loads((rejected.root / "report" / "report.json").read_text())["verdict"]["passed"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    # Another failure takes the place of the first.
    assert cli(*command, "--min-psnr", bar + 1)[0] == 1
    facts = json.loads((aside(out) / "report" / "report.json").read_text())
    assert facts["verdict"]["min_psnr_db"] == bar + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"precision": "float32"}, "a float bundle"), ({"reference": False}, "a recipe without reference")],
    ids=["float", "no-reference"],
)
def test_what_cannot_be_judged_is_refused_before_the_work(
    small: Recipe, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe = dataclasses.replace(small, **changes)
    with pytest.raises(RequestError, match=words):
        compile_model(tmp_path / "no-such-model", tmp_path / "out", recipe, min_psnr=40.0)


def test_a_model_without_a_decoder_is_judged_by_its_latents(small: Recipe, tmp_path: Path) -> None:
    model, given = tiny_models.dit_pipeline(), {"min_psnr": 1.0}
    compile_model(model / "transformer", tmp_path / "out", small, scheduler=model / "scheduler", **given)
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    facts = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert facts["quality"]["of"] == "latents, taken for pictures from -4 to 4"
    assert 1 < facts["quality"]["psnr_db"] < 120
    assert facts["quality"]["of"] in page


def test_a_stranger_at_the_place_for_rejected_bundles_is_named_before_the_work(small: Recipe, tmp_path: Path) -> None:
    aside(tmp_path / "out").mkdir()
    (aside(tmp_path / "out") / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"out\.rejected: found a directory that is not a bundle"):
        compile_model(tmp_path / "no-such-model", tmp_path / "out", small, min_psnr=40.0)
