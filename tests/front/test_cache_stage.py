from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from quantempo.contracts.cache import DeltaCut, FeatureCut
from quantempo.errors import CacheUnused, ExportError, RequestError
from quantempo.pipeline import CompileSummary, compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle

from .conftest import SMALL, Cli, Compile

STEPS = 4


def load(bundle: OpenBundle, **more: str):  # type: ignore[no-untyped-def]
    import quantempo

    return quantempo.load(bundle.root, engine="ort", threads=1, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(**{**SMALL, "cache": "every:2"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> CompileSummary:
    return compile_model(tiny_models.dit_pipeline(), tmp_path_factory.mktemp("cached") / "dit", recipe)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> CompileSummary:
    model, out = tiny_models.unet(), tmp_path_factory.mktemp("cached") / "unet"
    return compile_model(model, out, recipe, scheduler=model / "scheduler")
