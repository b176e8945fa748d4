"""A small bundle of real ONNX graphs whose variants exchange a feature; opened by any runtime in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save
from support.bundle_maker import CACHE_FEATURES, make_program
from support.cached_graphs import DENOISER, VECTORS, deciding, every, onnx_engines

from quantempo.contracts.codec import digest
from quantempo.contracts.manifest import CacheIndex, Decoder, GraphEntry, Manifest, ProgramIndex
from quantempo.contracts.program import FITTED_GUIDANCE, PREDICTION, Correct, Decide, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.runtime.bundle_writer import BundleWriter

FEATURE = "cache.0"
LATENT_VECTORS = {
    "latents.gain": np.linspace(0.9, 1.1, 48, dtype=np.float32).reshape(12, 4),
    "latents.bias": np.linspace(-0.1, 0.1, 48, dtype=np.float32).reshape(12, 4),
}


def corrected(steps: int) -> StepProgram:
    """Every second call reuses the feature with a vector of its own, and has its prediction corrected."""
    program = every(2, steps, "reuse.1", noisy=True)
    calls = []
    for index, call in enumerate(program.calls):
        if call.graph == "reuse.1":
            rows = {"cache.0.gain": index % 3, "cache.0.bias": (index + 1) % 3}
            correct = Correct(PREDICTION, PREDICTION, "latents.gain", "latents.bias", index)
            call = replace(call, vectors=rows, update=(correct, *call.update))
        calls.append(call)
    return replace(program, calls=tuple(calls))


DECIDE = Decide("probe", threshold=0.16, polynomial=(0.5, 1.1, 0.002))
CACHED = {
    4: replace(every(2, 4), options={FITTED_GUIDANCE: 2.0}), 6: corrected(6), 9: deciding(9, DECIDE, noisy=True),
    10: deciding(10, replace(DECIDE, reference="last_refresh", accumulate=False, threshold=0.3, max_consecutive=3)),
}
"""Cached programs by step count: fixed and for one guidance scale, with corrections, and two that decide."""


def branching_graph() -> bytes:
    """A graph with a subgraph in which there is a weight, a node that only casts one, and sizes of every kind."""
    number = helper.make_tensor("inside", TensorProto.FLOAT, [2], [1.0, 2.0])
    branch = helper.make_tensor_value_info("branch", TensorProto.FLOAT, [2])
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=number), helper.make_node("Add", ["c", "k"], ["branch"])],
        "inner", [], [branch], [helper.make_tensor("k", TensorProto.FLOAT, [1], [3.0])],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["picked"], then_branch=inner, else_branch=inner),
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["sample", "v"], ["prediction"]),
    ]
    inputs = [
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", None, 2]),
    ]
    outputs = [helper.make_tensor_value_info("prediction", TensorProto.FLOAT16, None)]
    weight = helper.make_tensor("w", TensorProto.INT8, [2, 2], [1] * 4)
    graph = helper.make_graph(nodes, "outer", inputs, outputs, [weight])
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


DECODER = """<ir_version: 10, opset_import: ["" : 21]>
decoder (float[batch, 4, 8, 8] latents) => (float[batch, 3, 8, 8] image)
<int64[1] one = {1}, int64[1] four = {4}>
{ sliced = Slice(latents, one, four, one)  image = Tanh(sliced) }"""
"""The last three channels are the picture."""


def _decoder(folder: Path) -> tuple[bytes, GraphEntry]:
    """The file's bytes and the manifest's entry."""
    import onnx_ir as ir

    path = folder / "decoder.onnx"
    ir.save(ir.from_onnx_text(DECODER), path)
    given = TensorSpec("latents", "float32", ("batch", 4, 8, 8))
    made = TensorSpec("image", "float32", ("batch", 3, 8, 8))
    return path.read_bytes(), GraphEntry("graphs/decoder.onnx", (), "decoder", "float", "float32", (given,), (made,))


def write_onnx_bundle(
    target: Path, work: Path, steps: Iterable[int] = (1, 2, 4, 5, 6, 9, 10), decoder: bool = False
) -> Path:
    """Write the bundle; `work` is a scratch folder, `decoder` adds a decoder to pictures of three channels."""
    work.mkdir(parents=True, exist_ok=True)
    engines = onnx_engines(work, "ort")
    with BundleWriter(target) as writer:
        graphs = {}
        for name, engine in engines.items():
            file = f"graphs/{name}.float-f32.onnx"
            writer.add_bytes(file, (work / f"{name}.onnx").read_bytes())
            inputs, outputs = (
                tuple(TensorSpec(s.name, s.dtype, s.shape) for s in side.values())
                for side in (engine.inputs, engine.outputs)
            )
            graphs[f"{name}.float-f32"] = GraphEntry(
                file, (), name, "float", "float32", inputs, outputs,
                reads=(FEATURE,) if name.startswith("reuse") else (), writes=(FEATURE,) if name == "full" else (),
            )
            engine.close()
        if decoder:
            content, graphs["decoder"] = _decoder(work)
            writer.add_bytes(graphs["decoder"].file, content)
        for count in steps:
            writer.add_json(f"programs/{count}.json", make_program(count, noisy=True))
        for count, program in CACHED.items():
            writer.add_json(f"programs/cached.{count}.json", program)
        writer.add_bytes("programs/scheduler_config.json", b"{}\n")
        writer.add_bytes("cache.json", b"{}\n")
        writer.add_bytes("vectors.safetensors", save({**VECTORS, **LATENT_VECTORS}))
        writer.finish(
            Manifest(
                name="parts", precision="float32", requires=CACHE_FEATURES, files={}, graphs=graphs, denoiser=DENOISER,
                decoder=Decoder("decoder" if decoder else None), vectors="vectors.safetensors", default_guidance=2.0,
                programs=ProgramIndex(
                    "EchoScheduler", digest("parts"), {str(n): f"programs/{n}.json" for n in steps},
                    "programs/scheduler_config.json", default_steps=5,
                ),
                cache=CacheIndex("cache.json", {str(n): f"programs/cached.{n}.json" for n in CACHED}),
            )
        )
    return target
