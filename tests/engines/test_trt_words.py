"""What TensorRT says becomes five parts: memory, number formats, parser refusals, deaths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantempo.engines.onnx_graph import OnnxGraph
from quantempo.engines.onnx_reader import read_graph
from quantempo.engines.trt_words import (
    ParserError,
    Tactics,
    build_failure,
    count_tactics,
    died,
    parser_refusal,
    skipped_notice,
)

CONTRACT = Path(__file__).parents[1] / "conformance" / "contract.onnx"
LOG = [
    "Tactic: 0x0000000000000001 Time: 0.0123",
    "Tactic Name: sm80_xmma Tactic: 0x0000000000000002 Time: 0.0456",
    "Skipping tactic 0x0000000000000003 due to insufficient memory on requested size of 1073741824",
    "Tactic Device request: 3000MB Available: 900MB. Device memory is insufficient to use tactic.",
    "Total Weights Memory: 12 bytes",
]


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    return read_graph(CONTRACT)


def test_tactics_are_counted_in_the_log() -> None:
    assert count_tactics(LOG) == Tactics(tried=2, skipped=2)
    assert str(count_tactics(LOG)) == "2 of 4 tactics skipped"


def test_skipped_tactics_are_explained_when_the_build_went_well() -> None:
    text = skipped_notice("full", count_tactics(LOG), "512 MiB")
    assert text is not None
    assert "2 of 4 tactics skipped: they need more scratch memory than the limit of 512 MiB" in text
    assert "may be slower" in text
    assert skipped_notice("full", Tactics(5, 0), "") is None


@pytest.mark.parametrize(
    "said", ["no tactics to implement the operation within workspace limit", "Error Code 2: OutOfMemory (no memory)",
             "Could not find any implementation for node X due to insufficient workspace", "std::bad_alloc"],
)  # fmt: skip
def test_no_room_left_is_explained(said: str) -> None:
    error = build_failure("full", ["first", said], count_tactics(LOG), memory="512 MiB", capability="8.7")
    assert "no room to compute some layer (2 of 4 tactics skipped)" in error.found
    assert error.wanted == "more memory than 512 MiB"
    assert "raise --memory" in error.remedy
    assert "--shapes" in error.remedy


def test_a_number_format_that_the_gpu_lacks_is_named() -> None:
    line = "Networks with HW-specific datatypes: fp8_e4m3 are not supported on this device"
    error = build_failure("full", [line], Tactics(), memory="", capability="8.6")
    assert error.found.startswith("values of type fp8_e4m3")
    assert "FP8 needs capability 8.9" in error.cause


@pytest.mark.parametrize(
    "said",
    ["graph_jit.cpp: CHECK(status == CUDA_SUCCESS) failed",
     # TensorRT for RTX 1.4, which builds on a device alone.
     "[checkMacros.cpp::catchCudaError::229] Error Code 1: Cuda Runtime (In catchCudaError)"],
)  # fmt: skip
def test_a_missing_device_points_to_what_works_without_one(said: str) -> None:
    error = build_failure("full", [said], Tactics(), memory="", capability="8.9")
    assert "no usable GPU" in error.found
    assert "from version 1.5 on" in error.cause
    assert "--weights bundle" in error.remedy


def test_anything_else_is_quoted() -> None:
    error = build_failure("full", ["something new"], Tactics(), memory="", capability="8.9")
    assert "something new" in error.found


def test_a_parser_refusal_names_node_and_module(graph: OnnxGraph) -> None:
    node = replace(graph.nodes[0], name="blocks.0.ff.in/product")
    graph = replace(graph, nodes=(node, *graph.nodes[1:]))
    error = parser_refusal("full", [ParserError("No importer", node.name, node.op_type), ParserError("x")], graph)
    assert repr(node.name) in error.found
    assert "Gather at node 'blocks.0.ff.in/product' of module 'blocks.0.ff.in'" in error.found
    assert "No importer (and 1 more)" in error.found
    assert "a node without a name" in parser_refusal("full", [ParserError("bad")], graph).found


def test_a_killed_builder_is_told_apart_from_an_aborted_one() -> None:
    assert "ran out of memory" in died("full", -9, "").cause
    aborted = died("full", -6, "terminate called")
    assert "signal 6: terminate called" in aborted.found
    assert "parser abort" in aborted.remedy
