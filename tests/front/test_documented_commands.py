"""Every `quantempo` command of the README and of docs/ is run as shown, page by page, with tiny models in its places.

What takes long is shortened by further flags (fewer samples and steps), which come last and so win.  Sweeps under
`benchmarks/` and `tools/`, `make` and `pip` are checked by `tests/repo/test_readme.py`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.contracts.step_policy import StepPolicy
from quantempo.runtime.bundle import OpenBundle, read_bundle

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = ("--samples", "8", "--batch", "4", "--steps", "4", "--guidance", "1.5", "--max-steps", "4", "--threads", "1")
SHORTER = {
    "compile": FEWER, "plan": FEWER, "report": ("--samples", "2", "--steps", "4", "--worst", "0"),
    "sample": ("--steps", "4"), "compare": ("--samples", "2", "--steps", "4"), "bench": ("--rounds", "1"),
}
ONCE = ("compile", "plan", "sample", "reproduce", "float-steps", "import-scales")
"""Commands that refuse an output that is there already; a page may show one twice."""
BUILDS = {"rtx": "tensorrt_rtx", "": "tensorrt"}
"""What `build` needs, by the beginning of its target."""


def shown(page: Path) -> list[str]:
    """The page's `quantempo` commands, in order."""
    lines = [line for block in BLOCK.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("quantempo ")]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if shown(page)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dit_bundle: OpenBundle, maxima: Path) -> Path:
    """A folder that holds what the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTEMPO_GUARD", "off")
    unet = tiny_models.unet()
    for name in ("bundle", "out"):
        shutil.copytree(dit_bundle.root, name)
    for name in ("MODEL", "model"):
        shutil.copytree(tiny_models.dit_pipeline(), name)
    shutil.copytree(unet, "UNET")
    shutil.copytree(unet / "scheduler", "SCHEDULER")
    Path("base.yaml").write_text("samples: 16\n")
    Path("mine.yaml").write_text("range_method: mse\n")
    policy = {"runtime": {"diffusion_step_policy": StepPolicy(1, 1).data()}}
    Path("config.json").write_text(json.dumps({"quantization_config": policy}))
    shutil.copyfile(maxima, "maxima.safetensors")
    return tmp_path


def stand_in(command: str) -> list[str]:
    """The words after `quantempo`, made short."""
    words = shlex.split(command, comments=True)[1:]
    if "--min-psnr" in words:
        words[words.index("--min-psnr") + 1] = "1"  # random weights stand INT8 less well than trained ones
    words += SHORTER.get(words[0], ())
    if words[0] in ONCE and "--overwrite" not in words and ("-o" in words or "--out" in words):
        words.append("--overwrite")
    return words


def missing(words: list[str]) -> str:
    """The package without which a command is refused here; empty where all is installed."""
    needed = ["openvino"] if any("openvino" in word for word in words) else []
    if words[0] == "build":
        target = words[words.index("--target") + 1]
        needed.append(next(package for start, package in BUILDS.items() if target.startswith(start)))
    return next((package for package in needed if importlib.util.find_spec(package) is None), "")


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_commands_of_a_page_run(cli: Any, place: Path, page: Path) -> None:
    for command in shown(page):
        words = stand_in(command)
        code, out, err = cli(*words)
        absent = missing(words)
        if absent:
            assert (code, absent in err) == (1, True), f"{command}: {err}"
            continue
        refused = words[0] == "check" and "refused" in out
        assert code == (1 if refused else 0), f"{command}: {err}"
        assert "Traceback" not in err


def test_the_python_of_the_readme_runs(place: Path) -> None:
    (text,) = PYTHON.findall((ROOT / "README.md").read_text())
    found: dict[str, Any] = {}
    exec(compile(text.replace("num_inference_steps=20", "num_inference_steps=4"), "README.md", "exec"), found)
    assert len(found["images"]) == 2


def test_commands_that_need_no_help_are_not_shortened_into_others() -> None:
    assert stand_in("quantempo inspect bundle") == ["inspect", "bundle"]
    words = stand_in("quantempo compile MODEL -o bundle --plan plan.json   # as edited")
    assert words[:6] == ["compile", "MODEL", "-o", "bundle", "--plan", "plan.json"]
    assert words[-1] == "--overwrite"


def test_the_place_holds_a_whole_bundle(place: Path) -> None:
    read_bundle(place / "bundle")
