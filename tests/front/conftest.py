"""Bundles of tiny random models, compiled once per session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import tiny_models

from quantempo.cli import main
from quantempo.inspection import load_plan
from quantempo.pipeline import CompileSummary, compile_model
from quantempo.progress import Progress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle

SMALL = {"samples": 8, "batch": 4, "steps": (4,), "guidance": (1.5,), "max_steps": 6, "threads": 1}
Compile = Callable[..., CompileSummary]
Cli = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="session")
def small() -> Recipe:
    """A recipe that takes no time."""
    return Recipe(**SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def dit_bundle(tmp_path_factory: pytest.TempPathFactory, small: Recipe) -> OpenBundle:
    """The tiny DiT pipeline in INT8, compiled as users do."""
    return compile_model(tiny_models.dit_pipeline(), tmp_path_factory.mktemp("front") / "dit", small).bundle


@pytest.fixture(scope="session")
def unet_bundle(tmp_path_factory: pytest.TempPathFactory, small: Recipe) -> OpenBundle:
    """The tiny UNet in INT8, from a denoiser directory and a scheduler directory."""
    model, out = tiny_models.unet(), tmp_path_factory.mktemp("front") / "unet"
    return compile_model(model, out, small, scheduler=model / "scheduler").bundle


@pytest.fixture(scope="session")
def maxima(dit_bundle: OpenBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibrated scales of the bundle itself, written as a ModelOpt state dictionary has them."""
    plan, table = load_plan(dit_bundle), dit_bundle.scale_table()
    assert plan is not None
    assert table is not None
    top = {site.module: table.of(site.tensor).symmetric_scale.max() * 127 for site in plan.quantized()}
    file = tmp_path_factory.mktemp("modelopt") / "maxima.safetensors"
    save_file({f"{name}.input_quantizer._amax": np.array(value, np.float32) for name, value in top.items()}, file)
    return file


@pytest.fixture
def compile_tiny() -> Compile:
    """Compile the tiny DiT with a changed recipe; such compiles share their traces through the stage store."""

    def compiled(out: Path, *, model: Path | None = None, scheduler: Path | None = None, plan_file: Path | None = None,
                 overwrite: bool = False, guard: str | None = None, progress: Progress | None = None,
                 **changes: Any) -> CompileSummary:
        recipe = Recipe(**{**SMALL, **changes})
        given = {"scheduler": scheduler, "plan_file": plan_file, "overwrite": overwrite, "guard": guard,
                 "progress": progress}
        return compile_model(model or tiny_models.dit_pipeline(), out, recipe, **given)  # type: ignore[arg-type]

    return compiled


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `quantempo ARGUMENTS`: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantempo", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
