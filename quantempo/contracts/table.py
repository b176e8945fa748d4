"""Activation scales per tensor and scale group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.partition import Partition
from quantempo.errors import ScaleMissing


@dataclass(frozen=True, eq=False)
class TensorScales:
    """Quantizers of one tensor, one per group; all arrays have the length `groups`.

    `real = (stored - zero_point) · scale` with unsigned `stored` in `0 .. 2^bits - 1`; the symmetric form has the zero
    point `2^(bits-1)`, so both dialects hold the same integers up to an offset.

    Args:
        scale: float32, above zero.
        zero_point: int32 within `0 .. 2^bits - 1`.
        symmetric_scale: float32, above zero.
        centre: float32 `[groups, channels]`, subtracted from the tensor's channels before it is quantized, so that the
            scales are those of `x - centre`; `None` where nothing is subtracted.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    symmetric_scale: NDArray[np.float32]
    centre: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for array in (self.scale, self.symmetric_scale):
            if array.dtype != np.float32 or not np.all(np.isfinite(array)) or not np.all(array > 0):
                raise ValueError("scales must be float32, finite and above zero")
        if not len(self.scale) == len(self.zero_point) == len(self.symmetric_scale):
            raise ValueError("scale, zero_point and symmetric_scale differ in length")
        if self.centre is not None and (len(self.centre) != len(self.scale) or not np.all(np.isfinite(self.centre))):
            raise ValueError("centre must have a finite row for every group")

    def pick(self, symmetric: bool, bits: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Scale and zero point per group, in the asked form."""
        if symmetric:
            return self.symmetric_scale, np.full(len(self.scale), 2 ** (bits - 1), np.int32)
        return self.scale, self.zero_point


@dataclass(frozen=True, eq=False)
class ScaleTable:
    """All activation scales of a model.

    Args:
        partition: what the groups mean.
        tensors: by value name in the float graph.
    """

    partition: Partition
    tensors: Mapping[str, TensorScales]

    def of(self, tensor: str) -> TensorScales:
        """The scales of a tensor.

        Raises:
            ScaleMissing: there is no default scale.
        """
        if tensor not in self.tensors:
            raise ScaleMissing(
                f"scale table, tensor {tensor!r}", found="no scales", wanted=f"{self.partition.groups} groups",
                cause="the plan quantizes a site that calibration did not visit", remedy="calibrate with this plan",
            )
        scales = self.tensors[tensor]
        if len(scales.scale) != self.partition.groups:
            raise ScaleMissing(
                f"scale table, tensor {tensor!r}", found=f"{len(scales.scale)} groups",
                wanted=f"{self.partition.groups} groups", cause="table and partition come from different runs",
                remedy="calibrate again",
            )
        return scales

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Flat arrays for a safetensors file: `NAME|scale`, `|zero_point`, `|symmetric_scale`, `|centre`."""
        flat: dict[str, NDArray[np.generic]] = {}
        for name, scales in sorted(self.tensors.items()):
            flat[f"{name}|scale"] = scales.scale
            flat[f"{name}|zero_point"] = scales.zero_point
            flat[f"{name}|symmetric_scale"] = scales.symmetric_scale
            if scales.centre is not None:
                flat[f"{name}|centre"] = scales.centre
        return flat

    @staticmethod
    def from_arrays(partition: Partition, flat: Mapping[str, NDArray[np.generic]]) -> ScaleTable:
        """The inverse of `arrays`."""
        names = sorted({key.rsplit("|", 1)[0] for key in flat})
        return ScaleTable(
            partition,
            {
                name: TensorScales(
                    np.asarray(flat[f"{name}|scale"], np.float32), np.asarray(flat[f"{name}|zero_point"], np.int32),
                    np.asarray(flat[f"{name}|symmetric_scale"], np.float32),
                    np.asarray(flat[f"{name}|centre"], np.float32) if f"{name}|centre" in flat else None,
                )
                for name in names
            },
        )
