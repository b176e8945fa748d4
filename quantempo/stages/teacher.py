"""Engines that show more of a call: what another graph makes of the same inputs, and the inputs themselves.

A student is watched by a teacher, the float model, which evaluates every call on the same inputs.

The two graphs share their input buffers, so nothing is copied, and the trajectory is the student's own.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantempo.contracts.engine import Array, Binding, Buffer, Engine
from quantempo.contracts.tensors import TensorSpec

TEACHER = "teacher."
"""Prefix of the teacher's outputs."""
GIVEN = "given."
"""Prefix of inputs of the student that are shown as outputs."""


class TaughtBinding:
    """The student's binding; the teacher runs after it."""

    def __init__(self, student: Binding, teacher: Binding, shown: tuple[str, ...]) -> None:
        self._student, self._teacher = student, teacher
        self.inputs: Mapping[str, Buffer] = student.inputs
        self.outputs: Mapping[str, Buffer] = {
            **student.outputs, **{TEACHER + name: buffer for name, buffer in teacher.outputs.items()},
            **{GIVEN + name: student.inputs[name] for name in shown},
        }  # fmt: skip

    def run(self) -> None:
        """Evaluate both."""
        self._student.run()
        self._teacher.run()


class TaughtEngine:
    """A student's engine whose outputs hold the teacher's as well.

    Args:
        student: what drives the trajectory.
        teacher: takes a part of the student's inputs.
        shown: inputs of the student that an observer wants to see.
    """

    def __init__(self, student: Engine, teacher: Engine, shown: tuple[str, ...] = ()) -> None:
        self._student, self._teacher, self._shown = student, teacher, shown
        self.name = f"{student.name}, watched by {teacher.name}"
        self.host = student.host and teacher.host
        self.inputs: Mapping[str, TensorSpec] = student.inputs
        self.outputs: Mapping[str, TensorSpec] = {
            **student.outputs, **{TEACHER + name: spec for name, spec in teacher.outputs.items()},
            **{GIVEN + name: student.inputs[name] for name in shown},
        }  # fmt: skip

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        student = self._student.bind(sizes, share)
        taken = {d for spec in self._teacher.inputs.values() for d in spec.shape if isinstance(d, str)}
        teacher = self._teacher.bind(
            {name: size for name, size in sizes.items() if name in taken},
            {name: student.inputs[name] for name in self._teacher.inputs},
        )
        return TaughtBinding(student, teacher, self._shown)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The student's outputs and the teacher's, on host arrays."""
        taught = self._teacher.run({name: feeds[name] for name in self._teacher.inputs})
        return {
            **self._student.run(feeds), **{TEACHER + name: values for name, values in taught.items()},
            **{GIVEN + name: feeds[name] for name in self._shown},
        }  # fmt: skip

    def close(self) -> None:
        """Nothing: whoever opened the two engines closes them."""


class ShownEngine:
    """An engine whose inputs are outputs as well, for an observer.

    Args:
        engine: what runs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.host = engine.name, engine.host
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        shown = {GIVEN + name: spec for name, spec in engine.inputs.items()}
        self.outputs: Mapping[str, TensorSpec] = {**engine.outputs, **shown}

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        """See `quantempo.contracts.engine.Engine.bind`."""
        return _ShownBinding(self._engine.bind(sizes, share))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs and inputs, on host arrays."""
        return {**self._engine.run(feeds), **{GIVEN + name: feeds[name] for name in self.inputs}}

    def close(self) -> None:
        """Nothing: whoever opened the engine closes it."""


class _ShownBinding:
    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self.inputs: Mapping[str, Buffer] = binding.inputs
        given = {GIVEN + name: buffer for name, buffer in binding.inputs.items()}
        self.outputs: Mapping[str, Buffer] = {**binding.outputs, **given}

    def run(self) -> None:
        """Evaluate once."""
        self._binding.run()
