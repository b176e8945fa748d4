from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle_maker import Shape, denoiser_graph, make_program

from quantempo.contracts.engine import Buffer, Engine, EngineOptions
from quantempo.contracts.manifest import ClassInput, Denoiser
from quantempo.contracts.partition import Partition
from quantempo.contracts.program import LATENTS, PREDICTION, Call, Clamp, Lin, Noise, StepProgram
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.engines.registry import open_engine
from quantempo.errors import DataError, EngineError, RequestError
from quantempo.runtime.loop import Loop, LoopRequest, Observation, OutsideCalibration
from quantempo.runtime.rng import PhiloxNoise

SHAPE = Shape()
PARTITION = Partition((250.0, 500.0, 750.0), 0.0, 999.0)
DENOISER = Denoiser(SHAPE.latents, (ClassInput("class_labels", 10, 10),), group_input="scale_group")


def echo(folder: Path, graph: EchoGraph | None = None, host: bool = True, taps: tuple[str, ...] = ()) -> Engine:
    path = folder / "g.json"
    write_echo_graph(path, graph or denoiser_graph(SHAPE))
    return open_engine("echo", path, EngineOptions(extra_outputs=taps, settings={"host": str(host).lower()}))


def request(guidance: tuple[float, ...] = (1.0,), **changes: Any) -> LoopRequest:
    batch = len(guidance)
    labels = np.arange(batch, dtype=np.int64), np.full(batch, 10, np.int64)
    made = LoopRequest(batch, guidance, PhiloxNoise.from_seeds(3, batch), conditioning={"class_labels": labels})
    return replace(made, **changes)


def reference(engine: Engine, program: StepProgram, guidance: tuple[float, ...]) -> np.ndarray:
    """The same run, written plainly: one sample at a time, both branches in calls of their own."""
    batch = len(guidance)
    out = []
    for sample, scale in enumerate(guidance):
        noise = PhiloxNoise.from_seeds(3, batch)

        def draw(index: int, noise: PhiloxNoise = noise, sample: int = sample) -> np.ndarray:
            full = np.empty((batch, *SHAPE.latents), np.float32)
            noise.draw(index, full)
            return full[sample : sample + 1].copy()

        registers = {LATENTS: (draw(0).astype(np.float64) * program.state[0].initial_scale).astype(np.float32)}
        for call in program.calls:
            feeds = {
                "sample": lin(registers, call.inputs["sample"]), "timestep": np.array([call.timestep], np.float32),
                "scale_group": np.array(PARTITION.group_of(call.key), np.int64),
            }
            cond = engine.run({**feeds, "class_labels": np.array([sample])})[PREDICTION].astype(np.float64)
            if scale > 1:
                null = engine.run({**feeds, "class_labels": np.array([10])})[PREDICTION].astype(np.float64)
                cond = null + scale * (cond - null)
            registers[PREDICTION] = cond.astype(np.float32)
            for op in call.update:
                if isinstance(op, Lin):
                    registers[op.to] = lin(registers, op.terms)
                elif isinstance(op, Clamp):
                    registers[op.to] = np.clip(registers[op.source], np.float32(op.low), np.float32(op.high))
                elif isinstance(op, Noise):
                    registers[op.to] = draw(op.draw)
        out.append(registers[LATENTS])
    return np.concatenate(out)


def lin(registers: Mapping[str, np.ndarray], terms: tuple[tuple[str, float], ...]) -> np.ndarray:
    total = registers[terms[0][0]].astype(np.float64) * terms[0][1]
    for name, coefficient in terms[1:]:
        total = total + registers[name].astype(np.float64) * coefficient
    return total.astype(np.float32)


@pytest.mark.parametrize("mode", ["batched", "split"])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("guidance", [(1.0,), (4.0,), (1.0, 3.0, 0.0, 7.5)])
def test_the_loop_is_the_plain_reference_to_the_bit(
    tmp_path: Path, mode: str, host: bool, guidance: tuple[float, ...]
) -> None:
    engine = echo(tmp_path, host=host)
    program = make_program(5, noisy=True)
    result = Loop({"full": engine}, DENOISER, PARTITION).run(program, request(guidance, mode=mode))
    assert np.array_equal(result.latents, reference(engine, program, guidance))


def test_a_sample_without_guidance_costs_no_unconditional_row(tmp_path: Path) -> None:
    rows: list[tuple[str, ...]] = []
    loop = Loop({"full": echo(tmp_path)}, DENOISER, PARTITION)
    for guidance in ((1.0, 1.0), (1.0, 2.0)):
        loop.run(make_program(1), request(guidance, observer=lambda seen, _: rows.append(seen.branches)))
    assert rows == [("conditional",) * 2, ("conditional", "conditional", "unconditional")]


def test_the_observer_sees_call_group_seeds_branches_and_the_engine_s_own_buffers(tmp_path: Path) -> None:
    engine = echo(tmp_path, taps=("blocks.0",))
    seen: list[tuple[Observation, int, tuple[int, ...]]] = []

    def observer(observation: Observation, outputs: Mapping[str, Buffer]) -> None:
        tap = outputs["blocks.0"].array
        seen.append((observation, tap.ctypes.data, tap.shape))

    program = make_program(4)
    Loop({"full": engine}, DENOISER, PARTITION).run(program, request((1.0, 3.0), seeds=(7, 9), observer=observer))
    assert [s[0].index for s in seen] == [0, 1, 2, 3]
    assert [s[0].group for s in seen] == [3, 2, 1, 0]
    assert seen[0][0].call is program.calls[0]
    assert seen[0][0].seeds == (7, 9, 9)
    assert seen[0][0].samples == (0, 1, 1)
    assert len({s[1] for s in seen}) == 1, "the buffer moved or was copied"
    assert seen[0][2] == (3, 6)


def test_a_key_outside_the_calibrated_range_gives_one_notice_a_run(tmp_path: Path) -> None:
    narrow = Partition((500.0,), 400.0, 600.0)
    loop = Loop({"full": echo(tmp_path)}, DENOISER, narrow)
    with pytest.warns(OutsideCalibration, match="timestep 999 lies outside the calibrated range 400 to 600") as caught:
        loop.run(make_program(20), request())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(make_program(20), request())


def test_the_group_key_of_a_call_may_differ_from_its_timestep(tmp_path: Path) -> None:
    groups: list[int | None] = []
    program = make_program(2)
    program = replace(program, calls=tuple(replace(c, group_key=10.0) for c in program.calls))
    observe = request(observer=lambda seen, _: groups.append(seen.group))
    Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(program, observe)
    assert groups == [0, 0]


def test_calls_choose_their_graph_variant(tmp_path: Path) -> None:
    engines = {}
    for seed, name in enumerate(("full", "reuse.1")):
        (tmp_path / name).mkdir()
        engines[name] = echo(tmp_path / name, replace(denoiser_graph(SHAPE), seed=seed))
    full = make_program(2)
    mixed = replace(full, calls=(full.calls[0], replace(full.calls[1], graph="reuse.1")))
    loop = Loop(engines, DENOISER, PARTITION)
    first, second = (loop.run(p, request()).latents for p in (full, mixed))
    assert not np.array_equal(first, second)
    swapped = Loop({"full": engines["reuse.1"], "reuse.1": engines["full"]}, DENOISER, PARTITION)
    flipped = replace(full, calls=(replace(full.calls[0], graph="reuse.1"), full.calls[1]))
    assert np.array_equal(swapped.run(flipped, request()).latents, second)


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    program = make_program(1)
    program = replace(program, calls=(replace(program.calls[0], graph="ful"),))
    with pytest.raises(DataError, match=r"a call of graph 'ful'[\s\S]*did you mean 'full'"):
        Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(program, request())


def test_an_input_that_the_graph_does_not_have_is_named(tmp_path: Path) -> None:
    program = make_program(1)
    program = replace(program, calls=(Call(1.0, {"sampel": ((LATENTS, 1.0),)}, (), 0),))
    with pytest.raises(EngineError, match=r"no input 'sampel'[\s\S]*did you mean 'sample'"):
        Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(program, request())


def test_conditioning_left_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="input 'class_labels': found no value for it"):
        Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(make_program(1), request(conditioning={}))


def test_a_fixed_batch_is_named_with_the_nearest_shape(tmp_path: Path) -> None:
    graph = denoiser_graph(SHAPE)
    fixed = tuple(replace(s, shape=tuple(2 if d == "batch" else d for d in s.shape)) for s in graph.inputs)
    out = tuple(replace(s, shape=(2, *SHAPE.latents)) for s in graph.outputs)
    engine = echo(tmp_path, EchoGraph(fixed, out))
    with pytest.raises(RequestError, match=r"nearest legal shape is \(2, 4, 8, 8\)"):
        Loop({"full": engine}, DENOISER, PARTITION).run(make_program(1), request((1.0,) * 3))
    assert Loop({"full": engine}, DENOISER, PARTITION).run(make_program(1), request((2.0,))).engine_calls == 1


def test_a_group_input_without_a_partition_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="wanted a partition"):
        Loop({"full": echo(tmp_path)}, DENOISER, None)


def test_given_latents_are_scaled_and_replace_the_first_draw_alone(tmp_path: Path) -> None:
    loop = Loop({"full": echo(tmp_path)}, DENOISER, PARTITION)
    program = make_program(4, noisy=True)
    start = np.empty((1, *SHAPE.latents), np.float32)
    PhiloxNoise.from_seeds(3, 1).draw(0, start)
    before = start.copy()
    given = loop.run(program, request(latents=start)).latents
    assert np.array_equal(given, loop.run(program, request()).latents)
    assert np.array_equal(start, before), "the caller's array was changed"


def test_the_callback_runs_once_a_step_also_where_a_step_has_two_calls(tmp_path: Path) -> None:
    calls = []
    for index in range(4):
        calls.append(replace(make_program(4).calls[index], step=index // 2))
    program = StepProgram("Heun", 2, tuple(calls))
    seen: list[tuple[int, float]] = []
    request_ = request(on_step=lambda step, timestep, _: seen.append((step, timestep)))
    Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(program, request_)
    assert seen == [(0, 999.0), (1, 499.0)]


def test_the_callback_may_replace_the_latents_and_gets_a_copy(tmp_path: Path) -> None:
    loop = Loop({"full": echo(tmp_path)}, DENOISER, PARTITION)
    program = make_program(2)
    plain = loop.run(program, request()).latents

    def scribble(step: int, timestep: float, latents: np.ndarray) -> None:
        latents[...] = 9.0

    assert np.array_equal(loop.run(program, request(on_step=scribble)).latents, plain)
    zeros = loop.run(program, request(on_step=lambda s, t, latents: np.zeros_like(latents))).latents
    assert not zeros.any()
    with pytest.raises(RequestError, match=r"callback after step 0: latents: found float64 \(1, 4, 8, 8\)"):
        loop.run(program, request(on_step=lambda s, t, latents: latents.astype(np.float64)))


def test_bindings_are_kept_between_runs_of_one_size(tmp_path: Path) -> None:
    addresses = []
    loop = Loop({"full": echo(tmp_path)}, DENOISER, PARTITION)
    for batch in (1, 1, 2, 2):
        observe = lambda seen, outputs: addresses.append(outputs[PREDICTION].array.ctypes.data)  # noqa: E731
        loop.run(make_program(1), request((1.0,) * batch, observer=observe))
    assert addresses[0] == addresses[1]
    assert addresses[2] == addresses[3]


def test_time_is_split_between_engine_and_loop(tmp_path: Path) -> None:
    result = Loop({"full": echo(tmp_path)}, DENOISER, PARTITION).run(make_program(10), request((2.0,), mode="split"))
    assert result.engine_calls == 20
    assert 0 < result.engine_seconds < result.total_seconds
    assert result.overhead_per_call == pytest.approx((result.total_seconds - result.engine_seconds) / 20)
