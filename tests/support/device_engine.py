"""An echo graph behind TensorRT's interface: real device buffers and kernels, on a device that is this machine."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper
from support.fake_tensorrt import FakeDevice, FakeLibrary

from quantempo.contracts.codec import digest
from quantempo.contracts.engine import Engine
from quantempo.contracts.manifest import FileEntry
from quantempo.engines.cache import KeyParts
from quantempo.engines.trt_engine import TrtEngine
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import EngineRecord, PlanRecord

PLAN = b'{"factor": 1}'
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def device_engine(folder: Path, echo: Engine, device: FakeDevice, **settings: str) -> TrtEngine:
    """An engine on the device that computes what `echo` does.

    Args:
        folder: where the graph's signature is written.
        echo: computes on host copies.
        device: has the memory and runs the kernels.
        settings: of the engine.
    """
    inputs, outputs = (
        [helper.make_tensor_value_info(n, TYPES[s.dtype], s.shape) for n, s in specs.items()]
        for specs in (echo.inputs, echo.outputs)
    )
    node = helper.make_node("Identity", [inputs[0].name], [outputs[0].name])
    path = folder / "signature.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "signature", inputs, outputs)), path)
    library = FakeLibrary(device, compute=lambda given: echo.run({n: a.copy() for n, a in given.items()})["prediction"])
    version = str(library.__version__)
    plan = PlanRecord(
        "x.plan", FileEntry(digest(PLAN), len(PLAN)), len(PLAN), KeyParts("g", "tensorrt_rtx", version, "sm_89"),
        (parse_profile("batch=1:2:16"),), "plan",
    )
    record = EngineRecord("rtx-ada", "tensorrt_rtx", version, "8.9", digest("bundle"), {"x": plan})
    return TrtEngine(library, device, path, record, "x", PLAN, {"cuda_graph": "on", "registers": "device", **settings})
