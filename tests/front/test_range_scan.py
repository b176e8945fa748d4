"""The range scan: one abs-max per tensor, in parts that fit into memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantempo.calib.collect import StatsCollector
from quantempo.contracts.engine import EngineOptions
from quantempo.engines.registry import open_engine
from quantempo.errors import EngineError, NonFiniteActivation
from quantempo.export.graph_files import load_graph
from quantempo.export.quantize_attention import stored_ranges
from quantempo.inspection import STATISTICS
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.request import Request
from quantempo.runtime.session import Session
from quantempo.stages import range_scan
from quantempo.stages.dialects import GraphChoice, ranged_tensors, scanned_tensors
from quantempo.stages.range_scan import scan_ranges, scan_steps


@pytest.fixture(scope="module")
def reference(dit_bundle: OpenBundle) -> OpenBundle:
    return read_bundle(dit_bundle.root / "reference")


def wanted(reference: OpenBundle, *names: str) -> dict[str, int]:
    graph = load_graph(reference.path(reference.manifest.graphs["full.float-f32"].file))
    return scanned_tensors(graph, GraphChoice(names))


def test_float16_needs_every_tensor_and_fp8_those_of_attention(reference: OpenBundle) -> None:
    every, attention = wanted(reference, "portable-f16"), wanted(reference, "fp8-f32")
    assert wanted(reference, "ort-f32", "portable-bf16") == {}
    assert set(attention) < set(every)
    assert len(attention) == 3 * 2  # queries, keys and values of two blocks
    scores = wanted(reference, "ort-f32", "portable-f32")
    assert len(scores) == 2 * 2
    assert set(scores) < set(attention)
    assert all(elements > 0 for elements in every.values())


def test_the_scan_sees_what_a_run_sees(reference: OpenBundle, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, program = wanted(reference, "fp8-f32"), reference.program(scan_steps(small))
    found = scan_ranges(reference, tensors, program, small)
    seen = dict.fromkeys(tensors, 0.0)
    labels = [0, 7 % reference.manifest.denoiser.classes[0].count]
    request = Request(class_labels=labels, guidance_scale=1.5, seed=[0, 1], batch_size=2)
    options = EngineOptions(threads=1, extra_outputs=tuple(tensors))
    with Session(reference, lambda path, given: open_engine("ort", path, given), options) as session:

        def observe(_: object, outputs: object) -> None:
            for name in tensors:
                seen[name] = max(seen[name], float(np.abs(outputs[name].array).max()))  # type: ignore[index]

        session.sample(request, program, output_type="latent", observer=observe)
    assert found == pytest.approx(seen)
    # The parts change nothing.
    monkeypatch.setattr(range_scan, "_parts", lambda tensors: [(name,) for name in tensors])
    assert scan_ranges(reference, tensors, program, small) == pytest.approx(found)


def test_parts_stay_within_the_budget_and_lose_nothing() -> None:
    row = 2 * range_scan.SAMPLES * 4
    tensors = {"a": 10, "b": 10, "c": 25, "d": 1}
    assert list(range_scan._parts(tensors, 20 * row)) == [("a", "b"), ("c",), ("d",)]
    assert list(range_scan._parts({}, 20)) == []


def test_an_unknown_tensor_is_refused(reference: OpenBundle, small: Recipe) -> None:
    with pytest.raises(EngineError, match="no such tensor"):
        scan_ranges(reference, {"attention": 4}, reference.program(4), small)


def test_calibration_watches_what_attention_needs_by_default(reference: OpenBundle, dit_bundle: OpenBundle) -> None:
    graph = load_graph(reference.path(reference.manifest.graphs["full.float-f32"].file))
    assert set(ranged_tensors(graph, "int8")) == set(wanted(reference, "portable-f32"))
    assert set(ranged_tensors(graph, "fp8")) == set(wanted(reference, "fp8-f32"))
    # Scale times 127 is the largest magnitude of all calls, not of a few.
    largest = StatsCollector.load(dit_bundle.root / STATISTICS).largest()
    stored = stored_ranges(load_graph(dit_bundle.path("graphs/full.portable-f32.onnx")), "int8")
    assert stored
    assert stored == pytest.approx({name: largest[name] for name in stored}, rel=1e-5)


def test_a_value_that_is_not_finite_is_named_with_tensor_timestep_and_seed(
    reference: OpenBundle, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, program = wanted(reference, "fp8-f32"), reference.program(4)
    victim, sample = sorted(tensors)[0], Session.sample

    def poisoned(self: Session, *args: Any, observer: Any, **named: Any) -> Any:
        def poison(seen: Any, outputs: Any) -> None:
            if seen.index == 2:
                row = next(i for i, seed in enumerate(seen.seeds) if seed == 1)
                outputs[victim].array[row].flat[3] = np.inf
            observer(seen, outputs)

        return sample(self, *args, observer=poison, **named)

    monkeypatch.setattr(Session, "sample", poisoned)
    where = f"range scan, tensor '{victim}' at timestep {program.calls[2].key:g}, seed 1"
    words = rf"{where}: found infinity in 1 of \d+ values"
    with pytest.raises(NonFiniteActivation, match=words):
        scan_ranges(reference, tensors, program, small)


def test_the_scan_says_how_far_it_is(reference: OpenBundle, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, told = wanted(reference, "portable-f32"), []
    monkeypatch.setattr(range_scan, "_parts", lambda tensors: [(name,) for name in list(tensors)[:2]])
    scan_ranges(reference, tensors, reference.program(4), small, advance=lambda *seen: told.append(seen))
    assert told == [(done, 8) for done in range(1, 9)]
