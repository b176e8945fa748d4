"""The latency guard in a compile: recorded beside the bundle, said aloud, and followed only where that was asked."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support import tiny_models

from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share, Site
from quantempo.devices import guarding
from quantempo.devices.guarding import (
    GuardRecord,
    SlowerThanFloat,
    Subject,
    guard_mode,
    regions_of,
    restricted,
    settle,
)
from quantempo.engines.guard import Timing, Verdict
from quantempo.errors import NoSites, RequestError
from quantempo.export import for_ort, lower_ort
from quantempo.export.graph_files import load_graph
from quantempo.export.quantize_attention import stored_ranges
from quantempo.export.weights import stored_weights
from quantempo.inspection import load_plan
from quantempo.pipeline import compile_model
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.stages.dialects import GraphChoice, lower_graphs

QUICK = Timing(rounds=5, warmup=1, sample_s=0.004, margin=0.02, clock=time.process_time)
"""One thread's own time: what else the machine does must not decide a test."""


def subject_of(bundle: OpenBundle) -> Subject:
    reference = read_bundle(bundle.root / "reference")
    plan, table = load_plan(bundle), bundle.scale_table()
    assert plan is not None
    assert table is not None
    graph = load_graph(reference.path("graphs/full.float-f32.onnx"))
    weights = stored_weights(load_graph(bundle.path("graphs/full.ort-f32.onnx")), plan)
    choice = GraphChoice((), ranges=stored_ranges(load_graph(bundle.path("graphs/full.portable-f32.onnx")), "int8"))
    return Subject(graph, reference.manifest.denoiser, plan, table, weights, choice, threads=1)


@pytest.fixture(scope="module")
def subject(dit_bundle: OpenBundle) -> Subject:
    return subject_of(dit_bundle)


def slowed(monkeypatch: pytest.MonkeyPatch, guilty: str, rounds: int = 60) -> None:
    """Plant a region that loses: where a site of it is quantized, its activation first makes a long detour."""
    real = lower_ort.lower_ort

    def planted(model: ir.Model, plan: QuantPlan, *rest: Any) -> ir.Model:
        lowered = real(model, plan, *rest)
        for site in plan.quantized():
            if guilty in site.id:
                _detour(lowered, site, rounds)
        return lowered

    monkeypatch.setattr(lower_ort, "lower_ort", planted)


def _detour(model: ir.Model, site: Site, rounds: int) -> None:
    value = next((v for node in model.graph for v in node.outputs if v.name == site.tensor), None)
    if value is None:
        return  # the graph reads it from outside, or has drawn it into something else
    uses = list(value.uses())
    producer = value.producer()
    assert producer is not None
    last, after = value, producer
    for index in range(rounds):
        node = ir.Node("", "Softplus" if index % 2 else "Tanh", [last], name=f"{site.id}/detour{index}")
        model.graph.insert_after(after, node)
        last, after = node.outputs[0], node
        last.name, last.type, last.shape = f"{site.id}/detour{index}", value.type, value.shape
    for node, index in uses:
        node.replace_input_with(index, last)


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guard_mode(None) == "off", "tests/conftest.py says so"
    monkeypatch.delenv("QUANTEMPO_GUARD")
    assert guard_mode(None) == "record"
    assert guard_mode("revert") == "revert"
    with pytest.raises(RequestError, match=r"(?s)found 'recrod', wanted off or record or revert.*did you mean"):
        guard_mode("recrod")
    monkeypatch.setenv("QUANTEMPO_GUARD", "never")
    with pytest.raises(RequestError, match="'never'"):
        guard_mode(None)


def test_regions_are_sites_of_one_kind(subject: Subject) -> None:
    regions = regions_of(subject.plan)
    sites = [site for region in regions for site in region.sites]
    assert sorted(sites) == sorted(site.id for site in subject.plan.quantized())
    (attention,) = (region for region in regions if region.name == "transformer_blocks.*.attn1.to_q")
    assert {site.rpartition(".")[2] for site in attention.sites} == {"to_q", "to_k", "to_v"}
    assert {site.split(".")[1] for site in attention.sites} == {"0", "1"}


def test_a_restricted_plan_can_be_lowered_and_says_why(subject: Subject) -> None:
    gone = "transformer_blocks.1.attn1.to_k"
    owner = subject.plan.decisions[gone]
    assert isinstance(owner, Quantize), "the case that matters: the owner of a shared scale goes"
    shared = [name for name, d in subject.plan.decisions.items() if d == Share(gone)]
    assert len(shared) == 2
    left = frozenset(site.id for site in subject.plan.quantized()) - {gone}
    plan, table = restricted(subject.plan, subject.table, left, "too slow")
    assert plan.decisions[gone] == Keep("too slow")
    assert plan.decisions[shared[0]] == owner
    assert plan.decisions[shared[1]] == Share(shared[0])
    lowered = lower_ort.lower_ort(subject.graph, plan, table, subject.weights)
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in lowered.graph) == len(left)
    everything = frozenset(site.id for site in subject.plan.quantized())
    assert restricted(subject.plan, subject.table, everything, "")[0].decisions == subject.plan.decisions


def test_off_times_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "compare", lambda *_: pytest.fail("timed"))
    assert settle(subject, "off").records == ()


def test_a_planted_loser_is_recorded_and_said_but_nothing_changes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, "ff.net.2")
    monkeypatch.setattr(guarding, "candidates", lambda: ("ort",))
    with pytest.warns(SlowerThanFloat, match=r"on ort .*regions that lose: .*ff\.net\.2.*guard mode revert"):
        guarded = settle(subject, "record", QUICK)
    assert guarded.plan is subject.plan
    (record,) = guarded.records
    losing = {item.region for item in record.regions if item.loses}
    assert "transformer_blocks.*.ff.net.2" in losing
    assert {item.region for item in record.regions} == {region.name for region in regions_of(subject.plan)}


def test_revert_leaves_a_planted_loser_in_float(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float twin makes a longer detour, so that what is left of this tiny model still wins against it."""
    slowed(monkeypatch, "ff.net.2", rounds=40)
    monkeypatch.setattr(guarding, "candidates", lambda: ("ort",))
    real = for_ort.for_onnxruntime

    def slow_twin(model: ir.Model) -> ir.Model:
        made = real(model)
        _detour(made, next(site for site in subject.plan.sites if "ff.net.2" in site.id), 400)
        return made

    monkeypatch.setattr(for_ort, "for_onnxruntime", slow_twin)
    guarded = settle(subject, "revert", QUICK)
    assert guarded.plan.decisions == subject.plan.decisions, "what loses on one engine is taken from no other"
    assert set(guarded.plan.dialects) == {"ort-f32"}
    kept = set(guarded.plan.dialects["ort-f32"])
    reasons = {decision.reason for decision in guarded.plan.dialects["ort-f32"].values()}
    assert reasons == {"slower in integers than in float on ONNX Runtime, as timed on the compiling machine"}
    assert {"transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"} <= kept
    (record,) = guarded.records
    assert set(record.reverted) == kept
    assert record.verdict.wins
    left = {site.id for site in guarded.plan.for_graph("ort-f32").quantized()}
    everything = {site.id for site in subject.plan.quantized()}
    assert left, "what does not lose stays quantized"
    assert left == everything - kept
    choice = replace(subject.choice, names=("ort-f32", "portable-f32"))
    graphs = lower_graphs(subject.graph, guarded.plan, subject.table, subject.weights, choice)
    counts = {name: sum(n.op_type == "MatMulIntegerToFloat" for n in graph.graph) for name, graph in graphs.items()}
    assert counts["full.ort-f32"] == len(left)
    quantizers = {str(n.outputs[0].name) for n in graphs["full.portable-f32"].graph if n.op_type == "QuantizeLinear"}
    assert any("ff.net.2" in name for name in quantizers)


def test_where_everything_loses_the_compile_stops_with_advice(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only sites that the detour reaches are quantized, so that none can win by chance."""
    guilty = frozenset(site.id for site in subject.plan.quantized() if "ff.net.2" in site.id)
    plan, table = restricted(subject.plan, subject.table, guilty, "not part of the case")
    slowed(monkeypatch, "ff.net.2", rounds=240)
    monkeypatch.setattr(guarding, "candidates", lambda: ("ort",))
    warnings.simplefilter("ignore", SlowerThanFloat)  # pytest puts the filters back
    with pytest.raises(NoSites, match=r"(?s)slower in integers than in float, however.*--dtype float32"):
        settle(replace(subject, plan=plan, table=table), "revert", QUICK)


def test_a_compile_writes_the_verdict_beside_the_bundle(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "TIMING", Timing(rounds=1, warmup=1, sample_s=0.001))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerThanFloat)  # a model this small may well lose
        timed = compile_model(tiny_models.dit_pipeline(), tmp_path / "a", small, guard="record").bundle
    silent = compile_model(tiny_models.dit_pipeline(), tmp_path / "b", small, guard="off").bundle
    assert timed.digest == silent.digest, "a recorded verdict must not change the bundle"
    assert not (silent.root / "engines").exists()
    plan = load_plan(timed)
    assert plan is not None
    for name in guarding.candidates():
        target = guarding.TARGETS.get(name)
        if target is None:
            continue
        data = json.loads((timed.root / "engines" / target / "engine.json").read_text())
        assert set(data) <= set(GuardRecord.__dataclass_fields__)
        assert data["bundle"] == timed.digest
        assert data["verdict"]["candidate_ms"] > 0
        assert {region["region"] for region in data["regions"]} == {region.name for region in regions_of(plan)}
    read_bundle(timed.root)


def test_each_engine_is_judged_by_its_own_times(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one engine a region loses, on the other everything does, then the other way round; both are told apart."""
    monkeypatch.setattr(guarding, "candidates", lambda: ("ort", "openvino"))
    kinds = {"ort": "ort-f32", "openvino": "portable-f32"}
    whole = tuple(site.id for site in subject.plan.quantized())
    verdict = Verdict("float", "int8", "", "faster", 2.0, 1.0, 0.5, 0.01, ())

    for losers in ({"ort": whole[:2], "openvino": whole[2:4]}, {"ort": whole[:1], "openvino": whole}):

        def judge(maker: Any, mode: str, timing: Timing, losers: Any = losers) -> Any:
            return verdict, (), losers[maker._backend]

        monkeypatch.setattr(guarding, "_judge", judge)
        guarded = settle(subject, "revert", QUICK)
        assert guarded.plan.decisions == subject.plan.decisions
        wanted = {kinds[name]: set(sites) for name, sites in losers.items() if sites != whole}
        assert {kind: set(kept) for kind, kept in guarded.plan.dialects.items()} == wanted
        assert [record.target for record in guarded.records] == ["cpu", "openvino"]
    monkeypatch.setattr(guarding, "_judge", lambda *_: (verdict, (), whole))
    with pytest.raises(NoSites, match="gains on ONNX Runtime or OpenVINO"):
        settle(subject, "revert", QUICK)
