"""The scripts under benchmarks/ start, pages name their commands, and the benchmark page is what its JSON files say."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
PAGES = "\n".join(page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
SHOWN = (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.fixture
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The path that a script sees; what it imports from its folder is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield monkeypatch
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_it_does(
    script: Path, as_a_script: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` needs none of the tools that a benchmark compares with, and shows the script's own text."""
    as_a_script.setattr(sys, "argv", [str(script), "--help"])
    for tool in ("nncf", "optimum", "modelopt"):
        as_a_script.setitem(sys.modules, tool, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert " ".join(text.split())[:60] in said
    assert said.startswith("usage:")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_page_or_the_script_itself_shows_its_command(script: Path) -> None:
    helpers = {"peer_optimum"}  # which peers.py runs
    text = PAGES + (ast.get_docstring(ast.parse(script.read_text())) or "")
    assert script.stem in helpers or f"python benchmarks/{script.name}" in text


def test_the_full_run_renews_every_file_of_results_or_the_page_says_why_not() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {*re.findall(r"docs/(\w+\.json)", makefile), "schedulers.json", "models.json"}  # sweeps write these two
    assert {"scheduler_sweep.py", "model_sweep.py"} <= set(re.findall(r"\w+\.py", makefile))
    excused = set(re.findall(r"`(\w+\.json)` \(", SHOWN.split("\n## ")[0]))
    assert named | excused == {path.name for path in (ROOT / "docs").glob("*.json")}
    assert not named & excused


def test_the_predicted_memory_is_near_the_measured_peak() -> None:
    facts = json.loads((ROOT / "docs" / "compile_cost.json").read_text())
    stages = {name: peak for name, peak in facts["peak_anonymous_bytes"].items() if name != "latency guard"}
    assert len(stages) > 5
    assert 0.9 < facts["predicted"]["memory_bytes"] / max(stages.values()) < 1.4
    assert 0.9 < facts["predicted"]["bundle_bytes"] / facts["found"]["bundle_bytes"] < 1.1


def test_every_section_of_the_benchmark_page_shows_its_command() -> None:
    sections = re.split(r"^## ", SHOWN, flags=re.MULTILINE)[1:]
    assert len(sections) > 5
    for section in sections:
        title = section.splitlines()[0]
        prose = re.sub(r"^```bash\n.*?^```", "", "\n".join(section.splitlines()[1:]), flags=re.MULTILINE | re.DOTALL)
        command = r"^python ((?:benchmarks|tools)/\w+\.py) .*--json docs/(\w+\.json)"
        commands = re.findall(command, section, re.MULTILINE)
        assert re.search(r"\d", prose), f"{title!r} shows no figure"
        assert commands, f"{title!r} shows no command"
        for script, written in commands:
            assert (ROOT / script).is_file()
            json.loads((ROOT / "docs" / written).read_text())


def test_the_benchmark_page_and_the_readme_are_what_the_json_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for path in (ROOT / "docs").glob("*.json"):
        (docs / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    namespace = runpy.run_path(str(ROOT / "tools" / "benchmark_page.py"))
    monkeypatch.setitem(namespace["load"].__globals__, "DOCS", docs)
    namespace["main"]()
    assert (docs / "benchmarks.md").read_text() == SHOWN, "run: python tools/benchmark_page.py"
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
