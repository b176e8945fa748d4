"""What crosses a graph's border."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (numpy's word) and shape of a graph input or output.

    A dimension that is a string is symbolic (`"batch"`); the same word means the same size throughout a graph.
    A rank-0 tensor has the shape `()`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The concrete shape for given sizes of the symbolic dimensions; `KeyError` names a missing one."""
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.shape)
