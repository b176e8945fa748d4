"""What the pages for users of other tools name of ours is there: every option, command and argument in their tables."""

from __future__ import annotations

import bisect
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.main import get_command

import quantempo
from quantempo.calib.ranges import METHODS
from quantempo.cli import app
from quantempo.contracts.partition import Partition
from quantempo.pipeline import compile_model

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("coming-from-*.md"))
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
USAGE_ERROR = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
HEADINGS = ("What maps to what", "What is different", "What to keep", "What quantempo cannot do", "Side by side")


def promises() -> list[tuple[str, str]]:
    """Code spans in the right-hand column of the tables, and in the text around them, that name something of ours."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            ours = line.split(" | ")[1] if line.startswith("| ") and line.count(" | ") == 1 else line
            if line.startswith("| --- ") or (line.startswith("| ") and ours is line):
                continue
            found += [(page.stem, span) for span in re.findall(r"`([^`]+)`", ours)]
    return found


def check(span: str) -> None:
    """Fail where a span names a command, option or argument that we do not have."""
    if span.startswith("quantempo "):
        words = shlex.split(span)
        command = COMMANDS[words[1]]
        if words[2:]:
            command.make_context(words[1], words[2:])
    elif span.startswith("--"):
        words = shlex.split(span)
        assert words[0] in OPTIONS, f"no command takes {words[0]}"
        if words[0] == "--range-method":
            assert words[1:] == [] or words[1] in METHODS
    elif match := re.match(r"(quantempo\.load|compile_model)\((.*)\)$", span):
        called = {"quantempo.load": quantempo.load, "compile_model": compile_model}[match[1]]
        assert set(re.findall(r"(\w+)=", match[2])) <= set(inspect.signature(called).parameters)
    elif match := re.match(r"(\w+)=$", span):
        assert match[1] in inspect.signature(quantempo.load).parameters


@pytest.mark.parametrize(("page", "span"), promises())
def test_what_a_page_names_of_ours_is_there(page: str, span: str) -> None:
    check(span)


@pytest.mark.parametrize(
    "span", ["--calib-sett x.npz", "quantempo compile m", "quantempo compil", "quantempo float-step b", "thread=",
             "--range-method minmx", "compile_model(..., lop=my_loop)", "quantempo.load('b', motor='ort')"],
)
def test_a_wrong_promise_is_caught(span: str) -> None:
    with pytest.raises((AssertionError, KeyError, USAGE_ERROR)):
        check(span)


def test_there_is_a_page_for_each_tool_and_all_have_the_same_parts() -> None:
    assert [page.stem for page in PAGES] == [f"coming-from-{t}" for t in ("modelopt", "onnxruntime", "optimum-intel")]
    for page in PAGES:
        assert tuple(re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)) == HEADINGS
        assert f"](docs/{page.name})" in (DOCS.parent / "README.md").read_text()


def test_the_line_for_a_loop_of_ones_own_finds_the_group() -> None:
    (line,) = re.findall(r"^```python\n(.*)\n```$", (DOCS / "coming-from-onnxruntime.md").read_text(), re.MULTILINE)
    partition = Partition((10.0, 30.0, 45.0), 0.0, 980.0)
    for timestep in (0.0, 9.9, 10.0, 29.0, 30.0, 979.0):
        names = {
            "np": np, "bisect": bisect, "feeds": {}, "timestep": timestep,
            "manifest": {"partition": {"edges": list(partition.edges)}},
        }
        exec(line, names)
        assert names["feeds"]["scale_group"] == partition.group_of(timestep)  # type: ignore[index]
