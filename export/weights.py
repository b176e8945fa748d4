"""Weights to INT8, one scale per output channel, symmetric.

`w ≈ q · scale[n]` with integer `q` in `-(2^(bits-1) - 1) .. 2^(bits-1) - 1` and zero point 0: -128 stays unused, so
that the range is symmetric and `-q` is always representable.  Fewer than 8 bits use the narrower integer range in INT8
storage; they are simulated and save neither bytes nor time.

One tensor is worked on at a time, in blocks that fit the processor's second-level cache, so beyond the result the
memory needed is a few hundred kilobytes whatever the model's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.contracts.plan import Keep, QuantPlan, Site
from quantempo.errors import PlanError
from quantempo.export.gptq import compensated_rounding

WeightMethod = Literal["minmax", "mse"]

VALUES, FP8_VALUES, SCALE = ".int8", ".fp8", ".scale"
"""Suffixes of a quantized weight's two initializers: values in one of two formats, and scale."""

SCALE_FLOOR = np.float32(2.0**-60)
"""Least weight scale.  A channel of zeros would have the scale 0, which every backend refuses."""

BLOCK = 1 << 16
"""Elements worked on at a time."""

RATIOS = {8: np.linspace(1.0, 0.7, 13), 4: np.linspace(1.0, 0.3, 29)}
"""Clipping ratios that the MSE search tries; below 8 bits the best one lies lower."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in INT8, or in FP8 (E4M3; see `quantempo.export.lower_fp8`).

    Args:
        values: int8 or float8_e4m3fn, in the shape of the weight.
        scale: float32 `[n]`, one per output channel, above zero.
        axis: the output channel axis of `values`.
        dead: output channels whose weights are all zero; they carry the least scale.
    """

    values: NDArray[Any]
    scale: NDArray[np.float32]
    axis: int
    dead: tuple[int, ...]

    def dequantized(self) -> NDArray[np.float32]:
        """The real weights that the integers stand for."""
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        real: NDArray[np.float32] = self.values.astype(np.float32) * self.scale.reshape(shape)
        return real

    def column_sums(self) -> NDArray[np.float32]:
        """Sum of the real weights per output channel, `[n]`."""
        others = tuple(a for a in range(self.values.ndim) if a != self.axis)
        sums = self.values.sum(others, np.int64) * self.scale.astype(np.float64)
        rounded: NDArray[np.float32] = sums.astype(np.float32)
        return rounded


def output_axis(site: Site) -> int:
    """The output channel axis of a site's weight: 1 of `[k, n]`, 0 of `[n, k / group, ...]`."""
    return 1 if site.op == "matmul" else 0


def quantize_weights(
    model: ir.Model,
    plan: QuantPlan,
    method: WeightMethod = "mse",
    grams: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, QuantizedWeight]:
    """All weights that a plan wants in INT8, by initializer name.

    Both dialects take this one result, so that they hold the same bytes.

    Args:
        model: float graph with the plan's sites.
        plan: quantized sites, and kept ones with INT8 storage.
        method: `minmax`, or `mse` for the clipping that loses least (never worse than `minmax`).
        grams: `Σ x xᵀ` by activation tensor; matrix products that read one of them are rounded with compensation
            (see `quantempo.export.gptq`), the others to the nearest.

    Raises:
        PlanError: a weight is missing, not finite, or asked for in two ways.
        CalibrationError: a Gram matrix does not fit its weight.
    """
    return dict(each_weight(model, plan, method, grams))


def each_weight(
    model: ir.Model,
    plan: QuantPlan,
    method: WeightMethod = "mse",
    grams: Mapping[str, NDArray[np.float64]] | None = None,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """`quantize_weights` one by one, in the order of `wanted_weights`."""
    for name, (site, bits) in wanted_weights(plan).items():
        real = weight_of(model, site)
        found = quantize_weight(real, output_axis(site), bits, method, where=f"weight {name!r}")
        if site.op == "matmul" and grams is not None and site.tensor in grams:
            values = compensated_rounding(real, grams[site.tensor], found.scale, 2 ** (bits - 1) - 1)
            found = dataclasses.replace(found, values=values)
        yield name, found


def wanted_weights(plan: QuantPlan) -> dict[str, tuple[Site, int]]:
    """The weights that a plan wants in INT8, sorted by name: a site that reads each, and its bits.

    Raises:
        PlanError: a weight is asked for in two ways.
    """
    wanted: dict[str, tuple[Site, int]] = {}
    for site in plan.sites:
        settings = plan.settings(site)
        decision = plan.decisions[site.id]
        if settings is None and not (isinstance(decision, Keep) and decision.weight_storage == "int8"):
            continue
        request = (site, settings.weight_bits if settings is not None else 8)
        first = wanted.setdefault(site.weight, request)
        if (output_axis(first[0]), first[1]) != (output_axis(site), request[1]):
            raise PlanError(
                f"weight {site.weight!r}",
                found=f"{first[0].id!r} ({first[0].op}, {first[1]} bits), {site.id!r} ({site.op}, {request[1]} bits)",
                wanted="one way to quantize a weight that two sites share",
                cause="the plan was edited by hand",
                remedy="give both sites the same weight_bits",
            )
    return dict(sorted(wanted.items()))


def stored_weights(model: ir.Model, plan: QuantPlan) -> dict[str, QuantizedWeight]:
    """The weights that a quantized graph of this plan holds, so that it can be lowered again with other activation
    scales.

    Raises:
        PlanError: the graph was made from another plan.
    """
    found = {}
    constants = model.graph.initializers
    for site in plan.quantized():
        values = constants.get(f"{site.weight}{VALUES}") or constants.get(f"{site.weight}{FP8_VALUES}")
        scale = constants.get(f"{site.weight}{SCALE}")
        if values is None or scale is None or values.const_value is None or scale.const_value is None:
            raise PlanError(
                f"weight {site.weight!r}", found="no quantized values in the graph",
                wanted="those of every quantized site", cause="graph and plan do not belong together",
                remedy="compile the bundle again",
            )
        integers = values.const_value.numpy()
        others = tuple(a for a in range(integers.ndim) if a != output_axis(site))
        dead = np.flatnonzero(~(integers != 0).any(axis=others))
        found[site.weight] = QuantizedWeight(
            integers, scale.const_value.numpy(), output_axis(site), tuple(int(i) for i in dead)
        )
    return found


def weight_of(model: ir.Model, site: Site) -> NDArray[np.float32]:
    """The float weight of a site; raises as `weight_tensor` does."""
    weight: NDArray[np.float32] = weight_tensor(model, site).numpy()
    return weight


def weight_tensor(model: ir.Model, site: Site) -> ir.TensorProtocol:
    """The float weight of a site, not yet read where it is lazy.

    Raises:
        PlanError: the graph has no such initializer, or of another shape or type.
    """
    value = model.graph.initializers.get(site.weight)
    axis = output_axis(site)
    if value is not None and value.const_value is not None:
        shape = tuple(value.const_value.shape.numpy())
        if value.const_value.dtype == ir.DataType.FLOAT and shape[axis] == site.n and np.prod(shape) == site.n * site.k:
            return value.const_value
        found = f"{value.const_value.dtype.name} of shape {list(shape)}"
    else:
        found = "no such initializer"
    raise PlanError(
        f"site {site.id!r}, weight {site.weight!r}",
        found=found,
        wanted=f"a float32 initializer with {site.n} output channels and {site.k} weights each",
        cause="the plan belongs to another graph",
        remedy="make the plan anew for this model",
    )


def quantize_weight(
    weight: NDArray[np.float32], axis: int, bits: int = 8, method: WeightMethod = "mse", *, where: str = "weight"
) -> QuantizedWeight:
    """One weight to INT8.

    `mse` tries clipping ratios of each channel's largest magnitude, keeps the one with the least squared error, and
    then fits the scale to the chosen integers by least squares: clipping as in Banner et al. (arXiv:1810.05723), with
    the exact error in place of a model of the distribution.

    Args:
        weight: float32, finite; `[k, n]` with `axis` 1 or `[n, ...]` with `axis` 0.
        axis: output channel axis.
        bits: 2 to 8.
        method: see above.
        where: name of the weight, for messages.

    Raises:
        PlanError: a weight is not finite, or `bits` is out of range.
    """
    if not 2 <= bits <= 8:
        raise PlanError(
            where, found=f"weight_bits {bits}", wanted="2 to 8", cause="the plan was edited by hand",
            remedy="choose 8, or fewer to simulate a narrower format",
        )
    matrix = weight if axis == 1 else weight.reshape(len(weight), -1)
    top = np.float32(2 ** (bits - 1) - 1)
    largest = _abs_max(matrix, axis)
    if not np.all(np.isfinite(largest)):
        raise PlanError(
            where, found="NaN or infinity among the weights", wanted="finite weights",
            cause="the checkpoint is damaged, or overflowed when it was cast to a narrower type",
            remedy="load the model in float32 and look at this layer",
        )
    scale = np.maximum(largest / top, SCALE_FLOOR).astype(np.float32)
    if method == "mse":
        scale = _search(matrix, axis, scale, top, RATIOS[8 if bits == 8 else 4].astype(np.float32))
    values = np.empty(matrix.shape, np.int8)
    for rows, block, factor, work in _blocks(matrix, axis, scale):
        values[rows] = _round(block, factor, top, work)
    if method == "mse":
        scale = _least_squares(matrix, values, axis, scale)
    dead = tuple(int(i) for i in np.flatnonzero(largest == 0))
    return QuantizedWeight(values.reshape(weight.shape), scale, axis, dead)


def _blocks(
    matrix: NDArray[np.float32], axis: int, scale: NDArray[np.float32]
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Row blocks with the scales that apply to them (broadcastable) and a scratch array of their shape."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    scratch = np.empty((min(step, len(matrix)), matrix.shape[1]), np.float32)
    for start in range(0, len(matrix), step):
        rows = slice(start, min(start + step, len(matrix)))
        factor = scale[None, :] if axis == 1 else scale[rows, None]
        yield rows, matrix[rows], factor, scratch[: rows.stop - start]


def _abs_max(matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    # Without the temporary array of np.abs; NaN and infinity survive both reductions.
    largest: NDArray[np.float32] = np.maximum(matrix.max(1 - axis, initial=0.0), -matrix.min(1 - axis, initial=0.0))
    return largest


def _round(
    block: NDArray[np.float32], factor: NDArray[np.float32], top: np.float32, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    np.divide(block, factor, out=out)
    np.rint(out, out=out)
    return np.clip(out, -top, top, out=out)


def _search(
    matrix: NDArray[np.float32], axis: int, scale: NDArray[np.float32], top: np.float32, ratios: NDArray[np.float32]
) -> NDArray[np.float32]:
    errors = np.zeros((len(ratios), len(scale)))
    for rows, block, factor, work in _blocks(matrix, axis, scale):
        for index, ratio in enumerate(ratios):
            trial = np.maximum(factor * ratio, SCALE_FLOOR)
            _round(block, trial, top, work)
            work *= trial
            work -= block
            if axis == 1:
                errors[index] += np.einsum("kn,kn->n", work, work)
            else:
                errors[index, rows] = np.einsum("nk,nk->n", work, work)
    best: NDArray[np.float32] = np.maximum(scale * ratios[errors.argmin(0)], SCALE_FLOOR)
    return best


def _least_squares(
    matrix: NDArray[np.float32], values: NDArray[np.int8], axis: int, scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scale at which the integers come closest to the weights: `<w, q> / <q, q>`."""
    product, square = np.zeros(len(scale)), np.zeros(len(scale))
    for rows, block, _, work in _blocks(matrix, axis, scale):
        work[...] = values[rows]
        where: Any = slice(None) if axis == 1 else rows
        spec = "kn,kn->n" if axis == 1 else "nk,nk->n"
        product[where] += np.einsum(spec, block, work)
        square[where] += np.einsum(spec, work, work)
    fitted = np.divide(product, square, out=scale.astype(np.float64), where=square > 0)
    return np.maximum(fitted, SCALE_FLOOR).astype(np.float32)
