"""FP8 E4M3: rounding, and weights in it.

E4M3 (Micikevicius et al. 2022, arXiv:2209.05433) has 4 exponent and 3 mantissa bits, no infinity, a largest value of
448 and a smallest normal value of 2^-6.  Between them the relative error is at most 2^-4 whatever the scale, so a scale
only has to keep values below 448 and out of the subnormals: ranges matter far less than with INT8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.contracts.plan import QuantPlan, Site
from quantempo.errors import PlanError
from quantempo.export.gptq import compensated_rounding_to
from quantempo.export.weights import QuantizedWeight, output_axis, quantize_weight, wanted_weights, weight_of

E4M3_MAX = 448.0
LEAST_SCALE = 2.0**-14
"""The smallest number that float16 holds with all its bits."""
OCTAVE = np.exp2(-np.arange(8) / 8)
"""Scales tried per output channel: within an octave the grid moves against the weights; a whole octave changes nothing
but the subnormals."""


def to_e4m3(values: NDArray[Any]) -> NDArray[Any]:
    """Round to E4M3, half to even, saturating at ±448: ONNX's QuantizeLinear with scale 1."""
    result: NDArray[Any] = np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return result


def fp8_scale(largest: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
    """The scale at which a largest magnitude still fits: `largest / 448` or a little more.

    It is rounded up to a bfloat16 number and not below 2^-14, so that float16, bfloat16 and float32 graphs hold the
    same scale.  E4M3 has the range to spare.
    """
    wanted = np.maximum(np.asarray(largest, np.float64) / E4M3_MAX, LEAST_SCALE)
    bits = wanted.astype(np.float32).view(np.uint32).astype(np.uint64)
    up = ((bits + 0xFFFF) & np.uint64(0xFFFF0000)).astype(np.uint32)
    result: NDArray[np.float32] = up.view(np.float32)
    return result


def rounded(values: NDArray[Any]) -> NDArray[np.float64]:
    """The nearest E4M3 numbers, as float64."""
    result: NDArray[np.float64] = to_e4m3(values).astype(np.float64)
    return result


def fp8_weights(
    model: ir.Model, plan: QuantPlan, grams: Mapping[str, NDArray[np.float64]] | None = None
) -> dict[str, QuantizedWeight]:
    """All weights that a plan quantizes, in E4M3, by initializer name; see `each_fp8_weight`."""
    return dict(each_fp8_weight(model, plan, grams))


def each_fp8_weight(
    model: ir.Model, plan: QuantPlan, grams: Mapping[str, NDArray[np.float64]] | None = None
) -> Iterator[tuple[str, QuantizedWeight]]:
    """The weights of `wanted_weights`, in its order: quantized ones in E4M3, those that are only stored in INT8.

    Args:
        model: float graph with the plan's sites.
        plan: its weights are 8-bit.
        grams: `Σ x xᵀ` by activation tensor; matrix products that read one of them are rounded with compensation
            (see `quantempo.export.gptq`).

    Raises:
        PlanError: a weight is missing, not finite, or of fewer bits.
    """
    computed: dict[str, Site] = {}
    for site in plan.quantized():
        settings = plan.settings(site)
        assert settings is not None
        if settings.weight_bits != 8 or settings.activation_bits != 8:
            raise PlanError(
                f"site {site.id!r}", found=f"{settings.weight_bits}-bit weights, {settings.activation_bits}-bit inputs",
                wanted="8 and 8", cause="fewer bits are simulated with integers only", remedy="compile with int8",
            )
        computed.setdefault(site.weight, site)
    for name, (site, bits) in wanted_weights(plan).items():
        real, axis = weight_of(model, site), output_axis(site)
        if name not in computed:
            yield name, quantize_weight(real, axis, bits, where=f"weight {name!r}")
            continue
        reader = computed[name]
        gram = (grams or {}).get(reader.tensor) if reader.op == "matmul" else None
        yield name, fp8_weight(real, axis, gram, where=name)


def weight_bytes(weight: QuantizedWeight) -> NDArray[np.int8]:
    """The stored bytes of a weight of either format."""
    return weight.values.view(np.int8)


def weight_values(stored: NDArray[np.int8], fp8: bool) -> NDArray[Any]:
    """The inverse of `weight_bytes`."""
    return stored.view(ml_dtypes.float8_e4m3fn) if fp8 else stored


def fp8_weight(
    weight: NDArray[np.float32], axis: int, gram: NDArray[np.float64] | None = None, *, where: str = "weight"
) -> QuantizedWeight:
    """One weight to E4M3: per output channel the scale of least squared error, then rounding.

    Args:
        weight: float32, finite; `[k, n]` with `axis` 1 or `[n, ...]` with `axis` 0.
        axis: output channel axis.
        gram: see `fp8_weights`; for `[k, n]` only.
        where: name of the weight, for messages.

    Raises:
        PlanError: a weight is not finite.
    """
    columns = np.ascontiguousarray(weight if axis == 1 else weight.reshape(len(weight), -1).T, np.float64)
    largest = np.abs(columns).max(0, initial=0.0)
    if not np.all(np.isfinite(largest)):
        raise PlanError(
            f"weight {where!r}", found="NaN or infinity among the weights", wanted="finite weights",
            cause="the checkpoint is damaged, or overflowed when it was cast to a narrower type",
            remedy="load the model in float32 and look at this layer",
        )
    candidates = fp8_scale(largest[None] / OCTAVE[:, None])
    errors = [np.square(columns - rounded(columns / scale) * scale).sum(0) for scale in candidates.astype(np.float64)]
    scale = candidates[np.argmin(errors, 0), np.arange(len(largest))]
    steps = columns / scale.astype(np.float64)
    values = rounded(steps) if gram is None else compensated_rounding_to(rounded, steps, gram)
    shaped = values if axis == 1 else values.T
    dead = tuple(int(i) for i in np.flatnonzero(largest == 0))
    return QuantizedWeight(to_e4m3(np.ascontiguousarray(shaped).reshape(weight.shape)), scale, axis, dead)
