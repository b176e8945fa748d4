"""Every error that quantempo raises on purpose, in five parts.

A message says where it happened, what was found, what was wanted, the likely cause and the next step.  Classes are for
programs to catch; the words are for people, and the tests match them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantempoError(Exception):
    """Base of all our errors.

    Args:
        where: the file, tensor, argument or stage, as the user knows it.
        found: what is there.
        wanted: what would have been right.
        cause: the likely reason.
        remedy: what to do next.
    """

    def __init__(self, where: str, *, found: str, wanted: str, cause: str, remedy: str) -> None:
        self.where, self.found, self.wanted, self.cause, self.remedy = where, found, wanted, cause, remedy
        super().__init__(
            f"{where}: found {found}, wanted {wanted}.\n  Likely cause: {cause}.\n  Next step: {remedy}."
        )


class ModelError(QuantempoError):
    """The model directory cannot be used."""


class NotAModelDirectory(ModelError):
    """No diffusers pipeline or denoiser lies at the given path."""


class PickleCheckpoint(ModelError):
    """The weights are only there as a pickle, which can run code when it is loaded."""


class UnsupportedModel(ModelError):
    """The denoiser or pipeline is of a kind that quantempo does not know how to feed."""


class ExportError(QuantempoError):
    """A graph could not be traced, or a pass broke its contract."""


class BatchLoop(ExportError):
    """A model's Python loops over the samples of a batch, so that a graph has a fixed batch."""


class SchedulerRefused(QuantempoError):
    """The scheduler is not a linear map in sample, prediction and noise, so it has no step program."""


class PlanError(QuantempoError):
    """A quantization plan does not fit the model or cannot be lowered."""


class NoSites(PlanError):
    """Nothing would be quantized."""


class CalibrationError(QuantempoError):
    """Calibration could not produce usable statistics."""


class NonFiniteActivation(CalibrationError):
    """A tensor held NaN or infinity while the trajectories ran."""


class ScaleMissing(CalibrationError):
    """A (tensor, group) pair has no scale; there is no default scale."""


class DataError(QuantempoError):
    """A JSON document does not have the shape that its type asks for."""


class UnknownKey(DataError):
    """A JSON document holds a key that its type does not have."""


class BundleError(QuantempoError):
    """A bundle directory cannot be read."""


class DigestMismatch(BundleError):
    """A file's bytes are not those that the manifest names."""


class UnsafePath(BundleError):
    """A path in a manifest or graph leaves the bundle, or is a link."""


class NewerBundle(BundleError):
    """The bundle was written by a newer quantempo."""


class UnknownFeature(BundleError):
    """The bundle requires a feature that this reader does not have."""


class QualityNotReached(QuantempoError):
    """A bundle is further from float than was asked for."""


class NotReproduced(QuantempoError):
    """A bundle that was made again has other bytes."""


class OutputExists(QuantempoError):
    """The output path is taken."""


class DiskFull(QuantempoError):
    """There is no room for a file; what was complete before is untouched."""


class RequestError(QuantempoError, ValueError):
    """An argument of a call is outside what the bundle takes."""


class EngineError(QuantempoError):
    """An engine could not be opened or run."""


class FusionError(EngineError):
    """An engine would compute quantized products in float: right numbers, no speed."""


class MissingExtra(QuantempoError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, where: str, *, package: str, extra: str, instead_of: str = "") -> None:
        first = f"pip uninstall -y {instead_of} && " if instead_of else ""
        super().__init__(
            where,
            found=f"no installed package {package!r}",
            wanted=f"the extra {extra!r}",
            cause="quantempo was installed without this extra",
            remedy=f"run: {first}pip install 'quantempo[{extra}]'",
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word closest to a misspelt one, as a phrase for `remedy`, or the list of all known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + (", ".join(names) or "none")
