"""Which trajectories calibration runs, and the loop over them; the model's side is injected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector, read_note
from quantempo.contracts.codec import canonical_json, digest
from quantempo.errors import CalibrationError, RequestError

FIRST_SEED = 1_000_000
"""Calibration seeds start here, so that they never meet the small ones that people evaluate with."""


@dataclass(frozen=True)
class ProgramChoice:
    """One way to sample.

    Args:
        steps: number of steps.
        scheduler: class name; empty for the model's own.
    """

    steps: int = 20
    scheduler: str = ""

    @property
    def id(self) -> str:
        """Name for people and logs, e.g. `DDIMScheduler/20` or `20`."""
        return f"{self.scheduler}/{self.steps}" if self.scheduler else str(self.steps)


@dataclass(frozen=True)
class CalibrationSet:
    """What is run.  The defaults suit a small class-conditional model; each sample is one whole trajectory.

    Args:
        samples: number of trajectories.
        batch: trajectories that run together; the last batch may be smaller.
        seeds: one per sample; empty for `FIRST_SEED`, `FIRST_SEED + 1`, ….
        labels: one condition per sample (class label, or index of a prompt); empty to deal out all classes evenly.
        guidance: guidance scales, dealt out evenly over the batches; see `guidance_range`.
        programs: schedulers and numbers of steps, dealt out evenly over the batches.
    """

    samples: int = 64
    batch: int = 16
    seeds: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    guidance: tuple[float, ...] = (1.0, 1.5, 4.0, 7.0)
    programs: tuple[ProgramChoice, ...] = (ProgramChoice(),)


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories that run together.

    Args:
        index: place in the plan.
        seeds: one per row.
        labels: one per row; empty for a model without conditions.
        guidance: guidance scale of all rows.
        program: how to sample.
    """

    index: int
    seeds: tuple[int, ...]
    labels: tuple[int, ...]
    guidance: float
    program: ProgramChoice


def guidance_range(text: str, count: int = 4) -> tuple[float, ...]:
    """Guidance scales from a user's words: `4`, `1.5,4`, or `1.5..7` for `count` evenly spaced ones, ends included.

    Raises:
        RequestError: not numbers, or a range that is upside down.
    """
    try:
        if ".." in text:
            low, high = (float(part) for part in text.split("..", 1))
            if low > high:
                raise _bad("guidance", text, "the lower end first", "the range is upside down", f"{high:g}..{low:g}")
            values = tuple(low + (high - low) * i / max(1, count - 1) for i in range(count if high > low else 1))
        else:
            values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise _bad("guidance", text, "numbers", "a misspelling", "write 4, 1.5,4 or 1.5..7") from error
    return values


def plan_batches(declared: CalibrationSet, *, classes: int | None = None) -> tuple[TrajectoryBatch, ...]:
    """The batches, always the same for the same declaration.

    Guidance scales and programs are dealt out in turns, such that each one gets its share of the batches (within one)
    and, over `guidance * programs` batches, every pair occurs once.  Labels that are not given are dealt out evenly in
    a fixed shuffled order, so that they do not go in step with guidance or program.

    Args:
        declared: what the user asked for.
        classes: number of class labels of the model; `None` where it has none or the labels are given.

    Raises:
        RequestError: nothing to run, fewer seeds or labels than samples, or fewer batches than guidance scales or
            programs.
    """
    check_set(declared, classes)
    seeds = declared.seeds[: declared.samples] or tuple(range(FIRST_SEED, FIRST_SEED + declared.samples))
    labels = declared.labels[: declared.samples]
    if not labels and classes is not None:
        order = np.random.Generator(np.random.Philox(0)).permutation(declared.samples)
        labels = tuple(int(i) % classes for i in order)
    cycle = math.lcm(len(declared.guidance), len(declared.programs))
    batches = []
    for index, start in enumerate(range(0, declared.samples, declared.batch)):
        rows = slice(start, start + declared.batch)
        guidance = declared.guidance[(index + index // cycle) % len(declared.guidance)]
        program = declared.programs[index % len(declared.programs)]
        batches.append(TrajectoryBatch(index, seeds[rows], labels[rows], float(guidance), program))
    return tuple(batches)


def check_set(declared: CalibrationSet, classes: int | None = None) -> None:
    """Refuse a calibration set that cannot be run as asked.

    Raises:
        RequestError: see `plan_batches`.
    """
    where = "calibration set"
    numbers = [("samples", declared.samples), ("batch", declared.batch)]
    for name, number in numbers + [("steps", program.steps) for program in declared.programs]:
        if number < 1:
            raise _bad(f"{where}, {name}", str(number), "at least 1", "the set is empty", f"ask for more {name}")
    if not all(math.isfinite(value) for value in declared.guidance):
        raise _bad(f"{where}, guidance", str(declared.guidance), "finite numbers", "a misspelling", "correct it")
    batches = -(-declared.samples // declared.batch)
    _check_choices(f"{where}, guidance", "guidance scales", len(declared.guidance), batches, declared.batch)
    _check_choices(f"{where}, programs", "programs", len(declared.programs), batches, declared.batch)
    for name, given in (("seeds", declared.seeds), ("labels", declared.labels)):
        if given and len(given) < declared.samples:
            raise _bad(
                f"{where}, {name}", f"{len(given)} {name} for {declared.samples} samples",
                f"{declared.samples} {name}", "the list is shorter than the number of samples that was asked for",
                f"ask for {len(given)} samples, or give more {name}",
            )  # fmt: skip
    if len(set(declared.seeds)) < len(declared.seeds):
        raise _bad(f"{where}, seeds", "a repeated seed", "distinct seeds", "a slip", "give each sample its own seed")
    wrong = [label for label in declared.labels if classes is not None and not 0 <= label < classes]
    if wrong and classes is not None:
        raise _bad(
            f"{where}, labels", str(wrong[0]), f"0 to {classes - 1}", "the model has no such class",
            f"use {min(max(wrong[0], 0), classes - 1)}, the nearest legal label",
        )  # fmt: skip


def _check_choices(where: str, name: str, choices: int, batches: int, batch: int) -> None:
    """Each choice needs a batch of its own, or it would silently not be calibrated."""
    if choices == 0:
        raise _bad(where, f"no {name}", "at least one", "the set is empty", f"name one of the {name}")
    if choices > batches:
        raise _bad(
            where, f"{choices} {name} for {batches} batches", "at least one batch for each",
            "too few samples, or too many in a batch", f"ask for {choices * batch} samples or smaller batches",
        )  # fmt: skip


def _bad(where: str, found: str, wanted: str, cause: str, remedy: str) -> RequestError:
    return RequestError(where, found=found, wanted=wanted, cause=cause, remedy=remedy)


class Observer(Protocol):
    """Receives the tapped tensors of one denoiser call."""

    def __call__(self, key: float, taps: Mapping[str, NDArray[Any]], branch: str = "") -> None:
        """Add a call with the given group key; see `StatsCollector.observe`."""


RunBatch = Callable[[TrajectoryBatch, Observer], None]
Progress = Callable[[int, int], None]


class Companion(Protocol):
    """Statistics beside the collector's, such as `quantempo.calib.gram.GramCollector`."""

    def save(self, path: Path) -> None:
        """Write everything, in one step."""

    def restore(self, path: Path) -> None:
        """Become what was saved."""


@dataclass(frozen=True)
class Failure:
    """A batch that could not be run: its index and the reason."""

    batch: int
    samples: int
    reason: str


def run_calibration(
    batches: Sequence[TrajectoryBatch],
    run_batch: RunBatch,
    collector: StatsCollector,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    companion: Companion | None = None,
) -> StatsCollector:
    """Run all batches, and go on where an interrupted run stopped.

    After each batch the statistics so far are written to `checkpoint`, in one step, with a digest of what is being
    run.  A later call with the same batches and tensors skips what is done and ends with the same bytes as a run that
    was never interrupted.

    A batch that fails is left out and counted, and the others still run; with the checkpoint a later call runs the
    missing ones alone.  Nothing is made up: fewer samples than asked for are an error at the end.

    Args:
        batches: from `plan_batches`.
        run_batch: runs one batch and hands every denoiser call to the observer.
        collector: a fresh one; its graph and tensors are what is observed.
        checkpoint: file to write and resume from; its folder must exist.
        progress: told the number of batches done and in all, also before the first one.
        companion: what else `run_batch` fills; it is checkpointed beside the statistics.

    Returns:
        The collector with all batches in it: `collector` itself, or the one that the checkpoint held.

    Raises:
        CalibrationError: a batch observed nothing, some failed, or the checkpoint belongs to another calibration.
        NonFiniteActivation: see `StatsCollector.observe`, where the first batch fails; what ran before stays in the
            checkpoint.
    """
    run = _Calibration(batches, run_batch, collector, checkpoint, companion)
    if progress is not None:
        progress(len(run.done), len(batches))
    failures: list[Failure] = []
    for batch in [b for b in batches if b.index not in run.done]:
        try:
            run.batch(batch)
        except Exception as error:
            if checkpoint is None or not run.done:
                raise
            failures.append(Failure(batch.index, len(batch.seeds), _first_line(error)))
            run.restore()
        else:
            run.save(batch)
        if progress is not None:
            progress(len(run.done) + len(failures), len(batches))
    if failures:
        asked, failed = sum(len(b.seeds) for b in batches), sum(f.samples for f in failures)
        raise CalibrationError(
            "calibration", found=f"{asked - failed} of {asked} samples; {failed} in {len(failures)} batches failed",
            wanted="all that were asked for", cause=f"batch {failures[0].batch}: {failures[0].reason}",
            remedy="remove the cause and run the same command again: the samples that succeeded are kept",
        )
    return run.collector


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


class _Calibration:
    """The statistics so far, and the batches that are in them."""

    def __init__(
        self, batches: Sequence[TrajectoryBatch], run_batch: RunBatch, collector: StatsCollector,
        checkpoint: Path | None, companion: Companion | None,
    ) -> None:
        shown = {"graph": collector.graph, "tensors": collector.tensors, "by_channel": sorted(collector.by_channel)}
        self._identity = digest(canonical_json({"batches": batches, **shown}))
        self._run_batch, self._checkpoint, self._companion = run_batch, checkpoint, companion
        self.collector = collector
        self.done: list[int] = []
        if checkpoint is not None and checkpoint.exists():
            self.restore()

    def restore(self) -> None:
        """What the checkpoint holds."""
        assert self._checkpoint is not None
        self.done = _batches_done(self._checkpoint, self._identity)
        self.collector = StatsCollector.load(self._checkpoint)
        if self._companion is not None:
            self._companion.restore(self._aside(len(self.done)))

    def batch(self, batch: TrajectoryBatch) -> None:
        """Run one batch."""
        calls = 0

        def observe(key: float, taps: Mapping[str, NDArray[Any]], branch: str = "") -> None:
            nonlocal calls
            calls += 1
            self.collector.observe(key, taps, seeds=batch.seeds, branch=branch)

        self._run_batch(batch, observe)
        if not calls:
            raise CalibrationError(
                f"calibration, batch {batch.index} ({batch.program.id} steps)",
                found="no observed call",
                wanted="one per denoiser call",
                cause=f"the program never calls graph {self.collector.graph!r}",
                remedy="calibrate with a program that calls it",
            )

    def save(self, batch: TrajectoryBatch) -> None:
        """Count a batch as done; what cannot be written is the disk's failure, not the batch's."""
        self.done.append(batch.index)
        if self._checkpoint is not None:
            # First the companion, under a name of its own: whenever the process dies, the pair fits together.
            if self._companion is not None:
                self._companion.save(self._aside(len(self.done)))
            self.collector.save(self._checkpoint, note={"calibration": self._identity, "done": self.done})
            self._aside(len(self.done) - 1).unlink(missing_ok=True)

    def _aside(self, done: int) -> Path:
        assert self._checkpoint is not None
        return companion_file(self._checkpoint, done)


def companion_file(checkpoint: Path, done: int) -> Path:
    """Where the companion of a checkpoint lies after so many batches."""
    return checkpoint.with_name(f"{checkpoint.name}.{done}")


def _batches_done(checkpoint: Path, identity: str) -> list[int]:
    note = read_note(checkpoint)
    if not isinstance(note, dict) or note.get("calibration") != identity:
        raise CalibrationError(
            f"calibration checkpoint {checkpoint}",
            found="statistics of another calibration",
            wanted="the same samples, programs, guidance and tensors",
            cause="the calibration set or the plan changed since the run was interrupted",
            remedy="delete the file to calibrate from the start, or restore the former settings",
        )
    return [int(index) for index in note["done"]]
