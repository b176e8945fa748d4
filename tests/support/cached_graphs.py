"""Small graph variants that exchange a cached feature, their programs, and a plain replay to compare the loop with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.bundle_maker import Shape, make_program

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import ClassInput, Denoiser
from quantempo.contracts.program import INDICATOR, LATENTS, PREDICTION, Call, Clamp, Decide, Lin, Noise, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.contracts.variants import Variant
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.runtime.loop import LoopRequest
from quantempo.runtime.rng import PhiloxNoise

Array = NDArray[Any]
SHAPE = Shape()
LATENTS_SHAPE = SHAPE.latents
DENOISER = Denoiser(LATENTS_SHAPE, (ClassInput("class_labels", 10, 10),))
FEATURE = TensorSpec("cache.0", "float32", ("batch", *LATENTS_SHAPE))
VARIANTS = {
    "full": Variant(("sample", "timestep", "class_labels"), (PREDICTION, "cache.0"), writes=("cache.0",)),
    "reuse.0": Variant(("sample", "timestep", "class_labels", "cache.0"), (PREDICTION,), reads=("cache.0",)),
    "reuse.1": Variant(
        ("sample", "cache.0", "cache.0.gain", "cache.0.bias"), (PREDICTION,), reads=("cache.0",)
    ),
    "probe": Variant(("sample", "timestep", "class_labels"), (INDICATOR,)),
}
VECTORS = {
    "cache.0.gain": np.linspace(0.5, 1.5, 12, dtype=np.float32).reshape(3, 4),
    "cache.0.bias": np.linspace(-0.2, 0.3, 12, dtype=np.float32).reshape(3, 4),
}


def echo_graphs() -> dict[str, EchoGraph]:
    """By variant; the outputs of echo graphs depend on all inputs."""
    latents = ("batch", *LATENTS_SHAPE)
    known = {
        "sample": TensorSpec("sample", "float32", latents), "timestep": TensorSpec("timestep", "float32", ("batch",)),
        "class_labels": TensorSpec("class_labels", "int64", ("batch",)), "cache.0": FEATURE,
        "cache.0.gain": TensorSpec("cache.0.gain", "float32", (4,)),
        "cache.0.bias": TensorSpec("cache.0.bias", "float32", (4,)),
        PREDICTION: TensorSpec(PREDICTION, "float32", latents),
        INDICATOR: TensorSpec(INDICATOR, "float32", ("batch", 5, 3)),
    }
    return {
        name: EchoGraph(tuple(known[n] for n in v.inputs), tuple(known[n] for n in v.outputs), seed=index)
        for index, (name, v) in enumerate(VARIANTS.items()) if name != "reuse.1"
    }


def echo_engines(folder: Path, host: bool = True) -> dict[str, Engine]:
    engines = {}
    for name, graph in echo_graphs().items():
        path = folder / f"{name}.json"
        write_echo_graph(path, graph)
        engines[name] = open_engine("echo", path, EngineOptions(settings={"host": str(host).lower()}))
    return engines


TEXTS = {
    "full": """agraph (float[batch,4,8,8] sample, float[batch] timestep, int64[batch] class_labels)
        => (float[batch,4,8,8] prediction, float[batch,4,8,8] cache.0) <float half = {0.7}, float rest = {0.3},
            float slow = {0.002}, float few = {0.1}, int64[4] wide = {-1, 1, 1, 1}> {
        labels = Cast <to = 1> (class_labels)
        turned = Mul (labels, few)
        phase = Mul (timestep, slow)
        both = Add (phase, turned)
        spread = Reshape (both, wide)
        moved = Add (sample, spread)
        cache.0 = Tanh (moved)
        deep = Mul (cache.0, half)
        shallow = Mul (sample, rest)
        prediction = Add (deep, shallow)
    }""",
    "reuse.0": """agraph (float[batch,4,8,8] sample, float[batch,4,8,8] cache.0) => (float[batch,4,8,8] prediction)
        <float half = {0.7}, float rest = {0.3}> {
        deep = Mul (cache.0, half)
        shallow = Mul (sample, rest)
        prediction = Add (deep, shallow)
    }""",
    "reuse.1": """agraph (float[batch,4,8,8] sample, float[batch,4,8,8] cache.0, float[4] cache.0.gain,
            float[4] cache.0.bias) => (float[batch,4,8,8] prediction)
        <float half = {0.7}, float rest = {0.3}, int64[3] wide = {4, 1, 1}> {
        gain = Reshape (cache.0.gain, wide)
        bias = Reshape (cache.0.bias, wide)
        scaled = Mul (cache.0, gain)
        corrected = Add (scaled, bias)
        deep = Mul (corrected, half)
        shallow = Mul (sample, rest)
        prediction = Add (deep, shallow)
    }""",
    "probe": """agraph (float[batch,4,8,8] sample, float[batch] timestep, int64[batch] class_labels)
        => (float[batch,4,8,8] indicator)
        <float slow = {0.002}, float few = {0.3}, int64[4] wide = {-1, 1, 1, 1}> {
        labels = Cast <to = 1> (class_labels)
        turned = Mul (labels, few)
        phase = Mul (timestep, slow)
        both = Add (phase, turned)
        spread = Reshape (both, wide)
        indicator = Add (sample, spread)
    }""",
}
"""A denoiser whose deep part is one tensor, cut there: `reuse.0` fed with a call's own feature is `full`."""


def onnx_engines(folder: Path, backend: str) -> dict[str, Engine]:
    import onnx_ir as ir

    engines = {}
    for name, text in TEXTS.items():
        path = folder / f"{name}.onnx"
        # The text form has no dots in names.
        plain = text.replace("cache.0.gain", "gain_in").replace("cache.0.bias", "bias_in").replace("cache.0", "cache_0")
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{plain}')
        renamed = {"gain_in": "cache.0.gain", "bias_in": "cache.0.bias", "cache_0": "cache.0"}
        for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
            value.name = renamed.get(str(value.name), value.name)
        ir.save(model, path)
        engines[name] = open_engine(backend, path, EngineOptions(threads=1))
    return engines


def onnx_variants() -> dict[str, Variant]:
    return {**VARIANTS, "reuse.0": replace(VARIANTS["reuse.0"], inputs=("sample", "cache.0"))}


def every(interval: int, steps: int, graph: str = "reuse.0", noisy: bool = False) -> StepProgram:
    """Refresh at every `interval`-th call, reuse in between."""
    program = make_program(steps, noisy)
    calls = tuple(c if i % interval == 0 else replace(c, graph=graph) for i, c in enumerate(program.calls))
    return replace(program, calls=calls)


def deciding(steps: int, decide: Decide, noisy: bool = False) -> StepProgram:
    """Every call decides."""
    program = make_program(steps, noisy)
    return replace(program, calls=tuple(replace(c, graph="reuse.0", decide=decide) for c in program.calls))


def request(guidance: Sequence[float] = (1.0,), first: int = 0, **changes: Any) -> LoopRequest:
    """Samples `first`, `first + 1`, … with a seed and a label of their own."""
    batch = len(guidance)
    labels = np.arange(first, first + batch, dtype=np.int64), np.full(batch, 10, np.int64)
    noise = PhiloxNoise.from_seeds(tuple(range(first, first + batch)), batch)
    return replace(LoopRequest(batch, guidance, noise, conditioning={"class_labels": labels}), **changes)


@dataclass
class PlainRow:
    """One row's state, in Python's own numbers."""

    features: dict[str, Array] = field(default_factory=dict)
    reference: list[float] | None = None
    total: float = 0.0
    age: int = 0
    reuses: int = 0

    def refreshes(self, decide: Decide, indicator: Array) -> bool:
        values = [float(v) for v in indicator.reshape(-1)]
        refresh = True
        if self.reference is not None:
            difference = size = 0.0
            for value, before in zip(values, self.reference, strict=True):
                difference += abs(value - before)
                size += abs(before)
            change = difference / size if size else math.nan
            estimate = decide.polynomial[0]
            for coefficient in decide.polynomial[1:]:
                estimate = estimate * change + coefficient
            estimate = 0.0 if estimate < 0 else estimate
            self.total += estimate
            measure = self.total if decide.accumulate else estimate
            refresh = not math.isfinite(change) or not measure < decide.threshold or self.age >= decide.max_consecutive
        self.total, self.age = (0.0, 0) if refresh else (self.total, self.age + 1)
        if refresh or decide.reference == "previous_call":
            self.reference = values
        return refresh


def plain_replay(
    engines: Mapping[str, Engine], program: StepProgram, guidance: Sequence[float]
) -> tuple[Array, list[int]]:
    """One sample after the other, each branch in calls of its own; latents and reuses per sample."""
    results, reuses = [], []
    for sample, scale in enumerate(guidance):
        noise = PhiloxNoise.from_seeds((sample,), 1)
        rows = {"conditional": PlainRow(), "unconditional": PlainRow()}

        def draw(index: int, noise: PhiloxNoise = noise) -> Array:
            out = np.empty((1, *LATENTS_SHAPE), np.float32)
            noise.draw(index, out)
            return out

        registers = {LATENTS: (draw(0).astype(np.float64) * program.state[0].initial_scale).astype(np.float32)}
        for call in program.calls:
            feeds: dict[str, Array] = {name: _lin(registers, terms) for name, terms in call.inputs.items()}
            feeds["timestep"] = np.array([call.timestep], np.float32)
            cond = _evaluate(engines, call, {**feeds, "class_labels": np.array([sample])}, rows["conditional"])
            wide = cond.astype(np.float64)
            if scale > 1:
                null = _evaluate(engines, call, {**feeds, "class_labels": np.array([10])}, rows["unconditional"])
                wide = null.astype(np.float64) + scale * (wide - null.astype(np.float64))
            registers[PREDICTION] = wide.astype(np.float32)
            for op in call.update:
                if isinstance(op, Lin):
                    registers[op.to] = _lin(registers, op.terms)
                elif isinstance(op, Clamp):
                    registers[op.to] = np.clip(registers[op.source], np.float32(op.low), np.float32(op.high))
                elif isinstance(op, Noise):
                    registers[op.to] = draw(op.draw)
        results.append(registers[LATENTS])
        reuses.append(sum(row.reuses for row in rows.values()))
    return np.concatenate(results), reuses


def _lin(registers: Mapping[str, Array], terms: tuple[tuple[str, float], ...]) -> Array:
    total = registers[terms[0][0]].astype(np.float64) * terms[0][1]
    for name, coefficient in terms[1:]:
        total = total + registers[name].astype(np.float64) * coefficient
    return total.astype(np.float32)


def _evaluate(engines: Mapping[str, Engine], call: Call, feeds: dict[str, Array], row: PlainRow) -> Array:
    graph = call.graph
    if call.decide is not None:
        probe = engines[call.decide.probe]
        indicator = probe.run({name: feeds[name] for name in probe.inputs})[INDICATOR]
        graph = call.decide.refresh if row.refreshes(call.decide, indicator) else graph
    row.reuses += graph != "full"
    engine = engines[graph]
    vectors = {name: VECTORS[name][index] for name, index in call.vectors.items()}
    given = {**feeds, **row.features, **vectors}
    out = engine.run({name: given[name] for name in engine.inputs})
    if "cache.0" in out:
        row.features["cache.0"] = out["cache.0"]
    return out[PREDICTION]
