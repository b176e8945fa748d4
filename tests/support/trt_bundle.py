"""A small bundle with graphs for TensorRT: one block of two products, in the dialects and float types that it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save
from support.bundle_maker import make_program
from support.quant_graphs import GraphMaker, min_max_table

from quantempo.contracts.codec import digest
from quantempo.contracts.manifest import Decoder, Denoiser, GraphEntry, Manifest, ProgramIndex
from quantempo.export.float_types import to_half
from quantempo.export.graph_files import specs, write_graphs
from quantempo.export.lower_fp8 import lower_fp8
from quantempo.export.lower_portable import lower_portable
from quantempo.runtime.bundle_writer import BundleWriter

TOKENS, WIDTH = 64, 64
TYPES = {"f32": "float32", "f16": "float16"}


def toy_graphs(hidden: int = 128) -> tuple[dict[str, ir.Model], Any]:
    """Graphs by name, and the scale table."""
    maker = GraphMaker({"sample": ("batch", TOKENS, WIDTH), "timestep": ("batch",)})
    steps = maker.op("Reshape", [maker.inputs["timestep"], maker.constant("shape", np.array([-1, 1, 1]))], "steps")
    moved = maker.op("Add", [maker.inputs["sample"], maker.op("Sin", [steps], "sine")], "moved")
    inner = maker.op("Gelu", [maker.matmul(moved, WIDTH, hidden, "blocks.0.ff.in")], "gelu")
    model = maker.model(maker.op("Identity", [maker.matmul(inner, hidden, WIDTH, "blocks.0.ff.out")], "prediction"))
    plan = maker.plan()
    rng = np.random.default_rng(0)
    shape = (2, TOKENS, WIDTH)
    feeds = [
        {"sample": (rng.standard_normal(shape) * s).astype(np.float32), "timestep": np.ones(2, np.float32)}
        for s in (1.0, 1.5, 2.0)
    ]
    table = min_max_table(model, plan, feeds)
    graphs = {"full.portable-f32": lower_portable(model, plan, table), "full.float-f32": model}
    for name, lowered in (("full.portable-f16", graphs["full.portable-f32"].clone()),
                          ("full.fp8-f16", lower_fp8(model, plan, table))):  # fmt: skip
        to_half(lowered, "float16", {})
        graphs[name] = lowered
    return graphs, table


def make_trt_bundle(root: Path, names: tuple[str, ...] | None = None, hidden: int = 128) -> Path:
    """Write the bundle with some of the graphs, by default all but the float one."""
    graphs, table = toy_graphs(hidden)
    chosen = {n: g for n, g in graphs.items() if n in (names or [k for k in graphs if "float-" not in k])}
    with BundleWriter(root) as writer:
        folder = writer.path("graphs/x").parent
        entries = {}
        for name, file in write_graphs(folder, chosen).items():
            dialect, _, kind = name.removeprefix("full.").partition("-")
            entries[name] = GraphEntry(
                f"graphs/{file.file}", tuple(f"graphs/{d}" for d in file.data), "full",
                dialect, TYPES[kind],  # type: ignore[arg-type]
                specs(chosen[name].graph.inputs), specs(chosen[name].graph.outputs),
            )
        writer.add_json("programs/2.json", make_program(2))
        writer.add_bytes("programs/scheduler_config.json", b'{"_class_name": "EchoScheduler"}\n')
        writer.add_bytes("tables.safetensors", save({k: np.ascontiguousarray(v) for k, v in table.arrays().items()}))
        manifest = Manifest(
            name="toy", precision="int8", requires=("step-program-1", "scale-groups-1"), files={}, graphs=entries,
            denoiser=Denoiser((TOKENS, WIDTH), group_input="scale_group"), decoder=Decoder(),
            programs=ProgramIndex("EchoScheduler", digest("x"), {"2": "programs/2.json"},
                                  "programs/scheduler_config.json", 2),
            partition=table.partition, tables="tables.safetensors",
        )
        if all("float-" in name for name in entries):
            manifest = replace(
                manifest, precision="float32", partition=None, tables=None, denoiser=Denoiser((TOKENS, WIDTH)),
                requires=("step-program-1",),
            )
        writer.finish(manifest)
    return root
