"""`quantempo build`: a bundle's graphs to engines for one target, with the engine library alone (no torch, no onnx).

Bundle in, `engines/TARGET/` out: one plan per graph and `engine.json`, which holds what each plan was made from.  What
is there already and has the same key is kept, and graphs of several kinds (`fp8-f16`, `portable-f16`) lie side by side.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantempo import __version__
from quantempo.contracts.manifest import GraphEntry, Manifest
from quantempo.engines import gate as fusion
from quantempo.engines import trt_process
from quantempo.engines.cache import KeyParts, check_private, differences, file_digest, file_entry
from quantempo.engines.check import check_graph, refusals
from quantempo.engines.cuda_device import CudaDevice
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.plan_store import pack, weight_sources
from quantempo.engines.shapes import symbols
from quantempo.engines.targets import SHORT, Target, require_format, require_version, target
from quantempo.engines.tensorrt import BuildJob, Built, capabilities, version
from quantempo.engines.trt_profiles import Profile, Range, complete, input_shapes, parse_profile, require_known
from quantempo.engines.trt_record import (
    FOLDER,
    RECORD_NAME,
    EngineRecord,
    PlanRecord,
    Weights,
    read_record,
    weight_files,
    write_record,
)
from quantempo.engines.trt_words import skipped_notice
from quantempo.errors import BundleError, EngineError, MissingExtra, QuantempoError, RequestError, nearest
from quantempo.progress import Progress, SilentProgress
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import DECODE_ROWS

if TYPE_CHECKING:
    from quantempo.engines.gate import GateReport
    from quantempo.engines.tensorrt import Library

DEFAULT_ROWS = 8
"""Largest batch that engines are built for where the bundle names none."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Args:
        target: a profile of `quantempo.engines.targets`.
        shapes: profiles as typed, e.g. `batch=1:2:8`; several make several optimization profiles.
        graphs: dialect and float type, e.g. `portable-f16`; empty takes what suits the target best.
        weights: see `quantempo.engines.trt_record.Weights`.
        memory_mib, timing_cache, level, version_compatible: see `BuildJob`.
        force: build again what is there already.
    """

    target: str
    shapes: tuple[str, ...] = ()
    graphs: str = ""
    weights: Weights = "plan"
    memory_mib: int = 0
    timing_cache: str = ""
    level: int = -1
    version_compatible: bool = False
    force: bool = False


@dataclass(frozen=True)
class BuildSummary:
    """What was built.

    Args:
        folder: where it lies.
        record: the sidecar.
        kept: graphs whose plan was there already.
        beside: graphs of other kinds that were built before and stay.
        notices: for the user.
        commands: per graph, the line for those who prefer the library's own tool.
    """

    folder: Path
    record: EngineRecord
    kept: tuple[str, ...]
    beside: tuple[str, ...]
    notices: tuple[str, ...]
    commands: Mapping[str, str]

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"{self.folder}: {self.record.backend} {self.record.library}, capability {self.record.capability}"]
        for name, plan in self.record.plans.items():
            if name in self.beside:
                lines.append(f"  {name}: stays beside it")
                continue
            how = "there already" if name in self.kept else f"{plan.seconds:.1f} s"
            stored = f", {plan.entry.size / 1e6:.1f} MB on disk" if plan.entry.size != plan.plan_size else ""
            lines.append(f"  {name}: {how}, plan of {plan.plan_size / 1e6:.1f} MB{stored}, key {plan.key[:12]}")
            if plan.gate is not None:
                lines.append(f"    {plan.gate}")
        lines += [f"  note: {notice}" for notice in self.notices]
        return "\n".join([*lines, "by hand:", *(f"  {command}" for command in self.commands.values())])


def build_bundle(bundle: Path, options: BuildOptions, progress: Progress | None = None) -> BuildSummary:
    """Build a bundle's engines for a target.

    Raises:
        RequestError: the target takes no engines, or a shape is impossible.
        PlanError: the target lacks the number format.
        EngineError: library or graph do not fit the target, the builder fails, or a plan does not pass the fusion gate.
        BundleError: the bundle has no graph that the target reads.
    """
    profile = _tensorrt_target(options.target)
    opened = read_bundle(bundle)
    _require_flags(profile, options)
    asked = tuple(parse_profile(text) for text in options.shapes)
    graphs = choose_graphs(opened.manifest, profile, options.graphs)
    library: Library = "tensorrt_rtx" if profile.backend == "tensorrt_rtx" else "tensorrt"
    installed = version(library)
    require_version(profile, installed)
    capability, device = _device(profile)
    jobs = _jobs(opened, graphs, profile, options, asked, library)
    folder = opened.root / FOLDER / profile.name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)
    empty = EngineRecord(
        profile.name, library, installed, capability, opened.digest, {}, options.version_compatible, device,
        {"quantempo": __version__, library: installed},
    )
    before, beside, dropped = _plans_before(folder, empty, jobs)
    plans: dict[str, PlanRecord] = {}
    kept, notices = [], [*_notices(graphs, opened.manifest), *dropped]
    for name, job in jobs.items():
        parts = key_parts(job, installed, device)
        old = before.get(name)
        if old is not None and not options.force and _is_current(folder, old, parts, options.weights):
            plans[name] = old
            kept.append(name)
            continue
        if old is not None and old.key != parts.key:
            changed = ", ".join(str(item) for item in differences(parts, old.parts))
            notices.append(f"{name} is built again: {changed}")
        with (progress or SilentProgress()).stage(f"build {name}"):
            plans[name] = _build(folder, name, job, parts, profile, options)
        notices += plans[name].notices
    record = replace(empty, plans={**plans, **beside})
    write_record(folder, record)
    _drop_strangers(folder, record)
    commands = {name: tool_line(job) for name, job in jobs.items()}
    return BuildSummary(folder, record, tuple(kept), tuple(beside), tuple(notices), commands)


def _tensorrt_target(name: str) -> Target:
    profile = target(name)
    if not profile.tensorrt:
        raise RequestError(
            "target", found=f"{name!r}, which runs on {profile.library}", wanted="a target of TensorRT",
            cause="ONNX Runtime and OpenVINO compile a graph when they open it",
            remedy="load the bundle as it is; the setting `cache` keeps what they compile",
        )
    return profile


def _require_flags(profile: Target, options: BuildOptions) -> None:
    if options.version_compatible and profile.backend == "tensorrt_rtx":
        raise RequestError(
            f"target {profile.name!r}", found="--version-compatible", wanted="no such promise",
            cause="plans of TensorRT for RTX load in the release that built them alone",
            remedy="leave the option out, and build again after an update",
        )


def choose_graphs(manifest: Manifest, profile: Target, asked: str = "") -> dict[str, GraphEntry]:
    """The graphs to build: all variants of one dialect and float type, and the decoder.

    Args:
        manifest: of the bundle.
        profile: what for.
        asked: `DIALECT-TYPE`, or empty for the first of the profile's list that the bundle has.

    Raises:
        PlanError: a number format that the target lacks.
        BundleError: the bundle has none that the target reads.
    """
    decoder = manifest.decoder.graph
    kinds: dict[str, dict[str, GraphEntry]] = {}
    for name, entry in manifest.graphs.items():
        if name != decoder:
            kinds.setdefault(f"{entry.dialect}-{SHORT[entry.float_type]}", {})[name] = entry
    readable = profile.kinds
    floats = [f"float-{SHORT[kind]}" for kind in SHORT if kind in profile.formats]
    if (asked or next(iter(kinds), "")).startswith("fp8") and (asked or all(k.startswith("fp8") for k in kinds)):
        require_format(profile, "fp8")
    chosen = asked or next((kind for kind in (*readable, *floats) if kind in kinds), "")
    if chosen not in kinds or chosen not in (*readable, *floats):
        raise BundleError(
            f"target {profile.name!r}", found=f"a bundle with graphs {', '.join(sorted(kinds))}",
            wanted=f"graphs that it reads: {', '.join((*readable, *floats))}" if chosen not in kinds or not asked
            else f"not {asked}: {profile.name} reads {', '.join(readable)}",
            cause="the bundle was compiled for other targets" if not asked or asked not in kinds
            else "the device, or its library, lacks what the graph asks for",
            remedy=nearest(asked, kinds) if asked and asked not in kinds
            else f"compile it with --target {profile.name}" + (", or leave --graphs out" if asked else ""),
        )
    graphs = dict(kinds[chosen])
    if decoder is not None and "float-f32" in floats and _has_float32_products(profile):
        graphs[decoder] = manifest.graphs[decoder]
    return graphs


def _has_float32_products(profile: Target) -> bool:
    """TensorRT for RTX has none for Turing."""
    return not (profile.backend == "tensorrt_rtx" and profile.capability == "7.5")


def _notices(graphs: Mapping[str, GraphEntry], manifest: Manifest) -> tuple[str, ...]:
    decoder = manifest.decoder.graph
    if decoder is None or decoder in graphs:
        return ()
    return (f"{decoder} is not built: this device has no float32 products; decode with another engine",)


def _device(profile: Target) -> tuple[str, str]:
    """Compute capability and name of what the plans are for.

    Raises:
        EngineError: this device is not of the target's kind.
    """
    if profile.backend == "tensorrt_rtx":
        if profile.capability not in capabilities():
            raise EngineError(
                f"target {profile.name!r}", found=f"compute capability {profile.capability}",
                wanted=f"one of {', '.join(capabilities())}", cause="the installed TensorRT for RTX does not know it",
                remedy="install a newer version of tensorrt-rtx",
            )
        return profile.capability, f"sm_{profile.capability.replace('.', '')}"
    try:
        device = CudaDevice.open()
    except MissingExtra:
        # A Jetson's own TensorRT comes without cuda-python; the target's name is all there is to go by.
        return profile.capability, f"sm_{profile.capability.replace('.', '')}"
    if device.capability != profile.capability:
        raise EngineError(
            f"target {profile.name!r}", found=f"{device.name}, compute capability {device.capability}",
            wanted=f"a device of compute capability {profile.capability}",
            cause="TensorRT builds for the device that it runs on", remedy="build on the target device",
        )
    return device.capability, f"{device.name}, sm_{device.capability.replace('.', '')}"


def _jobs(
    bundle: OpenBundle,
    graphs: Mapping[str, GraphEntry],
    profile: Target,
    options: BuildOptions,
    asked: tuple[Profile, ...],
    library: Library,
) -> dict[str, BuildJob]:
    """One job per graph, after all checks that need no builder."""
    require_known(asked, (s for e in graphs.values() for s in symbols({i.name: i for i in e.inputs})))
    jobs = {}
    for name, entry in graphs.items():
        graph = bundle.path(entry.file)
        refused = refusals(check_graph(graph, profile))
        if refused:
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            raise EngineError(
                f"{name} for {profile.name!r}", found=f"{refused[0].found} ({refused[0].where}){more}",
                wanted="a graph that the target reads",
                cause=f"rule {refused[0].rule!r} of `quantempo check`", remedy=refused[0].remedy,
            )
        profiles = complete(name, {i.name: i for i in entry.inputs}, asked, default_ranges(bundle.manifest, name))
        jobs[name] = BuildJob(
            library, str(graph), "", profile.capability, profiles, options.weights, options.memory_mib,
            options.timing_cache, options.level, options.version_compatible,
        )
    return jobs


def default_ranges(manifest: Manifest, name: str) -> dict[str, Range]:
    """Sizes to build for where the user names none: from one row to the bundle's largest batch, tuned for two rows."""
    if name == manifest.decoder.graph:
        return {"batch": Range(1, 1, DECODE_ROWS)}
    high = manifest.denoiser.max_batch or DEFAULT_ROWS
    return {"batch": Range(1, min(2, high), high)}


def key_parts(job: BuildJob, installed: str, device: str) -> KeyParts:
    """What a plan depends on."""
    graph = Path(job.graph)
    return KeyParts(
        graph=file_digest(graph), backend=job.library, version=installed, device=device,
        weights={name: file_digest(path) for name, path in weight_files(graph).items()},
        shapes={str(index): str(profile) for index, profile in enumerate(job.profiles)}, flags=job.flags(),
    )


def _plans_before(
    folder: Path, record: EngineRecord, wanted: Collection[str]
) -> tuple[Mapping[str, PlanRecord], dict[str, PlanRecord], tuple[str, ...]]:
    """All plans of an earlier build, those of other graphs that stay beside a new record, and why others do not."""
    try:
        old = read_record(folder)
    except QuantempoError:
        return {}, {}, ()
    others = {name: plan for name, plan in old.plans.items() if name not in wanted}
    reasons = [
        word
        for word in ("manifest", "library", "device", "capability", "version_compatible")
        if getattr(old, word) != getattr(record, word)
    ]
    if reasons:
        # A record speaks for all of its plans, and these would be refused when they are loaded.
        why = f"was removed: it was built with another {', '.join(reasons)}"
        return old.plans, {}, tuple(f"{name} {why}; build it again if you need it" for name in others)
    whole = {name: plan for name, plan in others.items() if _is_whole(folder, plan)}
    damaged = (f"{name} was removed: its file is damaged or gone" for name in others if name not in whole)
    return old.plans, whole, tuple(damaged)


def _is_whole(folder: Path, plan: PlanRecord) -> bool:
    path = folder / plan.file
    return path.is_file() and not path.is_symlink() and file_entry(path) == plan.entry


def _is_current(folder: Path, plan: PlanRecord, parts: KeyParts, weights: Weights) -> bool:
    return plan.key == parts.key and plan.weights == weights and _is_whole(folder, plan)


def _build(
    folder: Path, name: str, job: BuildJob, parts: KeyParts, profile: Target, options: BuildOptions
) -> PlanRecord:
    file = f"{name}.plan"
    work = folder / f".{file}.partial"
    try:
        built = trt_process.build(replace(job, plan=str(work)))
        graph = Path(job.graph)
        report = _gate(work, graph, profile, built)
        if options.weights == "bundle":
            work.write_bytes(pack(work.read_bytes(), weight_sources(graph)))
        work.replace(folder / file)
    finally:
        work.unlink(missing_ok=True)
    memory = f"{job.memory_mib} MiB" if job.memory_mib else ""
    notice = skipped_notice(name, built.tactics, memory)
    return PlanRecord(
        file, file_entry(folder / file), built.size, parts, job.profiles, options.weights, round(built.seconds, 3),
        report, (notice,) if notice else (),
    )


def _gate(plan: Path, graph: Path, profile: Target, built: Built) -> GateReport | None:
    """The fusion gate's report; `None` where nothing is quantized.

    Raises:
        FusionError: a quantized site runs in float.
    """
    structure = read_graph(graph)
    if not fusion.intended_sites(structure):
        return None
    if profile.backend == "tensorrt_rtx":
        report = fusion.check_rtx(plan.read_bytes(), structure, profile)
    else:
        report = fusion.check_inspector(built.inspector, structure, profile)
    report.require(graph.stem)
    return report


def _drop_strangers(folder: Path, record: EngineRecord) -> None:
    """Remove what an earlier build left and no record names any more."""
    wanted = {RECORD_NAME, *(plan.file for plan in record.plans.values())}
    for path in folder.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def tool_line(job: BuildJob) -> str:
    """The same build with the library's own command line tool."""
    words = ["tensorrt_rtx" if job.library == "tensorrt_rtx" else "trtexec", f"--onnx={job.graph}"]
    words.append(f"--saveEngine={Path(job.graph).stem}.plan")
    shapes = input_shapes(read_graph(Path(job.graph)).inputs, job.profiles[0])
    for index, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        items = (f"{name}:{'x'.join(map(str, ends[index]))}" for name, ends in shapes.items())
        if shapes:
            words.append(f"--{option}={','.join(items)}")
    if job.library == "tensorrt":
        words.append("--stronglyTyped")
    words += ["--profilingVerbosity=detailed", "--skipInference"]
    words += [f"--timingCacheFile={job.timing_cache}"] if job.timing_cache else []
    words += [f"--memPoolSize=workspace:{job.memory_mib}M"] if job.memory_mib else []
    words += [f"--builderOptimizationLevel={job.level}"] if job.level >= 0 else []
    words += ["--stripWeights"] if job.weights == "refit" else []
    words += ["--versionCompatible", "--excludeLeanRuntime"] if job.version_compatible else []
    return shlex.join(words)
