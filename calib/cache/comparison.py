"""Whether one of two candidates has lower errors on the same samples, by more than chance."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Errors = NDArray[np.float64]
"""One value per sample."""


def clearly_lower(one: Errors, other: Errors) -> bool:
    """Whether errors of the same samples are lower in `one`, by more than the standard error of their difference."""
    gain = other - one
    return float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain))


def clearly_lower_in_decibels(one: Errors, other: Errors) -> bool:
    """`clearly_lower` of logarithms, in which a few samples with large errors do not decide alone."""
    tiny = np.finfo(np.float64).tiny
    return clearly_lower(np.log(np.maximum(one, tiny)), np.log(np.maximum(other, tiny)))


def better(one: Errors, other: Errors) -> bool:
    """Whether errors of the same samples are lower in `one`: their mean, and by more than chance.

    A few samples with large errors may make any mean uncertain, so it is enough if the fall is clear in decibels.
    """
    lower = float(one.mean()) < float(other.mean())
    return lower and (clearly_lower(one, other) or clearly_lower_in_decibels(one, other))
