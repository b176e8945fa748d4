"""The contract of a graph pass, and the driver that holds passes to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import onnx_ir as ir

from quantempo.errors import ExportError


class Violation(Exception):
    """A pass's condition does not hold; the text says what was seen."""


class GraphPass(ABC):
    """One exact transformation: the graph computes the same function before and after, up to float rounding.

    A pass object holds no state between calls.
    """

    @property
    def name(self) -> str:
        """The class name, for messages and counts."""
        return type(self).__name__

    def requires(self, model: ir.Model) -> None:  # noqa: B027
        """Raise `Violation` where the pass must not be run."""

    @abstractmethod
    def apply(self, model: ir.Model) -> int:
        """Transform in place; returns the number of places that changed."""

    def ensures(self, model: ir.Model) -> None:  # noqa: B027
        """Raise `Violation` where the pass did not do what it promises."""


def run_passes(model: ir.Model, passes: Sequence[GraphPass]) -> tuple[tuple[str, int], ...]:
    """Run passes in order.

    Returns:
        (name, number of changed places) of each pass.

    Raises:
        ExportError: a condition does not hold; names the pass and those that ran before it.
    """
    done: list[tuple[str, int]] = []
    for item in passes:
        try:
            item.requires(model)
        except Violation as violation:
            raise _broken(item, "pre-condition", violation, done) from violation
        changed = item.apply(model)
        try:
            item.ensures(model)
        except Violation as violation:
            raise _broken(item, "post-condition", violation, done) from violation
        done.append((item.name, changed))
    return tuple(done)


def _broken(item: GraphPass, kind: str, violation: Violation, done: Sequence[tuple[str, int]]) -> ExportError:
    before = ", ".join(name for name, _ in done) or "none"
    return ExportError(
        f"graph pass {item.name}, {kind}",
        found=str(violation),
        wanted=(type(item).__doc__ or item.name).strip().split("\n")[0].rstrip("."),
        cause=f"the graph holds a form that the pass does not know (passes that ran before: {before})",
        remedy="report it with the model's config.json",
    )
