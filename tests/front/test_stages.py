"""Which stages a compile runs and which it takes from an earlier one."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.errors import RequestError
from quantempo.pipeline import compile_model
from quantempo.progress import UPDATE_VARIABLE, Advance, JsonProgress, SilentProgress
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle
from quantempo.stages.listing import list_stages
from quantempo.stages.store import RECORD, WORK_VARIABLE, KeyLock, StageResult, StageStore, cache_limit, default_root

CENTRED_BY_GROUPS = {"scales", "weights"}
ALWAYS = {"write"}
"""No result of an earlier compile can stand for it."""


class Log:
    """The events of a compile, as `--log json` writes them; what ran is read from them, not from its own summary."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self.progress = JsonProgress(self._text)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._text.getvalue().splitlines()]

    def ran(self) -> set[str]:
        """Stages that began, each of which also has to end."""
        begun, ended = ([e["stage"] for e in self.events() if e["event"] == word] for word in ("start", "end"))
        assert begun == ended
        return set(begun)

    def reused(self) -> set[str]:
        return {event["stage"] for event in self.events() if event["event"] == "reused"}

    def foretold(self) -> set[str]:
        """Stages that said how much was left before they ended; what they say only grows, up to the whole."""
        found: dict[str, list[float]] = {}
        for event in self.events():
            if event["event"] == "progress":
                found.setdefault(event["stage"], []).append(event["done"] / event["total"])
        assert all(shares == sorted(shares) and shares[-1] == 1 for shares in found.values()), found
        return {stage for stage, shares in found.items() if any(0 < share < 1 for share in shares)}


FIRST = Log()


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, small: Recipe) -> Path:
    """The stage store after one compile of the tiny DiT, whose events are in `FIRST`."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WORK_VARIABLE, str(folder / "work"))
        patch.setenv(UPDATE_VARIABLE, "1e-9")
        compile_model(tiny_models.dit_pipeline(), folder / "bundle", small, progress=FIRST.progress)
    return folder / "work"


def test_a_stage_that_can_predict_says_what_is_left(first_run: Path) -> None:
    # Tracing is one call of torch's; a plan and scales take seconds at most.
    assert FIRST.ran() - FIRST.foretold() == {"denoiser", "decoder", "plan", "scales"}


def test_time_left_is_known_within_a_batch(first_run: Path) -> None:
    seen = [e for e in FIRST.events() if e["event"] == "progress" and e["stage"] == "calibrate"]
    assert {event["total"] for event in seen} == {2 * 4}, "two batches of four calls"
    assert {event["done"] for event in seen} == set(range(9))


@pytest.fixture(scope="module")
def scanned_run(tmp_path_factory: pytest.TempPathFactory, first_run: Path, small: Recipe) -> Path:
    """The store after another compile with a float16 graph."""
    folder = tmp_path_factory.mktemp("scanned")
    shutil.copytree(first_run, folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WORK_VARIABLE, str(folder / "work"))
        compile_model(tiny_models.dit_pipeline(), folder / "bundle", replace(small, graphs=("portable-f16",)))
    return folder / "work"


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, set()),
        ({"keep": ("*.ff.*",)}, {"plan", "scales", "weights"}),
        ({"range_method": "percentile"}, {"scales"}),
        ({"groups": "uniform:2"}, CENTRED_BY_GROUPS),
        ({"activation_bits": 7}, {"plan", "scales"}),
        ({"guidance": (2.0,)}, {"calibrate", "scales", "weights"}),
        ({"seed": 3}, {"calibrate", "scales", "weights"}),
        ({"steps": (5,)}, {"calibrate", "scales", "weights"}),
        ({"weight_method": "minmax"}, {"calibrate", "scales", "weights"}),
        ({"max_steps": 7}, {"sampler"}),
        ({"default_guidance": 3.0}, set()),
        ({"reference": False}, set()),
        ({"graphs": ("portable-bf16",)}, set()),
        ({"graphs": ("portable-f16",)}, {"ranges"}),
        ({"attention": "quantized"}, {"ranges"}),
        ({"attention": "float"}, set()),
        ({"guard": "record"}, {"latency guard"}),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_a_changed_setting_runs_exactly_what_depends_on_it(
    compile_tiny: Any,
    first_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    stages: set[str],
) -> None:
    # A copy of the store after one compile: other tests' compiles must not count as earlier results.
    shutil.copytree(first_run, tmp_path / "work")
    monkeypatch.setenv(WORK_VARIABLE, str(tmp_path / "work"))
    monkeypatch.setenv(UPDATE_VARIABLE, "1e-9")
    log = Log()
    made = compile_tiny(tmp_path / "bundle", progress=log.progress, **changes)
    assert log.foretold() >= {"write", "ranges", "latency guard"} & log.ran()
    assert log.ran() == stages | ALWAYS
    assert log.reused() == {"sampler", "denoiser", "decoder", "plan", "calibrate", "scales", "weights"} - stages
    assert {run.stage for run in made.stages if not run.reused} == stages - {"latency guard"}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, set()),
        ({"keep": ("*.ff.*",)}, {"plan", "scales", "weights"}),
        ({"range_method": "percentile"}, {"scales"}),
        ({"guidance": (2.0,)}, {"calibrate", "scales", "weights", "ranges"}),
        ({"seed": 3}, {"calibrate", "scales", "weights"}),
    ],
    ids=["nothing", "keep", "range-method", "guidance", "seed"],
)
def test_a_range_scan_runs_once_for_a_graph_that_needs_it(
    compile_tiny: Any, scanned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], stages: set[str],
) -> None:
    shutil.copytree(scanned_run, tmp_path / "work")
    monkeypatch.setenv(WORK_VARIABLE, str(tmp_path / "work"))
    log = Log()
    compile_tiny(tmp_path / "bundle", graphs=("portable-f16",), progress=log.progress, **changes)
    assert log.ran() == stages | ALWAYS


def test_the_guidance_of_a_sample_touches_no_stage(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    def seen() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in default_root().rglob("*"))

    before = seen()
    words = ("sample", dit_bundle.root, "-o", tmp_path / "a.png", "--class", 1, "--steps", 2, "--threads", 1)
    assert cli(*words, "--guidance", 3)[0] == 0
    assert seen() == before


def test_each_stage_is_one_line_with_its_reason(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    words = ("compile", tiny_models.dit_pipeline(), "-o", tmp_path / "b", "--recipe", dit_bundle.root / "recipe.json")
    code, _, err = cli(*words, "--range-method", "mse")
    assert code == 0
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines] == [
        "sampler", "denoiser", "decoder", "plan", "calibrate", "scales", "weights", "write",
    ]
    assert lines[4] == "calibrate: reused (same inputs)"
    assert lines[5].startswith("scales: run (changed: range method), ")
    code, _, err = cli(*words, "--range-method", "mse", "--overwrite", "--log", "json")
    events = [json.loads(line) for line in err.splitlines()]
    assert {"event": "reused", "stage": "scales", "why": "same inputs"} in events
    assert {"event": "start", "stage": "write", "why": "a bundle is always written anew"} in events
    code, _, err = cli(*words, "--overwrite", "--quiet")
    assert (code, err) == (0, "")


def test_a_changed_plan_is_named_as_the_reason(compile_tiny: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    made = compile_tiny(tmp_path / "bundle", keep=("*.attn1.to_q",))
    why = {run.stage: run.why for run in made.stages}
    assert why["plan"] == "changed: keep"
    assert "quantized weights" in why["weights"]
    assert why["denoiser"] == "same inputs"


# ------------------------------------------------------------------------------------------------- the store


def filled(folder: Path, advance: Advance) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "a").write_text("content" * 50_000)


def run(root: Path, inputs: dict[str, Any], make: Any = filled, **options: Any) -> tuple[StageResult, StageStore]:
    with StageStore(root, SilentProgress()) as store:
        return store.run("stage", inputs, make, **options), store


def test_a_result_is_made_once(tmp_path: Path) -> None:
    first, store = run(tmp_path, {"a": 1})
    assert store.runs[0].why == "first run"
    again, store = run(tmp_path, {"a": 1}, make=None)
    assert again == first
    assert store.runs[0].reused
    assert again.path("sub/a").read_text().startswith("contentcontent")
    other, store = run(tmp_path, {"a": 1, "b": [2, 3]})
    assert other.key != first.key
    assert store.runs[0].why == "changed: b"


@pytest.mark.parametrize("damage", ["sub/a", RECORD])
def test_a_damaged_result_is_made_again(tmp_path: Path, damage: str) -> None:
    result, _ = run(tmp_path, {"a": 1})
    content = result.path(damage).read_bytes()
    result.path(damage).write_bytes(content[:-1] + b"?")
    again, store = run(tmp_path, {"a": 1})
    assert (store.runs[0].reused, store.runs[0].why) == (False, "its files were damaged")
    assert again.path("sub/a").read_text().startswith("contentcontent")


def test_an_error_leaves_nothing_unless_the_stage_can_go_on(tmp_path: Path) -> None:
    def breaks(folder: Path, advance: Advance) -> None:
        assert not (folder / "half").exists()
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    for resumes in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {"a": 1}, breaks, resumes=resumes)
        left = [p.name for p in (tmp_path / "stage").rglob("*") if not p.name.endswith(".lock")]
        assert ("half" in left) is resumes
    _, store = run(tmp_path, {"a": 1}, resumes=True)
    assert store.runs[0].why == "first run; goes on from an interrupted run"


def test_the_least_recently_used_results_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    results = [run(tmp_path, {"a": i})[0] for i in range(3)]
    for age, result in enumerate(results):
        os.utime(result.path(RECORD), (1e9 - age, 1e9 - age))
    store = StageStore(tmp_path, SilentProgress())
    size = store.entries()[0].size
    with KeyLock(results[2].folder.with_name(f"{results[2].key}.lock")) as lock:
        lock.take(None, shared=True)
        assert store.trim(size) == 2 * size
    assert [r.folder.is_dir() for r in results] == [False, False, True]
    assert "0.0 MB removed" not in list_stages(tmp_path, 0.0)
    assert store.entries() == []


def test_two_processes_make_a_result_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from quantempo.progress import SilentProgress\n"
        "from quantempo.stages.store import StageStore\n"
        "def make(folder, advance):\n"
        "    (folder / 'a').write_text('x'); time.sleep(0.5)\n"
        "with StageStore(Path(sys.argv[1]), SilentProgress()) as store:\n"
        "    store.run('stage', {'a': 1}, make); print(store.runs[0].reused)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sorted(process.communicate()[0].strip() for process in started) == ["False", "True"]


def test_where_results_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTEMPO_WORK", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("QUANTEMPO_WORK")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_root() == Path("/cache/quantempo/stages")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_root() == Path("/home/somebody/.cache/quantempo/stages")


def test_the_limit_is_a_number_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTEMPO_CACHE_GB", raising=False)
    assert cache_limit() == 20e9
    monkeypatch.setenv("QUANTEMPO_CACHE_GB", "0.5")
    assert cache_limit() == 5e8
    for word in ("much", "-1", "nan"):
        monkeypatch.setenv("QUANTEMPO_CACHE_GB", word)
        with pytest.raises(RequestError, match="QUANTEMPO_CACHE_GB"):
            cache_limit()


@pytest.mark.parametrize("words", ["uniform:0.5", "normal:0.5", "density:0.5", "single"])
def test_a_selection_looks_at_fewer_calls(compile_tiny: Any, tmp_path: Path, words: str) -> None:
    from quantempo.calib.collect import StatsCollector

    log = Log()
    compile_tiny(tmp_path / "bundle", selection=words, samples=16, groups="single", progress=log.progress)
    assert log.ran() >= {"calibrate", "scales", "weights"}
    # What a part of the calls shows is no range of all of them, so attention's ranges are scanned.
    assert "ranges" in log.ran() | log.reused()
    statistics = StatsCollector.load(tmp_path / "bundle" / "report" / "statistics.safetensors")
    visits = sum(statistics.samples().values()) / 4
    assert visits == (4 if words == "single" else 8), "of 4 batches with 4 calls each"


def test_two_schedulers_of_one_configuration_have_programs_of_their_own(tmp_path: Path) -> None:
    """A configuration that was written for one scheduler serves another, and its digest is then the same."""
    from quantempo.export.sampler import load_scheduler, scheduler_identity
    from quantempo.stages.model import _programs

    stock = json.loads((tiny_models.unet() / "scheduler" / "scheduler_config.json").read_text())
    schedulers = []
    for name in ("DDIMScheduler", "EulerAncestralDiscreteScheduler"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "scheduler_config.json").write_text(json.dumps({**stock, "_class_name": name}))
        schedulers.append(load_scheduler(folder))
    identities = [scheduler_identity(scheduler) for scheduler in schedulers]
    assert identities[0][1] == identities[1][1]
    with StageStore(tmp_path / "work", SilentProgress()) as store:
        for scheduler, (name, identity) in zip(schedulers, identities, strict=True):
            traced = _programs(store, scheduler, (name, identity), [2], None)
            assert json.loads(traced.path("0002.json").read_text())["scheduler"] == name
