"""Models that take arrays: calibrated, sampled, reported and timed with a .npz file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from quantempo.errors import RequestError
from quantempo.report import ReportOptions, write_report
from quantempo.stages.conditioning import read_arrays

WORDS = ("--samples", 8, "--batch", 4, "--steps", 3, "--guidance", "1.5", "--max-steps", 4, "--threads", 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.Generator(np.random.Philox(1))
    rows = {
        name: draw.standard_normal((4, 77, 24)).astype(np.float32)
        for name in ("encoder_hidden_states", "negative_encoder_hidden_states")
    }
    path = tmp_path_factory.mktemp("inputs") / "prompts.npz"
    np.savez(path, **rows)
    return path


def test_a_conditioned_model_from_its_directory_to_latents(cli: Any, prompts: Path, tmp_path: Path) -> None:
    model, bundle = tiny_models.condition_unet(), tmp_path / "bundle"
    command = ("compile", model, "-o", bundle, "--scheduler", model / "scheduler", *WORDS)
    code, _, err = cli(*command)
    assert code == 1
    assert "pass it as --calib-set to calibrate, as --inputs to sample and to report" in err
    code, _, err = cli(*command, "--calib-set", prompts)
    assert code == 0, err

    code, _, err = cli("sample", bundle, "--steps", 3, "-o", tmp_path / "x.npy")
    assert code == 1
    assert "write numpy.savez(FILE, encoder_hidden_states=…) and pass --inputs FILE" in err

    code, text, err = cli("sample", bundle, "--inputs", prompts, "--count", 2, "--steps", 3, "-o", tmp_path / "x.npy")
    assert code == 0, err
    assert "8 samples" in text
    latents = np.load(tmp_path / "x.npy")
    assert latents.shape == (8, 4, 8, 8)
    # Rows stay together: samples 0 and 1 have the same prompt and different noise.
    assert len({row.tobytes() for row in latents}) == 8

    code, _, err = cli("sample", bundle, "--inputs", prompts, "--steps", 3, "-o", tmp_path / "x.png")
    assert code == 1
    assert "'pil' for latents of 4 channels without a decoder" in err
    assert "-o FILE.npy" in err
    assert not (tmp_path / "x.png").exists()

    code, text, err = cli("bench", bundle, "--inputs", prompts, "--rounds", 1, "--threads", 1, "--json")
    assert code == 0, err
    assert json.loads(text)["rounds"] == 1
    code, text, err = cli(
        "report", bundle, "--inputs", prompts, "--samples", 4, "--steps", 3, "--guidance", "1.5", "--worst", 0
    )
    assert code == 0, err
    assert "of latents" in text


def test_a_file_that_is_no_archive_of_arrays_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found no such file"):
        read_arrays(tmp_path / "none.npz", "inputs")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(RequestError, match=r"a file that numpy cannot read \(one array without a name\)"):
        read_arrays(tmp_path / "one.npy", "inputs")


def test_a_report_takes_no_arrays_that_the_model_does_not_have(dit_bundle: Any) -> None:
    options = ReportOptions(arrays={"pooled": np.zeros((2, 4), np.float32)})
    with pytest.raises(RequestError, match="this model takes no arrays"):
        write_report(dit_bundle.root, options)
