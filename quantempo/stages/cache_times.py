"""How long calls take while a cache is fitted: what predicted times are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

from quantempo.stages.cache_runs import CacheSettings, VariantBench

TIMED_RUNS = 5


def call_times(bench: VariantBench, settings: CacheSettings) -> dict[str, float]:
    """Milliseconds of one call of each quantized variant for a guided sample."""
    return {name: milliseconds(bench, settings, "quantized", name) for name in bench.set.variants}


def milliseconds(
    bench: VariantBench, settings: CacheSettings, mode: Literal["float", "quantized"], variant: str
) -> float:
    """Milliseconds of one call for a guided sample."""
    binding = bench.engine(mode, variant).bind({"batch": 2 if settings.guidance > 1 else 1})
    binding.run()
    return median_ms(binding.run)


def median_ms(action: Callable[[], object]) -> float:
    """Milliseconds of an action, the median of some runs."""
    times = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
