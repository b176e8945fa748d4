from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from quantempo.calib.cache.schedules import cost_of, every
from quantempo.calib.trajectories import FIRST_SEED
from quantempo.contracts.cache import FULL, DeltaCut, FeatureCut, SublayerCut, check_cache_plan
from quantempo.contracts.program import LATENTS, Correct, check_program
from quantempo.contracts.variants import Variant, check_variants
from quantempo.errors import ExportError, RequestError
from quantempo.export.weights import quantize_weights
from quantempo.pipeline import (
    calibrate,
    calibration_programs,
    export_model,
    float_view,
    open_model,
    open_store,
    plan_stage,
    scale_table,
)
from quantempo.progress import SilentProgress
from quantempo.recipe import Recipe
from quantempo.stages import cache_schedules
from quantempo.stages.cache_runs import (
    CacheParts,
    CacheSettings,
    VariantBench,
    check_batches,
    fitting_batches,
    program_batches,
)
from quantempo.stages.cache_schedules import ScheduleSearch, WholeRuns, closest_costs, reuse_errors
from quantempo.stages.caching import CacheFit, fit_cache, parse_policy
from quantempo.stages.dynamic_caching import fit_dynamic, parse_dynamic

CUT = DeltaCut(1, 1, 2)
STEPS = 4


@pytest.fixture(scope="module")
def parts(small: Recipe) -> Iterator[CacheParts]:
    """The tiny DiT, quantized, in memory."""
    opened = open_model(tiny_models.dit_pipeline(), None, small, {})
    recipe = opened.recipe
    with open_store(None, SilentProgress()) as store:
        exported = export_model(opened, store)
        plan, _ = plan_stage(store, exported, recipe, None)
        view = float_view(exported, recipe)
        programs = calibration_programs(recipe, exported.program)
        statistics = calibrate(view, plan, recipe, programs=programs).statistics
        table = scale_table(statistics, plan, recipe.groups, recipe.range_method)
        weights = quantize_weights(exported.graph, plan, "mse")
        yield CacheParts(exported, plan, table, weights, statistics, view.manifest, recipe, {})


def settings(policy: str = "every:2", **more: object) -> CacheSettings:
    return CacheSettings(policy, CUT, **{"samples": 8, "batch": 4, "checks": 4, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fit(parts: CacheParts, tmp_path_factory: pytest.TempPathFactory) -> CacheFit:
    return fit_cache(parts, settings(), tmp_path_factory.mktemp("fit"))


def test_artefacts_fit_each_other(parts: CacheParts, fit: CacheFit, tmp_path: Path) -> None:
    check_cache_plan(fit.plan, "test")
    program = fit.programs[STEPS]
    check_program(program, "test")
    bench = VariantBench(parts, tmp_path, fit.plan.cuts)
    bench.quantize(fit.tables)
    loop = bench.loop("quantized", fit.vectors)
    loop.check(program)
    bench.close()
    assert [call.graph for call in program.calls] == list(fit.plan.schedules[str(STEPS)].calls)
    assert [call.graph for call in program.calls] == [FULL, "reuse.0"] * 2
    assert {len(values) for values in fit.vectors.values()} == {STEPS}


def test_several_step_counts_share_the_vectors_file(parts: CacheParts, tmp_path: Path) -> None:
    found = fit_cache(parts, settings(samples=4), tmp_path, (3, 4))
    assert {len(values) for values in found.vectors.values()} == {7}
    variants = {
        name: Variant(("sample", *v.vectors, *v.reads), ("prediction", *v.writes), v.reads, v.writes)
        for name, v in _variants(parts, tmp_path).items()
    }
    for steps, program in found.programs.items():
        check_variants(program, variants, found.vectors, 4, f"{steps} steps")
    rows = [row for call in found.programs[4].calls for row in call.vectors.values()]
    assert min(rows) == 3 + 1  # call 1 of the second program, after the three rows of the first
    for fit in found.fits.values():
        for name, values in fit.vectors.items():
            row = found.plan.schedules[str(fit.program.steps)].row
            np.testing.assert_array_equal(found.vectors[name][row : row + len(values)], values)


def _variants(parts: CacheParts, folder: Path):  # type: ignore[no-untyped-def]
    bench = VariantBench(parts, folder / "again", {"reuse.0": CUT})
    bench.close()
    return bench.set.variants


def test_interval_one_never_reuses_and_equals_the_uncached_run_bit_for_bit(parts: CacheParts, tmp_path: Path) -> None:
    found = fit_cache(parts, settings("every:1", corrections=("feature",)), tmp_path / "a")
    bench = VariantBench(parts, tmp_path / "b", found.plan.cuts)
    bench.quantize(found.tables)
    loop = bench.loop("quantized", found.vectors)
    batch = fitting_batches(settings(), STEPS, 10)[0]
    cached = bench.run(loop, found.programs[STEPS], batch)
    plain = bench.run(loop, parts.exported.program(STEPS), batch)
    np.testing.assert_array_equal(cached, plain)
    bench.close()


def test_corrections_lower_the_held_out_error_of_each_call(fit: CacheFit) -> None:
    found = fit.fits[STEPS].found
    assert set(found) <= {"cache.0", "prediction", "latents"}
    for correction in found.values():
        assert np.all(correction.after <= correction.before)
    features = found["cache.0"]
    assert features.identity(0)  # a refresh has nothing to correct
    assert features.before[1] > features.after[1] > 0
    ops = [op for call in fit.programs[STEPS].calls for op in call.update if isinstance(op, Correct)]
    assert {op.to for op in ops} <= {"prediction", LATENTS}


def test_corrections_are_kept_only_where_held_out_runs_end_closer_to_the_float_model(
    parts: CacheParts, fit: CacheFit, tmp_path: Path
) -> None:
    errors = fit.fits[STEPS].errors
    assert [name for name, _ in errors] == ["none", "feature", "history", "prediction", "latents"]
    bench = VariantBench(parts, tmp_path, fit.plan.cuts)
    bench.quantize(fit.tables)
    plain = parts.exported.program(STEPS)
    squares = []
    for batch in check_batches(bench, settings(), plain):
        wanted = bench.run(bench.loop("float", bench.identity_vectors(STEPS)), plain, batch)
        made = bench.run(bench.loop("quantized", fit.vectors), fit.programs[STEPS], batch)
        squares.append((made.astype(np.float64) - wanted) ** 2)
    bench.close()
    assert np.concatenate(squares).mean() == pytest.approx(min(error for _, error in errors), rel=1e-9)


def test_seeds_of_fit_check_and_calibration_are_disjoint(parts: CacheParts, tmp_path: Path) -> None:
    bench = VariantBench(parts, tmp_path, {"reuse.0": CUT})
    bench.close()
    plain = parts.exported.program(STEPS)
    sets = [{seed for batch in make(bench, settings(), plain) for seed in batch.seeds}
            for make in (check_batches, program_batches)]  # fmt: skip
    assert not sets[0] & sets[1]
    assert min(sets[0] | sets[1]) > FIRST_SEED + parts.recipe.samples


def test_noise_floor_is_in_the_report_with_its_inputs(fit: CacheFit) -> None:
    floor = fit.report["steps"][str(STEPS)]["noise_floor"]["cache.0"]
    assert [(entry["call"], entry["refresh"]) for entry in floor["entries"]] == [(1, 0), (3, 2)]
    for entry in floor["entries"]:
        assert 0 < entry["noise"] < 0.1
        assert entry["change"] > 0


def test_fits_are_deterministic(parts: CacheParts, fit: CacheFit, tmp_path: Path) -> None:
    again = fit_cache(parts, settings(), tmp_path)
    assert again.plan == fit.plan
    assert again.programs == fit.programs
    for name, values in fit.vectors.items():
        np.testing.assert_array_equal(again.vectors[name], values)


@pytest.mark.parametrize("policy", ["teacache:0.3", "firstblock:0.3"])
def test_decisions_at_run_time_skip_about_what_was_asked_for(
    parts: CacheParts, tmp_path: Path, policy: str
) -> None:
    asked = settings(policy, guidance=1.0)
    found = fit_dynamic(parts, asked, tmp_path / "a", (8,) if 8 in parts.exported.programs else (6,))
    (steps, program), = found.programs.items()
    check_program(program, "test")
    assert found.report[str(steps)]["skipped"] >= 0.3
    bench = VariantBench(parts, tmp_path / "b", found.plan.cuts, correct_features=False, probe=found.plan.probe)
    bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
    loop = bench.loop("quantized", {})
    seen: list[str] = []
    batches = fitting_batches(asked, steps, 10)
    for batch in batches:
        bench.run(loop, program, batch, lambda call, outputs: seen.extend([call.graph] * len(call.samples)))
    bench.close()
    reused = seen.count("reuse.0") / (steps * 8)
    # Decisions were replayed on uncached runs; the cached ones wander off a little.
    assert abs(reused - found.report[str(steps)]["skipped"]) < 0.3
    assert seen.count("probe") == (steps - 1) * 8


@pytest.mark.parametrize("corrected", [False, True])
def test_a_programmed_schedule_beats_even_spacing_on_held_out_runs_or_is_even(
    parts: CacheParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    monkeypatch.setattr(cache_schedules, "SEARCH_RUNS", 6)
    given, program = settings(samples=12, checks=8), parts.exported.program(STEPS)
    bench, even = VariantBench(parts, tmp_path, {"reuse.0": CUT}), every(STEPS, 2)
    found = ScheduleSearch(bench, given, program).schedule("programmed", 2, corrected)
    assert len(found) == len(even)
    history = reuse_errors(bench, given, program, 2).history if corrected else None
    judge = WholeRuns(bench, program, check_batches(bench, given, program), history)
    assert found == even or judge.error(found).mean() < judge.error(even).mean()
    bench.quantize_plainly()
    with monkeypatch.context() as patch:  # where held-out runs do not agree, nothing that was found is taken
        patch.setattr(cache_schedules, "clearly_lower", lambda one, other: False)
        assert ScheduleSearch(bench, given, program).schedule("programmed", 2, corrected) == even
    bench.close()


def test_the_costs_that_went_with_the_measurements_guide_the_search() -> None:
    calls = 6
    right, wrong = (np.full((calls + 1, calls + 1), np.inf) for _ in range(2))
    for a in range(calls):
        for b in range(a + 1, calls + 1):
            right[a, b], wrong[a, b] = (b - a) ** 2 * (1 + a), (b - a) ** 2 * (calls - a)
    schedules = [(0, 1, 2), (0, 2, 4), (0, 3, 5), (0, 4, 5)]
    measured = {schedule: 1e-3 * cost_of(right, schedule) for schedule in schedules}
    assert closest_costs([wrong, right], measured) is right
    assert closest_costs([right, wrong], measured) is right


def test_words_that_are_no_policy_are_refused() -> None:
    assert parse_policy("programmed:3") == ("programmed", 3)
    assert parse_dynamic("teacache:0.25") == ("teacache", 0.25)
    for text in ("evry:2", "every", "every:0", "every:two"):
        with pytest.raises(RequestError, match="every:N"):
            parse_policy(text)
    for text in ("teacache:1.5", "teacache", "tea:0.5"):
        with pytest.raises(RequestError, match="teacache:SHARE"):
            parse_dynamic(text)


@pytest.mark.parametrize(
    ("cut", "words"),
    [(DeltaCut(0, 0, 5), "5 blocks"), (FeatureCut(("nowhere",)), "nowhere"),
     (SublayerCut(((True, True),) * 3), "3 blocks")],
)  # fmt: skip
def test_cuts_that_do_not_fit_are_refused(
    parts: CacheParts, tmp_path: Path, cut: DeltaCut | FeatureCut | SublayerCut, words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        fit_cache(parts, CacheSettings("every:2", cut), tmp_path)
