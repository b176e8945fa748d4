"""Whether a step program and a set of graph variants belong together: features, vectors and decisions.

Everything is checked on names and shapes, before an engine runs; `quantempo.contracts.program.check_program` has
looked at the program by itself before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.program import INDICATOR, Call, Correct, Decide, StepProgram
from quantempo.errors import DataError, nearest

Vectors = Mapping[str, NDArray[np.float32]]
"""Arrays of a vectors file: (rows, channels) by name."""


@dataclass(frozen=True)
class Variant:
    """What a graph variant takes and gives.

    Args:
        inputs, outputs: all names.
        reads, writes: the cached features among them.
    """

    inputs: Collection[str]
    outputs: Collection[str]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @staticmethod
    def of(entry: GraphEntry) -> Variant:
        """As the manifest lists it."""
        return Variant(
            tuple(s.name for s in entry.inputs), tuple(s.name for s in entry.outputs), entry.reads, entry.writes
        )


def variants_of(program: StepProgram) -> tuple[str, ...]:
    """The variants that a program may run, in the order in which they first run (what writes comes before)."""
    names: dict[str, None] = {}
    for call in program.calls:
        names.update(dict.fromkeys(runs_of(call)))
    return tuple(names)


def is_cached(program: StepProgram, variants: Mapping[str, Variant]) -> bool:
    """Whether any call of a program may reuse features."""
    return any(call.decide or (call.graph in variants and variants[call.graph].reads) for call in program.calls)


def runs_of(call: Call) -> tuple[str, ...]:
    """The variants that a call may run, its own graph last."""
    return (call.graph,) if call.decide is None else (call.decide.probe, call.decide.refresh, call.graph)


def check_variants(
    program: StepProgram, variants: Mapping[str, Variant], vectors: Vectors, channels: int, where: str
) -> None:
    """Refuse a program that these variants cannot replay.

    Args:
        program: passed by `check_program`.
        variants: by name.
        vectors: of the bundle.
        channels: of the latents, which `Correct` works on.
        where: for messages.

    Raises:
        DataError: a call of a missing variant, a feature that is read before it is written, a probe without an
            indicator, or vectors that are missing, unknown or too short; with the call's index.
    """
    check = _Check(variants, vectors, channels, where)
    for index, call in enumerate(program.calls):
        check.call(index, call)


@dataclass
class _Check:
    variants: Mapping[str, Variant]
    vectors: Vectors
    channels: int
    where: str
    written: set[str] = field(default_factory=set)

    def call(self, index: int, call: Call) -> None:
        for name in runs_of(call):
            if name not in self.variants:
                raise DataError(
                    f"{self.where}: call {index}", found=f"a call of graph {name!r}",
                    wanted=f"one of {', '.join(sorted(self.variants))}",
                    cause="program and bundle do not belong together", remedy=nearest(name, self.variants),
                )
        if call.decide is None:
            self._reads(index, call.graph, self.written)
            self.written.update(self.variants[call.graph].writes)
        else:
            self._decides(index, call, call.decide)
        self._inputs(index, call)
        for op in call.update:
            if isinstance(op, Correct):
                for name in (op.gain, op.bias):
                    self._row(index, "correct", name, op.row)
                    if self.vectors[name].shape[1] != self.channels:
                        found = f"array {name!r} of {self.vectors[name].shape[1]} channels"
                        raise self._refuse(index, found, f"{self.channels} channels, as the latents have")

    def _decides(self, index: int, call: Call, decide: Decide) -> None:
        probe, refresh = self.variants[decide.probe], self.variants[decide.refresh]
        if INDICATOR not in probe.outputs:
            found = f"probe {decide.probe!r} without an output {INDICATOR!r}"
            raise self._refuse(index, found, "a graph that computes it")
        self._reads(index, decide.probe, set())
        self._reads(index, decide.refresh, set(probe.writes))
        # Rows refresh at different calls, so what a row may reuse is what its own refresh wrote, whenever that was.
        self._reads(index, call.graph, {*probe.writes, *refresh.writes})
        self.written.update((*probe.writes, *refresh.writes))

    def _reads(self, index: int, name: str, written: Collection[str]) -> None:
        for feature in self.variants[name].reads:
            if feature in written:
                continue
            found = f"graph {name!r}, which reuses feature {feature!r}"
            if index == 0:
                raise self._refuse(index, found, "a first call that computes everything")
            raise self._refuse(index, f"{found}, which nothing wrote before", "a call that writes it first")

    def _inputs(self, index: int, call: Call) -> None:
        taken = {name for run in runs_of(call) for name in self.variants[run].inputs if name in self.vectors}
        for name, row in call.vectors.items():
            self._row(index, f"input {name!r}", name, row)
            if name not in taken:
                raise self._refuse(index, f"vector {name!r} for graph {call.graph!r}", "an input of that name")
        for name in sorted(taken - set(call.vectors)):
            raise self._refuse(index, f"no vector for input {name!r} of graph {call.graph!r}", "a row of its array")

    def _row(self, index: int, what: str, name: str, row: int) -> None:
        if name not in self.vectors:
            raise self._refuse(
                index, f"{what} with the unknown vector {name!r}", "an array of the vectors file",
                nearest(name, self.vectors),
            )
        rows = len(self.vectors[name])
        if not 0 <= row < rows:
            raise self._refuse(index, f"{what} of row {row} of {name!r}", f"rows 0 to {rows - 1}")

    def _refuse(self, index: int, found: str, wanted: str, remedy: str = "compile the bundle again") -> DataError:
        return DataError(
            f"{self.where}: call {index}", found=found, wanted=wanted,
            cause="the program was edited by hand, or was made for other graphs", remedy=remedy,
        )
