"""Every command that the README and the pages under docs/ show can be run: it is parsed by what it names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from quantempo.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*([ROOT / "README.md"] if (ROOT / "README.md").is_file() else []), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
USAGE_ERROR = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
"""Click's class; newer typers carry a click of their own."""
PLANNED_ELSEWHERE = ("git", "cd", "python3", "source", ".", "export", "apt", "dpkg")
"""Words that need nothing of ours to exist."""


def commands(text: str) -> list[str]:
    """The commands of all shell blocks, continuation lines joined, comments and prompts dropped."""
    found = []
    for language, body in BLOCK.findall(text):
        if language in SHELL:
            for line in body.replace("\\\n", " ").splitlines():
                words = line.strip().removeprefix("$ ")
                if words and not words.startswith("#"):
                    found.append(words)
    return found


def shown() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in commands(page.read_text())]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_make(words: list[str]) -> None:
    targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    assert targets
    assert set(targets) <= make_targets(), f"make has no target {sorted(set(targets) - make_targets())}"


def check_quantempo(words: list[str]) -> None:
    if len(words) == 2 and words[1] in ("--help", "--version"):
        return
    assert words[1] in COMMANDS, f"quantempo has no command {words[1]!r}"
    # Parsing alone: options exist, have values of their type, and nothing that is required is missing.
    COMMANDS[words[1]].make_context(words[1], list(words[2:]))


def check_python(words: list[str]) -> None:
    if words[1] == "-m":
        assert words[2] in ("pytest", "venv", "pip", "build", "quantempo.cli"), words[2]
        return
    if words[1] == "-c":
        compile(words[2], "README", "exec")
        return
    script = ROOT / words[1]
    assert script.is_file(), f"{words[1]} does not exist"
    text = script.read_text()
    # Options that several scripts share are declared in one of them.
    shared = [path for path in script.parent.glob("*.py") if re.search(rf"^import {path.stem}$", text, re.MULTILINE)]
    text += "".join(path.read_text() for path in shared)
    for option in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
        assert f'"{option}"' in text, f"{words[1]} takes no {option}"


def check_pip(words: list[str]) -> None:
    for word in words:
        match = re.fullmatch(r"(?:quantempo|\.)\[([\w,-]+)\]", word)
        if match:
            text = (ROOT / "pyproject.toml").read_text()
            for extra in match[1].split(","):
                assert re.search(rf"^{extra} = \[", text, re.MULTILINE), f"there is no extra {extra!r}"


def check_cmake(words: list[str]) -> None:
    """The source folder, the build options and the toolchain file exist."""
    if "-S" in words:
        folder = ROOT / words[words.index("-S") + 1]
        known = (folder / "CMakeLists.txt").read_text()
        for word in words:
            if match := re.match(r"-D(QUANTEMPO_\w+)=", word):
                assert match[1] in known, f"there is no option {match[1]}"
            if word.startswith("-DCMAKE_TOOLCHAIN_FILE="):
                assert (ROOT / word.partition("=")[2].removeprefix("$PWD/")).is_file(), word


def check_sampler(words: list[str]) -> None:
    """The options of the C++ command line stand in its usage."""
    usage = (ROOT / "runtime/cpp/examples/sample.cpp").read_text().partition("usage:")[2].partition(')"')[0]
    for word in words[1:]:
        if word.startswith("-"):
            assert re.search(rf"^  {re.escape(word)} ", usage, re.MULTILINE), f"quantempo-sample has no option {word}"


def check(command: str) -> None:
    for part in re.split(r"&&|\|\||\||;", command):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        name = Path(words[0]).name
        if name == "make":
            check_make(words)
        elif name == "quantempo":
            check_quantempo(words)
        elif name in ("python", "python3"):
            check_python(words)
        elif name == "pip":
            check_pip(words)
        elif name == "cmake":
            check_cmake(words)
        elif name == "quantempo-sample":
            check_sampler(words)
        else:
            assert name in PLANNED_ELSEWHERE or (ROOT / words[0]).is_file(), f"nothing checks the command {part!r}"


@pytest.mark.parametrize(("page", "command"), shown() or [pytest.param("", "", marks=pytest.mark.skip("no commands"))])
def test_a_command_that_is_shown_can_be_run(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make dmeo", "quantempo compiel model -o out", "quantempo compile model", "quantempo sample b -o x --stpes 4",
        "quantempo compile model -o out --seed x", "python benchmarks/nothing.py", "pip install 'quantempo[cpuu]'",
        "cmake -S runtime/cpp -B build -DQUANTEMPO_OTR=ON", "build/cpp/quantempo-sample out --stpes 4",
        "python tools/train_demo.py --no-such-option", "mkae test", "make test && make dmeo",
    ],
)
def test_a_wrong_command_is_caught(command: str) -> None:
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check(command)


@pytest.mark.parametrize(
    "command",
    ["make demo", "make test", "quantempo compile model -o out --keep '*.ff.*' --guidance 1.5,4  # keep the MLPs",
     "PYTHON=python3.11 make test", "quantempo demo", "python tools/train_demo.py", "pip install 'quantempo[cpu]'"],
)
def test_a_right_command_passes(command: str) -> None:
    check(command)


def test_commands_are_found_in_shell_blocks_alone() -> None:
    text = "```bash\n$ make \\\n  demo\n# no\n\nmake test\n```\n```python\nmake()\n```\n```\nmake nothing\n```\n"
    assert commands(text) == ["make    demo", "make test"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_makefile_names_scripts_that_exist() -> None:
    for script in re.findall(r"(?:tools|benchmarks)/\w+\.py", (ROOT / "Makefile").read_text()):
        assert (ROOT / script).is_file(), f"{script} does not exist"


def test_make_without_doing_anything_knows_its_two_commands() -> None:
    for target in ("demo", "test"):
        command = ["make", "--dry-run", target, f"PYTHON={sys.executable}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "make test" in (ROOT / ".ci" / "run").read_text()
