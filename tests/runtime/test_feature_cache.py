from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle_maker import make_program
from support.cached_graphs import (
    DENOISER,
    VARIANTS,
    VECTORS,
    PlainRow,
    deciding,
    echo_engines,
    every,
    onnx_engines,
    onnx_variants,
    plain_replay,
    request,
)

from quantempo.contracts.cache import SublayerCut, merge_masks
from quantempo.contracts.engine import Buffer, Engine
from quantempo.contracts.program import PREDICTION, Call, Correct, Decide, Lin, StepProgram
from quantempo.contracts.variants import Variant
from quantempo.engines.host import HostBuffer
from quantempo.errors import DataError, EngineError, QuantempoError
from quantempo.runtime.feature_cache import Decisions, chunks
from quantempo.runtime.loop import Loop, Observation
from quantempo.runtime.registers import Registers
from quantempo.runtime.rng import NoiseSource, standard_normal

BACKENDS = [
    "echo", pytest.param("ort", marks=pytest.mark.skipif(find_spec("onnxruntime") is None, reason="no onnxruntime")),
    pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")),
]
ONNX = BACKENDS[1:]


def engines_of(backend: str, folder: Path) -> tuple[dict[str, Engine], dict[str, Variant]]:
    if backend == "echo":
        return echo_engines(folder), dict(VARIANTS)
    return onnx_engines(folder, backend), onnx_variants()


def cached_loop(backend: str, folder: Path) -> tuple[Loop, dict[str, Engine]]:
    engines, variants = engines_of(backend, folder)
    vectors = {} if backend == "echo" else VECTORS
    return Loop(engines, DENOISER, None, {n: v for n, v in variants.items() if n in engines}, vectors), engines


# Decisions alone


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("reference", ["previous_call", "last_refresh"])
@pytest.mark.parametrize("polynomial", [(1.0, 0.0), (2.0, -1.0, 0.3), (-3.0, 0.5), (0.2,)])
def test_decisions_follow_the_written_rule(accumulate: bool, reference: Any, polynomial: tuple[float, ...]) -> None:
    decide = Decide("probe", 0.6, polynomial=polynomial, accumulate=accumulate, reference=reference, max_consecutive=3)
    decisions, rows = Decisions(4), [PlainRow() for _ in range(4)]
    indicator = standard_normal(1, 0, 0, (4, 3, 5))
    seen = []
    for call in range(30):
        indicator = indicator + np.float32(0.15) * standard_normal(2, call, 0, (4, 3, 5))
        found = decisions.choose(decide, indicator)
        assert list(found) == [row.refreshes(decide, values) for row, values in zip(rows, indicator, strict=True)]
        seen.append(found)
    share = np.mean(seen[1:])
    assert seen[0].all()
    assert 0.0 < share < 1.0, "this rule never changes its mind, so the comparison shows nothing"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_indicator_that_is_not_finite_refreshes(bad: float) -> None:
    decisions = Decisions(2)
    decide = Decide("probe", 1e30)
    values = np.ones((2, 4), np.float32)
    decisions.choose(decide, values)
    broken = values.copy()
    broken[1, 2] = bad
    with np.errstate(invalid="ignore"):
        assert list(decisions.choose(decide, broken)) == [False, True]
        assert list(decisions.choose(decide, values)) == [False, True], "compared with what is not finite"
    assert list(decisions.choose(decide, values)) == [False, False]


def test_an_indicator_of_zeros_refreshes_the_next_call() -> None:
    decisions = Decisions(1)
    zeros = np.zeros((1, 4), np.float32)
    assert [bool(decisions.choose(Decide("p", 1.0), zeros)[0]) for _ in range(3)] == [True, True, True]


def test_a_polynomial_below_zero_is_no_change_and_a_threshold_of_zero_still_refreshes() -> None:
    for threshold, wanted in ((0.0, True), (1e-9, False)):
        decisions = Decisions(1)
        decide = Decide("p", threshold, polynomial=(-1.0,))
        same = np.ones((1, 4), np.float32)
        assert [bool(decisions.choose(decide, same)[0]) for _ in range(3)] == [True, wanted, wanted]


def test_reuses_in_a_row_are_capped() -> None:
    decisions = Decisions(1)
    decide = Decide("p", 1.0, max_consecutive=2)
    same = np.ones((1, 4), np.float32)
    found = [bool(decisions.choose(decide, same)[0]) for _ in range(7)]
    assert found == [True, False, False, True, False, False, True]


def test_a_refresh_that_was_not_decided_starts_anew_and_a_fixed_reuse_counts() -> None:
    decisions = Decisions(1)
    decide = Decide("p", 1.0, max_consecutive=2)
    same = np.ones((1, 4), np.float32)
    decisions.choose(decide, same)
    decisions.reused()
    assert not decisions.choose(decide, same)[0]
    assert decisions.choose(decide, same)[0], "the fixed reuse was the first of two"
    decisions.forget()
    assert decisions.choose(decide, same)[0]


@pytest.mark.parametrize("count", range(18))
def test_chunks_are_powers_of_two_and_cover_the_rows_in_order(count: int) -> None:
    rows = np.arange(count) * 3
    parts = list(chunks(rows))
    assert [row for part in parts for row in part] == list(rows)
    assert all(len(part) & (len(part) - 1) == 0 for part in parts)
    assert len(parts) <= max(1, count.bit_length())


# The loop


@pytest.mark.parametrize("mode", ["batched", "split"])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("guidance", [(1.0,), (4.0,), (1.0, 3.0, 0.0, 7.5)])
@pytest.mark.parametrize(
    "program",
    [
        every(2, 7, noisy=True), every(3, 7), deciding(12, Decide("probe", 0.5), noisy=True),
        deciding(12, Decide("probe", 0.25, accumulate=False, reference="last_refresh", max_consecutive=4)),
    ],
    ids=["every 2", "every 3", "accumulated", "last refresh"],
)
def test_cached_programs_are_the_plain_replay_to_the_bit(
    tmp_path: Path, mode: str, host: bool, guidance: tuple[float, ...], program: StepProgram
) -> None:
    engines = echo_engines(tmp_path, host)
    result = Loop(engines, DENOISER, None, VARIANTS).run(program, request(guidance, mode=mode))
    wanted, reuses = plain_replay(engines, program, guidance)
    assert np.array_equal(result.latents, wanted)
    assert result.reused == sum(reuses)
    assert 0 < result.reused < result.rows


def test_these_decisions_differ_between_samples_and_branches(tmp_path: Path) -> None:
    """Without this, the comparison above would never run a part of a lane."""
    loop, _ = cached_loop("echo", tmp_path)
    runs: list[Observation] = []
    loop.run(
        deciding(12, Decide("probe", 0.5)),
        request((1.0, 3.0, 0.0, 7.5), observer=lambda seen, _: runs.append(seen)),
    )
    assert any(seen.graph != "probe" and 0 < len(seen.samples) < 6 for seen in runs)
    by_branch: dict[tuple[int, str], list[str]] = {}
    for seen in runs:
        for sample, branch in zip(seen.samples, seen.branches, strict=True):
            if seen.graph != "probe":
                by_branch.setdefault((sample, branch), []).append(seen.graph)
    assert all(len(graphs) == 12 for graphs in by_branch.values())
    assert len(by_branch) == 6
    assert by_branch[1, "conditional"] != by_branch[1, "unconditional"] or (
        by_branch[3, "conditional"] != by_branch[3, "unconditional"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_zero_equals_the_plain_loop_to_the_bit(tmp_path: Path, backend: str) -> None:
    loop, _ = cached_loop(backend, tmp_path)
    plain = loop.run(make_program(9), request((2.0, 1.0)))
    never = loop.run(deciding(9, Decide("probe", 0.0)), request((2.0, 1.0)))
    assert np.array_equal(never.latents, plain.latents)
    assert (plain.reused, never.reused, never.rows) == (0, 0, 27)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_keep_all_layers_and_an_interval_of_one_equal_a_loop_that_knows_no_features_to_the_bit(
    tmp_path: Path, backend: str
) -> None:
    loop, engines = cached_loop(backend, tmp_path)
    wanted = Loop({"full": engines["full"]}, DENOISER).run(make_program(9), request((2.0, 1.0)))
    cuts, names = merge_masks([None, *[SublayerCut(((False, False),) * 3)] * 8], 4)
    assert cuts == {}
    calls = zip(make_program(9).calls, names, strict=True)
    kept = replace(make_program(9), calls=tuple(replace(call, graph=name) for call, name in calls))
    for program in (kept, every(1, 9)):
        found = loop.run(program, request((2.0, 1.0)))
        assert np.array_equal(found.latents, wanted.latents)
        assert found.reused == 0
    assert not np.array_equal(loop.run(every(2, 9), request((2.0, 1.0))).latents, wanted.latents)


def test_a_prediction_may_be_overwritten_before_the_sampler_reads_it(tmp_path: Path) -> None:
    loop, _ = cached_loop("echo", tmp_path)
    seen: list[int] = []

    def halve(index: int, registers: Registers, noise: NoiseSource) -> None:
        seen.append(index)
        ahead = registers.copied()
        ahead[PREDICTION][...] = 0.0  # a copy: the run does not see it
        registers[PREDICTION][...] *= np.float32(0.5)

    changed = loop.run(make_program(5), request((2.0, 1.0), on_prediction=halve))
    halved = Lin(PREDICTION, ((PREDICTION, 0.5),))
    program = make_program(5)
    written = replace(program, calls=tuple(replace(c, update=(halved, *c.update)) for c in program.calls))
    assert seen == [0, 1, 2, 3, 4]
    assert np.array_equal(changed.latents, loop.run(written, request((2.0, 1.0))).latents)


@pytest.mark.parametrize("backend", ONNX)
def test_reuse_of_this_call_s_own_feature_equals_full_to_the_bit(tmp_path: Path, backend: str) -> None:
    """Every call runs twice, first `full`, then `reuse` on the same sample; the second one's prediction counts."""
    loop, _ = cached_loop(backend, tmp_path)
    program = make_program(6)
    doubled = []
    for call in program.calls:
        doubled += [replace(call, update=()), replace(call, graph="reuse.0")]
    found = loop.run(replace(program, calls=tuple(doubled)), request((2.0, 1.0)))
    plain = loop.run(program, request((2.0, 1.0))).latents
    if backend == "openvino":
        # It fuses the two products and their sum in one graph and not in the other: other roundings, the same values.
        assert np.abs(found.latents - plain).max() < 1e-6
    else:
        assert np.array_equal(found.latents, plain)
    assert found.reused * 2 == found.rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_of_a_batch_is_as_alone(tmp_path: Path, backend: str) -> None:
    loop, _ = cached_loop(backend, tmp_path)
    program = deciding(12, Decide("probe", 0.5 if backend == "echo" else 0.25))
    guidance = (1.0, 3.0, 1.0, 5.0, 2.0, 1.0, 1.0)
    together = loop.run(program, request(guidance))
    parts = [loop.run(program, request((g,), first=i)) for i, g in enumerate(guidance)]
    assert np.array_equal(together.latents, np.concatenate([p.latents for p in parts]))
    assert together.reused == sum(p.reused for p in parts)
    assert len({p.reused / p.rows for p in parts}) > 1, "all samples decide alike, so the test shows nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", [True, False])
def test_a_higher_threshold_never_reuses_less(tmp_path: Path, backend: str, accumulate: bool) -> None:
    loop, _ = cached_loop(backend, tmp_path)
    reused = []
    for threshold in (0.0, 0.03, 0.04, 0.05, 0.06, 0.07, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 100.0):
        program = deciding(20, Decide("probe", threshold, accumulate=accumulate))
        reused.append(loop.run(program, request((1.0, 1.0, 1.0))).reused)
    assert reused == sorted(reused)
    assert reused[0] == 0
    assert reused[-1] == 3 * 19
    assert len(set(reused)) > 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_inputs_and_prediction_are_shared_memory(tmp_path: Path, backend: str) -> None:
    loop, engines = cached_loop(backend, tmp_path)
    bound: dict[str, Mapping[str, Buffer]] = {}
    for name, engine in engines.items():
        bind = engine.bind

        def spy(sizes: Any, share: Any = None, name: str = name, bind: Any = bind) -> Any:
            binding = bind(sizes, share)
            bound[name] = {**binding.inputs, **binding.outputs}
            return binding

        engine.bind = spy  # type: ignore[method-assign]
    loop.run(every(2, 4), request((3.0, 1.0)))
    assert set(bound) == {"full", "reuse.0"}

    def address(variant: str, tensor: str) -> int:
        buffer = bound[variant][tensor]
        assert isinstance(buffer, HostBuffer)
        return buffer.memory.ctypes.data

    for tensor in ("cache.0", "sample", PREDICTION):
        assert address("full", tensor) == address("reuse.0", tensor), tensor


@pytest.mark.parametrize("backend", ONNX)
def test_vectors_are_fed_per_call(tmp_path: Path, backend: str) -> None:
    loop, engines = cached_loop(backend, tmp_path)
    program = every(2, 6, graph="reuse.1")
    calls = tuple(
        replace(c, vectors={"cache.0.gain": i // 2, "cache.0.bias": i // 2}) if c.graph == "reuse.1" else c
        for i, c in enumerate(program.calls)
    )
    program = replace(program, calls=calls)
    found = loop.run(program, request((2.0, 1.0, 1.0))).latents
    wanted, _ = plain_replay(engines, program, (2.0, 1.0, 1.0))
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, loop.run(every(2, 6), request((2.0, 1.0, 1.0))).latents)


def test_corrections_of_the_prediction_work_after_guidance(tmp_path: Path) -> None:
    engines = echo_engines(tmp_path)
    vectors = {"g": np.full((1, 4), 2.0, np.float32), "b": np.zeros((1, 4), np.float32)}
    loop = Loop(engines, DENOISER, None, VARIANTS, vectors)
    program = make_program(3)
    corrected = replace(program, calls=tuple(
        replace(c, update=(Correct(PREDICTION, PREDICTION, "g", "b", 0), *c.update)) for c in program.calls
    ))  # fmt: skip

    def twice(terms: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple((name, 2 * k if name == PREDICTION else k) for name, k in terms)

    scaled = replace(program, calls=tuple(
        replace(c, update=tuple(replace(op, terms=twice(op.terms)) if op.kind == "lin" else op for op in c.update))
        for c in program.calls
    ))  # fmt: skip
    for guidance in ((1.0, 1.0), (4.0, 1.0)):
        found, wanted = (loop.run(p, request(guidance)).latents for p in (corrected, scaled))
        assert np.array_equal(found, wanted), "a factor of two is exact"


def test_memory_is_kept_between_runs_of_cached_and_plain_programs(tmp_path: Path) -> None:
    """A plain run of another batch in between must not leave the variants with different features."""
    loop, engines = cached_loop("echo", tmp_path)
    program = every(2, 6)
    first = loop.run(program, request((1.0,))).latents
    loop.run(make_program(2), request((1.0, 1.0)))
    assert np.array_equal(loop.run(program, request((1.0,))).latents, first)
    loop.run(program, request((1.0, 1.0)))
    assert np.array_equal(loop.run(program, request((1.0,))).latents, first)
    assert np.array_equal(plain_replay(engines, program, (1.0,))[0], first)


def test_the_result_counts_by_variant(tmp_path: Path) -> None:
    loop, _ = cached_loop("echo", tmp_path)
    fixed = loop.run(every(3, 7), request((3.0, 1.0)))
    assert {n: (t.runs, t.rows) for n, t in fixed.variants.items()} == {"full": (3, 9), "reuse.0": (4, 12)}
    assert (fixed.rows, fixed.reused, fixed.engine_calls) == (21, 12, 7)
    assert fixed.engine_seconds == pytest.approx(sum(t.seconds for t in fixed.variants.values()))
    decided = loop.run(deciding(7, Decide("probe", 1e9)), request((3.0, 1.0)))
    assert {n: t.rows for n, t in decided.variants.items()} == {"probe": 21, "full": 3, "reuse.0": 18}


def test_two_calls_per_step_are_counted_per_call(tmp_path: Path) -> None:
    """Heun's second call of the first step may reuse: what counts is the call, not the step."""
    loop, _ = cached_loop("echo", tmp_path)
    program = every(2, 6)
    heun = replace(program, steps=3, calls=tuple(replace(c, step=i // 2) for i, c in enumerate(program.calls)))
    result = loop.run(heun, request())
    assert (result.rows, result.reused) == (6, 3)
    assert np.array_equal(result.latents, loop.run(program, request()).latents)


# Bad input


def calls_with(**changes: Any) -> StepProgram:
    """Three calls; the last one is changed."""
    program = make_program(3)
    return replace(program, calls=(*program.calls[:2], replace(program.calls[2], **changes)))


def first_call(graph: str) -> StepProgram:
    program = make_program(3)
    return replace(program, calls=(replace(program.calls[0], graph=graph), *program.calls[1:]))


def gain(row: int, name: str = "cache.0.gain") -> dict[str, int]:
    return {name: row, "cache.0.bias": 0}


BAD: list[tuple[StepProgram, str]] = [
    (first_call("reuse.0"), r"call 0: found graph 'reuse\.0', which reuses feature 'cache\.0', wanted a first call"),
    (calls_with(graph="reuse.3"), r"call 2: found a call of graph 'reuse\.3', wanted one of full, probe, reuse\.0"),
    (calls_with(graph="deep.0"), r"call 2: found graph 'deep\.0', which reuses feature 'cache\.9', which nothing"),
    (
        calls_with(graph="reuse.1", vectors=gain(0, "cache.0.gian")),
        r"call 2: found input 'cache\.0\.gian' with the unknown vector 'cache\.0\.gian'[\s\S]*mean 'cache\.0\.gain'",
    ),
    (calls_with(graph="reuse.1", vectors=gain(3)), r"row 3 of 'cache\.0\.gain', wanted rows 0 to 2"),
    (calls_with(graph="reuse.1"), r"call 2: found no vector for input 'cache\.0\.bias' of graph 'reuse\.1'"),
    (calls_with(vectors=gain(0)), r"call 2: found vector 'cache\.0\.gain' for graph 'full', wanted an input of that"),
    (calls_with(graph="reuse.0", decide=Decide("full", 0.1)), r"found probe 'full' without an output 'indicator'"),
    (calls_with(graph="reuse.0", decide=Decide("prob", 0.1)), r"graph 'prob'[\s\S]*did you mean 'probe'"),
    (
        calls_with(graph="reuse.0", decide=Decide("probe", 0.1, refresh="reuse.0")),
        r"call 2: found graph 'reuse\.0', which reuses feature 'cache\.0', which nothing wrote before",
    ),
    (calls_with(graph="deep.0", decide=Decide("probe", 0.1)), r"reuses feature 'cache\.9', which nothing wrote before"),
    (
        calls_with(update=(Correct("latents", PREDICTION, "long", "long", 0),)),
        r"call 2: found array 'long' of 5 channels, wanted 4 channels, as the latents have",
    ),
    (
        calls_with(update=(Correct("latents", PREDICTION, "cache.0.gain", "cache.0.bias", 5),)),
        r"call 2: found correct of row 5 of 'cache\.0\.gain', wanted rows 0 to 2",
    ),
]


@pytest.mark.parametrize(("program", "words"), BAD, ids=lambda v: v[:50] if isinstance(v, str) else "")
def test_a_program_that_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, program: StepProgram, words: str
) -> None:
    engines = echo_engines(tmp_path)
    variants = {**VARIANTS, "deep.0": Variant(("sample", "cache.9"), (PREDICTION,), reads=("cache.9",))}
    if "deep.0" not in [c.graph for c in program.calls]:
        del variants["deep.0"]
    vectors = {**VECTORS, "long": np.ones((1, 5), np.float32)}
    ran: list[Observation] = []
    with pytest.raises(DataError, match=words):
        Loop(engines, DENOISER, None, variants, vectors).run(
            program, request(observer=lambda seen, _: ran.append(seen))
        )
    assert not ran


def test_rows_that_decide_need_a_free_batch(tmp_path: Path) -> None:
    from support.cached_graphs import echo_graphs

    from quantempo.contracts.engine import EngineOptions
    from quantempo.engines.echo import write_echo_graph
    from quantempo.engines.registry import open_engine

    engines = echo_engines(tmp_path)
    for name, graph in echo_graphs().items():
        inputs, outputs = (
            tuple(replace(s, shape=(2, *s.shape[1:])) for s in specs) for specs in (graph.inputs, graph.outputs)
        )
        write_echo_graph(tmp_path / f"{name}.json", replace(graph, inputs=inputs, outputs=outputs))
        engines[name] = open_engine("echo", tmp_path / f"{name}.json", EngineOptions())
    loop = Loop(engines, DENOISER, None, VARIANTS)
    assert loop.run(every(2, 4), request((1.0, 1.0))).reused == 4
    with pytest.raises(EngineError, match=r"graph 'reuse\.0': found a fixed batch of 2, wanted a free batch"):
        loop.run(deciding(4, Decide("probe", 0.1)), request((1.0, 1.0)))


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_vectors_of_another_length_than_the_input_are_named(tmp_path: Path) -> None:
    engines = onnx_engines(tmp_path, "ort")
    vectors = {"cache.0.gain": np.ones((3, 5), np.float32), "cache.0.bias": VECTORS["cache.0.bias"]}
    loop = Loop(engines, DENOISER, None, onnx_variants(), vectors)
    with pytest.raises(QuantempoError, match=r"input 'cache\.0\.gain': found float32 \(4,\), wanted float32 of 5 "):
        loop.run(calls_with(graph="reuse.1", vectors=gain(0)), request())


def test_a_call_that_feeds_what_no_variant_takes_is_named(tmp_path: Path) -> None:
    loop, _ = cached_loop("echo", tmp_path)
    program = deciding(2, Decide("probe", 0.1))
    wrong: list[Call] = [replace(c, inputs={"sampel": (("latents", 1.0),)}) for c in program.calls]
    with pytest.raises(EngineError, match=r"graph 'reuse\.0': found no input 'sampel'"):
        loop.run(replace(program, calls=tuple(wrong)), request())
