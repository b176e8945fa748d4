"""Whether TensorRT for RTX leaves weights out of a plan on a machine without a GPU: every flag, in every version given.

Each combination of builder flags is one build of one graph, in a process of its own, by the interpreter of an
environment that holds nothing but `tensorrt-rtx` (and numpy, which its bindings want).  `individual` marks the largest
weight alone as refittable.

    python -m venv /tmp/rtx && /tmp/rtx/bin/pip install tensorrt-rtx==1.6.1.120 numpy
    python benchmarks/rtx_strip.py graph.onnx --python /tmp/rtx/bin/python --json docs/rtx_strip.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

FLAGS = (
    "", "STRIP_PLAN", "STRIP_PLAN REFIT_IDENTICAL", "STRIP_PLAN REFIT", "STRIP_PLAN WEIGHT_STREAMING",
    "STRIP_PLAN VERSION_COMPATIBLE", "STRIP_PLAN REFIT_INDIVIDUAL", "STRIP_PLAN REFIT_INDIVIDUAL individual",
    "REFIT", "REFIT_IDENTICAL", "WEIGHT_STREAMING",
)
"""Builder flags; none is the plan with its weights."""
CHILD = """
import json, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(message)

log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(sys.argv[1]), log.errors
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
if network.num_inputs and any(size < 0 for i in range(network.num_inputs) for size in network.get_input(i).shape):
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        shape = [2 if size < 0 else size for size in network.get_input(i).shape]
        profile.set_shape(network.get_input(i).name, shape, shape, shape)
    config.add_optimization_profile(profile)
marked = ""
for word in sys.argv[2].split():
    if word == "individual":
        sizes = {}
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.type == trt.LayerType.CONSTANT:
                layer.__class__ = trt.IConstantLayer
                sizes[layer.name] = layer.weights.size
        marked = max(sizes, key=sizes.get)
        assert network.mark_weights_refittable(marked)
    else:
        config.set_flag(getattr(trt.BuilderFlag, word))
plan = builder.build_serialized_network(network, config)
said = " ".join(log.errors[-1].split())[:300] if log.errors else ""
print(json.dumps({"version": trt.__version__, "bytes": plan.nbytes if plan is not None else 0, "said": said}))
"""


def main() -> None:
    """Try everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, object]]] = {}
    for python in options.python:
        for flags in FLAGS:
            command = [python, "-c", CHILD, str(options.graph), flags]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{python}, {flags}: {done.stderr[-500:]}")
            answer = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(answer.pop("version"), {})[flags or "plan"] = answer
            print(python, flags or "plan", answer, flush=True)
    weights = sum(path.stat().st_size for path in options.graph.parent.glob("weights.*.bin"))
    report = {"graph": options.graph.name, "weight_bytes": weights, "versions": found}
    options.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
