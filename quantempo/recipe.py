"""What the user may choose when a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantempo.errors import PlanError, nearest

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Settings of a compile; every field has a default that works.

    Args:
        precision: `int8`, or `float32` for a float bundle.
        groups: `auto`, `single`, `uniform:G` or `optimal:G`.
        range_method: how activations are clipped; see `quantempo.calib.ranges`.
        activation_bits: 8, or fewer (simulated in 8-bit storage).
        centre: shift channels per group where that is free (see `quantempo.export.centring`).
        weight_method: `gptq` (scales by `mse`, then rounding that makes up for its own errors on the calibration
            data), or plain rounding with scales by `mse` or `minmax`.
        samples: calibration trajectories in all; guidance scales and step counts share them evenly.
        batch: samples that run together.
        guidance: guidance scales that the calibration covers.
        steps: step counts that the calibration covers, with the model's own scheduler.
        schedulers: further scheduler folders whose trajectories contribute.
        classes: labels to calibrate on; empty means all labels with a name, or else spread over all.
        seed: of the calibration noise; results are deterministic in it.
        keep, exclude: module-path patterns kept in float (`keep` and `exclude` are one list under two names).
        max_steps: programs for 1 to this many steps go into the bundle.
        default_guidance: what a run of the bundle uses when the caller does not say.
        reference: write the float twin beside the bundle, for reports and comparisons.
        threads: engine threads while calibrating; 0 lets the engine choose.
    """

    precision: Literal["int8", "float32"] = "int8"
    groups: str = "auto"
    range_method: str = "minmax"
    activation_bits: int = 8
    centre: bool = True
    weight_method: Literal["gptq", "mse", "minmax"] = "gptq"
    samples: int = 256
    batch: int = 16
    guidance: tuple[float, ...] = (1.0, 1.5, 4.0, 7.0)
    steps: tuple[int, ...] = (20, 50)
    schedulers: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    seed: int = 0
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_steps: int = 100
    default_guidance: float = 1.5
    reference: bool = True
    threads: int = 0
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        for field, known in (("precision", ("int8", "float32")), ("weight_method", ("gptq", "mse", "minmax"))):
            value = str(getattr(self, field))
            if value not in known:
                raise _refuse(field, value, " or ".join(known), nearest(value, known))
        if not 2 <= self.activation_bits <= 8:
            raise _refuse("activation_bits", self.activation_bits, "2 to 8", "take 8; fewer are simulated")
        if not self.steps or min(self.steps) < 1:
            raise _refuse("steps", self.steps, "at least one positive step count", "give, for example, 20")
        if not self.guidance or min(self.guidance) < 0:
            raise _refuse("guidance", self.guidance, "at least one scale of 0 or more", "give, for example, 1.5")
        if self.samples < 1 or self.batch < 1:
            raise _refuse("samples", self.samples, "at least one sample and a batch of at least 1", "give 32")


def _refuse(field: str, found: object, wanted: str, remedy: str) -> PlanError:
    return PlanError(
        f"recipe, {field}", found=repr(found), wanted=wanted, cause="a slip in the recipe or flag", remedy=remedy
    )
