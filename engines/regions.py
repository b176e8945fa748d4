"""Finding the regions of a model that quantization slows down, so that they can be left in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantempo.contracts.engine import Engine
from quantempo.engines.guard import Timing, Variant, Verdict, compare
from quantempo.errors import PlanError

Make = Callable[[frozenset[str]], Variant]
"""From the ids of the sites to quantize to something that can be timed."""


@dataclass(frozen=True)
class Region:
    """Sites that are quantized, or left, together.

    Args:
        name: for people, e.g. `attention products`.
        sites: ids.
    """

    name: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class RegionVerdict:
    """What quantizing a region brings.

    Args:
        region: its name; `NAME[3:6]` for a part of it.
        sites: ids.
        gain_ms: milliseconds a call that quantizing it saves; below zero it costs time.
        loses: whether the loss stands out of the noise.
        ratio, noise: of the model with the region quantized, against the model without.
    """

    region: str
    sites: tuple[str, ...]
    gain_ms: float
    loses: bool
    ratio: float
    noise: float


@dataclass(frozen=True)
class RegionReport:
    """What a search found.

    Args:
        revert: sites to leave in float, sorted.
        regions: verdicts in the order in which they were reached.
        verdict: what is left quantized, against the float twin.
    """

    revert: tuple[str, ...]
    regions: tuple[RegionVerdict, ...]
    verdict: Verdict


def revert_losing(
    regions: Sequence[Region], make: Make, twin: Variant, timing: Timing | None = None
) -> RegionReport:
    """Time each region's share, leave in float what loses, and compare the rest with the float twin.

    A region is judged by taking it out of the quantized model: what then becomes faster loses.  A losing region is
    halved as long as a half still loses by itself, so that of a mixed region only the guilty part goes.  (Inside a
    region that wins as a whole, losers stay hidden; choose regions of one kind.)  If the rest is still slower than the
    twin, everything is reverted: then `revert` holds all sites and the verdict says so.

    Args:
        regions: disjoint.
        make: lowers and opens the model with exactly these sites quantized.
        twin: the float model.
        timing: see there.

    Raises:
        PlanError: a site is in two regions, or there is none.
        EngineError: a variant does not run.
    """
    every = _all_sites(regions)
    with _Search(make, timing or Timing(), every) as search:
        for region in regions:
            search.judge(region)
    left = search.quantized
    if left:
        verdict = compare(twin, make(left), search.timing)
        if verdict.outcome == "slower":
            left = frozenset()
            verdict = replace(verdict, note="still slower than the float model: nothing is left quantized")
    else:
        verdict = replace(compare(twin, twin, search.timing), note="every region loses: nothing is left quantized")
    return RegionReport(tuple(sorted(every - left)), tuple(search.verdicts), verdict)


def time_regions(regions: Sequence[Region], make: Make, timing: Timing | None = None) -> tuple[RegionVerdict, ...]:
    """What each region brings, measured by taking it alone out of the quantized model; nothing is reverted.

    Raises:
        PlanError, EngineError: as `revert_losing`.
    """
    with _Search(make, timing or Timing(), _all_sites(regions)) as search:
        for region in regions:
            search.measure(region)
    return tuple(search.verdicts)


def _all_sites(regions: Sequence[Region]) -> frozenset[str]:
    every = [site for region in regions for site in region.sites]
    if not every or len(set(every)) < len(every):
        raise PlanError(
            "latency guard: regions", found="a site twice" if every else "no site",
            wanted="disjoint regions with sites", cause="the regions were put together wrongly",
            remedy="name each site once",
        )
    return frozenset(every)


class _Lent:
    """An engine that stays open when a comparison closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Nothing: the search closes it."""


class _Search:
    """The sites that are still quantized, and what was found so far."""

    def __init__(self, make: Make, timing: Timing, quantized: frozenset[str]) -> None:
        self.make, self.timing, self.quantized = make, timing, quantized
        self.verdicts: list[RegionVerdict] = []
        self._engine: Engine | None = None
        self._variant: Variant | None = None

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._variant = None

    def _whole(self) -> Variant:
        """What all regions are compared with, made and opened once."""
        if self._variant is None:
            self._variant = self.make(self.quantized)
        variant = self._variant

        def lend() -> Any:
            if self._engine is None:
                self._engine = variant.open()
            return _Lent(self._engine)

        return replace(variant, open=lend)

    def judge(self, region: Region) -> None:
        """Revert what loses of a region."""
        if not self.measure(region).loses:
            return
        for part in self._guilty(region):
            self.quantized -= set(part.sites)
        self._close()

    def _guilty(self, region: Region) -> list[Region]:
        """The parts of a losing region that lose by themselves; the region itself where no half does."""
        if len(region.sites) == 1:
            return [region]
        middle = len(region.sites) // 2
        halves = [
            Region(f"{region.name}[{start}:{end}]", region.sites[start:end])
            for start, end in ((0, middle), (middle, len(region.sites)))
        ]
        losing = [half for half in halves if self.measure(half).loses]
        return [part for half in losing for part in self._guilty(half)] or [region]

    def measure(self, region: Region) -> RegionVerdict:
        """Time the model without a region against the model with it."""
        without = self.make(self.quantized - set(region.sites))
        verdict = compare(without, self._whole(), self.timing)
        found = RegionVerdict(
            region.name, region.sites, verdict.baseline_ms - verdict.candidate_ms, verdict.outcome == "slower",
            verdict.ratio, verdict.noise,
        )
        self.verdicts.append(found)
        return found
