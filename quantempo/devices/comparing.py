"""Two engines side by side on one bundle: the same feeds, the same seeds, and where they part.

Feeds are recorded from a real sampling run, so that every graph sees what it will see.  Inner tensors are taken out as
further outputs; that keeps an engine from fusing across them, so the errors at sites belong to graphs with taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Binding, Buffer, Engine, EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.devices.opening import bundle_dialect, denoiser_graph
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.registry import open_engine
from quantempo.errors import RequestError
from quantempo.inspection import REFERENCE, load_plan
from quantempo.quality import Images, draw, psnr_db
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import Session

FLOAT = "float"
"""How the float reference is called in a comparison."""
CEILING_DB = 200.0
"""Equal tensors have no finite ratio; they count as this much."""


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Args:
        seeds: samples of the end-to-end comparison.
        steps: sampling steps; 0 takes the bundle's default.
        guidance: guidance scale; `None` takes the bundle's default.
        calls: engine calls, spread over a run, whose outputs and sites are compared.
        sites: whether inner tensors are compared too.
        threads: engine threads.
    """

    seeds: int = 8
    steps: int = 0
    guidance: float | None = None
    calls: int = 4
    sites: bool = True
    threads: int = 0


@dataclass(frozen=True)
class TensorError:
    """How far two engines' values of one tensor are apart, over all compared calls.

    Args:
        tensor: value name in the float graph.
        site: module path; empty for an output of the graph.
        relative: 2-norm of the difference over the 2-norm of the first engine's values.
        db: the same as a signal-to-noise ratio.
        largest: largest absolute difference.
    """

    tensor: str
    site: str
    relative: float
    db: float
    largest: float


@dataclass(frozen=True)
class PairPsnr:
    """Same-seed PSNR of images (see `quantempo.quality.draw`) in dB: mean over the images, and the worst of them."""

    first: str
    second: str
    mean_db: float
    worst_db: float


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        engines: in the order asked for.
        dialects: which graphs each of them ran.
        outputs: graph outputs, first engine against the second.
        sites: what quantized sites read and write, worst first.
        images: PSNR of every pair, the float reference included where the bundle has one.
        seeds, steps, calls: what it rests on.
    """

    engines: tuple[str, ...]
    dialects: Mapping[str, str]
    outputs: tuple[TensorError, ...]
    sites: tuple[TensorError, ...]
    images: tuple[PairPsnr, ...]
    seeds: int
    steps: int
    calls: int

    def text(self, worst: int = 12) -> str:
        """A table for people."""
        first, second = self.engines
        lines = [f"{first} ({self.dialects[first]}) against {second} ({self.dialects[second]}), "
                 f"{self.calls} calls, {self.seeds} seeds, {self.steps} steps", "", "  output"]  # fmt: skip
        lines += [f"    {_row(item)}" for item in self.outputs]
        if self.sites:
            lines += ["", f"  site tensors, the {min(worst, len(self.sites))} worst of {len(self.sites)}"]
            lines += [f"    {_row(item)}" for item in self.sites[:worst]]
        lines += ["", "  images, same seeds"]
        lines += [f"    {p.first:>8} – {p.second:<8} {p.mean_db:6.2f} dB, worst {p.worst_db:6.2f}" for p in self.images]
        return "\n".join(lines)


def _row(item: TensorError) -> str:
    return f"{item.db:7.2f} dB  relative {item.relative:.2e}  largest {item.largest:.2e}  {item.site or item.tensor}"


def compare_engines(path: Path, engines: Sequence[str], options: CompareOptions | None = None) -> Comparison:
    """Compare two engines on one bundle.

    Args:
        path: bundle directory.
        engines: two backend names.
        options: see there.

    Raises:
        RequestError: not two different engines, or one for which the bundle has no graph.
        EngineError, MissingExtra: an engine is not there or refuses its graph.
    """
    options = options or CompareOptions()
    if len(engines) != 2 or engines[0] == engines[1]:
        raise RequestError(
            "engines", found=", ".join(engines) or "none", wanted="two different engines",
            cause="a comparison has two sides", remedy="give, for example, --engines ort,openvino",
        )
    bundle = read_bundle(path)
    for name in engines:
        denoiser_graph(name, bundle)
    reference = read_bundle(path / REFERENCE) if (path / REFERENCE / "manifest.json").is_file() else None
    feeds = record_feeds(bundle, engines[0], options)
    taps = common_tensors(bundle, engines) if options.sites else {}
    errors = tensor_errors(bundle, engines, feeds, tuple(taps), options.threads)
    shown = [TensorError(e.tensor, taps.get(e.tensor, ""), e.relative, e.db, e.largest) for e in errors]
    steps = options.steps or bundle.manifest.programs.default_steps
    return Comparison(
        engines=tuple(engines), dialects={name: str(bundle_dialect(name, bundle)) for name in engines},
        outputs=tuple(item for item in shown if not item.site),
        sites=tuple(sorted((item for item in shown if item.site), key=lambda item: item.db)),
        images=_image_pairs(bundle, reference, engines, steps, options), seeds=options.seeds, steps=steps,
        calls=len(feeds),
    )


class _Recorder:
    """An engine that keeps what it is fed."""

    def __init__(self, engine: Engine, calls: list[dict[str, NDArray[Any]]]) -> None:
        self.name, self.host = engine.name, engine.host
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self._engine, self._calls = engine, calls

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        """The engine's binding, watched."""
        return _RecordedBinding(self._engine.bind(sizes, share), self._calls)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """As the engine."""
        return self._engine.run(feeds)

    def close(self) -> None:
        """As the engine."""
        self._engine.close()


class _RecordedBinding:
    def __init__(self, binding: Binding, calls: list[dict[str, NDArray[Any]]]) -> None:
        self._binding, self._calls = binding, calls
        self.inputs, self.outputs = binding.inputs, binding.outputs

    def run(self) -> None:
        """Copy the inputs, then run."""
        self._calls.append({name: buffer.download() for name, buffer in self.inputs.items()})
        self._binding.run()


def record_feeds(bundle: OpenBundle, engine: str, options: CompareOptions) -> list[dict[str, NDArray[Any]]]:
    """Inputs of some denoiser calls, evenly spread over one guided run of one sample."""
    calls: list[dict[str, NDArray[Any]]] = []
    graph = bundle.path(denoiser_graph(engine, bundle).file)

    def opened(path: Path, given: EngineOptions) -> Engine:
        real = open_engine(engine, path, given)
        return _Recorder(real, calls) if path == graph else real

    with Session(bundle, opened, EngineOptions(options.threads), bundle_dialect(engine, bundle)) as session:
        session(**_request(session, [0], options), output_type="latent")
    picked = np.unique(np.linspace(0, len(calls) - 1, max(1, min(options.calls, len(calls)))).round().astype(int))
    return [calls[index] for index in picked]


def _request(session: Session, seeds: list[int], options: CompareOptions) -> dict[str, Any]:
    """Call arguments for some seeds, labels dealt out over the classes."""
    denoiser = session.manifest.denoiser
    request: dict[str, Any] = {"seed": seeds, "batch_size": len(seeds), "guidance_scale": options.guidance}
    request["num_inference_steps"] = options.steps or None
    if denoiser.classes:
        names = sorted(int(label) for label in denoiser.classes[0].names) or range(denoiser.classes[0].count)
        request["class_labels"] = [names[seed % len(names)] for seed in seeds]
    for item in denoiser.arrays:
        shape = tuple(size if isinstance(size, int) else 8 for size in item.shape)
        for name in (item.name, f"negative_{item.name}") if item.guided else (item.name,):
            rows = [np.random.Generator(np.random.Philox([len(name), seed])).standard_normal(shape) for seed in seeds]
            request[name] = np.stack(rows).astype(item.dtype)
    return request


def common_tensors(bundle: OpenBundle, engines: Sequence[str]) -> dict[str, str]:
    """What quantized sites read and write, as far as both engines' graphs compute it: site by value name.

    Lowering keeps the names of all float values; a product whose bias was drawn into it goes by the name of the sum.
    """
    plan = load_plan(bundle)
    if plan is None:
        return {}
    graphs = [read_graph(bundle.path(denoiser_graph(name, bundle).file)) for name in engines]
    computed = set.intersection(*({name for node in graph.nodes for name in node.outputs} for graph in graphs))
    outputs = set(graphs[0].outputs)
    found: dict[str, str] = {}
    for site in plan.quantized():
        with_bias = f"{site.output.rpartition('/')[0]}/out"
        result = next((name for name in (with_bias, site.output) if name in computed), None)
        for name, what in ((site.tensor, f"{site.id}, input"), (result, f"{site.id}, result")):
            if name is not None and name in computed and name not in outputs:
                found.setdefault(name, what)
    return found


def tensor_errors(
    bundle: OpenBundle,
    engines: Sequence[str],
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    taps: tuple[str, ...],
    threads: int = 0,
) -> list[TensorError]:
    """Errors of all graph outputs and taps between two engines, over some calls."""
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    largest: dict[str, float] = {}
    with ExitStack() as stack:
        opened = []
        for name in engines:
            graph = bundle.path(denoiser_graph(name, bundle).file)
            opened.append(open_engine(name, graph, EngineOptions(threads, taps)))
            stack.callback(opened[-1].close)
        for feed in feeds:
            first, second = (engine.run({k: v for k, v in feed.items() if k in engine.inputs}) for engine in opened)
            for name in first:
                difference = first[name].astype(np.float64) - second[name].astype(np.float64)
                signal[name] = signal.get(name, 0.0) + float(np.sum(first[name].astype(np.float64) ** 2))
                noise[name] = noise.get(name, 0.0) + float(np.sum(difference**2))
                largest[name] = max(largest.get(name, 0.0), float(np.max(np.abs(difference), initial=0.0)))
    return [TensorError(name, "", *_ratio(signal[name], noise[name]), largest[name]) for name in signal]


def _ratio(signal: float, noise: float) -> tuple[float, float]:
    """Relative error, and signal-to-noise ratio in dB."""
    if noise == 0:
        return 0.0, CEILING_DB
    if signal == 0:
        return float("inf"), -CEILING_DB
    return (noise / signal) ** 0.5, min(10 * float(np.log10(signal / noise)), CEILING_DB)


def _image_pairs(
    bundle: OpenBundle, reference: OpenBundle | None, engines: Sequence[str], steps: int, options: CompareOptions
) -> tuple[PairPsnr, ...]:
    images = {name: _images(bundle, name, steps, options) for name in engines}
    if reference is not None:
        images[FLOAT] = _images(reference, engines[0], steps, options)
    pairs = []
    for first, second in itertools.combinations(images, 2):
        values = psnr_db(images[first], images[second])
        pairs.append(PairPsnr(first, second, float(values.mean()), float(values.min())))
    return tuple(pairs)


def _images(bundle: OpenBundle, engine: str, steps: int, options: CompareOptions) -> Images:
    def opened(path: Path, given: EngineOptions) -> Engine:
        return open_engine(engine, path, given)

    asked = CompareOptions(steps=steps, guidance=options.guidance)
    parts = []
    with Session(bundle, opened, EngineOptions(options.threads), bundle_dialect(engine, bundle)) as session:
        for start in range(0, options.seeds, 8):
            seeds = list(range(start, min(start + 8, options.seeds)))
            parts.append(draw(session, bundle.manifest, **_request(session, seeds, asked)))
    return np.concatenate(parts)
