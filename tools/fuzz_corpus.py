"""Write the seed corpus: one small input per thing that a bundle holds.

    python tools/fuzz_corpus.py runtime/cpp/fuzz/corpus

The first byte of an input says what it is; see fuzz_bundle.cpp.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from quantempo.contracts.codec import to_data
from quantempo.contracts.manifest import FileEntry
from quantempo.engines.cache import KeyParts
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import EngineRecord, PlanRecord

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.bundle_maker import Shape, make_bundle, make_program
from support.onnx_bundles import CACHED, branching_graph, write_onnx_bundle

MANIFEST, PROGRAM, SPLIT_PROGRAM, VECTORS, TABLE, GRAPH, RECORD, CACHED_PROGRAM = range(8)


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def record() -> EngineRecord:
    """Two plans, one of them with two profiles."""
    parts = KeyParts(graph="g", backend="tensorrt", version="10.13.3", device="sm_89")
    plans = {
        f"full.{kind}": PlanRecord(
            f"full.{kind}.plan", FileEntry("0" * 64, 9), 9, parts, tuple(parse_profile(text) for text in profiles)
        )
        for kind, profiles in (("portable-f16", ("batch=1:2:4", "batch=4:8:16")), ("float-f32", ("batch=1",)))
    }
    return EngineRecord("l4", "tensorrt", "10.13.3", "8.9", "0" * 64, plans)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, kind: int, content: bytes) -> None:
        (folder / name).write_bytes(bytes([kind]) + content)

    with tempfile.TemporaryDirectory() as work:
        cached = make_bundle(Path(work) / "cached", Shape(steps=(1, 4), cached=(4,)))
        write("manifest-cached", MANIFEST, compact(json.loads((cached / "manifest.json").read_text())))
        plain = make_bundle(Path(work) / "plain", Shape(steps=(2,), groups=0, decoder=False))
        write("manifest-float", MANIFEST, compact(json.loads((plain / "manifest.json").read_text())))
        program = json.loads((cached / "programs/cached.4.json").read_text().replace('"row": 3', '"row": 2'))
        pair = {"manifest": json.loads((cached / "manifest.json").read_text()), "program": program}
        write("cached", CACHED_PROGRAM, compact(pair))
        parts = write_onnx_bundle(Path(work) / "parts", Path(work) / "scratch")
        write("graph", GRAPH, (parts / "graphs/full.float-f32.onnx").read_bytes())
        write("table", TABLE, (make_bundle(Path(work) / "t", Shape(groups=2)) / "tables.safetensors").read_bytes())
    write("program-noisy", PROGRAM, compact(to_data(make_program(3, noisy=True))))
    noisy = make_program(2)
    fed = replace(noisy, calls=tuple(replace(call, inputs={"timestep": (("latents", 0.9),)}) for call in noisy.calls))
    write("program-feeds-timestep", PROGRAM, compact(to_data(fed)))
    for steps, program in CACHED.items():
        # The fuzzed variants have one gain, and vectors of three rows.
        text = compact(to_data(program)).decode().replace("latents.", "")
        data = json.loads(text)
        for call in data["calls"]:
            if "vectors" in call:
                call["vectors"] = {"cache.0.gain": 1}
            for operation in call["update"]:
                operation.update({"row": operation["row"] % 3} if "row" in operation else {})
        write(f"program-cached-{steps}", PROGRAM if steps % 2 else SPLIT_PROGRAM, compact(data))
    ramp = np.arange(8, dtype=np.float32).reshape(2, 4)
    write("vectors", VECTORS, save({"gain": ramp, "bias": ramp}))
    write("record", RECORD, compact(to_data(record())))
    write("graph-branching", GRAPH, branching_graph())
    external = b"\x0a\x08location\x12\x0bweights.bin", b"\x0a\x06offset\x12\x0264"
    entries = b"".join(b"\x6a" + bytes([len(pair)]) + pair for pair in external)
    tensor = b"\x08\x02\x08\x03\x10\x01\x42\x01w" + entries
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    write("graph-external", GRAPH, b"\x3a" + bytes([len(graph)]) + graph)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
