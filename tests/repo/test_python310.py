"""The runtime in a fresh Python 3.10 environment with `quantempo[cpu]` alone: no torch, no diffusers, no onnx."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

import quantempo
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle

SAMPLE = """
import importlib.util, json, sys
import numpy as np
import quantempo
assert sys.version_info[:2] == (3, 10)
with quantempo.load(sys.argv[1], threads=1) as session:
    out = session(class_labels=[1, "digit 2"], seed=5, num_inference_steps=4, guidance_scale=1.5)
np.save(sys.argv[2], out.latents)
out.images[0].save(sys.argv[2] + ".png")
heavy = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy")
print(json.dumps([name for name in heavy if importlib.util.find_spec(name) is not None]))
"""


def interpreter() -> str | None:
    """A Python 3.10: `python3.10` on the path, or one that pyenv holds."""
    candidates = [shutil.which("python3.10")]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False).stdout.strip()
        candidates += [str(p) for p in sorted(Path(root).glob("versions/3.10*/bin/python"))]
    for candidate in candidates:
        if candidate:
            tried = subprocess.run([candidate, "-c", "import ensurepip, venv"], capture_output=True, check=False)
            if tried.returncode == 0:
                return candidate
    return None


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and its `cpu` extra."""
    found = interpreter()
    if found is None:
        pytest.skip("no Python 3.10 on this machine")
    folder = tmp_path_factory.mktemp("py310") / "venv"
    subprocess.run([found, "-m", "venv", str(folder)], check=True)
    made = folder / "bin" / "python"
    options = ("--quiet", "--disable-pip-version-check", "--retries", "1")
    command = [str(made), "-m", "pip", "install", *options, f"{wheel}[cpu]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Could not find a version" in done.stderr and "quantempo" not in done.stderr:
        pytest.skip("the package index cannot be reached: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> OpenBundle:
    recipe = Recipe(samples=8, batch=8, steps=(4,), guidance=(1.5,), max_steps=4, threads=1, reference=False)
    return compile_model(tiny_models.dit_pipeline(), tmp_path_factory.mktemp("bundle") / "dit", recipe).bundle


def run(python: Path, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *map(str, words)], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


def test_a_bundle_loads_and_samples_there_as_it_does_here(python: Path, bundle: OpenBundle, tmp_path: Path) -> None:
    done = run(python, "-c", SAMPLE, bundle.root, tmp_path / "out.npy", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [], "only numpy, safetensors and an engine are there"
    with quantempo.load(bundle.root, threads=1) as session:
        here = session(class_labels=[1, 2], seed=5, num_inference_steps=4, guidance_scale=1.5).latents
    there = np.load(tmp_path / "out.npy")
    assert np.abs(there - here).max() <= 0.05 * np.abs(here).max(), "another version of the engine may round otherwise"
    assert (tmp_path / "out.npy.png").stat().st_size > 0


def test_the_command_line_samples_and_inspects_there(python: Path, bundle: OpenBundle, tmp_path: Path) -> None:
    command = python.parent / "quantempo"
    words = ("sample", bundle.root, "--class", 3, "--steps", 2, "-o", tmp_path / "grid.png", "--threads", 1)
    done = run(command, *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()
    done = run(command, "inspect", bundle.root, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == bundle.digest


def test_compiling_there_names_the_pip_command(python: Path, tmp_path: Path) -> None:
    words = ("compile", tiny_models.dit_pipeline(), "-o", tmp_path / "b")
    done = run(python.parent / "quantempo", *words, folder=tmp_path)
    assert done.returncode == 1
    assert "run: pip install 'quantempo[compile,cpu]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
