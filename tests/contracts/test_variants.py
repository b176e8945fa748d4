"""What check_variants refuses is tested where it protects: tests/runtime/test_feature_cache.py and test_bundle.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.program import LATENTS, Call, Decide, StepProgram
from quantempo.contracts.tensors import TensorSpec
from quantempo.contracts.variants import Variant, check_variants, is_cached, runs_of, variants_of
from quantempo.errors import DataError

VARIANTS = {
    "full": Variant(("sample",), ("prediction", "a", "b"), writes=("a", "b")),
    "early": Variant(("sample", "a"), ("prediction", "b"), reads=("a",), writes=("b",)),
    "late": Variant(("sample", "b"), ("prediction",), reads=("b",)),
    "head": Variant(("sample",), ("indicator", "h"), writes=("h",)),
    "tail": Variant(("h",), ("prediction", "b"), reads=("h",), writes=("b",)),
    "short": Variant(("h", "b"), ("prediction",), reads=("h", "b")),
}


def program(*calls: str | tuple[str, Decide]) -> StepProgram:
    made = []
    for step, call in enumerate(calls):
        graph, decide = (call, None) if isinstance(call, str) else call
        made.append(Call(1.0, {"sample": ((LATENTS, 1.0),)}, (), step, graph=graph, decide=decide))
    return StepProgram("Example", len(made), tuple(made))


def check(made: StepProgram) -> None:
    check_variants(made, VARIANTS, {}, 4, "p")


def test_an_entry_of_the_manifest_says_what_a_variant_exchanges() -> None:
    spec, feature = TensorSpec("sample", "float32", ("batch",)), TensorSpec("a", "float32", ("batch",))
    entry = GraphEntry("g", (), "late", "ort", "float32", (spec, feature), (spec,), reads=("a",))
    assert Variant.of(entry) == Variant(("sample", "a"), ("sample",), reads=("a",))


def test_variants_come_in_the_order_of_their_first_run() -> None:
    made = program("full", "late", ("short", Decide("head", 0.1, refresh="tail")), "full")
    assert variants_of(made) == ("full", "late", "head", "tail", "short")
    assert runs_of(made.calls[2]) == ("head", "tail", "short")


def test_a_program_is_cached_where_a_call_may_reuse() -> None:
    assert not is_cached(program("full", "full"), VARIANTS)
    assert is_cached(program("full", "late"), VARIANTS)
    assert is_cached(program(("full", Decide("head", 0.0))), VARIANTS)
    assert not is_cached(program("elsewhere"), VARIANTS)


def test_what_was_written_stays_until_it_is_read() -> None:
    check(program("full", "full", "early", "late", "late"))


def test_a_probe_may_hand_its_own_features_to_the_variants_of_its_call() -> None:
    check(program(("short", Decide("head", 0.1, refresh="tail")), ("short", Decide("head", 0.1, refresh="tail"))))


def test_a_row_may_only_reuse_what_its_own_refresh_writes() -> None:
    """`full` wrote `a` before, but rows that refresh later by `tail` would have an older `a` than `b`."""
    with pytest.raises(DataError, match="call 1: found graph 'early', which reuses feature 'a', which nothing wrote"):
        check(program("full", ("early", Decide("head", 0.1, refresh="tail"))))


def test_a_vector_that_a_refreshing_variant_takes_must_be_there_too() -> None:
    variants = {**VARIANTS, "full": replace(VARIANTS["full"], inputs=("sample", "gain"))}
    with pytest.raises(DataError, match="call 0: found no vector for input 'gain' of graph 'late'"):
        check_variants(
            program(("late", Decide("head", 0.1))), variants, {"gain": np.ones((1, 4), np.float32)}, 4, "p"
        )
