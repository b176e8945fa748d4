"""Which scale group a call belongs to."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """Half-open intervals of the group key that tile the line, so any scheduler and step count finds its group.

    Group `g` covers `[edges[g-1], edges[g])`, with minus and plus infinity at the ends.

    Args:
        edges: the inner edges, strictly ascending; `G - 1` of them for `G` groups.
        low, high: the smallest and largest key that was calibrated; outside, a run goes on with a notice.
        unit: what the key is.
    """

    edges: tuple[float, ...]
    low: float
    high: float
    unit: str = "timestep"

    def __post_init__(self) -> None:
        if any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges must ascend strictly: {self.edges}")
        if self.low > self.high:
            raise ValueError(f"low {self.low} above high {self.high}")

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.edges) + 1

    def group_of(self, key: float) -> int:
        """The group of a key; every key has one."""
        return bisect_right(self.edges, key)

    def calibrated(self, key: float) -> bool:
        """Whether the key lies within what was calibrated, up to half a typical interval."""
        slack = (self.high - self.low) / max(1, self.groups - 1)
        return self.low - slack <= key <= self.high + slack

    @staticmethod
    def single(low: float, high: float) -> Partition:
        """One group for everything."""
        return Partition((), low, high)
