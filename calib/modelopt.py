"""Activation scales from a checkpoint that NVIDIA's Model Optimizer calibrated.

Two forms, both read from safetensors and both one number a tensor: the calibrated maximum in a state dictionary
(`MODULE.input_quantizer._amax`), and the scale of an exported checkpoint (`MODULE.input_scale`, the maximum over 448
for FP8 and over 127 for INT8).  The state dictionary itself is a pickle, which is not read here; docs/engines.md shows
the line that writes its maxima as safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.errors import CalibrationError

AMAX, SCALE = ".input_quantizer._amax", ".input_scale"
TOPS = {"F8_E4M3": 448.0, "I8": 127.0}
"""Largest stored value by the type of the weight that a scale belongs to."""
FLOOR = 2.0**-20
"""Least maximum; a scale of zero is refused by every backend."""


class FlooredScale(UserWarning):
    """A checkpoint holds scales that are not above zero."""


@dataclass(frozen=True)
class Imported:
    """What a checkpoint gave.

    Args:
        table: the starting table with the checkpoint's scales in it.
        taken: tensors whose scales are the checkpoint's.
        left: tensors that keep theirs, with the reason.
    """

    table: ScaleTable
    taken: tuple[str, ...]
    left: Mapping[str, str]


def read_maxima(path: Path) -> dict[str, float]:
    """Largest activation by module path.

    Raises:
        CalibrationError: no safetensors file, no scales in it, one that is not a single finite number, or a scale of
            an unknown number format.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, float] = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = list(file.keys())
            for name in sorted(names):
                suffix = next((s for s in (AMAX, SCALE) if name.endswith(s)), None)
                if suffix is None:
                    continue
                module = name.removesuffix(suffix)
                values = np.asarray(file.get_tensor(name), np.float64)
                if values.size != 1 or not np.isfinite(values).all():
                    raise _bad(f"{path.name}: {name}", f"{values.size} values" if values.size != 1 else f"{values}",
                               "one finite number", "scales per channel or block have no integer product")
                factor = 1.0 if suffix == AMAX else _top(path, module, file, names)
                found[module] = float(values.reshape(())) * factor
    except (OSError, SafetensorError) as error:
        raise _bad(str(path), f"{error}", "a safetensors file", "a pickle, or a file that was cut short") from error
    if not found:
        raise _bad(str(path), f"{len(names)} tensors, none of them a scale", f"names ending in {AMAX} or {SCALE}",
                   "the checkpoint was not quantized, or keeps its scales in another file")
    return found


def _top(path: Path, module: str, file: object, names: list[str]) -> float:
    weight = f"{module}.weight"
    kind = file.get_slice(weight).get_dtype() if weight in names else "none"  # type: ignore[attr-defined]
    if kind not in TOPS:
        raise _bad(f"{path.name}: {module}{SCALE}", f"a scale beside a weight of type {kind}",
                   f"one of {', '.join(TOPS)}", "a number format that this reader does not know")
    return TOPS[kind]


def _bad(where: str, found: str, wanted: str, cause: str) -> CalibrationError:
    return CalibrationError(
        where, found=found, wanted=wanted, cause=cause,
        remedy="calibrate with quantempo, or export the maxima as docs/engines.md shows",
    )


def import_maxima(table: ScaleTable, plan: QuantPlan, maxima: Mapping[str, float]) -> Imported:
    """A scale table with a checkpoint's maxima in place of calibrated ranges.

    Each tensor gets `scale = maximum / (2^(bits-1) - 1)` in every group, symmetric, as the checkpoint means it.  Where
    several sites read one tensor, the largest of their maxima counts.  Outputs of convolutions, which such checkpoints
    do not hold, and centred tensors, whose scales belong to other values, keep what they have.

    Args:
        table: calibrated, or from anywhere else.
        plan: its plan.
        maxima: by module path.

    Raises:
        CalibrationError: not one module of the plan is in the checkpoint.
    """
    wanted: dict[str, float] = {}
    bits: dict[str, int] = {}
    for site in plan.quantized():
        settings = plan.settings(site)
        if settings is not None and site.module in maxima:
            wanted[site.tensor] = max(wanted.get(site.tensor, maxima[site.module]), maxima[site.module])
            bits[site.tensor] = settings.activation_bits
    if not wanted:
        raise _bad("scales of a checkpoint", f"modules such as {next(iter(sorted(maxima)), 'none')}",
                   f"modules such as {plan.sites[0].module}", "the checkpoint is of another model")
    tensors, left = dict(table.tensors), {}
    for name, scales in table.tensors.items():
        if name not in wanted:
            left[name] = "not in the checkpoint"
        elif scales.centre is not None:
            left[name] = "centred: its scales are those of other values"
        else:
            tensors[name] = _constant(wanted[name], bits[name], len(scales.scale))
    floored = sorted(name for name in wanted if wanted[name] < FLOOR and name not in left)
    if floored:
        warnings.warn(
            f"{len(floored)} scales of the checkpoint are not above zero and are set to the least: {floored[0]}",
            FlooredScale, stacklevel=2,
        )
    taken = tuple(sorted(set(table.tensors) - set(left)))
    return Imported(ScaleTable(table.partition, tensors), taken, dict(sorted(left.items())))


def _constant(maximum: float, bits: int, groups: int) -> TensorScales:
    scale = np.full(groups, max(maximum, FLOOR) / (2 ** (bits - 1) - 1), np.float32)
    return TensorScales(scale, np.full(groups, 2 ** (bits - 1), np.int32), scale.copy())
