from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantempo.calib.collect import StatsCollector
from quantempo.calib.gram import GramCollector
from quantempo.calib.trajectories import (
    FIRST_SEED,
    CalibrationSet,
    Observer,
    ProgramChoice,
    RunBatch,
    TrajectoryBatch,
    guidance_range,
    plan_batches,
    run_calibration,
)  # fmt: skip
from quantempo.errors import CalibrationError, NonFiniteActivation, RequestError

SMALL = CalibrationSet(samples=10, batch=2, guidance=(1.0, 4.0), programs=(ProgramChoice(2), ProgramChoice(3)))


def test_the_plan_is_always_the_same_and_uses_every_seed_once() -> None:
    batches = plan_batches(CalibrationSet(), classes=10)
    assert batches == plan_batches(CalibrationSet(), classes=10)
    assert [s for b in batches for s in b.seeds] == list(range(FIRST_SEED, FIRST_SEED + 64))
    assert [b.index for b in batches] == list(range(len(batches)))
    assert all(len(b.seeds) == len(b.labels) == 16 for b in batches)


def test_labels_are_dealt_out_evenly() -> None:
    labels = Counter(label for b in plan_batches(CalibrationSet(samples=100), classes=10) for label in b.labels)
    assert labels == dict.fromkeys(range(10), 10)


def test_guidance_and_programs_get_their_share_and_meet_in_every_pair() -> None:
    declared = CalibrationSet(
        samples=32, batch=1, guidance=(1.0, 2.0, 4.0, 7.0), programs=(ProgramChoice(10), ProgramChoice(20, "DDIM"))
    )
    batches = plan_batches(declared)
    assert set(Counter(b.guidance for b in batches).values()) == {8}
    assert set(Counter(b.program for b in batches).values()) == {16}
    assert set(Counter((b.guidance, b.program.id) for b in batches).values()) == {4}


@pytest.mark.parametrize("samples", [7, 9, 13])
def test_shares_are_even_within_one_batch(samples: int) -> None:
    declared = CalibrationSet(samples=samples, batch=1, guidance=(1.0, 2.0, 3.0), programs=(ProgramChoice(4),) * 1)
    shares = Counter(b.guidance for b in plan_batches(declared)).values()
    assert max(shares) - min(shares) <= 1


def test_the_last_batch_may_be_smaller_and_lists_of_the_user_are_kept() -> None:
    declared = CalibrationSet(samples=5, batch=2, seeds=(9, 8, 7, 6, 5), labels=(1, 2, 3, 4, 0), guidance=(1.5,))
    batches = plan_batches(declared, classes=5)
    assert [b.seeds for b in batches] == [(9, 8), (7, 6), (5,)]
    assert [b.labels for b in batches] == [(1, 2), (3, 4), (0,)]
    assert plan_batches(replace(declared, labels=()))[0].labels == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "the set is empty"),
        ({"batch": 0}, "batch: found 0"),
        ({"guidance": ()}, "no guidance scales"),
        ({"programs": ()}, "no programs"),
        ({"programs": (ProgramChoice(0),)}, "steps: found 0"),
        ({"guidance": (float("nan"),)}, "finite numbers"),
        ({"guidance": tuple(map(float, range(9)))}, "9 guidance scales for 5 batches"),
        ({"seeds": (1, 2, 3)}, "3 seeds for 10 samples"),
        ({"labels": (1,) * 9}, "9 labels for 10 samples"),
        ({"labels": (1,) * 9 + (12,)}, "use 9, the nearest legal label"),
        ({"labels": (1,) * 9 + (-3,)}, "use 0, the nearest legal label"),
        ({"seeds": (1,) * 10}, "a repeated seed"),
    ],
)
def test_a_set_that_cannot_be_run_as_asked_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        plan_batches(replace(SMALL, **changes), classes=10)  # type: ignore[arg-type]
    assert "Likely cause" in str(caught.value)
    assert "Next step" in str(caught.value)


def test_guidance_from_words() -> None:
    assert guidance_range("1.5..7.5", 4) == (1.5, 3.5, 5.5, 7.5)
    assert guidance_range("4") == (4.0,)
    assert guidance_range("3..3") == (3.0,)
    assert guidance_range("1,2.5") == (1.0, 2.5)
    with pytest.raises(RequestError, match=r"upside down[\s\S]*1.5..7"):
        guidance_range("7..1.5")
    with pytest.raises(RequestError, match="numbers"):
        guidance_range("high")


def _run(batch: TrajectoryBatch, observer: Observer) -> None:
    for step in range(batch.program.steps):
        rng = np.random.default_rng([step, *batch.seeds])
        observer(float(step), {"x": rng.standard_normal((len(batch.seeds), 4)).astype(np.float32) * (1 + step)})


def _fresh() -> StatsCollector:
    return StatsCollector("full", ["x"])


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    batches = plan_batches(SMALL)
    run_calibration(batches, _run, _fresh(), tmp_path / "whole")
    ran: list[int] = []

    def run_until_third(batch: TrajectoryBatch, observer: Observer) -> None:
        ran.append(batch.index)
        _run(batch, observer)
        if len(ran) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(batches, run_until_third, _fresh(), tmp_path / "parts")
    progress: list[tuple[int, int]] = []
    result = run_calibration(
        batches, run_until_third, _fresh(), tmp_path / "parts", lambda done, of: progress.append((done, of))
    )
    assert ran == [0, 1, 2, 2, 3, 4]
    assert progress == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert result.samples() == {0.0: 10, 1.0: 10, 2.0: 4}


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    batches = plan_batches(SMALL)
    first = run_calibration(batches, _run, _fresh(), tmp_path / "c")

    def never(batch: TrajectoryBatch, observer: Observer) -> None:
        raise AssertionError

    again = run_calibration(batches, never, _fresh(), tmp_path / "c")
    assert list(again.stats()) == list(first.stats())


def test_without_a_checkpoint_the_result_is_the_same(tmp_path: Path) -> None:
    batches = plan_batches(SMALL)
    result = run_calibration(batches, _run, _fresh())
    kept = run_calibration(batches, _run, _fresh(), tmp_path / "c")
    for a, b in zip(result.stats().values(), kept.stats().values(), strict=True):
        assert np.array_equal(a.counts, b.counts)
        assert a.total == b.total


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path: Path) -> None:
    run_calibration(plan_batches(SMALL), _run, _fresh(), tmp_path / "c")
    with pytest.raises(CalibrationError, match=r"statistics of another calibration[\s\S]*delete the file"):
        run_calibration(plan_batches(replace(SMALL, guidance=(2.0,))), _run, _fresh(), tmp_path / "c")


def test_a_batch_that_observes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"batch 0 \(2 steps\): found no observed call"):
        run_calibration(plan_batches(SMALL), lambda batch, observer: None, _fresh(), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def _breaking(bad: set[int]) -> RunBatch:
    def run(batch: TrajectoryBatch, observer: Observer) -> None:
        _run(batch, observer)
        if batch.index in bad:
            x = np.ones((2, 4), np.float32)
            x[1, 1] = np.inf
            observer(1.0, {"x": x})

    return run


def test_a_broken_sample_of_the_first_batch_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteActivation, match=f"'x' at timestep 1, seed {FIRST_SEED + 1}"):
        run_calibration(plan_batches(SMALL), _breaking({0}), _fresh(), tmp_path / "c")


def test_failed_samples_are_counted_and_the_others_are_kept(tmp_path: Path) -> None:
    batches = plan_batches(SMALL)
    shown: list[int] = []
    with pytest.raises(CalibrationError) as caught:
        run_calibration(batches, _breaking({2, 4}), _fresh(), tmp_path / "c", lambda done, total: shown.append(done))
    message = str(caught.value)
    assert "found 6 of 10 samples; 4 in 2 batches failed, wanted all that were asked for" in message
    assert f"batch 2: calibration, tensor 'x' at timestep 1, seed {FIRST_SEED + 5}: found infinity" in message
    assert "the samples that succeeded are kept" in message
    assert shown == [0, 1, 2, 3, 4, 5]
    assert StatsCollector.load(tmp_path / "c").samples()[0.0] == 6, "nothing of a failed batch is counted"
    ran: list[int] = []

    def mended(batch: TrajectoryBatch, observer: Observer) -> None:
        ran.append(batch.index)
        _run(batch, observer)

    found = run_calibration(batches, mended, _fresh(), tmp_path / "c")
    assert ran == [2, 4]
    whole = run_calibration(batches, _run, _fresh())
    for a, b in zip(found.stats().values(), whole.stats().values(), strict=True):
        assert (a.total, a.low, a.counts.tobytes()) == (b.total, b.low, b.counts.tobytes())


def test_the_companion_is_checkpointed_with_the_statistics(tmp_path: Path) -> None:
    batches = plan_batches(SMALL)

    def with_grams(grams: GramCollector, stop: int) -> RunBatch:
        def run(batch: TrajectoryBatch, observer: Observer) -> None:
            def both(key: float, taps: Any, branch: str = "") -> None:
                observer(key, taps, branch)
                grams.observe(key, taps)
                if batch.index == stop:
                    raise KeyboardInterrupt

            _run(batch, both)

        return run

    whole = GramCollector(["x"])
    run_calibration(batches, with_grams(whole, 9), _fresh(), tmp_path / "whole", companion=whole)
    for stop in (1, 3):
        half = GramCollector(["x"])
        with pytest.raises(KeyboardInterrupt):
            run_calibration(batches, with_grams(half, stop), _fresh(), tmp_path / "c", companion=half)
    rest = GramCollector(["x"])
    run_calibration(batches, with_grams(rest, 9), _fresh(), tmp_path / "c", companion=rest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.5", "whole", "whole.5"]
    assert (tmp_path / "c.5").read_bytes() == (tmp_path / "whole.5").read_bytes()
    assert (tmp_path / "c").read_bytes() == (tmp_path / "whole").read_bytes()
