"""quantempo beside other tools: fidelity, time per call, size on disk; what fails is recorded with its message.

Fidelity: the demo models, same-seed PSNR to float as in quality.py, every tool's model running in our loop.  Tools that
calibrate get rows of the denoiser calls that our own calibration runs.  Time: the full-size shapes of int8_speed.py on
one pinned core, in alternation.  Needs `pip install nncf`; ModelOpt and optimum-intel pin other versions of our
libraries, so each is run by an interpreter of its own.

    python benchmarks/peers.py --modelopt venv-a/bin/python --optimum venv-b/bin/python --json docs/peers.json
    python benchmarks/peers.py --parts fidelity --demos dit --samples 10 --only 'quantize_static*'    # a quick look

Results are added to the JSON one by one, and what is made is kept under --work, so the work can be done in pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import int8_speed
import nncf_comparison
import numpy as np
import openvino_speed
import peer_tools
import quality

from quantempo.contracts.engine import Binding, Buffer, Engine, EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines import openvino
from quantempo.engines.host import HostEngine, allocate
from quantempo.engines.registry import open_engine
from quantempo.pipeline import compile_model
from quantempo.progress import console_progress
from quantempo.report.measure import Fidelity, Subject, open_subject
from quantempo.runtime.session import Session

CASES = nncf_comparison.CASES
FLOAT = nncf_comparison.FLOAT
Opener = Callable[[Path, EngineOptions], Engine]


class EagerEngine(HostEngine):
    """The diffusers module itself as an engine; only the sample is rounded to its type, as in diffusers' pipelines."""

    def __init__(self, module: Any, dtype: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        super().__init__("eager", {s.name: s for s in inputs}, {s.name: s for s in outputs})
        self.module, self.dtype = module, dtype

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        self._check_bind(sizes, share)
        return EagerBinding(self, sizes)


class EagerBinding:
    """A binding of an `EagerEngine`."""

    def __init__(self, engine: EagerEngine, sizes: Mapping[str, int]) -> None:
        self._engine = engine
        self.inputs: Mapping[str, Buffer] = allocate(engine.name, engine.inputs, sizes, None)
        self.outputs: Mapping[str, Buffer] = allocate(engine.name, engine.outputs, sizes, None)

    def run(self) -> None:
        import torch

        given = [torch.from_numpy(buffer.array) for buffer in self.inputs.values()]
        given[0] = given[0].to(self._engine.dtype)
        with torch.inference_mode():
            (prediction,) = self._engine.module(*given)
        out = next(iter(self.outputs.values())).array
        # A DiT predicts a variance too, which its graph leaves out.
        np.copyto(out, prediction[:, : out.shape[1]].float().numpy())


class Results:
    """The JSON file: read at first, written after every figure."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def put(self, value: Any, *keys: str) -> None:
        """Set a value under nested keys."""
        place = self.data
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        if self.path is not None:
            self.path.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")

    def drop(self, *keys: str) -> None:
        """Forget what is there under nested keys."""
        place = self.data
        for key in keys[:-1]:
            place = place.get(key, {})
        place.pop(keys[-1], None)

    @contextmanager
    def failures(self, *keys: str) -> Iterator[None]:
        """What is raised inside becomes a recorded failure; what was recorded there before is forgotten."""
        self.drop("failures", *keys)
        try:
            yield
        except Exception as error:  # a tool may raise anything, and its words are the result
            words = " ".join(str(error).split())
            self.put(f"{type(error).__name__}: {words[:400]}", "failures", *keys)
            print(f"{' '.join(keys)}: FAILED: {type(error).__name__}: {words[:400]}", flush=True)


def main() -> None:
    options = parse()
    results = Results(options.json)
    results.put({**results.data.get("machine", {}), **openvino_speed.machine(), **versions(options)}, "machine")
    results.put(planned(), "planned")
    with openvino.without_telemetry(), tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        if "fidelity" in options.parts:
            for name in options.demos:
                fidelity(name, work / "demo" / name, options, results)
                results.put(f"fidelity {name}", "commands", command())
        for part in ("prepare", "time"):
            for name in openvino_speed.models(options) if part in options.parts else ():
                {"prepare": prepare, "time": measure}[part](name, work / "large" / name, options, results)
                results.put(f"{part} {name}", "commands", command())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="prepare: the models to time")
    parser.add_argument("--demos", nargs="+", choices=["dit", "unet"], default=["dit", "unet"])
    parser.add_argument("--samples", type=int, default=50, help="held-out seeds")
    parser.add_argument("--rows", type=int, default=300, help="calibration rows for every tool")
    parser.add_argument("--trajectories", type=int, default=64, help="that the rows are drawn from")
    parser.add_argument("--threads", type=int, default=1, help="while calibrating and sampling; timing takes one")
    parser.add_argument("--model", choices=[*int8_speed.MODELS, "all"], default="all", help="shapes to time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="per variant and round")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of labels")
    parser.add_argument("--modelopt", type=Path, help="a Python with nvidia-modelopt[onnx]")
    parser.add_argument("--optimum", type=Path, help="a Python with optimum-intel[openvino]")
    parser.add_argument("--work", type=Path, help="keeps bundles, graphs and the tools' models, made where absent")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


PARTS = ("fidelity", "prepare", "time")
OURS = ("quantempo on ort", "quantempo on openvino")
EAGER = ("diffusers eager, float32", "diffusers eager, bfloat16")


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of the tools; those of the other environments where they are given."""
    found = {"nncf": version("nncf"), "diffusers": version("diffusers"), "onnx": version("onnx")}
    for name, python in (("nvidia-modelopt", options.modelopt), ("optimum-intel", options.optimum)):
        if python is not None:
            command = [python, "-c", f"from importlib.metadata import version; print(version({name!r}))"]
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def planned() -> dict[str, Any]:
    """Every label of a full run, so that the page can name what is missing."""
    python = Path("python")
    fidelity = {
        name: [*OURS, *EAGER, *(tool.label for tool in peer_tools.tools(name, python, python))]
        for name in quality.SOURCES
    }
    return {"fidelity": fidelity, "time": list(int8_speed.MODELS)}


def command() -> str:
    """How this was started, without the places of one machine."""
    words, shown = iter(sys.argv[1:]), ["python", "benchmarks/peers.py"]
    for word in words:
        if word == "--work":
            next(words)
        elif word in ("--modelopt", "--optimum"):
            next(words)
            shown += [word, f"{word[2:].upper()}_PYTHON"]
        elif word == "--json":
            shown += [word, f"docs/{Path(next(words)).name}"]
        else:
            shown.append(word)
    return shlex.join(shown)


def wanted(label: str, options: argparse.Namespace) -> bool:
    """Whether the command line asks for it."""
    return any(fnmatch.fnmatch(label, pattern) for pattern in options.only)


# Fidelity


def fidelity(name: str, folder: Path, options: argparse.Namespace, results: Results) -> None:
    """Same-seed PSNR to ONNX Runtime float32 of everything, by case, and the bytes of each denoiser."""
    source, scheduler, recipe = quality.SOURCES[name]
    recipe = dataclasses.replace(recipe, threads=options.threads)
    if not (folder / "manifest.json").exists():
        compile_model(source, folder, recipe, scheduler=scheduler, progress=console_progress())
    subject = open_subject(folder)
    few = dataclasses.replace(recipe, samples=options.trajectories)
    rows = calibration_rows(subject, few, folder.parent / f"{name}-rows-{options.rows}.npz", options.rows)
    graph = subject.reference.path(subject.reference.manifest.graphs[FLOAT].file)
    keep = tuple(site.output for site in subject.plan.kept())
    model = source if (source / "model_index.json").is_file() else None
    made = folder.parent / f"{name}-peers"
    made.mkdir(exist_ok=True)
    job = peer_tools.Job(model, graph, rows, keep, made)
    facts = {"samples": options.samples, "rows": len(rows), "trajectories": options.trajectories, "kept": len(keep)}
    results.put(facts, "fidelity", name, "setting")
    reference = reference_images(subject, folder.parent / f"{name}-reference-{options.samples}.npz", options)

    def add(label: str, session: Session, size: int | None) -> None:
        for case in CASES:
            result = Fidelity.of(nncf_comparison.images(session, case, options), reference[case.name])
            results.put(asdict(result), "fidelity", name, "cases", case.name, label)
            print(f"{name} {case.name:30s} {label:60s} {result.psnr_db:6.2f} dB", flush=True)
        if size is not None:
            results.put(size, "fidelity", name, "bytes", label)

    ours_and_eager(name, subject, options, results, add)
    for tool in peer_tools.tools(name, options.modelopt, options.optimum):
        if not wanted(tool.label, options):
            continue
        results.put(tool.asked, "settings", tool.label)
        with results.failures("fidelity", name, tool.label):
            start = time.perf_counter()
            path = tool.quantize(job)
            results.put(round(time.perf_counter() - start, 1), "fidelity", name, "seconds", tool.label)
            with Session(subject.reference, instead(tool.engine, graph, path), engine_options(tool.engine)) as session:
                add(tool.label, session, bytes_of(path))


def ours_and_eager(
    name: str, subject: Subject, options: argparse.Namespace, results: Results, add: Callable[..., None]
) -> None:
    """Our own graphs on both engines, and the diffusers module in two types."""
    for engine, dialect in (("ort", "ort"), ("openvino", "portable")):
        label = f"quantempo on {engine}"
        if wanted(label, options):
            entry = subject.bundle.manifest.graphs[f"full.{dialect}-f32"]
            given = engine_options(engine)
            with Session(subject.bundle, nncf_comparison.opener(engine), given, dialect) as session:
                add(label, session, bytes_of(subject.bundle.path(entry.file)))
    for kind in ("float32", "bfloat16"):
        label = f"diffusers eager, {kind}"
        if wanted(label, options):
            with results.failures("fidelity", name, label):
                module, size = eager_module(name, kind, options.threads)
                entry = subject.reference.manifest.graphs[FLOAT]

                def opened(path: Path, given: EngineOptions, module: Any = module, entry: Any = entry) -> Engine:
                    if path.name != Path(entry.file).name:
                        return open_engine("ort", path, given)
                    return EagerEngine(module[0], module[1], entry.inputs, entry.outputs)

                with Session(subject.reference, opened, engine_options("ort")) as session:
                    add(label, session, size)


def eager_module(name: str, kind: str, threads: int) -> tuple[tuple[Any, Any], int]:
    """The trained demo denoiser behind the graph's inputs, its type, and the bytes of its parameters."""
    import diffusers
    import torch

    from quantempo.export.families import family_of
    from quantempo.export.source import open_source

    torch.set_num_threads(threads)
    source = open_source(*quality.SOURCES[name][:2])
    dtype = getattr(torch, kind)
    module = getattr(diffusers, source.class_name).from_pretrained(source.denoiser, torch_dtype=dtype).eval()
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return (family_of(source).wrap(module), dtype), size


def calibration_rows(subject: Subject, recipe: Any, path: Path, count: int) -> list[peer_tools.Feeds]:
    """`nncf_comparison.calibration_rows`, kept in a file."""
    if not path.exists():
        rows = nncf_comparison.calibration_rows(subject.reference, recipe, count)
        joined: Any = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        np.savez(path, **joined)
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    total = len(next(iter(arrays.values())))
    return [{key: values[i : i + 1] for key, values in arrays.items()} for i in range(total)]


def reference_images(subject: Subject, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures of the float model on ONNX Runtime by case, kept in a file."""
    if not path.exists():
        with Session(subject.reference, nncf_comparison.opener("ort"), engine_options("ort")) as session:
            np.savez(path, **{case.name: nncf_comparison.images(session, case, options) for case in CASES})
    with np.load(path) as stored:
        return {case.name: stored[case.name] for case in CASES}


def instead(engine: str, graph: Path, model: Path) -> Opener:
    """Opens a tool's model where the float denoiser is asked for, and everything else with ONNX Runtime."""

    def opened(path: Path, given: EngineOptions) -> Engine:
        if path.name != graph.name:
            return open_engine("ort", path, EngineOptions(threads=given.threads))
        return open_engine("ort", model, given) if engine == "ort" else nncf_comparison.OtherModel(path, model, given)

    return opened


def engine_options(engine: str, **settings: str) -> EngineOptions:
    """One thread; without idle threads that spin."""
    return EngineOptions(threads=1, settings={**({"spinning": "off"} if engine == "ort" else {}), **settings})


def bytes_of(model: Path) -> int:
    """Size of a graph and of its own part of the weight files, which it may share with others."""
    import onnx

    if model.suffix == ".xml":
        return model.stat().st_size + model.with_suffix(".bin").stat().st_size
    parts: dict[tuple[str, int], int] = {}
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            parts[place["location"], int(place.get("offset", 0))] = int(place["length"])
    return model.stat().st_size + sum(parts.values())


# Time


def prepare(name: str, folder: Path, options: argparse.Namespace, results: Results) -> None:
    """Make every model that `measure` times; two batches calibrate, since speed does not depend on the numbers."""
    import onnx_ir as ir

    from quantempo.export.for_ort import for_onnxruntime
    from quantempo.export.graph_files import write_graphs

    module, family = openvino_speed.prepare(name, folder)
    tuned = folder / "tuned"
    if not tuned.exists():
        tuned.mkdir()
        write_graphs(tuned, {"float": for_onnxruntime(ir.load(folder / "float.onnx"))})
    rows = [family.example(int8_speed.BATCH, seed) for seed in (0, 1)]
    (folder / "peers").mkdir(exist_ok=True)
    job = peer_tools.Job(None, folder / "float.onnx", rows, (), folder / "peers")
    for tool in timed_tools(name, options):
        if not wanted(tool.label, options):
            continue
        with results.failures("prepare", name, tool.label):
            path = place(tool, folder)
            if not path.exists():
                move(tool.quantize(job), path)
            results.put(tool.asked, "settings", tool.label)
            results.put(bytes_of(path), "time", name, "bytes", tool.label)
    parameters = sum(p.numel() for p in module.parameters())
    for label, size in (
        ("diffusers eager, float32", 4 * parameters), ("diffusers eager, bfloat16", 2 * parameters),
        ("onnxruntime float32", bytes_of(tuned / "float.onnx")),
        ("quantempo on ort", bytes_of(folder / "ort.onnx")),
        ("quantempo on openvino", bytes_of(folder / "portable.onnx")),
    ):
        results.put(size, "time", name, "bytes", label)


def move(made: Path, path: Path) -> None:
    """Move a model; one of OpenVINO is two files."""
    if made.suffix == ".xml":
        made.with_suffix(".bin").rename(path.with_suffix(".bin"))
    made.rename(path)


def place(tool: peer_tools.Tool, folder: Path) -> Path:
    """Where a tool's finished model lies."""
    suffix = ".onnx" if tool.engine == "ort" else ".xml"
    return folder / "peers" / ("ready-" + tool.label.replace(",", "").replace(" ", "-") + suffix)


def timed_tools(name: str, options: argparse.Namespace) -> list[peer_tools.Tool]:
    """One tool per structure of graph: calibration methods give the same operators with other numbers."""
    family = "dit" if name.startswith("dit") else "unet"
    return [
        tool for tool in peer_tools.tools(family, options.modelopt, options.optimum)
        if "our float" not in tool.label and "pipeline" not in tool.label
        and not any(word in tool.label for word in ("Entropy", "Percentile", "entropy"))
    ]


def measure(name: str, folder: Path, options: argparse.Namespace, results: Results) -> None:
    """Milliseconds per call; every piece has quantempo in it, and ratios are taken within a piece."""
    openvino_speed.pin()
    module, family = openvino_speed.prepare(name, folder)
    feeds = family.example(int8_speed.BATCH)
    makers = variants(name, folder, module, feeds, options)
    calls = {}
    for label, (maker, _) in makers.items():
        with results.failures("time", name, label):
            calls[label] = maker()
    times = openvino_speed.alternate(calls, options)
    for label in times:
        results.put(round(float(np.median(times[label])), 2), "time", name, "ms_per_call", label)
        rival = makers[label][1]
        if rival in times and rival != label:
            results.put(openvino_speed.ratio(times, label, rival), "time", name, "quantempo_is_faster_by", label)
        print(f"{name} {label:60s} {np.median(times[label]):8.2f} ms", flush=True)


def variants(
    name: str, folder: Path, module: Any, feeds: Any, options: argparse.Namespace
) -> dict[str, tuple[Callable[[], openvino_speed.Call], str]]:
    """What is timed: how to make its call, and the variant of quantempo on the same engine that it is compared with."""

    def bound(engine: str, path: Path, settings: Mapping[str, str], model: Path | None = None) -> openvino_speed.Call:
        given = EngineOptions(threads=1, settings=settings)
        if model is not None:
            return openvino_speed.bound(nncf_comparison.OtherModel(path, model, given), feeds)
        return openvino_speed.bound(open_engine(engine, path, given), feeds)

    ort = "quantempo on ort"
    found: dict[str, tuple[Callable[[], openvino_speed.Call], str]] = {
        ort: (lambda: bound("ort", folder / "ort.onnx", {}), ort),
        "onnxruntime float32": (lambda: bound("ort", folder / "tuned" / "float.onnx", {}), ort),
    }
    for hint in openvino_speed.HINTS:
        label = f"quantempo on openvino, {hint} rest"
        found[label] = (partial(bound, "openvino", folder / "portable.onnx", {"precision": hint}), label)
    for kind in ("float32", "bfloat16"):
        found[f"diffusers eager, {kind}"] = (partial(eager_call, module, feeds, kind), ort)
    for tool in timed_tools(name, options):
        path = place(tool, folder)
        if tool.engine == "ort":
            found[tool.label] = (partial(bound, "ort", path, {}), ort)
            continue
        for hint in openvino_speed.HINTS:
            found[f"{tool.label}, {hint} rest"] = (
                partial(bound, "openvino", folder / "float.onnx", {"precision": hint}, path),
                f"quantempo on openvino, {hint} rest",
            )
    return {label: entry for label, entry in found.items() if wanted(label, options)}


def eager_call(module: Any, feeds: Any, kind: str) -> openvino_speed.Call:
    """One of `int8_speed.eager`'s calls."""
    return int8_speed.eager(module, feeds, 1)[f"eager-{kind}"]


if __name__ == "__main__":
    main()
