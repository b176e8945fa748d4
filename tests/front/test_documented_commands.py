"""Every shell command of the README and of docs/ is accounted for: run here page by page, or named with what runs it.

`quantempo` commands run as shown, with tiny models in the places that the pages name.  What takes long is shortened by
further flags (fewer samples and steps), which come last and so win.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.contracts.step_policy import StepPolicy
from quantempo.runtime.bundle import OpenBundle

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = ("--samples", "8", "--batch", "4", "--steps", "8", "--guidance", "1.5", "--max-steps", "8", "--threads", "1")
SHORTER = {
    "compile": FEWER, "plan": FEWER, "report": ("--samples", "2", "--steps", "2", "--worst", "0"),
    "sample": ("--steps", "4"), "compare": ("--samples", "2", "--steps", "2"), "bench": ("--rounds", "1"),
}
ONCE = ("compile", "plan", "sample", "reproduce", "float-steps", "import-scales")
"""Commands that refuse an output that is there already; a page may show one twice."""
BUILDS = {"rtx": "tensorrt_rtx", "": "tensorrt"}
"""What `build` needs, by the beginning of its target."""
SWEEP = "takes minutes to hours; tests/repo/test_benchmarks.py runs its --help, tests/repo/test_readme.py checks flags"
ELSEWHERE = {
    "make test": "what .ci/run starts",
    "make demo": "tests/front/test_cli.py::test_the_demo_runs_with_fewer_samples runs its command, make test sets up "
    "the same .venv, tests/repo/test_readme.py reads what make would run",
    "pip install *quantempo*": "needs an index that has quantempo; tests/repo/test_wheel.py::"
    "test_it_is_small_and_runs_anywhere and test_metadata_names_the_extras_and_the_command look at the wheel, "
    "tests/repo/test_python310.py::test_the_command_line_samples_and_inspects_there installs it",
    "python benchmarks/*.py *": SWEEP,
    "python tools/*.py *": "sweeps and fuzzing, minutes to hours; tests/repo/test_readme.py checks their flags, "
    "tests/front/test_resume.py kills and resumes smaller compiles, tests/cpp/test_cpp_interface.py::"
    "test_a_short_fuzz_of_everything_that_reads_bytes_finds_nothing (in make test-full) fuzzes for seconds",
    "apt install *": "needs root and the network", "dpkg --add-architecture *": "needs root and the network",
    "cmake -S runtime/cpp -B build/cpp *": "tests/cpp/test_cpp_interface.py::"
    "test_an_installed_tree_serves_a_project_of_its_own builds the same folder",
    "cmake --install build/cpp *": "tests/cpp/test_cpp_interface.py::"
    "test_an_installed_tree_serves_a_project_of_its_own installs it",
    "export QUANTEMPO_ORT_LIBRARY=*": "a variable; tests/cpp/test_cpp_interface.py opens pip's library by path",
    "build/cpp/quantempo-sample *": "tests/cpp/test_cpp_runtime.py",
    "cmake *build/arm64*": "needs a cross compiler and arm64 libraries; tests/repo/test_readme.py finds its files",
}
"""Other commands by pattern, and what runs each or why nothing can."""


def commands(page: Path) -> list[str]:
    """The page's commands, in order; chained ones are one."""
    lines = [line for block in BLOCK.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def ours(page: Path) -> list[str]:
    """Its `quantempo` commands."""
    return [line for line in commands(page) if line.startswith("quantempo ")]


EVERY = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in EVERY if ours(page)]


def test_every_command_is_run_here_or_elsewhere() -> None:
    others = [line for page in EVERY for line in commands(page) if not line.startswith("quantempo ")]
    used = set()
    for line in others:
        text = " ".join(shlex.split(line, comments=True))
        matching = [pattern for pattern in ELSEWHERE if fnmatch(text, pattern)]
        assert matching, f"nothing runs {text!r}: add what does to this table"
        used.update(matching)
    assert used == set(ELSEWHERE), "no page shows these any more"


IN_FULL = " (in make test-full)"
NAMED = {
    words for text in ELSEWHERE.values() for words in re.findall(rf"[\w./]+\.py\S*(?:{re.escape(IN_FULL)})?", text)
}


@pytest.mark.parametrize("words", sorted(NAMED))
def test_what_is_said_to_run_a_command_is_there(words: str) -> None:
    file, _, name = words.removesuffix(IN_FULL).rstrip(",;").partition("::")
    assert (ROOT / file).is_file()
    if name:
        tree = ast.parse((ROOT / file).read_text())
        (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        marks = {ast.unparse(mark) for mark in found.decorator_list}
        assert ("pytest.mark.full" in marks) == words.endswith(IN_FULL), "make test leaves such tests out"


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


def allowed(words: list[str], out: str, err: str) -> int:
    """The exit code that the documentation promises."""
    if words[0] == "check" and "refused" in out:
        return 1
    # A model this tiny may lose in every region; then the documented answer is a refusal with its advice.
    return int("revert" in words and "slower in integers than in float, however it is divided" in err)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_commands_of_a_page_run(cli: Any, place: Path, page: Path) -> None:
    for command in ours(page):
        words = stand_in(command)
        code, out, err = cli(*words)
        assert "Traceback" not in err
        if absent := missing(words):
            assert code == 1, command
            assert absent in err, f"{command}: {err}"
            continue
        assert code == allowed(words, out, err), f"{command}: {err}"


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
