"""quantempo on OpenVINO beside the INT8 models that NNCF makes for OpenVINO: time per call, and fidelity.

Time: the full-size shapes of int8_speed.py, all variants in alternation on one pinned core, each with its better type
for the unquantized rest.  Fidelity: the demo models, same-seed PSNR to float.  NNCF is given rows of the denoiser calls
that our own calibration runs, and its model runs in our loop.  Needs `pip install nncf`.

    python benchmarks/nncf_comparison.py --json docs/nncf.json
    python benchmarks/nncf_comparison.py --parts fidelity --demos dit --samples 20        # a quick look
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import int8_speed
import numpy as np
import openvino_speed
import quality

from quantempo.calib.trajectories import ProgramChoice
from quantempo.contracts.engine import Binding, Buffer, Engine, EngineOptions
from quantempo.engines import openvino
from quantempo.engines.registry import open_engine
from quantempo.pipeline import compile_model, trajectory_batches
from quantempo.progress import console_progress
from quantempo.recipe import Recipe
from quantempo.report.measure import Fidelity, ReportOptions, Sampler, open_subject
from quantempo.runtime.bundle import OpenBundle
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session

Feeds = Mapping[str, np.ndarray]
FLOAT = "full.float-f32"
CASES = tuple(case for case in quality.CASES if case.steps == 20 and not case.scheduler)


@dataclass(frozen=True)
class Asked:
    """How NNCF is asked.

    Args:
        transformer: `model_type=TRANSFORMER`: smoothing, and more patterns of attention.
        mixed: asymmetric activations, which is NNCF's default for transformers; else all is symmetric.
        keep: products to leave in float.
    """

    transformer: bool
    mixed: bool
    keep: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For tables."""
        words = ["nncf", "transformer" if self.transformer else "plain", "mixed" if self.mixed else "performance"]
        return " ".join([*words, *(["our float layers"] if self.keep else [])])

    def quantize(self, graph: Path, samples: Sequence[Feeds], folder: Path) -> Path:
        """Quantize an ONNX graph through OpenVINO, as NNCF's documentation says, and save it."""
        import nncf
        import openvino as library

        done = nncf.quantize(
            library.Core().read_model(graph), nncf.Dataset(list(samples)), subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER if self.transformer else None,
            preset=nncf.QuantizationPreset.MIXED if self.mixed else nncf.QuantizationPreset.PERFORMANCE,
            ignored_scope=nncf.IgnoredScope(names=list(self.keep)) if self.keep else None,
        )
        path = folder / f"{self.label.replace(' ', '-')}.xml"
        library.save_model(done, path, compress_to_fp16=False)
        return path


TRANSFORMER = (Asked(True, True), Asked(True, False))
ASKED = {"dit": TRANSFORMER, "unet": (*TRANSFORMER, Asked(False, True), Asked(False, False))}
"""Settings by family; without `TRANSFORMER` a DiT does not survive (19 dB), a UNet does."""


class OtherModel(openvino.OpenVinoEngine):
    """Our engine with another model in the place of the graph that the other one was made from."""

    def __init__(self, graph: Path, model: Path, options: EngineOptions) -> None:
        super().__init__(graph, options, {**openvino.DEFAULTS, **options.settings})
        import openvino as library

        self._model = library.Core().read_model(model)


class Recorder:
    """An engine that keeps a copy of what every call reads."""

    def __init__(self, engine: Engine, seen: list[dict[str, np.ndarray]]) -> None:
        self._engine, self._seen = engine, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        return Recording(self._engine.bind(sizes, share), self._seen)


class Recording:
    """A binding of a `Recorder`."""

    def __init__(self, binding: Binding, seen: list[dict[str, np.ndarray]]) -> None:
        self._binding, self._seen = binding, seen
        self.inputs, self.outputs = binding.inputs, binding.outputs

    def run(self) -> None:
        self._seen.append({name: buffer.array.copy() for name, buffer in self.inputs.items()})
        self._binding.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    openvino_speed.add_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=["time", "fidelity"], default=["time", "fidelity"])
    parser.add_argument("--demos", nargs="+", choices=["dit", "unet"], default=["dit", "unet"])
    parser.add_argument("--samples", type=int, default=100, help="held-out seeds")
    parser.add_argument("--rows", type=int, default=1000, help="calibration rows for NNCF, whose default is 300")
    parser.add_argument("--trajectories", type=int, default=0, help="that the rows are drawn from; 0 for all of ours")
    parser.add_argument("--hints", nargs="+", choices=openvino_speed.HINTS, default=openvino_speed.HINTS)
    parser.add_argument("--bundles", type=Path, help="folder of compiled demo bundles; they are compiled where absent")
    parser.add_argument("--threads", type=int, default=0, help="while calibrating and sampling")
    options = parser.parse_args()

    def keep(part: str, name: str, found: dict[str, Any]) -> None:
        # Read again each time: the parts may run side by side.
        report = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        report["machine"] = {**openvino_speed.machine(), "nncf": version("nncf")}
        report.setdefault(part, {})[name] = found
        report.setdefault("commands", {})[f"{part} {name}"] = openvino_speed.command()
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")

    # NNCF reports its use to the vendor through the same package as OpenVINO.
    with openvino.without_telemetry(), tempfile.TemporaryDirectory() as scratch:
        if "fidelity" in options.parts:
            for name in options.demos:
                keep("fidelity", name, fidelity(name, Path(scratch), options))
        if "time" in options.parts:
            openvino_speed.pin()
            for name in openvino_speed.models(options):
                folder = options.keep / name if options.keep else Path(scratch) / name
                found = measure(name, folder, options)
                keep("time", name, found)
                openvino_speed.print_table(name, found)


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times of our INT8 graphs and of NNCF's, and ratios of the better ones."""
    _, family = openvino_speed.prepare(name, folder)
    feeds = family.example(int8_speed.BATCH)
    samples = [family.example(int8_speed.BATCH, seed) for seed in (0, 1)]
    calls = openvino_speed.int8_variants(folder, feeds)
    for asked in TRANSFORMER:
        path = folder / f"{asked.label.replace(' ', '-')}.xml"
        if not path.exists():
            asked.quantize(folder / "float.onnx", samples, folder)
        for hint in openvino_speed.HINTS:
            given = EngineOptions(threads=1, settings={"precision": hint})
            calls[f"{asked.label}, {hint} rest"] = openvino_speed.bound(
                OtherModel(folder / "float.onnx", path, given), feeds
            )
    times = openvino_speed.alternate(calls, options)
    rival = min(
        (openvino_speed.fastest(times, asked.label) for asked in TRANSFORMER),
        key=lambda label: float(np.median(times[label])),
    )
    groups = openvino_speed.fastest(times, "int8")
    constant = openvino_speed.fastest(times, "int8 constant scales")
    return {
        **openvino_speed.summary(times), "best": groups, "best_constant": constant, "rival": rival,
        "groups_over_nncf": openvino_speed.ratio(times, groups, rival),
        "constant_over_nncf": openvino_speed.ratio(times, constant, rival),
    }


def fidelity(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Same-seed PSNR to float of our bundle and of NNCF's models, by case and type of the unquantized rest."""
    source, scheduler, recipe = quality.SOURCES[name]
    recipe = dataclasses.replace(recipe, threads=options.threads)
    bundle = (options.bundles or scratch) / name
    if not bundle.exists():
        summary = compile_model(source, bundle, recipe, scheduler=scheduler, progress=console_progress())
        print(summary.text(), flush=True)
    subject = open_subject(bundle)
    if options.trajectories:
        recipe = dataclasses.replace(recipe, samples=options.trajectories, batch=max(1, options.trajectories // 8))
    samples = calibration_rows(subject.reference, recipe, options.rows)
    graph = subject.reference.path(subject.reference.manifest.graphs[FLOAT].file)
    kept = tuple(site.output for site in subject.plan.kept())
    # Also with the layers in float that our plan leaves there.
    asked = (*ASKED[name], dataclasses.replace(ASKED[name][0], keep=kept))
    given = EngineOptions(threads=options.threads)
    with Session(subject.reference, opener("ort"), given) as session:
        reference = {case.name: images(session, case, options) for case in CASES}
    found: dict[str, Any] = {case: {} for case in reference}

    def add(label: str, session: Session) -> None:
        for case in CASES:
            result = Fidelity.of(images(session, case, options), reference[case.name])
            found[case.name][label] = asdict(result)
            print(f"{name} {case.name:30s} {label:48s} {result.psnr_db:6.2f} dB", flush=True)

    with Session(subject.bundle, opener("ort"), given, "ort") as session:
        add("quantempo on ort", session)
    models = {one.label: one.quantize(graph, samples, scratch) for one in asked}
    for hint in options.hints:
        narrow = dataclasses.replace(given, settings={"precision": hint})
        with Session(subject.bundle, opener("openvino"), narrow, "portable") as session:
            add(f"quantempo, {hint} rest", session)
        for label, model in models.items():
            with Session(subject.reference, opener("openvino", {graph.name: model}), narrow) as session:
                add(f"{label}, {hint} rest", session)
    return {"samples": options.samples, "nncf_rows": len(samples), "cases": found}


def calibration_rows(reference: OpenBundle, recipe: Recipe, count: int) -> list[Feeds]:
    """Single rows, drawn evenly from all denoiser calls that calibration runs."""
    seen: list[dict[str, np.ndarray]] = []
    programs = {ProgramChoice(steps): reference.program(steps) for steps in recipe.steps}
    given = EngineOptions(threads=recipe.threads)
    ort = opener("ort")
    with Session(reference, lambda path, options: Recorder(ort(path, options), seen), given) as session:
        for batch in trajectory_batches(reference.manifest.denoiser, recipe, programs, {}):
            request = Request(
                class_labels=list(batch.labels) or None, guidance_scale=batch.guidance, seed=list(batch.seeds),
                batch_size=len(batch.seeds), arrays={},
            )
            session.sample(request, programs[batch.program], output_type="latent")
    places = [(call, row) for call in seen for row in range(len(call["sample"]))]
    chosen = np.random.Generator(np.random.Philox(0)).permutation(len(places))[:count]
    return [{key: values[row : row + 1] for key, values in call.items()} for call, row in (places[i] for i in chosen)]


def opener(backend: str, instead: Mapping[str, Path] | None = None) -> Callable[[Path, EngineOptions], Engine]:
    """Opens graphs with a backend, and another model in the place of some."""

    def open_graph(path: Path, options: EngineOptions) -> Engine:
        model = (instead or {}).get(path.name)
        return OtherModel(path, model, options) if model is not None else open_engine(backend, path, options)

    return open_graph


def images(session: Session, case: quality.Case, options: argparse.Namespace) -> Any:
    """Pictures of the held-out seeds."""
    sampler = Sampler(session, ReportOptions(steps=case.steps, threads=options.threads))
    return sampler.images(options.samples, case.guidance, quality.FIRST_SEED)


if __name__ == "__main__":
    main()
