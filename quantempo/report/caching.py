"""What feature caching does to fidelity and time: runs with it, without it, and with it but without corrections."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from quantempo.contracts.cache import CachePlan, cached_program
from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.variants import Vectors
from quantempo.devices.opening import bundle_dialect
from quantempo.engines.registry import open_engine
from quantempo.inspection import cache_facts
from quantempo.quality import Images
from quantempo.report.measure import Fidelity, ReportOptions, Sampler
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.session import Session
from quantempo.stages.cache_stage import FIT_REPORT


def measure_cache(
    quantized: Session, floating: Session, options: ReportOptions, drawn: Mapping[str, Images]
) -> tuple[dict[str, Any], dict[str, float]] | None:
    """Facts about fidelity and about time; `None` for a bundle without caching.

    Measured at the cached step count that is nearest to the report's, at the headline guidance.

    Args:
        quantized: the bundle.
        floating: its float reference.
        options: of the report.
        drawn: images `float` and `uncached` at the headline guidance and the report's own step count.
    """
    bundle = quantized.bundle
    facts = cache_facts(bundle)
    if facts is None:
        return None
    steps = min(bundle.cached_steps, key=lambda count: (abs(count - options.steps), count))
    guidance, here = options.guidance[0], replace(options, steps=steps)
    if steps == options.steps:
        wanted, plain = drawn["float"], drawn["uncached"]
    else:
        wanted = Sampler(floating, here).images(options.samples, guidance)
        plain = Sampler(quantized, here).images(options.samples, guidance)
    cached = Sampler(quantized, here, feature_cache="plan").images(options.samples, guidance)
    naive = naive_images(bundle, here)
    fidelity: dict[str, Any] = {
        "policy": facts["policy"], "steps": steps, "reused": facts["reused"][str(steps)],
        "psnr_db": Fidelity.of(cached, wanted).psnr_db, "psnr_db_uncached": Fidelity.of(plain, wanted).psnr_db,
        "psnr_db_naive": Fidelity.of(naive, wanted).psnr_db,
    }
    searched = fit_report(bundle).get("auto")
    if searched is not None:
        fidelity["auto"] = searched
    return fidelity, trajectory_times(quantized, here)


def fit_report(bundle: OpenBundle) -> Mapping[str, Any]:
    """What the fit measured, from the sidecar; empty where it is gone."""
    file = bundle.root / FIT_REPORT
    return parse_json(file.read_bytes(), str(file)) if file.is_file() else {}


def policy_lines(searched: Mapping[str, Any]) -> list[str]:
    """The table that `auto` chose from, as lines."""
    budget = searched["budget"]
    asked = [f"at least {budget['min_psnr_db']:g} dB"] if budget.get("min_psnr_db") else []
    asked += [f"at most {budget['max_ms']:g} ms"] if budget.get("max_ms") else []
    lines = [f"policies at {searched['steps']} steps, budget: {' and '.join(asked) or 'none'} (p: on the Pareto front)"]
    for row in searched["table"]:
        measured = "" if row["measured_ms"] is None else f", measured {row['measured_ms']:.1f} ms"
        lines.append(
            f"  {'*' if row['taken'] else ' '}{'p' if row['pareto'] else ' '} {row['name']:16s} "
            f"{row['psnr_db']:6.2f} dB, predicted {row['predicted_ms']:.1f} ms{measured}"
            + (", loses to float with fewer steps" if row["loses_to_fewer_steps"] else "")
        )
    return lines


class _Uncorrected(OpenBundle):
    """A bundle whose corrections do nothing."""

    def vectors(self) -> Vectors:
        """Gains of 1 and biases of 0."""
        found = super().vectors()
        return {n: np.full_like(a, 1.0 if n.endswith(".gain") else 0.0) for n, a in found.items()}


def naive_images(bundle: OpenBundle, options: ReportOptions) -> Images:
    """Images of the bundle's cache plan without any correction."""
    index = bundle.manifest.cache
    assert index is not None
    file = bundle.path(index.plan)
    plan = from_data(CachePlan, parse_json(file.read_bytes(), str(file)), file.name)
    vectors = bundle.vectors()
    inputs = {e.variant: [s.name for s in e.inputs if s.name in vectors] for e in bundle.manifest.graphs.values()}
    program = cached_program(bundle.program(options.steps), plan, plan.config, inputs)

    def opened(path: Any, asked: EngineOptions) -> Engine:
        return open_engine(options.engine, path, asked)

    dialect = bundle_dialect(options.engine, bundle)
    plain = _Uncorrected(bundle.root, bundle.manifest, bundle.digest)
    with Session(plain, opened, EngineOptions(threads=options.threads), dialect) as session:
        return Sampler(session, options, program).images(options.samples, options.guidance[0])


def trajectory_times(session: Session, options: ReportOptions) -> dict[str, float]:
    """Median milliseconds of a whole run of one guided sample, with and without caching in alternation."""
    given = Sampler(session, options).conditioning(0, 1)

    def once(mode: Literal["none", "plan"]) -> float:
        timing = session(
            **given, batch_size=1, seed=0, guidance_scale=options.guidance[0], output_type="latent",
            num_inference_steps=options.steps, feature_cache=mode,
        ).timings
        return 1e3 * timing.total

    modes: tuple[Literal["plan", "none"], ...] = ("plan", "none")
    for mode in modes:
        once(mode)
    rounds = [[once(mode) for mode in modes] for _ in range(options.timing_rounds)]
    cached, plain = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"trajectory_ms": cached, "trajectory_ms_uncached": plain}
