from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantempo.calib.collect import StatsCollector
from quantempo.calib.trajectories import ProgramChoice, TrajectoryBatch
from quantempo.stages.mining import SECOND_ROUND, hard_batches

BATCHES = (
    TrajectoryBatch(0, (100, 101, 102), (1, 2, 3), 1.5, ProgramChoice(4)),
    TrajectoryBatch(1, (103, 104, 105), (4, 5, 6), 4.0, ProgramChoice(4)),
    TrajectoryBatch(2, (106,), (7,), 1.5, ProgramChoice(4)),
)


def test_the_conditions_with_the_largest_errors_come_again_with_fresh_noise() -> None:
    errors = [(0.1, 0.9, 0.2), (0.8, 0.0, 0.7), (0.3,)]
    first, second = hard_batches(BATCHES, errors, 3)
    assert first == replace(BATCHES[0], index=0, seeds=(101 + SECOND_ROUND,), labels=(2,))
    assert second == replace(BATCHES[1], index=1, seeds=(103 + SECOND_ROUND, 105 + SECOND_ROUND), labels=(4, 6))
    assert sum(len(b.seeds) for b in hard_batches(BATCHES, errors, 100)) == 7
    assert hard_batches(BATCHES, [(0.0,) * 3, (0.0,) * 3, (0.0,)], 1)[0].labels == (1,), "ties go to the first"


def test_a_second_round_adds_the_hardest_samples(compile_tiny: Any, tmp_path: Path) -> None:
    plain = compile_tiny(tmp_path / "plain")
    mined = compile_tiny(tmp_path / "mined", hard_cases=3)
    stages = [run.stage for run in mined.stages]
    assert stages.index("mine") < len(stages) - 3
    assert stages.count("calibrate") == stages.count("scales") == stages.count("weights") == 2
    first, both = (
        StatsCollector.load(tmp_path / name / "report" / "statistics.safetensors") for name in ("plain", "mined")
    )
    assert set(both.samples().values()) == {n + 3 for n in first.samples().values()}
    tables = [made.bundle.path("tables.safetensors").read_bytes() for made in (plain, mined)]
    assert tables[0] != tables[1]
    again = compile_tiny(tmp_path / "again", hard_cases=3)
    assert all(run.reused for run in again.stages)
    assert again.bundle.digest == mined.bundle.digest
    for cell, more in zip(first.stats().values(), both.stats().values(), strict=True):
        assert more.low <= cell.low
        assert more.high >= cell.high
        assert np.sum(more.counts) > np.sum(cell.counts)
