"""Small bundles on the echo engine, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from quantempo.contracts.codec import canonical_json, digest, to_data
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import (
    CacheIndex,
    ClassInput,
    Decoder,
    Denoiser,
    FileEntry,
    GraphEntry,
    Manifest,
    ProgramIndex,
)
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import (
    LATENTS,
    PREDICTION,
    Call,
    Clamp,
    Correct,
    Lin,
    Noise,
    Operation,
    State,
    StepProgram,
)
from quantempo.contracts.table import ScaleTable, TensorScales
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.runtime.bundle import file_digest
from quantempo.runtime.bundle_writer import BundleWriter

FEATURES = ("step-program-1", "scale-groups-1")
CACHE_FEATURES = (*FEATURES, "corrections-1", "feature-cache-1")


@dataclass(frozen=True)
class Shape:
    """What the made bundle is like.

    Args:
        latents: per sample.
        classes: number of labels; the null label comes after them.
        steps: step counts with a program.
        groups: scale groups; 0 makes a float bundle.
        decoder: whether a decoder graph doubles the size and leaves `channels` channels.
        max_batch: as in the manifest.
        noisy: whether each step adds noise.
        cached: step counts with a program that reuses a feature at every second call, and corrects the prediction.
    """

    latents: tuple[int, int, int] = (4, 8, 8)
    classes: int = 10
    null: bool = True
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20)
    groups: int = 4
    decoder: bool = True
    channels: int = 1
    max_batch: int | None = None
    noisy: bool = False
    names: bool = True
    guidance: float = 1.5
    seed: int = 0
    cached: tuple[int, ...] = ()


def echo_engine(path: Path, options: EngineOptions) -> Engine:
    """What a `Session` over echo bundles opens graphs with."""
    return open_engine("echo", path, options)


def make_program(steps: int, noisy: bool = False, start: float = 1000.0) -> StepProgram:
    """A first-order sampler: `latents = a·latents + b·prediction (+ c·noise)`, with a second register and a clamp."""
    calls = []
    for step in range(steps):
        shrink = 1.0 - 0.5 / steps
        update: list[Operation] = [
            Lin("origin", ((LATENTS, 1.0), (PREDICTION, -0.7))),
            Clamp("origin", "origin", -3.0, 3.0),
        ]
        terms: tuple[tuple[str, float], ...] = ((LATENTS, shrink), ("origin", 0.3 / steps), (PREDICTION, -0.1 / steps))
        if noisy and step < steps - 1:
            update.append(Noise("noise", step + 1))
            terms = (*terms, ("noise", 0.05))
        update.append(Lin(LATENTS, terms))
        timestep = start * (1.0 - step / steps) - 1.0
        calls.append(Call(timestep, {"sample": ((LATENTS, 0.9),)}, tuple(update), step))
    return StepProgram("EchoScheduler", steps, tuple(calls), (State(LATENTS, 1.5),))


def denoiser_graph(shape: Shape) -> EchoGraph:
    """Inputs and outputs as `quantempo.contracts.manifest.Denoiser` asks for them."""
    inputs = [
        TensorSpec("sample", "float32", ("batch", *shape.latents)), TensorSpec("timestep", "float32", ("batch",)),
    ]
    if shape.classes:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    if shape.groups:
        inputs.append(TensorSpec("scale_group", "int64", ()))
    outputs = [TensorSpec("prediction", "float32", ("batch", *shape.latents))]
    if shape.cached:
        outputs.append(_feature(shape))
    return EchoGraph(
        tuple(inputs), tuple(outputs), shape.seed, inner=(TensorSpec("blocks.0", "float32", ("batch", 6)),)
    )


def _feature(shape: Shape) -> TensorSpec:
    return TensorSpec("cache.0", "float32", ("batch", 2, *shape.latents[1:]))


def cached_program(steps: int) -> StepProgram:
    """`make_program`, where every second call reuses the feature and has its prediction corrected."""
    program = make_program(steps)
    calls = list(program.calls)
    for index in range(1, steps, 2):
        correct = Correct(PREDICTION, PREDICTION, "gain", "bias", index)
        calls[index] = replace(calls[index], graph="reuse.0", update=(correct, *calls[index].update))
    return replace(program, calls=tuple(calls))


def make_bundle(
    target: Path, shape: Shape | None = None, changes: Mapping[str, object] | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle.

    Args:
        target: the directory to be.
        shape: what it is like.
        changes: fields of the manifest to replace.
        overwrite: replace an older bundle.
    """
    shape = shape or Shape()
    with BundleWriter(target, overwrite) as writer:
        graph = denoiser_graph(shape)
        dialect: Literal["ort", "float"] = "ort" if shape.groups else "float"
        write_echo_graph(writer.path("graphs/denoiser.json"), graph)
        written = ("cache.0",) if shape.cached else ()
        full = GraphEntry(
            "graphs/denoiser.json", (), "full", dialect, "float32", graph.inputs, graph.outputs, writes=written
        )
        graphs = {f"full.{dialect}-float32": full}
        if shape.cached:
            graphs[f"reuse.0.{dialect}-float32"] = _cache(writer, shape, full)
        if shape.decoder:
            graphs["decoder"] = _decoder(writer, shape)
        for steps in shape.steps:
            writer.add_json(f"programs/{steps}.json", make_program(steps, shape.noisy))
        writer.add_bytes("programs/scheduler_config.json", b'{"_class_name": "EchoScheduler"}\n')
        partition = _partition(shape.groups) if shape.groups else None
        if partition is not None:
            writer.add_bytes("tables.safetensors", _table(partition))
        manifest = Manifest(
            name="echo", precision="int8" if shape.groups else "float32",
            requires=CACHE_FEATURES if shape.cached else FEATURES, files={}, graphs=graphs,
            denoiser=_denoiser(shape), decoder=Decoder("decoder" if shape.decoder else None, 0.5, 0.1),
            programs=ProgramIndex(
                "EchoScheduler", digest("echo"), {str(s): f"programs/{s}.json" for s in shape.steps},
                "programs/scheduler_config.json", default_steps=shape.steps[-1],
            ),
            partition=partition, tables="tables.safetensors" if partition else None, default_guidance=shape.guidance,
            vectors="vectors.safetensors" if shape.cached else None,
            cache=CacheIndex("cache.json", {str(s): f"programs/cached.{s}.json" for s in shape.cached})
            if shape.cached else None,
        )
        writer.finish(replace(manifest, **dict(changes or {})))  # type: ignore[arg-type]
    return target


def _denoiser(shape: Shape) -> Denoiser:
    names = {str(i): f"digit {i}" for i in range(shape.classes)} if shape.names else {}
    classes = ClassInput("class_labels", shape.classes, shape.classes if shape.null else None, names)
    return Denoiser(
        shape.latents, (classes,) if shape.classes else (), group_input="scale_group" if shape.groups else None,
        max_batch=shape.max_batch,
    )


def _cache(writer: BundleWriter, shape: Shape, full: GraphEntry) -> GraphEntry:
    """Write everything that reuses features."""
    graph = EchoGraph((*full.inputs, _feature(shape)), full.outputs[:1], shape.seed + 2)
    write_echo_graph(writer.path("graphs/reuse.0.json"), graph)
    for steps in shape.cached:
        writer.add_json(f"programs/cached.{steps}.json", cached_program(steps))
    writer.add_bytes("cache.json", b"{}\n")
    rows, channels = max(shape.cached), shape.latents[0]
    ramp = np.linspace(0.8, 1.2, rows * channels, dtype=np.float32).reshape(rows, channels)
    writer.add_bytes("vectors.safetensors", save({"gain": ramp, "bias": ramp - np.float32(1.0)}))
    return replace(
        full, file="graphs/reuse.0.json", variant="reuse.0", inputs=graph.inputs, outputs=graph.outputs,
        reads=("cache.0",), writes=(),
    )


def _decoder(writer: BundleWriter, shape: Shape) -> GraphEntry:
    channels, height, width = shape.latents
    graph = EchoGraph(
        (TensorSpec("latents", "float32", ("batch", channels, height, width)),),
        (TensorSpec("image", "float32", ("batch", shape.channels, 2 * height, 2 * width)),), shape.seed + 1,
    )
    write_echo_graph(writer.path("graphs/decoder.json"), graph)
    return GraphEntry("graphs/decoder.json", (), "decoder", "float", "float32", graph.inputs, graph.outputs)


def _partition(groups: int) -> Partition:
    edges = tuple(1000.0 * (i + 1) / groups for i in range(groups - 1))
    return Partition(edges, 0.0, 999.0)


def _table(partition: Partition) -> bytes:
    scales = np.linspace(0.01, 0.02, partition.groups).astype(np.float32)
    one = TensorScales(scales, np.full(partition.groups, 120, np.int32), scales * np.float32(1.1))
    return save({name: np.asarray(a) for name, a in ScaleTable(partition, {"x": one}).arrays().items()})


def rewrite_manifest(bundle: Path, **changes: object) -> None:
    """Change top-level keys of a written manifest, as an attacker or an editor would."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(canonical_json(data))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and vouch for it in the manifest, as somebody who edits a bundle by hand would."""
    (bundle / name).write_bytes(content)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files[name] = to_data(FileEntry(file_digest(bundle / name), len(content)))
    rewrite_manifest(bundle, files=files)
