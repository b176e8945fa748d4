"""From traced calls to a step program: values, dead ones removed, registers named.

While a scheduler is traced every tensor is a *value* that is written once.  Afterwards a backward pass drops the
operations that nothing reads, and a forward scan gives values that are alive at the same time different register names.
`latents` always holds the current sample; a sample that is still needed after it is replaced is copied first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from quantempo.contracts.program import LATENTS, PREDICTION, Call, Clamp, Lin, Noise, Operation, Terms
from quantempo.export.sampler_rows import WIDTH, NotLinear, Row, coefficients, unit, zero

Form = tuple[tuple[int, float], ...]
"""A linear form over values: (value, coefficient) pairs in ascending value order."""

_NEGLIGIBLE = 2.0**-52
"""A coefficient this much smaller than the largest of its form is what rounding left of an exact cancellation."""


@dataclass(frozen=True)
class Op:
    """One operation on values: a `lin` with `form`, a `clamp` of one value between bounds, or a `noise` draw."""

    kind: str
    to: int
    form: Form = ()
    low: float = 0.0
    high: float = 0.0
    draw: int = 0

    def reads(self) -> Iterable[int]:
        """The values on the right."""
        return (value for value, _ in self.form)


@dataclass
class TracedCall:
    """One denoiser call while it is traced."""

    timestep: float
    step: int
    sample: Form
    prediction: int
    ops: list[Op] = field(default_factory=list)
    result: int = -1


class Tape:
    """Records values and operations; the sink that `RowMode` reports to.

    A slot of a row stands for one value.  Slots are handed out anew for every call (`finish` frees them), so the width
    of a row bounds the tensors alive within one call, not the length of the loop.
    """

    def __init__(self) -> None:
        self.calls: list[TracedCall] = []
        self.draws = 0
        self._next = 0
        self._slots: list[int] = []
        self._defined: dict[Form, int] = {}
        self.latents = self._value()

    def _value(self) -> int:
        self._next += 1
        return self._next - 1

    def row(self, value: int | None) -> Row:
        """The basis vector of a value; `None` is zero."""
        if value is None:
            return zero()
        if value not in self._slots:
            if len(self._slots) == WIDTH:
                raise NotLinear(f"more than {WIDTH} tensors alive in one call", "a row has no slot left for another")
            self._slots.append(value)
        return unit(self._slots.index(value))

    def form(self, row: Row) -> Form:
        """What a row says, over values, exact zeros and cancellation residues left out."""
        values = coefficients(row)
        largest = max(map(abs, values))
        pairs = [(self._slots[slot], c) for slot, c in enumerate(values) if c != 0.0 and abs(c) > _NEGLIGIBLE * largest]
        return tuple(sorted(pairs))

    def begin(self, timestep: float, step: int, sample: Form) -> Row:
        """Open a call; returns the row of its prediction."""
        self.calls.append(TracedCall(timestep, step, sample, self._value()))
        self._defined = {}
        return self.row(self.calls[-1].prediction)

    def noise(self) -> Row:
        """A fresh draw, numbered in the order in which the scheduler draws."""
        self.draws += 1
        op = Op("noise", self._value(), draw=self.draws)
        self.calls[-1].ops.append(op)
        return self.row(op.to)

    def clamp(self, source: Row, low: float, high: float) -> Row:
        """A clamp of a linear form, as a new value."""
        value = self.define(source)
        if value is None:
            if not low <= 0.0 <= high:
                raise NotLinear("a clamp of zero", "its bounds exclude zero, which makes the step affine")
            return zero()
        op = Op("clamp", self._value(), form=((value, 1.0),), low=low, high=high)
        self.calls[-1].ops.append(op)
        return self.row(op.to)

    def define(self, row: Row, *, keep: bool = False) -> int | None:
        """The value that equals a row: an existing one where the row is one basis vector, else a new `lin`.

        Args:
            row: the linear form.
            keep: whether the value must outlive the call; the prediction does not, so it is copied.

        Returns:
            The value, or `None` for zero.
        """
        form = self.form(row)
        if not form:
            return None
        call = self.calls[-1]
        if len(form) == 1 and form[0][1] == 1.0 and not (keep and form[0][0] == call.prediction):
            return form[0][0]
        if form not in self._defined:
            op = Op("lin", self._value(), form=form)
            call.ops.append(op)
            self._defined[form] = op.to
        return self._defined[form]

    def finish(self, result: Row) -> None:
        """Close the call with its new sample; all slots are free again."""
        value = self.define(result, keep=True)
        call = self.calls[-1]
        if value is None:
            value = self._value()
            call.ops.append(Op("lin", value))
        self.latents = call.result = value
        self._slots = []


def lower(calls: list[TracedCall], initial: int) -> tuple[Call, ...]:
    """The calls of a step program, with dead operations dropped and registers named.

    Args:
        calls: as traced.
        initial: the value of the sample before the first call.
    """
    return _Naming(_alive(calls), initial).run()


def _alive(calls: list[TracedCall]) -> list[TracedCall]:
    needed: set[int] = set()
    kept: list[TracedCall] = []
    for call in reversed(calls):
        needed.add(call.result)
        ops = []
        for op in reversed(call.ops):
            if op.to in needed:
                needed.update(op.reads())
                ops.append(op)
        needed.update(value for value, _ in call.sample)
        kept.append(TracedCall(call.timestep, call.step, call.sample, call.prediction, ops[::-1], call.result))
    return kept[::-1]


class _Naming:
    """A linear scan over operations in order; position counts operations and call boundaries."""

    def __init__(self, calls: list[TracedCall], initial: int) -> None:
        self._calls = calls
        self._name = {initial: LATENTS}
        self._holds = initial
        self._free: list[int] = []
        self._count = 0
        self._position = 0
        self._last_use = self._last_uses()

    def _last_uses(self) -> dict[int, int]:
        last: dict[int, int] = {}
        position = 0
        for call in self._calls:
            last.update((value, position) for value, _ in call.sample)
            for op in call.ops:
                position += 1
                last.update((value, position) for value in op.reads())
            position += 1
            last[call.result] = position
        return last

    def run(self) -> tuple[Call, ...]:
        return tuple(self._call(call) for call in self._calls)

    def _call(self, call: TracedCall) -> Call:
        self._name[call.prediction] = PREDICTION
        inputs = {"sample": self._terms(call.sample)}
        self._release([value for value, _ in call.sample])
        update: list[Operation] = []
        for op in call.ops:
            self._position += 1
            terms = self._terms(op.form)
            name = self._target(op, call, update)
            if op.kind == "lin":
                update.append(Lin(name, terms))
            elif op.kind == "clamp":
                update.append(Clamp(name, terms[0][0], op.low, op.high))
            else:
                update.append(Noise(name, op.draw))
        self._position += 1
        if self._name[call.result] != LATENTS:
            source = self._name[call.result]
            self._save_latents(update)
            update.append(Lin(LATENTS, ((source, 1.0),)))
            self._give_back(source)
            self._hold(call.result)
        return Call(timestep=call.timestep, inputs=inputs, update=tuple(update), step=call.step)

    def _terms(self, form: Form) -> Terms:
        order = {LATENTS: -2, PREDICTION: -1}
        named = [(self._name[value], c) for value, c in form]
        return tuple(sorted(named, key=lambda term: order.get(term[0]) or int(term[0][1:])))

    def _target(self, op: Op, call: TracedCall, update: list[Operation]) -> str:
        if op.to == call.result:
            # The copy comes before the operation, so it must not take a register that the operation still reads.
            self._save_latents(update)
            self._release(op.reads())
            self._hold(op.to)
            return LATENTS
        self._release(op.reads())
        self._name[op.to] = self._fresh()
        return self._name[op.to]

    def _hold(self, value: int) -> None:
        self._holds = value
        self._name[value] = LATENTS

    def _save_latents(self, update: list[Operation]) -> None:
        held = self._holds
        if self._last_use.get(held, -1) > self._position and self._name[held] == LATENTS:
            self._name[held] = self._fresh()
            update.append(Lin(self._name[held], ((LATENTS, 1.0),)))

    def _fresh(self) -> str:
        if self._free:
            return f"r{heapq.heappop(self._free)}"
        self._count += 1
        return f"r{self._count}"

    def _release(self, values: Iterable[int]) -> None:
        for value in set(values):
            if self._last_use.get(value, -1) <= self._position:
                self._give_back(self._name[value])

    def _give_back(self, name: str) -> None:
        if name not in (LATENTS, PREDICTION):
            heapq.heappush(self._free, int(name[1:]))
