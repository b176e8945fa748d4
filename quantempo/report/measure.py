"""The measurements behind a report."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantempo.calib.collect import StatsCollector
from quantempo.calib.ranges import METHODS
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.devices.opening import bundle_dialect
from quantempo.engines.registry import open_engine
from quantempo.errors import BundleError
from quantempo.inspection import REFERENCE, STATISTICS, load_plan
from quantempo.progress import Advance
from quantempo.quality import Images, Judge, draw, psnr_db, ssim
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import Session
from quantempo.stages.calibration import ENGINE
from quantempo.stages.dialects import GraphChoice, lower_graphs
from quantempo.stages.quantizers import scale_table

OTHER_SEEDS = 500_000
"""Offset of the seeds of the second float population; disjoint from held-out and calibration seeds."""


@dataclass(frozen=True)
class ReportOptions:
    """What to measure.

    Args:
        samples: held-out seeds for same-seed fidelity.
        population: images for accuracy and Fréchet distance; 0 leaves them out.
        guidance: scales; the first is the headline.
        steps: sampling steps.
        batch: samples per call of the session.
        judge: ONNX classifier, see `quantempo.quality.Judge`.
        threads: engine threads.
        engine: what runs the model and its float reference; variants for comparison run on ONNX Runtime.
        single_scale: compare with the best single scale over all range methods.
        timing_rounds: repetitions of the speed measurement.
        worst: for how many tensors to measure what keeping their sites in float would buy, the noisiest first.
        worst_samples: seeds for that.
        min_psnr_db: what the headline has to reach; `None` gives no verdict.
        arrays: conditioning by input name, a row per sample, used in turn; as for calibration.
    """

    samples: int = 64
    population: int = 0
    guidance: tuple[float, ...] = (1.5,)
    steps: int = 20
    batch: int = 25
    judge: Path | None = None
    threads: int = 0
    engine: str = ENGINE
    single_scale: bool = True
    timing_rounds: int = 15
    worst: int = 10
    worst_samples: int = 8
    min_psnr_db: float | None = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fidelity:
    """Same-seed agreement with the float reference: mean over images, in dB and as SSIM, and the worst image."""

    psnr_db: float
    ssim: float
    worst_db: float

    @staticmethod
    def of(images: Images, reference: Images) -> Fidelity:
        """Measure two sets of images."""
        ratios = psnr_db(images, reference)
        return Fidelity(float(ratios.mean()), float(ssim(images, reference).mean()), float(ratios.min()))


@dataclass(frozen=True, eq=False)
class Subject:
    """A bundle under test with all that a report needs."""

    bundle: OpenBundle
    reference: OpenBundle
    plan: QuantPlan
    statistics: StatsCollector


def open_subject(path: Path) -> Subject:
    """Open a quantized bundle with its float reference.

    Args:
        path: the bundle.

    Raises:
        BundleError: the bundle is a float one, or has no reference.
    """
    bundle = read_bundle(path)
    plan = load_plan(bundle)
    folder = path / REFERENCE
    if plan is None or not folder.is_dir() or not (path / STATISTICS).is_file():
        raise BundleError(
            f"report of {path}", found="a float bundle" if plan is None else "no float reference beside it",
            wanted="a quantized bundle with its reference/ and report/ folders",
            cause="it was compiled without a reference, or the folders were deleted",
            remedy="compile it again with --reference",
        )
    return Subject(bundle, read_bundle(folder), plan, StatsCollector.load(path / STATISTICS))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws images from a session, in batches, with labels dealt out over the named classes."""

    session: Session
    options: ReportOptions
    program: StepProgram | None = None
    feature_cache: Literal["auto", "none", "plan"] | None = None

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """The label of each sample; `None` for a model without classes."""
        classes = self.session.manifest.denoiser.classes
        if not classes:
            return None
        known = sorted(int(label) for label in classes[0].names) or range(min(classes[0].count, 10))
        return np.array([known[i % len(known)] for i in range(count)], np.int64)

    def conditioning(self, start: int, stop: int) -> dict[str, Any]:
        """What a call is given for the samples `start` to `stop`: labels, or rows of the options' arrays."""
        labels = self.labels(stop)
        rows = np.arange(start, stop)
        given: dict[str, Any] = {name: a[rows % len(a)] for name, a in self.options.arrays.items()}
        return given if labels is None else {**given, "class_labels": labels[start:stop].tolist()}

    def images(self, count: int, guidance: float, first_seed: int = 0, advance: Advance | None = None) -> Images:
        """Images (count, height, width, channels) in [0, 1] of the seeds `first_seed …`, made by `quality.draw`."""
        parts = []
        for start in range(0, count, self.options.batch):
            stop = min(count, start + self.options.batch)
            parts.append(draw(
                self.session, self.session.manifest, **self.conditioning(start, stop),
                seed=list(range(first_seed + start, first_seed + stop)), guidance_scale=guidance,
                num_inference_steps=None if self.program else self.options.steps, program=self.program,
                batch_size=stop - start, feature_cache=self.feature_cache,
            ))  # fmt: skip
            if advance is not None:
                advance(stop, count)
        return np.concatenate(parts)


@contextmanager
def sessions(subject: Subject, options: ReportOptions) -> Iterator[tuple[Session, Session]]:
    """The quantized session and the float session, on the engine of the options."""
    given = EngineOptions(threads=options.threads)

    def opened(path: Path, asked: EngineOptions) -> Engine:
        return open_engine(options.engine, path, asked)

    dialects = [bundle_dialect(options.engine, bundle) for bundle in (subject.bundle, subject.reference)]
    # The fidelity of the numbers is that of uncached runs; `quantempo.report.caching` measures caching.
    with (
        Session(subject.bundle, opened, given, dialects[0], "none") as quantized,
        Session(subject.reference, opened, given, dialects[1]) as floating,
    ):
        yield quantized, floating


@contextmanager
def session_with_table(subject: Subject, table: ScaleTable, options: ReportOptions) -> Iterator[Session]:
    """A session of the same bundle, down to the integer weights, with another scale table."""
    import dataclasses

    from quantempo.export.graph_files import load_graph, write_graphs
    from quantempo.export.quantize_attention import stored_ranges
    from quantempo.export.weights import stored_weights

    source = subject.reference.path(subject.reference.manifest.graphs["full.float-f32"].file)
    entry = main_graph(subject.bundle)
    quantized = subject.bundle.path(entry.file)
    made = load_graph(quantized)
    weights = stored_weights(made, subject.plan)
    choice = GraphChoice((entry.dialect,), ranges=stored_ranges(made, "fp8"))
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        graphs = lower_graphs(load_graph(source), subject.plan, table, weights, choice)
        (written,) = write_graphs(Path(folder), graphs).values()

        def open_variant(path: Path, given: EngineOptions) -> Engine:
            return _open(Path(folder) / written.file if path.name == Path(entry.file).name else path, given)

        # This graph writes no features, so that variants that read them would have none.
        plain = {
            n: dataclasses.replace(e, writes=(), outputs=tuple(s for s in e.outputs if s.name not in e.writes))
            for n, e in subject.bundle.manifest.graphs.items() if not e.reads
        }
        manifest = dataclasses.replace(
            subject.bundle.manifest, partition=table.partition, cache=None, vectors=None, graphs=plain
        )
        bundle = dataclasses.replace(subject.bundle, manifest=manifest)
        with Session(bundle, open_variant, EngineOptions(threads=options.threads), entry.dialect) as session:
            yield session


def main_graph(bundle: OpenBundle) -> GraphEntry:
    """The denoiser graph that ONNX Runtime runs, or simulates."""
    graphs = bundle.manifest.graphs
    return graphs["full.ort-f32"] if "full.ort-f32" in graphs else graphs["full.fp8-f32"]


def simulated(bundle: OpenBundle) -> str:
    """The number format that this machine only imitates; empty where it computes in it."""
    return "FP8 (E4M3)" if bundle.manifest.precision == "fp8" else ""


def single_scale_tables(subject: Subject) -> dict[str, ScaleTable]:
    """One scale per tensor for all timesteps, by range method."""
    return {name: scale_table(subject.statistics, subject.plan, "single", name) for name in sorted(METHODS)}


def _open(path: Path, options: EngineOptions) -> Engine:
    return open_engine(ENGINE, path, options)


@dataclass(frozen=True)
class Speed:
    """Medians over alternating rounds, in milliseconds per denoiser call of one guided sample (two rows)."""

    float_ms_per_call: float
    int8_ms_per_call: float
    loop_overhead_ms_per_call: float
    threads: int
    rounds: int
    engine: str = ENGINE


def measure_speed(quantized: Session, floating: Session, options: ReportOptions) -> Speed:
    """Time both sessions in alternation on whole runs of about ten steps at batch 1, guided if that is reported."""
    steps = min(quantized.bundle.steps, key=lambda count: abs(count - 10))
    given, guidance = Sampler(quantized, options).conditioning(0, 1), 1.5 if max(options.guidance) > 1 else 1.0

    def once(session: Session) -> tuple[float, float]:
        timing = session(
            **given, batch_size=1, seed=0, guidance_scale=guidance, num_inference_steps=steps, output_type="latent",
        ).timings
        return 1e3 * timing.engine / timing.calls, 1e3 * timing.overhead_per_call

    for session in (floating, quantized):
        once(session)
    pairs = [(once(floating), once(quantized)) for _ in range(options.timing_rounds)]
    return Speed(
        statistics.median(a[0] for a, _ in pairs), statistics.median(b[0] for _, b in pairs),
        statistics.median(b[1] for _, b in pairs), options.threads, options.timing_rounds, options.engine,
    )


@dataclass(frozen=True, eq=False)
class Populations:
    """Accuracy and Fréchet distances over large sets of images."""

    accuracy: float
    accuracy_float: float
    frechet_to_float: float
    frechet_float_to_float: float
    count: int


def measure_populations(
    quantized: Session, floating: Session, judge: Judge, options: ReportOptions, advance: Advance | None = None
) -> Populations:
    """Judge `population` images: quantized and float on the same seeds, float on other seeds as the yardstick."""
    from quantempo.quality import frechet_distance

    count, guidance = options.population, options.guidance[0]
    done = [0]

    def drawn(session: Session, first_seed: int) -> Images:
        images = Sampler(session, options).images(
            count, guidance, first_seed, lambda d, t: advance(done[0] + d, 3 * count) if advance else None
        )
        done[0] += count
        return images

    labels = Sampler(quantized, options).labels(count)
    assert labels is not None
    same, reference, other = drawn(quantized, 0), drawn(floating, 0), drawn(floating, OTHER_SEEDS)
    judged, judged_float, judged_other = judge(same), judge(reference), judge(other)
    return Populations(
        judged.accuracy(labels), judged_float.accuracy(labels),
        frechet_distance(judged.features, judged_float.features),
        frechet_distance(judged_other.features, judged_float.features), count,
    )


def open_judge(path: Path) -> Judge:
    """A judge from its ONNX file."""
    engine = open_engine(ENGINE, path)
    return Judge(engine.run)


@dataclass(frozen=True, eq=False)
class GuidanceResult:
    """Fidelity at one guidance scale."""

    guidance: float
    groups: Fidelity
    single: Mapping[str, Fidelity] = field(default_factory=dict)

    @property
    def best_single(self) -> tuple[str, float] | None:
        """The best range method with one scale, and its PSNR."""
        if not self.single:
            return None
        name = max(self.single, key=lambda n: self.single[n].psnr_db)
        return name, self.single[name].psnr_db


