"""The step program: a sampler written down as data.

A diffusers scheduler is linear in sample, prediction and noise.  Its loop is a list of calls of the denoiser, each
followed by operations on named *registers*, which are tensors of the state's shape.  `latents` is a register like any
other; `prediction` holds the denoiser's output after guidance.

Arithmetic is part of the contract, so that every runtime agrees bit for bit around the engine: registers are float32;
`lin` multiplies and adds in float64, in the written order, without contraction, and rounds once to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Union

from quantempo.errors import DataError

PROGRAM_VERSION = 1
LATENTS = "latents"
PREDICTION = "prediction"
FITTED_GUIDANCE = "fitted_guidance"
"""Among a program's options: the guidance scale that its cache plan was fitted at, for all samples."""
INDICATOR = "indicator"
"""The output of a probe graph; see `Decide`."""

Terms = tuple[tuple[str, float], ...]
"""A linear form: (register, coefficient) pairs, summed in this order.  Empty means zero."""


@dataclass(frozen=True)
class Lin:
    """`to = Σ coefficient · register`; the registers on the right are read before `to` is written."""

    kind: ClassVar[str] = "lin"
    to: str
    terms: Terms


@dataclass(frozen=True)
class Clamp:
    """`to = min(max(from, low), high)` in float32."""

    kind: ClassVar[str] = "clamp"
    to: str
    source: str
    low: float
    high: float


@dataclass(frozen=True)
class Noise:
    """`to` = a fresh standard normal tensor.  `draw` counts the draws of a run from 1; draw 0 is the initial noise."""

    kind: ClassVar[str] = "noise"
    to: str
    draw: int


@dataclass(frozen=True)
class Correct:
    """`to = gain[row] · source + bias[row]` per channel (axis 1), in float64, rounded once to float32.

    `gain` and `bias` name arrays of the bundle's vectors file, float32 of shape (rows, channels).  The source may be
    `prediction`, and so may the target: what follows in the call then reads the corrected prediction.
    """

    kind: ClassVar[str] = "correct"
    to: str
    source: str
    gain: str
    bias: str
    row: int


Operation = Union[Lin, Clamp, Noise, Correct]


@dataclass(frozen=True)
class Decide:
    """A choice at run time, for each row on its own, between refreshing the cached features and reusing them.

    The graph `probe` computes a cheap float32 tensor `indicator` for the rows.  Per row, in float64, with sums from the
    first element to the last: `change = Σ|indicator - reference| / Σ|reference|` and `estimate = polynomial(change)`
    (Horner's scheme), 0 where that is negative.  A row refreshes when it has no reference yet, when `change` is not
    finite, when the sum of estimates since its last refresh (with `accumulate`; else this estimate alone) is not below
    `threshold`, or after `max_consecutive` reuses in a row.  So a threshold of 0 always refreshes.

    TeaCache accumulates and looks at the previous call; first-block caching does neither.

    Args:
        probe: graph variant that computes `indicator`; the same in all calls of a program that decide.
        refresh: graph variant that runs for rows that refresh; the others run the call's `graph`.
        polynomial: coefficients, highest power first.
        reference: the row's indicator at the previous call that decided, or at its last refresh; the same in all calls
            of a program.  A call that does not decide forgets it when it writes features.
    """

    probe: str
    threshold: float
    refresh: str = "full"
    polynomial: tuple[float, ...] = (1.0, 0.0)
    accumulate: bool = True
    reference: Literal["previous_call", "last_refresh"] = "previous_call"
    max_consecutive: int = 1000


@dataclass(frozen=True)
class Call:
    """One evaluation of the denoiser and what follows it.

    Args:
        timestep: the value fed to the graph's timestep input, in the model's unit.
        inputs: for each graph input that is fed from registers, its linear form (usually `sample`).
        update: operations that run after guidance, in order.
        step: the index of the user's step; a two-call method has two calls with one step.
        group_key: what selects the scale group; `None` means the timestep.
        graph: which graph variant runs.
        vectors: for each graph input that takes a vector per call (corrections of cached features), the row of the
            array of the same name in the bundle's vectors file.
        decide: where the choice between `graph` and a refreshing variant falls at run time.
    """

    timestep: float
    inputs: Mapping[str, Terms]
    update: tuple[Operation, ...]
    step: int
    group_key: float | None = None
    graph: str = "full"
    vectors: Mapping[str, int] = field(default_factory=dict)
    decide: Decide | None = None

    @property
    def key(self) -> float:
        """The group key."""
        return self.timestep if self.group_key is None else self.group_key


@dataclass(frozen=True)
class State:
    """A tensor that the loop evolves: its initial value is `initial_scale` times a standard normal."""

    name: str = LATENTS
    initial_scale: float = 1.0


@dataclass(frozen=True)
class StepProgram:
    """A whole sampling loop for one scheduler configuration and step count.

    Args:
        scheduler: the class that was traced.
        steps: the user's number of steps.
        calls: in order.
        state: the tensors that exist before the first call; further registers come into being by being written.
        eta: the stochasticity that it was traced with, for schedulers that take one.
        options: further numbers that it was traced with, and `FITTED_GUIDANCE`.
    """

    scheduler: str
    steps: int
    calls: tuple[Call, ...]
    state: tuple[State, ...] = (State(),)
    eta: float | None = None
    version: int = PROGRAM_VERSION
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def noise_draws(self) -> int:
        """How many noise tensors a run draws, the initial one apart."""
        return sum(isinstance(op, Noise) for call in self.calls for op in call.update)

    def registers(self) -> tuple[str, ...]:
        """All registers in order of appearance, state first; `prediction` apart."""
        names = dict.fromkeys(s.name for s in self.state)
        for call in self.calls:
            names.update(dict.fromkeys(op.to for op in call.update if op.to != PREDICTION))
        return tuple(names)


def check_program(program: StepProgram, where: str) -> None:
    """Refuse a program that reads a register before it is written, or that is of another version.

    Raises:
        DataError: naming call and register.
    """

    def refuse(place: str, found: str, wanted: str) -> DataError:
        return DataError(
            f"{where}: {place}", found=found, wanted=wanted, cause="the program is damaged or of another version",
            remedy="compile the bundle again",
        )

    if program.version != PROGRAM_VERSION:
        raise refuse("version", str(program.version), str(PROGRAM_VERSION))
    if not program.calls:
        raise refuse("calls", "none", "at least one")
    known = {s.name for s in program.state}
    for index, call in enumerate(program.calls):
        reads = [(f"input {name!r}", register) for name, terms in call.inputs.items() for register, _ in terms]
        _check_reads(refuse, index, reads, known)
        available = known | {PREDICTION}
        for op in call.update:
            _check_reads(refuse, index, [(op.kind, r) for r in sources_of(op)], available)
            available.add(op.to)
        known = available - {PREDICTION}
        _check_rows(refuse, index, call)
    if LATENTS not in known:
        raise refuse("state", "no register 'latents'", "one, as the result")
    _check_decisions(refuse, program)


def sources_of(op: Operation) -> tuple[str, ...]:
    """The registers that an operation reads."""
    if isinstance(op, Lin):
        return tuple(register for register, _ in op.terms)
    return () if isinstance(op, Noise) else (op.source,)


def _check_reads(
    refuse: Callable[[str, str, str], DataError], index: int, reads: list[tuple[str, str]], known: set[str]
) -> None:
    for what, register in reads:
        if register not in known:
            raise refuse(f"call {index}", f"{what} reads register {register!r}, which nothing wrote", "a written one")


def _check_rows(refuse: Callable[[str, str, str], DataError], index: int, call: Call) -> None:
    rows = [(f"vector {name!r}", row) for name, row in call.vectors.items()]
    rows += [("correct", op.row) for op in call.update if isinstance(op, Correct)]
    for what, row in rows:
        if row < 0:
            raise refuse(f"call {index}", f"{what} of row {row}", "a row of at least 0")


def _check_decisions(refuse: Callable[[str, str, str], DataError], program: StepProgram) -> None:
    first: Decide | None = None
    for index, call in enumerate(program.calls):
        decide = call.decide
        if decide is None:
            continue
        first = first or decide
        place = f"call {index}: decide"
        if not (math.isfinite(decide.threshold) and decide.threshold >= 0):
            raise refuse(f"{place}.threshold", f"{decide.threshold}", "a finite number of at least 0")
        if decide.max_consecutive < 1:
            raise refuse(f"{place}.max_consecutive", f"{decide.max_consecutive}", "at least 1")
        if not decide.polynomial or not all(math.isfinite(c) for c in decide.polynomial):
            raise refuse(f"{place}.polynomial", f"{list(decide.polynomial)}", "at least one coefficient, all finite")
        if (decide.probe, decide.reference) != (first.probe, first.reference):
            found = f"probe {decide.probe!r} with reference {decide.reference!r}"
            raise refuse(place, found, f"{first.probe!r} with {first.reference!r}, as in the calls before")
