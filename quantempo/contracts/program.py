"""The step program: a sampler written down as data.

A diffusers scheduler is linear in sample, prediction and noise.  Its loop is a list of calls of the denoiser, each
followed by operations on named *registers*, which are tensors of the state's shape.  `latents` is a register like any
other; `prediction` holds the denoiser's output after guidance.

Arithmetic is part of the contract, so that every runtime agrees bit for bit around the engine: registers are float32;
`lin` multiplies and adds in float64, in the written order, without contraction, and rounds once to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Union

from quantempo.errors import DataError

PROGRAM_VERSION = 1
LATENTS = "latents"
PREDICTION = "prediction"

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


Operation = Union[Lin, Clamp, Noise]


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
    """

    timestep: float
    inputs: Mapping[str, Terms]
    update: tuple[Operation, ...]
    step: int
    group_key: float | None = None
    graph: str = "full"

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
            names.update(dict.fromkeys(op.to for op in call.update))
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
            sources = [r for r, _ in op.terms] if isinstance(op, Lin) else [op.source] if isinstance(op, Clamp) else []
            _check_reads(refuse, index, [(op.kind, r) for r in sources], available)
            available.add(op.to)
        known = available - {PREDICTION}
    if LATENTS not in known:
        raise refuse("state", "no register 'latents'", "one, as the result")


def _check_reads(
    refuse: Callable[[str, str, str], DataError], index: int, reads: list[tuple[str, str]], known: set[str]
) -> None:
    for what, register in reads:
        if register not in known:
            raise refuse(f"call {index}", f"{what} reads register {register!r}, which nothing wrote", "a written one")
