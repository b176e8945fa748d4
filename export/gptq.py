"""Weight rounding that lets later weights make up for the errors of earlier ones.

The output error of a matrix product with weight error `E` on activations with Gram matrix `H = Σ x xᵀ` is `tr(Eᵀ H E)`.
Rows of the weight are rounded one after another; the error of each is spread over the rows still to come in the way
that minimises this trace (Frantar et al. 2023, "GPTQ", equations 2 and 3; rows in order of falling `H` diagonal).
Scales stay as they are, so the stored format is the same as for plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import CalibrationError

DAMPING = 1e-3
"""Added to the diagonal, as a share of its mean: keeps directions that the data never took from being overfitted."""
BLOCK_ROWS = 128


def compensated_rounding(
    weight: NDArray[np.float32], gram: NDArray[np.float64], scale: NDArray[np.float32], limit: int
) -> NDArray[np.int8]:
    """Integers of a weight, rounded with compensation.

    Args:
        weight: `[k, n]`.
        gram: `[k, k]`, the sum of `x xᵀ` over activations; any positive factor gives the same result.
        scale: `[n]`, per output channel.
        limit: integers lie in `-limit .. limit`.

    Returns:
        int8 `[k, n]`, whose output error on this Gram matrix is at most that of plain rounding.

    Raises:
        CalibrationError: the Gram matrix does not fit the weight or is not finite.
    """
    if gram.shape != (len(weight), len(weight)) or not np.all(np.isfinite(gram)):
        raise CalibrationError(
            "weight rounding", found=f"a Gram matrix of shape {gram.shape}, finite: {bool(np.all(np.isfinite(gram)))}",
            wanted=f"finite numbers of shape {(len(weight), len(weight))}",
            cause="statistics of another tensor or model", remedy="calibrate again with this plan",
        )
    steps = weight.astype(np.float64) / scale.astype(np.float64)
    return compensated_rounding_to(lambda row: np.clip(np.rint(row), -limit, limit), steps, gram).astype(np.int8)


Nearest = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""To the nearest number of a format."""


def compensated_rounding_to(
    nearest: Nearest, steps: NDArray[np.float64], gram: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`steps` `[k, n]`, weights over their scale, as numbers of a format; with compensation where that helps."""
    plain = nearest(steps)
    order = np.argsort(-np.diag(gram), kind="stable")
    rounded = np.empty_like(plain)
    rounded[order] = _round_rows(steps[order], _factor(gram[np.ix_(order, order)]), nearest)
    better = output_error(steps - rounded, gram) < output_error(steps - plain, gram)
    return np.where(better, rounded, plain)


def output_error(error: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """`eᵀ H e` per column of a weight error `[k, n]`, shape `[n]`."""
    result: NDArray[np.float64] = np.einsum("kn,kn->n", error, gram @ error)
    return result


def _factor(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper triangular `U` with `Uᵀ U = H⁻¹`, `H` being damped."""
    size = len(gram)
    mean = float(np.mean(np.diag(gram)))
    damped = gram + np.eye(size) * (DAMPING * mean if mean > 0 else 1.0)
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def _round_rows(steps: NDArray[np.float64], factor: NDArray[np.float64], nearest: Nearest) -> NDArray[np.float64]:
    """Round row by row; errors go to the rows of the block at once and to all later blocks in one product."""
    work, rounded = steps.copy(), np.empty_like(steps)
    for start in range(0, len(steps), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(steps))
        errors = np.empty((stop - start, steps.shape[1]))
        for row in range(start, stop):
            rounded[row] = nearest(work[row])
            errors[row - start] = (work[row] - rounded[row]) / factor[row, row]
            work[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], errors[row - start])
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return rounded
