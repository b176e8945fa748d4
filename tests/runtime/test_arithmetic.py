"""Registers on a device: the same latents to the bit, and none of them crosses over between calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle_maker import Shape, denoiser_graph, make_program
from support.device_engine import device_engine
from support.fake_tensorrt import FakeDevice

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import ClassInput, Denoiser
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import LATENTS, PREDICTION, Clamp, Correct, Decide, Lin, State, StepProgram
from quantempo.contracts.variants import Variant
from quantempo.engines.echo import write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.runtime.arithmetic import device_math
from quantempo.runtime.lanes import Model
from quantempo.runtime.loop import Loop, LoopRequest, LoopResult
from quantempo.runtime.rng import PhiloxNoise

SHAPE = Shape()
LATENTS_BYTES = 4 * int(np.prod(SHAPE.latents))
PARTITION = Partition((250.0, 500.0, 750.0), 0.0, 999.0)
DENOISER = Denoiser(SHAPE.latents, (ClassInput("class_labels", 10, 10),), group_input="scale_group")
STEPS = 4
RAMP = np.linspace(0.8, 1.2, STEPS * SHAPE.latents[0], dtype=np.float32).reshape(STEPS, -1)
VECTORS = {"gain": RAMP, "bias": RAMP - np.float32(1.0)}


@pytest.fixture
def echo(tmp_path: Path) -> Engine:
    path = tmp_path / "g.json"
    write_echo_graph(path, denoiser_graph(SHAPE))
    return open_engine("echo", path, EngineOptions())


def other_echo(folder: Path) -> Engine:
    write_echo_graph(folder / "other.json", denoiser_graph(replace(SHAPE, seed=5)))
    return open_engine("echo", folder / "other.json", EngineOptions())


def run(engines: Mapping[str, Engine], program: StepProgram, guidance: tuple[float, ...], **changes: Any) -> LoopResult:
    batch = len(guidance)
    labels = np.arange(batch, dtype=np.int64), np.full(batch, 10, np.int64)
    made = LoopRequest(batch, guidance, PhiloxNoise.from_seeds(3, batch), conditioning={"class_labels": labels})
    return Loop(engines, DENOISER, PARTITION, vectors=VECTORS).run(program, replace(made, **changes))


def corrected() -> StepProgram:
    """Corrects the prediction in place and a register elsewhere."""
    program = make_program(STEPS, noisy=True)
    calls = [
        replace(call, update=(
            Correct(PREDICTION, PREDICTION, "gain", "bias", index), *call.update,
            Correct("kept", "origin", "bias", "gain", STEPS - 1 - index), Lin(LATENTS, ((LATENTS, 1.0), ("kept", 0.1))),
        )) for index, call in enumerate(program.calls)
    ]  # fmt: skip
    return replace(program, calls=tuple(calls))


def stateful() -> StepProgram:
    """A second state, a history that is copied, a register of zeros, a form of two terms that is fed, a tight clamp."""
    program = make_program(STEPS)
    calls = [
        replace(call, inputs={"sample": ((LATENTS, 0.8), ("second", 0.3))}, update=(
            Lin("old", (("second", 1.0),)), *call.update, Lin("zero", ()), Clamp("second", PREDICTION, -0.2, 0.1),
            Lin(LATENTS, ((LATENTS, 0.9), ("old", -0.4), ("zero", 3.0))),
        )) for call in program.calls
    ]  # fmt: skip
    return replace(program, calls=tuple(calls), state=(*program.state, State("second", 0.5)))


PROGRAMS = {"plain": make_program(STEPS), "noisy": make_program(STEPS, True), "corrected": corrected(),
            "stateful": stateful()}  # fmt: skip
GUIDANCES = {"none": (1.0, 1.0), "one": (4.0,), "mixed": (1.0, 3.0, 0.0, 7.5)}


@pytest.mark.parametrize("mode", ["batched", "split"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_device_gives_the_host_s_bits_and_keeps_latents_to_itself(
    tmp_path: Path, echo: Engine, kind: str, guidance: str, rescale: float, mode: str
) -> None:
    program, scales, device = PROGRAMS[kind], GUIDANCES[guidance], FakeDevice()
    engine = device_engine(tmp_path, echo, device)
    seen: list[int] = []
    changes = {"mode": mode, "rescale": rescale}
    result = run({"full": engine}, program, scales, observer=lambda *_: seen.append(len(device.downloads)), **changes)
    expected = run({"full": echo}, program, scales, **changes)
    np.testing.assert_array_equal(result.latents, expected.latents)
    assert np.std(result.latents) > 0.1
    assert device.log[0] == "prepare", "kernels are compiled before anything runs"
    assert seen == [0] * result.engine_calls, "something was downloaded before the end"
    size = len(scales) * LATENTS_BYTES
    assert device.downloads == [size]
    drawn = sum(op.kind == "noise" for call in program.calls for op in call.update) + len(program.state)
    assert sum(n >= size for n in device.uploads) == drawn, "only noise goes over"


def test_with_registers_on_the_host_every_call_crosses_over(tmp_path: Path, echo: Engine) -> None:
    device = FakeDevice()
    engine = device_engine(tmp_path, echo, device, registers="host")
    result = run({"full": engine}, PROGRAMS["plain"], (1.0,))
    np.testing.assert_array_equal(result.latents, run({"full": echo}, PROGRAMS["plain"], (1.0,)).latents)
    assert device.downloads == [LATENTS_BYTES] * STEPS
    assert device.kernels == []


def test_given_latents_and_those_of_a_callback_go_over(tmp_path: Path, echo: Engine) -> None:
    given = np.random.default_rng(0).standard_normal((2, *SHAPE.latents)).astype(np.float32)
    steps: list[np.ndarray] = []

    def on_step(step: int, timestep: float, latents: np.ndarray) -> np.ndarray | None:
        steps.append(latents.copy())
        return latents[:, :, ::-1] if step == 1 else None

    device = FakeDevice()
    engine = device_engine(tmp_path, echo, device)
    found, expected = (
        run({"full": each}, PROGRAMS["noisy"], (3.0, 1.0), latents=given, on_step=on_step) for each in (engine, echo)
    )
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(steps[:STEPS], steps[STEPS:])
    assert len(device.downloads) == STEPS + 1


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_engines_with_streams_of_their_own_see_what_was_queued(tmp_path: Path, echo: Engine, mode: str) -> None:
    """Each engine has a queue of its own, and the second one runs at every second call."""
    program = corrected()
    calls = [replace(c, graph="other") if i % 2 else c for i, c in enumerate(program.calls)]
    program = replace(program, calls=tuple(calls))
    echoes = {"full": echo, "other": other_echo(tmp_path)}
    devices = {name: FakeDevice() for name in echoes}
    engines = {name: device_engine(tmp_path, each, devices[name]) for name, each in echoes.items()}
    found, expected = (run(each, program, (4.0, 1.0), mode=mode) for each in (engines, echoes))
    np.testing.assert_array_equal(found.latents, expected.latents)
    assert devices["full"].kernels
    assert devices["other"].kernels == [], "one engine computes for all"
    assert devices["other"].downloads == []
    assert "prepare" not in devices["other"].log


def test_an_engine_waits_for_another_s_queue(tmp_path: Path, echo: Engine) -> None:
    """The lane's buffers are the second engine's, so nothing that it is fed makes the first one's stream wait."""
    alone = replace(corrected(), calls=tuple(replace(c, graph="other") for c in corrected().calls))
    both = replace(corrected(), calls=tuple(
        replace(c, graph="other" if i % 2 else "full") for i, c in enumerate(corrected().calls)
    ))  # fmt: skip
    echoes = {"full": echo, "other": other_echo(tmp_path)}
    engines = {name: device_engine(tmp_path, each, FakeDevice()) for name, each in echoes.items()}
    labels = {"class_labels": (np.zeros(1, np.int64), np.full(1, 10, np.int64))}
    latents = []
    for each in (engines, echoes):
        loop = Loop(each, DENOISER, PARTITION, vectors=VECTORS)
        for program in (alone, both):
            made = LoopRequest(1, (4.0,), PhiloxNoise.from_seeds(3, 1), conditioning=labels)
            latents.append(loop.run(program, made).latents)
    np.testing.assert_array_equal(latents[:2], latents[2:])


def test_forms_longer_than_a_kernel_takes_are_computed_on_the_host(tmp_path: Path, echo: Engine) -> None:
    program = make_program(STEPS)
    long = Lin(LATENTS, tuple((LATENTS, 0.05 + 0.001 * i) for i in range(17)))
    program = replace(program, calls=tuple(replace(c, update=(*c.update, long)) for c in program.calls))
    device = FakeDevice()
    found, expected = (
        run({"full": each}, program, (2.0,)) for each in (device_engine(tmp_path, echo, device), echo)
    )
    np.testing.assert_array_equal(found.latents, expected.latents)
    assert device.kernels == []


def model(**engines: Engine) -> Model:
    return Model(engines, DENOISER, {n: Variant(tuple(e.inputs), tuple(e.outputs)) for n, e in engines.items()}, {})


def test_what_a_device_cannot_replay_alone_is_left_to_the_host(tmp_path: Path, echo: Engine) -> None:
    engine = device_engine(tmp_path, echo, FakeDevice())
    program = make_program(STEPS)
    call = program.calls[1]
    decided, mixed = (
        replace(program, calls=(program.calls[0], changed)) for changed in (
            replace(call, decide=Decide("full", 0.1)), replace(call, graph="host"),
        )
    )  # fmt: skip
    assert device_math(model(full=engine), program) is not None
    assert device_math(model(full=engine), decided) is None
    assert device_math(model(full=engine, host=echo), mixed) is None
    assert device_math(model(full=echo), program) is None
    spec = engine.outputs[PREDICTION]
    engine.outputs = {PREDICTION: replace(spec, dtype="float16")}
    assert device_math(model(full=engine), program) is None


def test_device_memory_is_given_back(tmp_path: Path, echo: Engine) -> None:
    device = FakeDevice()
    engine = device_engine(tmp_path, echo, device)
    loop = Loop({"full": engine}, DENOISER, PARTITION, vectors=VECTORS)
    labels = {"class_labels": (np.arange(2, dtype=np.int64), np.full(2, 10, np.int64))}
    held = []
    for _ in range(3):
        loop.run(corrected(), LoopRequest(2, (4.0, 1.0), PhiloxNoise.from_seeds(3, 2), conditioning=labels))
        held.append(len(device.memory))
    assert held == [held[0]] * 3, "registers of earlier runs are still held"
