"""A compile that is interrupted goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from quantempo.calib.trajectories import FIRST_SEED
from quantempo.contracts.codec import canonical_json
from quantempo.errors import CalibrationError, DiskFull
from quantempo.pipeline import compile_model
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, file_digest, read_bundle
from quantempo.stages import store
from quantempo.stages.store import default_root

TRACES = ("sampler", "denoiser", "decoder", "plan")
RECIPE = Recipe(samples=16, batch=4, steps=(4,), guidance=(1.5,), max_steps=6, threads=1)


def tree(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): file_digest(p) for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> OpenBundle:
    """The bundle that an undisturbed compile makes."""
    return compile_model(tiny_models.dit_pipeline(), tmp_path_factory.mktemp("whole") / "b", RECIPE, guard="off").bundle


@pytest.fixture
def work(whole: OpenBundle, tmp_path: Path) -> Path:
    """A store with the traces alone."""
    for stage in TRACES:
        shutil.copytree(default_root() / stage, tmp_path / "work" / stage)
    return tmp_path / "work"


def resume(out: Path, work: Path) -> Any:
    return compile_model(tiny_models.dit_pipeline(), out, RECIPE, work=work, overwrite=True, guard="off")


def kill_at(out: Path, work: Path, stage: str, done: int = 0) -> None:
    """Start a compile in a process of its own and kill it when its log says that a stage has come so far."""
    recipe = work.parent / "recipe.json"
    recipe.write_text(canonical_json(RECIPE))
    words = [
        sys.executable, "-m", "quantempo.cli", "compile", tiny_models.dit_pipeline(), "-o", out, "--recipe", recipe,
        "--work", work, "--overwrite", "--guard", "off", "--log", "json",
    ]
    environment = {**os.environ, "QUANTEMPO_PROGRESS_SECONDS": "0"}
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        event = json.loads(line)
        if event.get("stage") == stage and (event["event"] == "start" or event.get("done", -1) >= done > 0):
            if event["event"] == "start" and done:
                continue
            process.kill()
            break
    else:
        raise AssertionError("".join(seen))
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize(("stage", "done"), [("calibrate", 2), ("write", 0)])
def test_a_killed_compile_goes_on_to_the_same_bytes(
    whole: OpenBundle, work: Path, tmp_path: Path, stage: str, done: int
) -> None:
    out = tmp_path / "place" / "bundle"
    shutil.copytree(whole.root / "reference", out)  # an older bundle
    before = tree(out)
    kill_at(out, work, stage, done)
    read_bundle(out)
    assert tree(out) == before
    made = resume(out, work)
    if stage == "calibrate":
        why = next(run.why for run in made.stages if run.stage == "calibrate")
        assert why.endswith("goes on from an interrupted run")
    assert tree(out) == tree(whole.root)
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    assert not list(work.rglob("*.partial"))


@pytest.mark.parametrize("at", ["before the files are sealed", "after the checkpoint is gone"])
def test_an_interruption_after_the_last_batch_costs_no_byte(
    whole: OpenBundle, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The last checkpoint's matrices become the result by renaming; both sides of that are safe."""
    seal, glob = store.seal, Path.glob

    def sealed(folder: Path, stage: str, inputs: Any) -> None:
        if stage == "calibrate":
            raise KeyboardInterrupt
        seal(folder, stage, inputs)

    def listed(path: Path, pattern: str) -> Any:
        if pattern == "checkpoint*":
            raise KeyboardInterrupt
        return glob(path, pattern)

    with monkeypatch.context() as patched:
        if at.startswith("before"):
            patched.setattr(Path, "glob", listed)
        else:
            patched.setattr(store, "seal", sealed)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "bundle", work)
    made = resume(tmp_path / "bundle", work)
    assert tree(made.bundle.root) == tree(whole.root)
    assert not list((work / "calibrate").rglob("*.partial"))


def test_batches_before_an_interruption_are_not_run_again(
    whole: OpenBundle, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantempo.runtime.session import Session

    sample, ran = Session.sample, []

    def interrupted(self: Session, *given: Any, **named: Any) -> Any:
        if given[0].seed[0] >= FIRST_SEED:  # the range scan samples too, with seeds of its own
            ran.append(given[0].seed[0])
        if len(ran) == 3:
            raise KeyboardInterrupt
        return sample(self, *given, **named)

    monkeypatch.setattr(Session, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "b", work)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["work"]
    resume(tmp_path / "b", work)
    assert len(ran) == 5
    assert ran[2] == ran[3], "the interrupted batch runs again, the two before it do not"
    assert tree(tmp_path / "b") == tree(whole.root)


def test_failed_samples_are_reported_and_run_again_alone(
    whole: OpenBundle, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantempo.runtime.session import Session

    sample, count = Session.sample, [0]

    def failing(self: Session, *given: Any, **named: Any) -> Any:
        count[0] += given[0].seed[0] >= FIRST_SEED
        if count[0] == 4:
            raise MemoryError("no room for activations")
        return sample(self, *given, **named)

    monkeypatch.setattr(Session, "sample", failing)
    with pytest.raises(CalibrationError, match=r"found 12 of 16 samples; 4 in 1 batches failed[\s\S]*no room for act"):
        resume(tmp_path / "b", work)
    assert not (tmp_path / "b").exists()
    resume(tmp_path / "b", work)
    assert count[0] == 5
    assert tree(tmp_path / "b") == tree(whole.root)


@pytest.fixture
def no_room() -> Iterator[Any]:
    """Files above a size cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [2_000, 60_000, 120_000])
def test_a_full_disk_leaves_the_older_bundle_and_the_next_run_goes_on(
    whole: OpenBundle, work: Path, tmp_path: Path, no_room: Any, size: int
) -> None:
    out = tmp_path / "place" / "bundle"
    shutil.copytree(whole.root / "reference", out)
    before = tree(out)
    no_room(size)
    with pytest.raises(DiskFull, match=r"(?s)room for the files.*run the same command again"):
        resume(out, work)
    no_room(resource.RLIM_INFINITY)
    assert tree(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    resume(out, work)
    assert tree(out) == tree(whole.root)


# ------------------------------------------------------------------------------------------------- the user's own loop


class Loop:
    """Two calls per batch, at timesteps of its own."""

    def __init__(self, key: str = "") -> None:
        self.cache_key = key
        self.batches = 0

    def __call__(self, denoise: Any, batch: Any) -> None:
        self.batches += 1
        rng = np.random.default_rng(batch.seeds[0])
        sample = rng.standard_normal((len(batch.seeds), 4, 8, 8)).astype(np.float32)
        for timestep in (800.0, 300.0):
            prediction = denoise(sample, timestep, class_labels=np.array(batch.labels))
            assert prediction.shape == sample.shape
            sample = sample - 0.5 * prediction


def test_a_loop_of_the_users_own_calibrates(tmp_path: Path) -> None:
    def compiled(name: str, loop: Loop) -> Any:
        return compile_model(tiny_models.dit_pipeline(), tmp_path / name, RECIPE, loop=loop, guard="off")

    first = Loop("mine, version 1")
    made = compiled("a", first)
    assert first.batches == 4
    partition = made.bundle.manifest.partition
    assert (partition.low, partition.high) == (300.0, 800.0)
    again, anonymous = Loop("mine, version 1"), Loop()
    assert compiled("b", again).bundle.digest == made.bundle.digest
    assert again.batches == 0
    compiled("c", anonymous)
    compiled("d", anonymous)
    assert anonymous.batches == 8, "a loop without a name is never taken for the same"
