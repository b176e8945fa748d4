"""Turns measurements into `report/report.json`, a table and a sheet of images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantempo.contracts.codec import to_data
from quantempo.contracts.table import ScaleTable
from quantempo.devices.choosing import engine_named
from quantempo.errors import QualityNotReached
from quantempo.inspection import site_counts, sizes
from quantempo.progress import Advance, Progress, SilentProgress
from quantempo.quality import LATENT_PEAK, Images, makes_pictures
from quantempo.report.analysis import drifts, noise_by_tensor
from quantempo.report.caching import measure_cache, policy_lines
from quantempo.report.figures import write_figures
from quantempo.report.measure import (
    Fidelity,
    GuidanceResult,
    ReportOptions,
    Sampler,
    Speed,
    Subject,
    measure_populations,
    measure_speed,
    open_judge,
    open_subject,
    session_with_table,
    sessions,
    simulated,
    single_scale_tables,
)
from quantempo.report.page import Pictures, best_single, write_page
from quantempo.report.sheet import AMPLIFY, Panel, contact_sheet, error_panel
from quantempo.report.worst import measure_gains
from quantempo.runtime.session import Session
from quantempo.stages.conditioning import check_arrays

REPORT_VERSION = 1
SHEET_IMAGES = 16
PAGE_IMAGES = 32


@dataclass(frozen=True)
class ReportSummary:
    """A written report."""

    folder: Path
    facts: dict[str, Any]

    def text(self) -> str:
        """The report's table."""
        return table(self.facts) + f"\n\nwrote {self.folder / 'index.html'}, report.json and pictures"

    @property
    def passed(self) -> bool:
        """Whether the bundle is as close to float as was asked for; yes, where nothing was."""
        verdict = self.facts.get("verdict")
        return verdict is None or bool(verdict["passed"])

    def check(self, kept: Path | None = None) -> None:
        """Refuse a bundle that is further from float than was asked for.

        Args:
            kept: where the bundle was put instead of its target.

        Raises:
            QualityNotReached: names the site that costs most.
        """
        if self.passed:
            return
        verdict, quality, worst = self.facts["verdict"], self.facts["quality"], self.facts["analysis"]["worst"]
        where = f"; this bundle lies at {kept}, and nothing was changed at its target" if kept else ""
        first = ", ".join(worst[0]["sites"]) if worst else ""
        raise QualityNotReached(
            f"report {self.folder}", found=f"{quality['psnr_db']:.2f} dB at guidance {quality['guidance']:g}",
            wanted=f"at least {verdict['min_psnr_db']:.2f} dB",
            cause=f"{first} loses most: in float it would give {worst[0]['gain_db']:+.2f} dB" if worst
            else "some sites do not stand 8 bits; a report with --worst 10 names them",
            remedy="keep the sites at the head of the report's list in float (--keep), or calibrate with more samples"
            + where,
        )


def write_report(bundle: Path, options: ReportOptions | None = None, progress: Progress | None = None) -> ReportSummary:
    """Measure a bundle against its float reference and write `BUNDLE/report/`.

    Args:
        bundle: a quantized bundle with `reference/`.
        options: what to measure.
        progress: where stages are shown.

    Raises:
        BundleError: no float reference.
    """
    options, progress = options or ReportOptions(), progress or SilentProgress()
    subject = open_subject(bundle)
    check_arrays(subject.bundle.manifest.denoiser, options.arrays, options.guidance, f"report of {bundle}")
    options = replace(options, engine=engine_named(options.engine, subject.bundle, options.threads))
    # FP8 hardly knows groups: the comparison would say nothing, at a price.
    tables = single_scale_tables(subject) if options.single_scale and not simulated(subject.bundle) else {}
    with sessions(subject, options) as (quantized, floating):
        speed = None
        if not simulated(subject.bundle):
            with progress.stage("speed"):
                speed = measure_speed(quantized, floating, options)
        drawn: dict[str, dict[float, Images]] = {"float": {}, "groups": {}}
        for name, session in (("float", floating), ("groups", quantized)):
            for guidance in options.guidance:
                with progress.stage(f"sample {name}, guidance {guidance:g}") as advance:
                    sampler = Sampler(session, options)
                    drawn[name][guidance] = sampler.images(options.samples, guidance, advance=advance)
        caching = _caching(subject, quantized, floating, options, drawn, progress)
        populations = None
        if options.population and options.judge is not None:
            with progress.stage("accuracy and Fréchet distance") as advance:
                judge = open_judge(options.judge)
                populations = measure_populations(quantized, floating, judge, options, advance)
    with progress.stage("single scales") as advance:
        single = _single_scales(subject, tables, options, advance)
    results = [
        GuidanceResult(
            g, Fidelity.of(drawn["groups"][g], drawn["float"][g]),
            {name: Fidelity.of(images[g], drawn["float"][g]) for name, images in single.items()},
        )
        for g in options.guidance
    ]
    facts = report_facts(subject, options, results, speed)
    if caching is not None:
        facts["cache"] = caching[0]
        facts["speed"].update(caching[1])
    with progress.stage("worst sites") as advance:
        facts["analysis"] = analyse(subject, options, drawn["float"][options.guidance[0]], advance)
    if options.min_psnr_db is not None:
        passed = bool(results[0].groups.psnr_db >= options.min_psnr_db)
        facts["verdict"] = {"min_psnr_db": options.min_psnr_db, "passed": passed}
    if populations is not None:
        facts["quality"].update(
            accuracy=populations.accuracy, accuracy_float=populations.accuracy_float,
            frechet_to_float=populations.frechet_to_float,
            frechet_float_to_float=populations.frechet_float_to_float, population=populations.count,
        )
    folder = bundle / "report"
    folder.mkdir(exist_ok=True)
    _sheet(results[0], drawn, single, facts["simulated"]).save(folder / "sheet.png")
    partition, guidance = subject.bundle.manifest.partition, results[0].guidance
    assert partition is not None
    write_figures(folder, facts["analysis"], partition)
    pictures = Pictures(*(drawn[name][guidance][:PAGE_IMAGES] for name in ("float", "groups")))
    write_page(folder / "index.html", subject.bundle.manifest.name, facts, partition, pictures)
    (folder / "report.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return ReportSummary(folder, facts)


def _caching(
    subject: Subject, quantized: Session, floating: Session, options: ReportOptions,
    drawn: dict[str, dict[float, Images]], progress: Progress,
) -> tuple[dict[str, Any], dict[str, float]] | None:
    if quantized.bundle.manifest.cache is None:
        return None
    head = options.guidance[0]
    with progress.stage("feature caching"):
        images = {"float": drawn["float"][head], "uncached": drawn["groups"][head]}
        return measure_cache(subject, quantized, floating, options, images)


def analyse(subject: Subject, options: ReportOptions, reference: Images, advance: Advance) -> dict[str, Any]:
    """Noise by tensor and group (estimated), drifting ranges, and what the worst sites cost (measured).

    Args:
        subject: the bundle.
        options: how much to measure.
        reference: float images of the headline guidance.
        advance: told after each measured site.
    """
    table = subject.bundle.scale_table()
    assert table is not None
    stats = subject.statistics.stats()
    noise = noise_by_tensor(stats, subject.plan, table)
    tried = noise[: options.worst]
    seeds = reference[: options.worst_samples]
    gains = measure_gains(subject, table, tried, seeds, options, advance) if tried else ()
    return {
        "tensors": [
            {"tensor": n.tensor, "sites": list(n.sites), "sqnr_db": [round(v, 3) for v in n.sqnr_db]} for n in noise
        ],
        "drift": [to_data(drift) for drift in drifts(stats, subject.plan)],
        "worst": [to_data(gain) for gain in gains], "worst_samples": len(seeds),
    }


def _single_scales(
    subject: Subject, tables: dict[str, ScaleTable], options: ReportOptions, advance: Any
) -> dict[str, dict[float, Images]]:
    found: dict[str, dict[float, Images]] = {}
    for done, (name, scales) in enumerate(tables.items()):
        advance(done, len(tables))
        with session_with_table(subject, scales, options) as session:
            sampler = Sampler(session, options)
            found[name] = {g: sampler.images(options.samples, g) for g in options.guidance}
    return found


def report_facts(
    subject: Subject, options: ReportOptions, results: list[GuidanceResult], speed: Speed | None
) -> dict[str, Any]:
    """The content of `report.json`."""
    manifest = subject.bundle.manifest
    head = results[0]
    quality: dict[str, Any] = {
        "psnr_db": head.groups.psnr_db, "ssim": head.groups.ssim, "worst_psnr_db": head.groups.worst_db,
        "guidance": head.guidance, "steps": options.steps, "samples": options.samples,
        "scheduler": manifest.programs.scheduler,
        "of": "pictures" if makes_pictures(manifest) else f"latents, taken for pictures from -{LATENT_PEAK:g} to "
        f"{LATENT_PEAK:g}",
    }
    if head.best_single is not None:
        quality["single_scale_method"], quality["psnr_db_single_scale"] = head.best_single
    quality["by_guidance"] = [
        {
            "guidance": r.guidance, "groups": asdict(r.groups),
            "single_scale": {name: asdict(f) for name, f in sorted(r.single.items())},
        }
        for r in results
    ]
    size = sizes(subject.bundle)
    assert manifest.partition is not None
    return {
        "version": REPORT_VERSION, "bundle": subject.bundle.digest, "quality": quality,
        "sites": site_counts(subject.plan), "scales": {"groups": manifest.partition.groups}, "size": size,
        "speed": asdict(speed) if speed is not None else None, "simulated": simulated(subject.bundle),
        "command": _command(options),
    }


def _command(options: ReportOptions) -> str:
    """The command line that makes this report again; the judge and the arrays are files that only the caller knows."""
    words = [
        "quantempo report BUNDLE", f"--samples {options.samples}", f"--population {options.population}",
        f"--guidance {','.join(f'{g:g}' for g in options.guidance)}", f"--steps {options.steps}",
        f"--worst {options.worst}", f"--engine {options.engine}", f"--threads {options.threads}",
    ]
    if options.min_psnr_db is not None:
        words.append(f"--min-psnr {options.min_psnr_db:g}")
    words += ["--judge JUDGE"] if options.judge is not None else []
    words += ["--inputs FILE"] if options.arrays else []
    return " ".join(words)


def _sheet(
    head: GuidanceResult, drawn: dict[str, dict[float, Images]], single: dict[str, dict[float, Images]],
    precision: str = "",
) -> Any:
    """Pictures side by side; `precision` is what is simulated."""
    guidance, best = head.guidance, head.best_single
    reference = drawn["float"][guidance][:SHEET_IMAGES]
    groups = drawn["groups"][guidance][:SHEET_IMAGES]
    panels = [Panel("float", "reference", reference)]
    if best is not None:
        flat = single[best[0]][guidance][:SHEET_IMAGES]
        panels.append(Panel("one scale", f"INT8, {best[0]}: {best[1]:.1f} dB", flat))
        panels.append(error_panel(f"its error, {AMPLIFY} times", "absolute difference", flat, reference))
    label = f"{precision}, simulated" if precision else "INT8"
    panels.append(Panel("scales per group", f"{label}: {head.groups.psnr_db:.1f} dB", groups))
    panels.append(error_panel(f"its error, {AMPLIFY} times", "absolute difference", groups, reference))
    return contact_sheet(panels)


def table(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    quality, speed, size, sites = facts["quality"], facts["speed"], facts["size"], facts["sites"]
    lines = [f"same-seed fidelity to float, {quality['samples']} held-out seeds, {quality['steps']} steps"]
    if quality["of"] != "pictures":
        lines.append(f"  of {quality['of']}")
    for result in quality["by_guidance"]:
        best = best_single(result)
        tail = f"   best single scale {best[1]:6.2f} dB ({best[0]})" if best else ""
        lines.append(f"  guidance {result['guidance']:<5g} PSNR {result['groups']['psnr_db']:6.2f} dB{tail}")
    if "accuracy" in quality:
        lines.append(
            f"over {quality['population']} images: accuracy {100 * quality['accuracy']:.1f} % "
            f"(float {100 * quality['accuracy_float']:.1f} %), Fréchet distance to float "
            f"{quality['frechet_to_float']:.4f} (float to float, other seeds: {quality['frechet_float_to_float']:.4f})"
        )
    lines += [
        f"sites      {sites['quantized']} of {sites['total']} quantized; {facts['scales']['groups']} scale groups",
        f"size       {size['bundle_bytes'] / 1e6:.2f} MB, float {size['float_bytes'] / 1e6:.2f} MB",
    ]
    if facts["simulated"]:
        lines.append(f"precision  {facts['simulated']}, simulated on this machine: fidelity only, no speed")
    else:
        lines.append(
            f"speed      {speed['int8_ms_per_call']:.2f} ms a call, float {speed['float_ms_per_call']:.2f} ms "
            f"({speed['float_ms_per_call'] / speed['int8_ms_per_call']:.2f}×); "
            f"the loop itself {speed['loop_overhead_ms_per_call']:.3f} ms"
        )
    if "cache" in facts:
        cache = facts["cache"]
        lines.append(
            f"caching    {cache['policy']} at {cache['steps']} steps: PSNR {cache['psnr_db']:.2f} dB, uncached "
            f"{cache['psnr_db_uncached']:.2f} dB, naive {cache['psnr_db_naive']:.2f} dB; a run takes "
            f"{speed['trajectory_ms']:.1f} ms, uncached {speed['trajectory_ms_uncached']:.1f} ms"
        )
        lines += policy_lines(cache["auto"]) if "auto" in cache else []
    worst = facts["analysis"]["worst"][:3]
    if worst:
        lines.append("worst sites, and what keeping them in float would buy:")
        lines += [f"  {row['gain_db']:+6.2f} dB  {', '.join(row['sites'])}" for row in worst]
    if "verdict" in facts:
        verdict = facts["verdict"]
        lines.append(f"verdict    {'passed' if verdict['passed'] else 'FAILED'}: {quality['psnr_db']:.2f} dB, "
                     f"{verdict['min_psnr_db']:.2f} dB asked for")
    return "\n".join(lines)


