"""A bundle made again from what it holds about itself, and compared file by file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantempo.contracts.manifest import Manifest
from quantempo.errors import NotReproduced
from quantempo.pipeline import compile_model
from quantempo.progress import Progress
from quantempo.recipe_file import read_recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Reproduction:
    """What came out.

    Args:
        bundle, again: the old one and the new one.
        files: names of files that differ, or that only one of them has, sorted.
        provenance: what the two were made with, where that differs: name, then, now.
    """

    bundle: OpenBundle
    again: OpenBundle
    files: tuple[str, ...]
    provenance: tuple[tuple[str, str, str], ...]

    @property
    def same(self) -> bool:
        """Whether manifest and all files are the same to the last byte."""
        return self.bundle.digest == self.again.digest

    def check(self) -> None:
        """Refuse a bundle that came out otherwise.

        Raises:
            NotReproduced: names the files, and what it was made with that is different now.
        """
        if self.same:
            return
        first = ", ".join(self.files[:5]) + (", …" if len(self.files) > 5 else "")
        changed = "; ".join(f"{name} was {then}, is {now}" for name, then, now in self.provenance)
        raise NotReproduced(
            f"bundle {self.bundle.root}", found=f"other bytes in {len(self.files)} files: {first or 'the manifest'}",
            wanted=f"the digest {self.bundle.digest[:12]}…, not {self.again.digest[:12]}…",
            cause=changed or "another kind of CPU: engines choose kernels by it, and their rounding reaches the scales",
            remedy=f"compare the two with `quantempo report`; the new one lies at {self.again.root}",
        )


def reproduce(
    bundle: Path,
    model: Path,
    out: Path,
    *,
    scheduler: Path | None = None,
    calibration: Path | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    work: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Reproduction:
    """Compile a model again with the recipe and the plan of a bundle, and compare the two.

    Latencies are not measured, so sidecars are not compared.

    Args:
        bundle: the bundle that is there.
        model: what it was made from.
        out: where the new one goes.
        scheduler: its scheduler, where it is a denoiser directory.
        calibration: the file of conditioning arrays, where it was calibrated on one; labels are in the recipe.
        arrays: the same, as arrays.
        work: folder for results of stages; `None` for the user's.
        overwrite: replace what an earlier run left at `out`.
        progress: where stages are shown.

    Raises:
        PlanError: the model is another one; names both digests.
        QuantempoError: as a compile does.
    """
    old = read_bundle(bundle)
    recipe = read_recipe([old.path(RECIPE)])
    if calibration is not None:
        recipe = dataclasses.replace(recipe, calibration=str(calibration))
    plan = None if old.manifest.plan is None else old.path(old.manifest.plan)
    made = compile_model(
        model, out, recipe, scheduler=scheduler, plan_file=plan, arrays=arrays, work=work, guard="off",
        overwrite=overwrite, progress=progress,
    )
    again = read_bundle(made.bundle.root)
    return Reproduction(old, again, _differing(old.manifest, again.manifest), _changed(old.manifest, again.manifest))


def _differing(old: Manifest, new: Manifest) -> tuple[str, ...]:
    return tuple(sorted(n for n in {*old.files, *new.files} if old.files.get(n) != new.files.get(n)))


def _changed(old: Manifest, new: Manifest) -> tuple[tuple[str, str, str], ...]:
    then, now = old.provenance, new.provenance
    return tuple(
        (name, then.get(name, "not there"), now.get(name, "not there"))
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    )
