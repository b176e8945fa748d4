"""Which steps of a run compute with float activations: the first and last ones, where quantization hurts most.

Weights stay as stored, in INT8; only the activations of these steps are not rounded.  The JSON form is the
`diffusion_step_policy` that checkpoints of NVIDIA's Model Optimizer carry in the denoiser's `config.json`, under
`quantization_config.runtime`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantempo.contracts.program import StepProgram
from quantempo.errors import DataError

FLOAT_VARIANT = "float"
"""The graph variant with the bundle's INT8 weights and float activations."""
SCHEMA_VERSION = 1
_FIXED = {"type": "first_last_n", "index_space": "denoising_loop_iteration", "default_mode": "native"}
_MODES = ("a16", "native")
_KEYS = ("schema_version", *_FIXED, "scope", "first_steps", "last_steps", "overlap", "reasoner")


@dataclass(frozen=True)
class StepPolicy:
    """Numbers of steps with float activations at the start and at the end of a run.

    Args:
        first, last: 0 for none.  In a run of no more than `first + last` steps, every step is of that kind.
    """

    first: int = 0
    last: int = 0

    @property
    def empty(self) -> bool:
        """Whether no step is concerned."""
        return self.first == 0 and self.last == 0

    def covers(self, step: int, steps: int) -> bool:
        """Whether a step (from 0) of a run computes with float activations."""
        return step < self.first or step >= steps - self.last

    def data(self) -> dict[str, Any]:
        """The JSON form."""

        def edge(count: int) -> dict[str, Any]:
            return {"count": count, "mode": "a16" if count else "native"}

        return {
            "schema_version": SCHEMA_VERSION, **_FIXED, "scope": ["transformer"], "first_steps": edge(self.first),
            "last_steps": edge(self.last), "overlap": "a16", "reasoner": "native",
        }


def apply_policy(program: StepProgram, policy: StepPolicy) -> StepProgram:
    """The program with the covered steps' calls on the float variant.

    Every call of a covered step changes, so both branches and both halves of a two-call method agree.  A call that
    reuses or writes cached features stays: the float variant holds none.
    """
    calls = tuple(
        replace(call, graph=FLOAT_VARIANT)
        if call.graph == "full" and call.decide is None and policy.covers(call.step, program.steps) else call
        for call in program.calls
    )
    return replace(program, calls=calls)


def policy_of(program: StepProgram) -> StepPolicy:
    """The policy that a program follows.

    Raises:
        DataError: float steps lie elsewhere than at the ends.
    """
    floats = sorted({call.step for call in program.calls if call.graph == FLOAT_VARIANT})
    first = 0
    while first < len(floats) and floats[first] == first:
        first += 1
    rest = floats[first:]
    if rest and rest != list(range(program.steps - len(rest), program.steps)):
        raise DataError(
            "step program", found=f"float steps {floats} of {program.steps}", wanted="some at the start and the end",
            cause="it was edited by hand", remedy="such a program has no step policy; run it as it is",
        )
    return StepPolicy(first, len(rest))


def read_policy(config: Mapping[str, Any], where: str) -> StepPolicy | None:
    """The policy in a denoiser's configuration; `None` where it has none.

    Args:
        config: content of `config.json`.
        where: its path, for messages.

    Raises:
        DataError: a policy of another kind or version, or one that is not complete.  Nothing is guessed: a policy that
            is half understood would run the wrong steps in integers without a word.
    """
    found: Any = config
    for key in ("quantization_config", "runtime", "diffusion_step_policy"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if found is None:
        return None
    place = f"{where}: diffusion_step_policy"
    if not isinstance(found, Mapping):
        raise _bad(place, f"{type(found).__name__}", "an object")
    for key in sorted(set(found) - set(_KEYS)):
        raise _bad(f"{place}.{key}", "an unknown key", f"one of {', '.join(_KEYS)}")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise _bad(f"{place}.schema_version", repr(found.get("schema_version")), str(SCHEMA_VERSION))
    for key, wanted in _FIXED.items():
        if found.get(key) != wanted:
            raise _bad(f"{place}.{key}", repr(found.get(key)), repr(wanted))
    counts = [_count(found.get(key), f"{place}.{key}") for key in ("first_steps", "last_steps")]
    if found.get("overlap", "a16") != "a16":
        # In a run that is shorter than both ends together, `native` would win over `a16`.
        raise _bad(f"{place}.overlap", repr(found.get("overlap")), "'a16'")
    return StepPolicy(*counts)


def _count(edge: Any, where: str) -> int:
    count = edge.get("count") if isinstance(edge, Mapping) else None
    mode = edge.get("mode") if isinstance(edge, Mapping) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 0 or mode not in _MODES:
        raise _bad(where, repr(edge), f"a count of at least 0 and a mode among {', '.join(_MODES)}")
    return count if mode == "a16" else 0


def _bad(where: str, found: str, wanted: str) -> DataError:
    return DataError(
        where, found=found, wanted=wanted, cause="a policy of a newer kind, or a slip in the configuration",
        remedy="correct it, or remove it to run every step in integers",
    )
