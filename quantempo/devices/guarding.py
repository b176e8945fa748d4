"""The latency guard of a compile: no engine slower than its float twin is handed over without a word.

Timings differ from run to run, so they never decide what a compile writes unless that was asked for: by default they
are recorded beside the bundle and a loss is said aloud.  With `revert`, regions that lose on an engine become `Keep`
decisions for the graph that this engine reads, with the measurement as their reason, and stay quantized in all others;
two such compiles may differ.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from quantempo.contracts.codec import canonical_json
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import Denoiser, GraphEntry
from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensors import TensorSpec
from quantempo.devices.choosing import ROWS, candidates, example_feeds
from quantempo.engines.cpu import cpu_features
from quantempo.engines.guard import Timing, Variant, Verdict, compare
from quantempo.engines.regions import Region, RegionVerdict, revert_losing, time_regions
from quantempo.engines.registry import open_engine, preferred_dialect
from quantempo.errors import NoSites, RequestError, nearest
from quantempo.planning import graph_bytes
from quantempo.progress import Advance, silent
from quantempo.stages.calibration import LARGE_BYTES
from quantempo.stages.dialects import GraphChoice, lower_graphs

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight
    from quantempo.progress import Progress
    from quantempo.stages.model import Exported

GuardMode = Literal["off", "record", "revert"]
VARIABLE = "QUANTEMPO_GUARD"
"""Environment variable: the mode where a caller names none, e.g. `off` on a build server whose clock means nothing."""
GROUP_INPUT = "scale_group"
SIDECAR = "engine.json"
TARGETS = {"ort": "cpu", "openvino": "openvino"}
"""The target that a CPU backend stands for."""
TITLES = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}
TIMING = Timing(rounds=7, warmup=2, sample_s=0.02, margin=0.02)
_TWIN_SETTINGS = {"openvino": {"precision": "auto"}}
"""What gives a backend's float graph its best speed."""
RECORD_VERSION = 1


class SlowerThanFloat(UserWarning):
    """A quantized engine is not faster than the float one."""


@dataclass(frozen=True)
class GuardRecord:
    """The sidecar `engines/TARGET/engine.json`.

    Args:
        target: see `quantempo.engines.targets`.
        bundle: digest of the manifest that was judged; of another bundle it says nothing.
        device: fingerprint of the CPU.
        verdict: the quantized model against its float twin, per call.
        regions: what each region brings.
        reverted: sites that were left in float for it, in the graph that this engine reads.
        rows, threads: of the timed call.
    """

    target: str
    bundle: str
    device: str
    verdict: Verdict
    regions: tuple[RegionVerdict, ...] = ()
    reverted: tuple[str, ...] = ()
    rows: int = ROWS
    threads: int = 0
    version: int = RECORD_VERSION


@dataclass(frozen=True, eq=False)
class Guarded:
    """What a compile goes on with.

    Args:
        plan: as given, or with what loses kept in float in the graphs of the engines on which it loses.
        records: one per engine that was timed, their bundle still empty.
    """

    plan: QuantPlan
    records: tuple[GuardRecord, ...] = ()

    def write(self, root: Path, bundle: str) -> None:
        """Write the sidecars.

        Args:
            root: the bundle's directory.
            bundle: digest of its manifest.
        """
        for record in self.records:
            folder = root / "engines" / record.target
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SIDECAR).write_text(canonical_json(replace(record, bundle=bundle)))


@dataclass(frozen=True, eq=False)
class Subject:
    """A model between calibration and writing.

    Args:
        graph: float graph in normal form.
        denoiser: how it is fed.
        plan, table, weights: what the quantized graphs are lowered from.
        choice: how they are lowered.
        threads: engine threads.
    """

    graph: Graph
    denoiser: Denoiser
    plan: QuantPlan
    table: ScaleTable
    weights: Mapping[str, QuantizedWeight]
    choice: GraphChoice
    threads: int = 0


def guard_mode(given: str | None) -> GuardMode:
    """The mode that was asked for, by the caller or by `QUANTEMPO_GUARD`; `record` otherwise.

    Raises:
        RequestError: there is no such mode.
    """
    mode = given if given is not None else os.environ.get(VARIABLE, "") or "record"
    if mode not in get_args(GuardMode):
        raise RequestError(
            "guard", found=repr(mode), wanted=" or ".join(get_args(GuardMode)), cause="a misspelling",
            remedy=nearest(mode, get_args(GuardMode)),
        )
    return mode  # type: ignore[return-value]  # one of the words, as was just tested


def guard_stage(
    exported: Exported, plan: QuantPlan, table: ScaleTable, weights: Mapping[str, QuantizedWeight],
    choice: GraphChoice, mode: GuardMode, threads: int, progress: Progress,
) -> Guarded:
    """`settle`, as the stage of a compile; nothing is shown where the guard is off."""
    subject = Subject(exported.graph, exported.denoiser, plan, table, weights, choice, threads)
    if mode == "off":
        return settle(subject, mode)
    with progress.stage("latency guard", "timings are never reused") as advance:
        return settle(subject, mode, advance=advance)


def settle(
    subject: Subject, mode: GuardMode, timing: Timing | None = None, advance: Advance = silent
) -> Guarded:
    """Time the quantized model against its float twin, whole and by region, on every CPU engine that is installed.

    Args:
        subject: see there.
        mode: `off` times nothing; `revert` keeps in float what loses, in the graph of the engine on which it loses.
        timing: see there.
        advance: told the number of variants opened and in all; in the mode `revert` nobody knows how many there will
            be, and it is told nothing.

    Raises:
        NoSites: in the mode `revert`, nothing is faster in integers on any engine.
    """
    plan = subject.plan
    if mode == "off" or not plan.quantized():
        return Guarded(plan)
    timing = timing or TIMING
    # Engines hold packed copies of their weights: those of a large model and of its twin are not held at once.
    timing = replace(timing, alone=timing.alone or graph_bytes(subject.graph) > LARGE_BYTES)
    records, lost = [], []
    engines = [name for name in candidates() if name in TARGETS]
    # On each engine two variants for the verdict, the whole once more, and one without each region.
    opened = _Opened(advance if mode == "record" else silent, len(engines) * (3 + len(regions_of(plan))))
    for backend in engines:
        maker = _Maker(subject, backend, opened)
        if not maker.sites:
            continue
        verdict, regions, reverted = _judge(maker, mode, timing)
        if len(reverted) == len(maker.sites):
            # The graph stays as it is: another engine gains, and this one can be told to run the float bundle.
            lost.append(backend)
            reverted = ()
        elif reverted:
            keep = Keep(f"slower in integers than in float on {TITLES[backend]}, as timed on the compiling machine")
            kept = {**plan.dialects.get(maker.kind, {}), **dict.fromkeys(reverted, keep)}
            plan = replace(plan, dialects={**plan.dialects, maker.kind: kept})
        records.append(
            GuardRecord(TARGETS[backend], "", cpu_features().fingerprint, verdict, regions, reverted,
                        threads=subject.threads)
        )
        _say(backend, verdict, regions, mode)
    if records and len(lost) == len(records):
        raise NoSites(
            "latency guard", found="a model that is slower in integers than in float, however it is divided",
            wanted=f"at least one region that gains on {' or '.join(TITLES[name] for name in lost)}",
            cause="the model is small, or this CPU has no fast integer products",
            remedy="compile with --dtype float32; or with --guard record, where the smaller files are worth the time",
        )
    return Guarded(plan, tuple(records))


def _judge(
    maker: _Maker, mode: GuardMode, timing: Timing
) -> tuple[Verdict, tuple[RegionVerdict, ...], tuple[str, ...]]:
    """The verdict on one engine, what each region brings there, and the sites that should stay in float."""
    regions = regions_of(maker.plan)
    if mode == "revert":
        report = revert_losing(regions, maker.quantized, maker.twin(), timing)
        return report.verdict, report.regions, report.revert
    verdict = compare(maker.twin(), maker.quantized(maker.sites), timing)
    return verdict, time_regions(regions, maker.quantized, timing), ()


def _say(backend: str, verdict: Verdict, regions: Sequence[RegionVerdict], mode: GuardMode) -> None:
    if verdict.wins:
        return
    losing = [item.region for item in regions if item.loses]
    advice = "compile with the guard mode revert to leave what loses in float" if mode == "record" else ""
    words = [f"on {backend} the quantized model is not faster than the float one: {verdict}"]
    words += [f"regions that lose: {', '.join(losing)}"] if losing else []
    words += [advice] if advice else []
    warnings.warn("; ".join(words), SlowerThanFloat, stacklevel=4)


def regions_of(plan: QuantPlan) -> tuple[Region, ...]:
    """Sites of one kind, whatever their block: those whose activations have one name up to its numbers."""
    found: dict[str, list[str]] = {}
    for site in plan.quantized():
        owner = site.tensor.rpartition("/")[0] or site.tensor
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", owner), []).append(site.id)
    return tuple(Region(name, tuple(sorted(sites))) for name, sites in sorted(found.items()))


def restricted(
    plan: QuantPlan, table: ScaleTable, quantized: frozenset[str], reason: str
) -> tuple[QuantPlan, ScaleTable]:
    """A plan in which of the quantized sites only some stay so, and the table that goes with it."""
    gone = {site.id: Keep(reason) for site in plan.quantized() if site.id not in quantized}
    changed = plan.keeping(gone)
    needed = set(changed.scaled_tensors())
    kept = {name: scales for name, scales in table.tensors.items() if name in needed}
    return changed, ScaleTable(table.partition, kept)


class _Opened:
    """Counts the variants that were opened for timing."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._total, self._done = advance, total, 0

    def count(self) -> None:
        """One more."""
        self._done += 1
        self._advance(min(self._done, self._total), self._total)


class _Maker:
    """Lowers, writes and opens variants of one model for one backend."""

    def __init__(self, subject: Subject, backend: str, opened: _Opened) -> None:
        self._subject, self._backend, self._opened = subject, backend, opened
        self._dialect = preferred_dialect(backend, ("ort", "portable"))
        self.kind = f"{self._dialect}-f32"
        """Of the graphs that the engine reads."""
        self.plan = subject.plan.for_graph(self.kind)
        self.sites = frozenset(site.id for site in self.plan.quantized())

    def twin(self) -> Variant:
        """The float model, as fast as the backend has it."""
        settings = _TWIN_SETTINGS.get(self._backend, {})
        return self._variant("float", frozenset(), settings)

    def quantized(self, sites: frozenset[str]) -> Variant:
        """The model with some sites quantized."""
        return self._variant(f"{len(sites)} sites in int8", sites, {}) if sites else self.twin()

    def _variant(self, label: str, sites: frozenset[str], settings: Mapping[str, str]) -> Variant:
        subject = self._subject
        described = replace(subject.denoiser, group_input=GROUP_INPUT) if sites else subject.denoiser
        from quantempo.export.graph_files import specs

        group = (TensorSpec(GROUP_INPUT, "int64", ()),) if sites else ()
        inputs = (*specs(subject.graph.graph.inputs), *group)
        entry = GraphEntry("", (), "full", "float", "float32", inputs, ())
        feeds = example_feeds(described, entry)
        return Variant(f"{self._backend} {label}", self._backend, lambda: self._open(sites, settings), feeds)

    def _open(self, sites: frozenset[str], settings: Mapping[str, str]) -> Engine:
        from quantempo.export.graph_files import write_graphs

        folder = Path(tempfile.mkdtemp(prefix="quantempo-guard-"))
        try:
            (written,) = write_graphs(folder, {"full": self._lowered(sites)}).values()
            options = EngineOptions(self._subject.threads, settings=settings)
            engine = open_engine(self._backend, folder / written.file, options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._opened.count()
        # An engine may map its weights until it compiles them at `bind`.
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
        return engine

    def _lowered(self, sites: frozenset[str]) -> Graph:
        from quantempo.export.for_ort import for_onnxruntime

        subject = self._subject
        if not sites:
            return for_onnxruntime(subject.graph) if self._dialect == "ort" else subject.graph
        plan, table = restricted(self.plan, subject.table, sites, "left out of a timing")
        choice = replace(subject.choice, names=(self.kind,))
        (lowered,) = lower_graphs(subject.graph, plan, table, subject.weights, choice).values()
        return lowered
