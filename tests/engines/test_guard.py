"""The guard finds real differences in a noisy machine, and blames the right region; time is simulated."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.contracts.engine import Binding, Buffer, Engine, EngineOptions
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.echo import EchoEngine, EchoGraph, open_engine, write_echo_graph
from quantempo.engines.guard import (
    Choice,
    Timing,
    Variant,
    Verdict,
    compare,
    library_versions,
    outcome,
    paired_ratio,
    pick_fastest,
)
from quantempo.engines.regions import Region, RegionReport, revert_losing
from quantempo.errors import EngineError, PlanError

SPEC = TensorSpec("x", "float32", ("batch", 4))


class Machine:
    """A clock that engines move forward; `drift` slows all of them down as time goes by."""

    def __init__(self, seed: int = 0, noise: float = 0.0, drift: float = 0.0, bursts: float = 0.0) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.noise, self.drift, self.bursts = noise, drift, bursts
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.calls: dict[str, int] = {}

    def clock(self) -> float:
        return self.now

    def spend(self, ms: float) -> None:
        factor = max(0.1, self.random.gauss(1.0, self.noise)) * (1 + self.drift * self.now)
        if self.random.random() < self.bursts:
            factor *= 3
        self.now += ms * factor / 1000

    def timing(self, **more: Any) -> Timing:
        return Timing(**{"clock": self.clock, "sample_s": 0.02, **more})

    def variant(self, folder: Path, label: str, ms: float, backend: str = "echo") -> Variant:
        path = folder / "graph.json"
        if not path.exists():
            write_echo_graph(path, EchoGraph((SPEC,), (TensorSpec("y", "float32", ("batch", 4)),)))

        def make() -> Engine:
            self.opened.append(label)
            return Slowed(open_engine(path, EngineOptions()), self, label, ms)

        return Variant(label, backend, make, {"x": np.ones((2, 4), np.float32)})


class Slowed:
    """An echo engine whose calls take simulated time."""

    def __init__(self, engine: EchoEngine, machine: Machine, label: str, ms: float) -> None:
        self.name, self.host, self.inputs, self.outputs = engine.name, engine.host, engine.inputs, engine.outputs
        self._engine, self._machine, self._label, self._ms = engine, machine, label, ms

    def bind(self, sizes: Mapping[str, int], share: Mapping[str, Buffer] | None = None) -> Binding:
        binding = self._engine.bind(sizes, share)
        plain, machine, label, ms = binding.run, self._machine, self._label, self._ms

        def run() -> None:
            plain()
            machine.calls[label] = machine.calls.get(label, 0) + 1
            machine.spend(ms)

        binding.run = run  # type: ignore[method-assign]
        return binding

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._engine.run(feeds)

    def close(self) -> None:
        self._machine.closed.append(self._label)
        self._engine.close()


@pytest.mark.parametrize(
    ("ms", "wanted"), [(8.0, "faster"), (12.0, "slower"), (10.0, "even"), (9.97, "even"), (10.03, "even")]
)
def test_a_difference_counts_when_it_stands_out(tmp_path: Path, ms: float, wanted: str) -> None:
    machine = Machine(noise=0.01)
    verdict = compare(
        machine.variant(tmp_path, "float", 10.0), machine.variant(tmp_path, "int8", ms), machine.timing()
    )
    assert verdict.outcome == wanted
    assert verdict.ratio == pytest.approx(ms / 10, rel=0.02)
    assert verdict.baseline_ms == pytest.approx(10, rel=0.02)
    assert verdict.wins == (wanted == "faster")


def test_a_machine_that_slows_down_slows_both_down(tmp_path: Path) -> None:
    machine = Machine(noise=0.005, drift=0.5)
    verdict = compare(
        machine.variant(tmp_path, "float", 10.0), machine.variant(tmp_path, "int8", 10.0), machine.timing()
    )
    assert verdict.rounds[-1].baseline > 1.1 * verdict.rounds[0].baseline
    assert verdict.outcome == "even"
    assert verdict.ratio == pytest.approx(1, abs=0.02)


def test_bursts_of_other_work_do_not_turn_the_verdict(tmp_path: Path) -> None:
    wrong = 0
    for seed in range(20):
        machine = Machine(seed=seed, noise=0.02, bursts=0.1)
        verdict = compare(
            machine.variant(tmp_path, "float", 10.0), machine.variant(tmp_path, "int8", 8.5),
            machine.timing(rounds=11),
        )
        wrong += verdict.outcome == "slower"
    assert wrong == 0


def test_equal_variants_are_rarely_told_apart(tmp_path: Path) -> None:
    told = 0
    for seed in range(100):
        machine = Machine(seed=seed, noise=0.05)
        pair = [machine.variant(tmp_path, label, 10.0) for label in ("one", "other")]
        told += compare(*pair, machine.timing()).outcome != "even"
    assert told <= 8


def test_engines_are_warmed_up_called_equally_often_and_closed(tmp_path: Path) -> None:
    machine = Machine()
    timing = machine.timing(rounds=4, warmup=3, sample_s=0.2)
    compare(machine.variant(tmp_path, "slow", 10.0), machine.variant(tmp_path, "fast", 5.0), timing)
    # 3 to warm up, 1 to see how many fit into half a sample (10 or 20), then 4 rounds there and back.
    assert machine.calls == {"slow": 3 + 1 + 4 * 2 * 10, "fast": 3 + 1 + 4 * 2 * 20}
    assert machine.closed == ["fast", "slow"]


def test_engines_are_closed_when_one_of_them_fails(tmp_path: Path) -> None:
    machine = Machine()
    broken = Variant("broken", "echo", refuse, {})
    with pytest.raises(EngineError, match="no such device"):
        compare(machine.variant(tmp_path, "float", 10.0), broken, machine.timing())
    assert machine.closed == ["float"]


def refuse() -> Engine:
    raise EngineError("broken", found="no such device", wanted="a device", cause="none there", remedy="add one")


def test_a_verdict_survives_the_sidecar(tmp_path: Path) -> None:
    machine = Machine(noise=0.01)
    verdict = compare(
        machine.variant(tmp_path, "float", 10.0), machine.variant(tmp_path, "int8", 7.0), machine.timing()
    )
    again = from_data(Verdict, parse_json(canonical_json(verdict), "verdict"), "verdict")
    assert again == verdict
    assert "quantempo" in again.versions
    assert str(verdict).startswith(f"int8: {verdict.candidate_ms:.3g} ms a call, float: ")
    assert str(verdict).endswith("faster")


def test_the_ratio_is_a_median_and_its_noise_follows_the_scatter() -> None:
    steady = [(10.0, 8.0)] * 9
    assert paired_ratio(steady) == (pytest.approx(0.8), pytest.approx(0.0, abs=1e-12))
    disturbed = [*steady[:7], (10.0, 80.0), (10.0, 0.8)]
    assert paired_ratio(disturbed)[0] == pytest.approx(0.8)
    wide = [(10.0, 8.0 * f) for f in (0.8, 0.9, 0.95, 1.0, 1.0, 1.05, 1.1, 1.2, 1.3)]
    assert paired_ratio(wide)[1] > 0.05
    assert paired_ratio(wide * 4)[1] < paired_ratio(wide)[1] * 0.6


@pytest.mark.parametrize(
    ("ratio", "noise", "wanted"),
    [(0.9, 0.02, "faster"), (0.9, 0.2, "even"), (1.1, 0.02, "slower"), (0.995, 0.0, "even")],
)
def test_what_counts_is_the_larger_of_noise_and_margin(ratio: float, noise: float, wanted: str) -> None:
    assert outcome(ratio, noise, 0.01) == wanted


def test_the_fastest_is_picked_in_noise_when_it_is_a_tenth_faster(tmp_path: Path) -> None:
    right = 0
    for seed in range(50):
        machine = Machine(seed=seed, noise=0.05, bursts=0.03)
        times = {"a": 10.0, "b": 9.0, "c": 11.0}
        choice = pick_fastest([machine.variant(tmp_path, k, v) for k, v in times.items()], machine.timing())
        right += choice.label == "b"
    assert right >= 45


def test_where_two_are_even_the_first_stays(tmp_path: Path) -> None:
    machine = Machine()
    pair = [machine.variant(tmp_path, label, ms) for label, ms in (("a", 10.0), ("b", 9.95))]
    choice = pick_fastest(pair, machine.timing())
    assert choice.label == "a"
    assert [t.label for t in choice.timed] == ["a", "b"]


def test_a_candidate_that_does_not_run_is_passed_over_and_named(tmp_path: Path) -> None:
    machine = Machine()
    broken = Variant("gpu", "tensorrt", refuse, {})
    choice = pick_fastest([broken, machine.variant(tmp_path, "cpu", 10.0)], machine.timing())
    assert choice.label == "cpu"
    assert "no such device" in choice.timed[-1].refused
    assert from_data(Choice, parse_json(canonical_json(choice), "c"), "c") == choice
    assert machine.closed == ["cpu"]


def test_no_candidate_at_all_is_refused() -> None:
    with pytest.raises(EngineError, match=r"(?s)gpu: broken.*at least one engine that runs the model.*pip install"):
        pick_fastest([Variant("gpu", "tensorrt", refuse, {})])


def test_versions_name_what_was_timed() -> None:
    found = library_versions("ort", "openvino", "echo", "unknown")
    assert set(found) <= {"quantempo", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino"}
    assert {"quantempo", "numpy"} <= set(found)


FLOAT_MS = 40.0


def model(
    machine: Machine, folder: Path, gains: Mapping[str, float], made: list[frozenset[str]] | None = None
) -> Callable[[frozenset[str]], Variant]:
    """A model whose time falls by each quantized site's gain."""

    def make(sites: frozenset[str]) -> Variant:
        if made is not None:
            made.append(sites)
        ms = FLOAT_MS - sum(gains[site] for site in sites)
        return machine.variant(folder, f"{len(sites)} sites", ms)

    return make


GAINS = {f"mlp.{i}": 2.0 for i in range(4)} | {f"attn.{i}": -1.5 for i in range(4)} | {"conv_in": -0.02}
REGIONS = (
    Region("mlp", tuple(f"mlp.{i}" for i in range(4))), Region("attention", tuple(f"attn.{i}" for i in range(4))),
    Region("edge", ("conv_in",)),
)


@pytest.mark.parametrize("seed", range(5))
def test_a_losing_region_is_reverted_and_the_rest_stays(tmp_path: Path, seed: int) -> None:
    machine = Machine(seed=seed, noise=0.01)
    twin = machine.variant(tmp_path, "float", FLOAT_MS)
    report = revert_losing(REGIONS, model(machine, tmp_path, GAINS), twin, machine.timing(rounds=15))
    assert report.revert == tuple(f"attn.{i}" for i in range(4))
    assert report.verdict.outcome == "faster"
    assert report.verdict.ratio == pytest.approx((FLOAT_MS - 8) / FLOAT_MS, rel=0.03)
    by_name = {r.region: r for r in report.regions}
    assert by_name["mlp"].gain_ms == pytest.approx(8, rel=0.1)
    assert by_name["attention"].gain_ms == pytest.approx(-6, rel=0.15)
    assert (by_name["mlp"].loses, by_name["attention"].loses, by_name["edge"].loses) == (False, True, False)


def test_of_a_mixed_region_only_the_guilty_part_goes(tmp_path: Path) -> None:
    machine = Machine()
    gains = {f"s{i}": 0.5 for i in range(8)} | {"s5": -6.0}
    report = revert_losing(
        [Region("all", tuple(gains))], model(machine, tmp_path, gains), machine.variant(tmp_path, "float", FLOAT_MS),
        machine.timing(),
    )
    assert report.revert == ("s5",)
    assert [r.region for r in report.regions if r.loses] == ["all", "all[4:8]", "all[4:8][0:2]", "all[4:8][0:2][1:2]"]


def test_a_region_none_of_whose_halves_loses_goes_as_a_whole(tmp_path: Path) -> None:
    # 1.25 % together, 0.6 % each: below what anybody cares about.
    machine = Machine()
    make = model(machine, tmp_path, {"a": -0.25, "b": -0.25, "c": 8.0})
    regions = [Region("pair", ("a", "b")), Region("rest", ("c",))]
    report = revert_losing(regions, make, machine.variant(tmp_path, "float", FLOAT_MS), machine.timing(margin=0.01))
    assert report.revert == ("a", "b")
    assert [r.loses for r in report.regions] == [True, False, False, False]


def test_a_model_that_stays_slower_is_not_quantized_at_all(tmp_path: Path) -> None:
    machine = Machine()
    gains = {"a": 0.0, "b": 0.0}

    def make(sites: frozenset[str]) -> Variant:
        # A fixed cost of being quantized, whatever the sites.
        return machine.variant(tmp_path, str(len(sites)), FLOAT_MS + (5.0 if sites else 0.0))

    report = revert_losing(
        [Region(name, (name,)) for name in gains], make, machine.variant(tmp_path, "float", FLOAT_MS), machine.timing()
    )
    assert report.revert == ("a", "b")
    assert "nothing is left quantized" in report.verdict.note
    assert "nothing is left quantized" in str(report.verdict)


def test_where_every_region_loses_nothing_is_left(tmp_path: Path) -> None:
    machine = Machine()
    gains = {"a": -4.0, "b": -4.0}
    made: list[frozenset[str]] = []
    report = revert_losing(
        [Region("a", ("a",)), Region("b", ("b",))], model(machine, tmp_path, gains, made),
        machine.variant(tmp_path, "float", FLOAT_MS), machine.timing(),
    )
    assert report.revert == ("a", "b")
    assert report.verdict.outcome == "even"
    assert "every region loses" in report.verdict.note


def test_a_report_survives_the_sidecar(tmp_path: Path) -> None:
    machine = Machine()
    twin = machine.variant(tmp_path, "float", FLOAT_MS)
    report = revert_losing(REGIONS, model(machine, tmp_path, GAINS), twin, machine.timing())
    assert from_data(RegionReport, parse_json(canonical_json(report), "r"), "r") == report


@pytest.mark.parametrize("regions", [(), (Region("a", ("s",)), Region("b", ("s",)))])
def test_regions_must_be_disjoint_and_hold_something(tmp_path: Path, regions: tuple[Region, ...]) -> None:
    machine = Machine()
    with pytest.raises(PlanError, match=r"(?s)latency guard: regions.*disjoint regions with sites"):
        revert_losing(regions, model(machine, tmp_path, {"s": 1.0}), machine.variant(tmp_path, "float", 1.0))


def test_one_variant_at_a_time_where_memory_is_short(tmp_path: Path) -> None:
    machine = Machine(drift=0.2, noise=0.01)
    told: list[str] = []

    def watched(variant: Variant) -> Variant:
        def make() -> Engine:
            assert len(machine.opened) == len(machine.closed), "nothing else is open"
            told.append(variant.label)
            return variant.open()

        return Variant(variant.label, variant.backend, make, variant.feeds)

    pair = [watched(machine.variant(tmp_path, label, ms)) for label, ms in (("float", 2.0), ("int8", 1.5))]
    found = compare(*pair, machine.timing(alone=True, rounds=9))
    assert told == ["float", "int8", "float"]
    assert machine.closed == told
    assert len(found.rounds) == 9
    assert found.wins
    assert found.ratio == pytest.approx(0.75, abs=0.03), "drift over all of it cancels"
    assert compare(*pair, machine.timing(alone=True, rounds=1)).rounds
    with pytest.raises(AssertionError, match="nothing else"):
        compare(*pair, machine.timing())
