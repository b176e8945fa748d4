from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import quantempo
from quantempo.calib.ranges import METHODS
from quantempo.demo import JUDGE
from quantempo.quality import psnr_db
from quantempo.report import ReportOptions, write_report
from quantempo.runtime.bundle import OpenBundle, read_bundle

OPTIONS = ReportOptions(
    samples=5, population=24, guidance=(1.5, 4.0), steps=4, batch=4, judge=JUDGE, threads=1, timing_rounds=2
)
KEYS = {
    "quality": (
        "psnr_db", "psnr_db_single_scale", "guidance", "accuracy", "accuracy_float", "frechet_to_float",
        "frechet_float_to_float",
    ),
    "sites": ("total", "quantized", "kept"),
    "scales": ("groups",),
    "size": ("float_bytes", "bundle_bytes"),
    "speed": ("float_ms_per_call", "int8_ms_per_call", "loop_overhead_ms_per_call"),
}
"""What other programs read from report.json."""


@pytest.fixture(scope="module")
def made(dit_bundle: OpenBundle) -> Any:
    return write_report(dit_bundle.root, OPTIONS)


@pytest.fixture(scope="module")
def facts(made: Any, dit_bundle: OpenBundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dit_bundle.root / "report" / "report.json").read_text())
    assert found == made.facts
    return found


def test_every_key_that_others_read_is_there_and_a_finite_number(facts: dict[str, Any]) -> None:
    for part, names in KEYS.items():
        for name in names:
            value = facts[part][name]
            assert isinstance(value, (int, float)), f"{part}.{name}"
            assert np.isfinite(value), f"{part}.{name}"


def test_values_are_sane(facts: dict[str, Any], dit_bundle: OpenBundle) -> None:
    quality, speed = facts["quality"], facts["speed"]
    assert 20 < quality["psnr_db"] < 100
    assert 20 < quality["psnr_db_single_scale"] < 100
    assert quality["worst_psnr_db"] <= quality["psnr_db"]
    assert quality["guidance"] == 1.5
    assert 0 <= quality["accuracy"] <= 1
    assert 0 <= quality["accuracy_float"] <= 1
    assert 0 <= quality["frechet_to_float"] < quality["frechet_float_to_float"]
    assert facts["sites"]["total"] == facts["sites"]["quantized"] + facts["sites"]["kept"]
    assert facts["scales"]["groups"] == 4
    assert facts["bundle"] == dit_bundle.digest
    assert 0 < speed["loop_overhead_ms_per_call"] < 50
    assert 0 < speed["int8_ms_per_call"] < 1000
    assert 0 < speed["float_ms_per_call"] < 1000


def test_the_headline_is_the_mean_of_per_image_psnr_on_the_same_seeds(
    facts: dict[str, Any], dit_bundle: OpenBundle
) -> None:
    images = {}
    for name, path in (("int8", dit_bundle.root), ("float", dit_bundle.root / "reference")):
        with quantempo.load(path, threads=1) as session:
            images[name] = np.concatenate([
                session(
                    class_labels=[i], seed=[i], num_inference_steps=4, guidance_scale=1.5, output_type="np"
                ).images for i in range(5)
            ])
    assert facts["quality"]["psnr_db"] == pytest.approx(psnr_db(images["int8"], images["float"]).mean(), abs=0.05)


def test_the_single_scale_is_the_best_of_all_range_methods(facts: dict[str, Any]) -> None:
    by_guidance = facts["quality"]["by_guidance"]
    assert [entry["guidance"] for entry in by_guidance] == [1.5, 4.0]
    for entry in by_guidance:
        assert set(entry["single_scale"]) == set(METHODS)
    single = {name: values["psnr_db"] for name, values in by_guidance[0]["single_scale"].items()}
    assert facts["quality"]["psnr_db_single_scale"] == max(single.values())
    assert single[facts["quality"]["single_scale_method"]] == max(single.values())
    assert len(set(single.values())) > 1, "the methods differ"


def test_the_table_shows_what_the_file_says(made: Any, facts: dict[str, Any]) -> None:
    text = made.text()
    assert f"{facts['quality']['psnr_db']:6.2f} dB" in text
    assert f"{facts['sites']['quantized']} of {facts['sites']['total']} quantized; 4 scale groups" in text
    assert "accuracy" in text
    assert f"{facts['size']['bundle_bytes'] / 1e6:.2f} MB" in text


def test_the_command_in_the_file_makes_the_report(facts: dict[str, Any]) -> None:
    command = facts["command"].split()
    assert command[:3] == ["quantempo", "report", "BUNDLE"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--samples"] == "5"
    assert options["--guidance"] == "1.5,4"
    assert options["--steps"] == "4"
    assert options["--population"] == "24"


def test_the_sheet_shows_float_one_scale_and_groups(made: Any, dit_bundle: OpenBundle) -> None:
    with Image.open(dit_bundle.root / "report" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        width, height = sheet.size
    assert width > 3 * height > 0, "five panels side by side"


def test_a_report_leaves_the_bundle_valid(made: Any, dit_bundle: OpenBundle) -> None:
    assert read_bundle(dit_bundle.root).digest == dit_bundle.digest


def test_without_judge_and_comparison_their_keys_are_left_out(compile_tiny: Any, tmp_path: Path) -> None:
    path = compile_tiny(tmp_path / "bundle").bundle.root
    options = ReportOptions(samples=2, steps=2, threads=1, single_scale=False, timing_rounds=1)
    quality = write_report(path, options).facts["quality"]
    assert "psnr_db" in quality
    assert not {"accuracy", "frechet_to_float", "psnr_db_single_scale"} & set(quality)
