"""Masks as a policy: at every second call, each attention and MLP layer is computed or reused by itself.

`masks:SHARE` learns by gradient which ones (Learning-to-Cache); `greedy:SHARE` takes those whose outputs move least,
one by one, as a baseline.  Masks differ from call to call and each needs a graph, so they are merged down to
`MAX_VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.cache.masks import Masks, SublayerErrors, cuts_of, greedy
from quantempo.calib.cache.schedules import Schedule, every
from quantempo.contracts.cache import SublayerCut, merge_masks, reuse_name
from quantempo.contracts.engine import Buffer
from quantempo.contracts.program import StepProgram
from quantempo.errors import RequestError
from quantempo.runtime.loop import Observation
from quantempo.stages.cache_runs import CacheParts, CacheSettings, Float32s, VariantBench
from quantempo.stages.cache_schedules import few_batches
from quantempo.stages.caching import CacheFit, Chosen, fit_chosen
from quantempo.stages.policy_words import parse_share
from quantempo.stages.teacher import GIVEN

POLICIES = ("masks", "greedy")
INTERVAL, MAX_VARIANTS = 2, 4
SAMPLES = 8
"""Trajectories that masks are chosen on."""


def parse_masks(text: str) -> tuple[str, float]:
    """Name, and the share of the sublayers that reusing calls reuse.

    Raises:
        RequestError: not such a word.
    """
    return parse_share(
        text, POLICIES, "masks:SHARE or greedy:SHARE, with a share above 0, at most 1", lambda share: 0 < share <= 1,
        example="0.7",
    )


def fit_masks(parts: CacheParts, settings: CacheSettings, folder: Path, steps: Sequence[int]) -> CacheFit:
    """Choose masks on the float model, then fit scales and corrections as for any fixed schedule.

    Raises:
        RequestError: a policy that is unknown, a model without attention and MLP layers, or one without a module.
    """
    name, share = parse_masks(settings.policy)
    whole = settings.cut
    if not isinstance(whole, SublayerCut):
        raise RequestError(
            "cache policy", found=f"{settings.policy} with a {whole.kind} cut", wanted="a cut of sublayers",
            cause="a mask says which attention and MLP layers are reused",
            remedy="leave the cut out, or choose every:N for this model",
        )
    (folder / "choose").mkdir()
    bench = VariantBench(parts, folder / "choose", {reuse_name(0): whole}, ())
    try:
        masks: dict[int, Masks] = {}
        for n in sorted(steps):
            program = parts.exported.program(n)
            refreshes = every(len(program.calls), INTERVAL)
            pairs = (len(program.calls) - len(refreshes)) * sum(map(len, whole.mask))
            choose = _learned if name == "masks" else _greedy
            masks[n] = choose(bench, settings, program, refreshes, max(1, round(share * pairs)))
    finally:
        bench.close()
    flat = [cut for n in sorted(masks) for cut in cuts_of(masks[n], whole.depth, whole.blocks)]
    cuts, names = merge_masks(flat, MAX_VARIANTS)
    chosen, start = {}, 0
    for n in sorted(masks):
        calls = len(masks[n])
        chosen[n] = Chosen(every(calls, INTERVAL), names[start : start + calls])
        start += calls
    (folder / "fit").mkdir()
    bench = VariantBench(parts, folder / "fit", cuts, ())
    try:
        return fit_chosen(bench, settings, cuts, chosen, {"interval": float(INTERVAL), "share": share})
    finally:
        bench.close()


def _greedy(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, refreshes: Schedule, count: int
) -> Masks:
    writes = bench.set.variants["full"].writes
    errors = SublayerErrors(len(program.calls), refreshes, writes)

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        errors.observe(seen.index, {name: outputs[name].array for name in writes})

    loop = bench.loop("float", {})
    for batch in few_batches(bench, settings, program, SAMPLES, SAMPLES):
        bench.run(loop, program, batch, watch)
    return greedy(errors.errors, refreshes, count)


def _learned(
    bench: VariantBench, settings: CacheSettings, program: StepProgram, refreshes: Schedule, count: int
) -> Masks:
    from quantempo.calib.tuning.router import Trajectories, train_router

    denoiser, load = bench.parts.manifest.denoiser, bench.parts.module
    if load is None:
        raise RequestError(
            "cache policy", found="learned masks for a model without its torch module", wanted="the module",
            cause="masks are learned by gradient", remedy="take greedy:SHARE",
        )
    fed: list[Float32s] = []
    rows: dict[str, NDArray[Any]] = {}

    def watch(seen: Observation, outputs: Mapping[str, Buffer]) -> None:
        fed.append(outputs[GIVEN + denoiser.sample_input].array.copy())
        rows.update({c.name: outputs[GIVEN + c.name].array.copy() for c in denoiser.classes})

    loop = bench.loop("shown", {})
    (batch,) = few_batches(bench, settings, program, SAMPLES, SAMPLES)
    bench.run(loop, program, batch, watch)
    points = Trajectories(np.stack(fed), [call.timestep for call in program.calls], rows)
    return train_router(load(), points, refreshes).reused_count(count)
