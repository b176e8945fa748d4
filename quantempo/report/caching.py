"""What feature caching does to fidelity and time: runs with it, without it, and with it but without corrections."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quantempo.contracts.cache import FULL, CachePlan, reuse_name
from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.program import FITTED_GUIDANCE, StepProgram
from quantempo.contracts.variants import Vectors
from quantempo.devices.opening import bundle_dialect
from quantempo.engines.registry import open_engine
from quantempo.inspection import cache_facts
from quantempo.quality import Images
from quantempo.report.measure import Fidelity, ReportOptions, Sampler, Subject, main_graph
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.bundle_cache import denoisers
from quantempo.runtime.session import Session
from quantempo.stages.cache_runs import graph_corrections
from quantempo.stages.cache_stage import FIT_REPORT
from quantempo.stages.dialects import GraphChoice, lower_graphs


def measure_cache(
    subject: Subject, quantized: Session, floating: Session, options: ReportOptions, drawn: Mapping[str, Images]
) -> tuple[dict[str, Any], dict[str, float]] | None:
    """Facts about fidelity and about time; `None` for a bundle without caching.

    Measured at the cached step count that is nearest to the report's, at the guidance scale of the plan.

    Args:
        subject: the bundle with its float reference.
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
    guidance = bundle.cached_program(steps).options.get(FITTED_GUIDANCE, options.guidance[0])
    here = replace(options, steps=steps, guidance=(guidance,))
    if steps == options.steps and guidance == options.guidance[0]:
        wanted, plain = drawn["float"], drawn["uncached"]
    else:
        wanted = Sampler(floating, here).images(options.samples, guidance)
        plain = Sampler(quantized, here).images(options.samples, guidance)
    cached = Sampler(quantized, here, feature_cache="plan").images(options.samples, guidance)
    naive = naive_images(subject, here)
    fidelity: dict[str, Any] = {
        "policy": facts["policy"], "steps": steps, "guidance": guidance, "reused": facts["reused"][str(steps)],
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


def naive_images(subject: Subject, options: ReportOptions) -> Images:
    """Images of quantization and reuse stacked blindly: every N-th call refreshes, one scale table, no corrections.

    N is the plan's mean distance of refreshes, at least 2.
    """
    from quantempo.export.graph_files import load_graph, write_graphs
    from quantempo.export.lower_variant import variant_plan, variant_table
    from quantempo.export.quantize_attention import stored_ranges
    from quantempo.export.variants import cut_variants
    from quantempo.export.weights import stored_weights

    bundle, reuse = subject.bundle, reuse_name(0)
    index = bundle.manifest.cache
    assert index is not None
    file = bundle.path(index.plan)
    plan = from_data(CachePlan, parse_json(file.read_bytes(), str(file)), file.name)
    dialect = bundle_dialect(options.engine, bundle) or main_graph(bundle).dialect
    entries = denoisers(bundle.manifest, dialect)
    full = load_graph(bundle.path(entries[FULL].file))
    source = load_graph(subject.reference.path(subject.reference.manifest.graphs["full.float-f32"].file))
    graph = cut_variants(source, plan.cuts, None, graph_corrections(plan.corrections)).variants[reuse].graph
    part, table = variant_plan(subject.plan, graph), bundle.scale_table()
    assert table is not None
    choice = GraphChoice((dialect,), ranges=stored_ranges(full, "fp8"))
    made = {reuse: graph} if not part.quantized() else lower_graphs(
        graph, part, variant_table(table, part), stored_weights(full, subject.plan), choice, reuse
    )  # fmt: skip
    program = even_program(bundle, plan, options.steps, entries[reuse])
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        (written,) = write_graphs(Path(folder), made).values()
        replaced = bundle.path(entries[reuse].file)

        def opened(path: Path, asked: EngineOptions) -> Engine:
            return open_engine(options.engine, Path(folder) / written.file if path == replaced else path, asked)

        plain = _Uncorrected(bundle.root, bundle.manifest, bundle.digest)
        with Session(plain, opened, EngineOptions(threads=options.threads), dialect) as session:
            return Sampler(session, options, program).images(options.samples, options.guidance[0])


def even_program(bundle: OpenBundle, plan: CachePlan, steps: int, reusing: GraphEntry) -> StepProgram:
    """The bundle's program with a refresh at every N-th call and the first reusing variant elsewhere."""
    program, schedule = bundle.program(steps), plan.schedules[str(steps)]
    refreshes = len(schedule.calls) * (1.0 - plan.parameters.get("share", 0.0))
    if schedule.decide is None:
        refreshes = schedule.calls.count(FULL)
    interval = max(2, round(len(schedule.calls) / max(refreshes, 1.0)))
    vectors = bundle.vectors()
    rows = {spec.name: 0 for spec in reusing.inputs if spec.name in vectors}
    calls = [
        call if i % interval == 0 else replace(call, graph=reuse_name(0), vectors=rows)
        for i, call in enumerate(program.calls)
    ]
    return replace(program, calls=tuple(calls))


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
