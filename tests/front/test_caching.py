from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from diffusers import DDPMScheduler
from support import tiny_models

from quantempo.calib.cache.history import correct_by_history
from quantempo.calib.cache.program_rows import (
    LATENTS_VECTORS,
    PREDICTION_VECTORS,
    correct_latents,
    correct_prediction,
    latent_coefficients,
)
from quantempo.calib.cache.schedules import cost_of, every, sum_of_costs
from quantempo.calib.trajectories import FIRST_SEED
from quantempo.contracts.cache import FULL, DeltaCut, FeatureCut, SublayerCut, check_cache_plan
from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.contracts.program import LATENTS, Correct, check_program
from quantempo.contracts.variants import Variant, check_variants
from quantempo.errors import ExportError, RequestError
from quantempo.export.sampler import trace_program
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
from quantempo.stages.cache_corrections import fit_corrections, with_noise_absorbed
from quantempo.stages.cache_runs import (
    CacheParts,
    CacheSettings,
    VariantBench,
    check_batches,
    fitting_batches,
    graph_corrections,
    program_batches,
)
from quantempo.stages.cache_schedules import (
    ScheduleSearch,
    WholeRuns,
    closest_costs,
    feature_changes,
    judged,
    scheduled,
    search_batches,
)
from quantempo.stages.caching import CacheFit, fit_cache, parse_policy
from quantempo.stages.closed_loop import (
    closed_loop_batch,
    fit_history,
    fit_latents,
    fit_prediction,
    reference_of,
)
from quantempo.stages.dialects import lower_graphs
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


def _bench(parts: CacheParts, folder: Path, fit: CacheFit) -> VariantBench:
    bench = VariantBench(parts, folder, fit.plan.cuts, graph_corrections(fit.plan.corrections))
    bench.quantize(fit.tables)
    return bench


def test_artefacts_fit_each_other(parts: CacheParts, fit: CacheFit, tmp_path: Path) -> None:
    check_cache_plan(fit.plan, "test")
    program = fit.programs[STEPS]
    check_program(program, "test")
    bench = _bench(parts, tmp_path, fit)
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


SUBLAYERS = SublayerCut(((True, True),) * 2)


@pytest.mark.parametrize("cut", [CUT, SUBLAYERS])
def test_a_plan_that_never_reuses_is_the_plain_run_of_the_uncut_graph(
    parts: CacheParts, tmp_path: Path, cut: DeltaCut | SublayerCut
) -> None:
    asked = CacheSettings("every:1", cut, ("history",), samples=4, batch=4, checks=4)
    found = fit_cache(parts, asked, tmp_path / "fit")
    assert [call.graph for call in found.programs[STEPS].calls] == [FULL] * STEPS
    assert found.fits[STEPS].history is None  # there is nothing to correct
    batch = fitting_batches(asked, STEPS, 10)[0]
    runs = []
    for name, cuts, program in (("cut", {"reuse.0": cut}, found.programs[STEPS]),
                                ("uncut", {}, parts.exported.program(STEPS))):  # fmt: skip
        bench = VariantBench(parts, tmp_path / name, cuts, ())
        bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
        runs.append(bench.run(bench.loop("quantized", {}), program, batch))
        bench.close()
    # Where inner values are outputs ONNX Runtime fuses less, which rounds differently; the arithmetic is the same.
    assert np.square(runs[0] - runs[1]).mean() < 1e-9 * np.square(runs[1]).mean()


@pytest.fixture(scope="module")
def bench(parts: CacheParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VariantBench]:
    made = VariantBench(parts, tmp_path_factory.mktemp("bench"), {"reuse.0": SUBLAYERS}, ())
    made.quantize_plainly()
    yield made
    made.close()


def test_what_a_closed_loop_fits_is_what_the_finished_program_does(bench: VariantBench) -> None:
    """The runs that it was fitted on end where the program with its corrections ends, bit for bit."""
    plain, refreshes = bench.parts.exported.program(STEPS), every(STEPS, 2)
    reference = reference_of(bench, plain, closed_loop_batch(bench, settings(), plain))
    program, vectors = scheduled(bench, plain, refreshes), bench.identity_vectors(STEPS)
    history, made = fit_history(bench, program, vectors, refreshes, reference)
    assert history.kept > 0
    program = correct_by_history(program, history, refreshes)
    np.testing.assert_array_equal(bench.run(bench.loop("quantized", vectors), program, reference.batch), made)
    prediction, made = fit_prediction(bench, program, vectors, reference)
    assert prediction.kept > 0
    program = correct_prediction(program, prediction)
    vectors = {**vectors, **dict(zip(PREDICTION_VECTORS, (prediction.gain, prediction.bias), strict=True))}
    np.testing.assert_array_equal(bench.run(bench.loop("quantized", vectors), program, reference.batch), made)
    latents, made = fit_latents(bench, program, vectors, reference)
    program = correct_latents(program, latents)
    vectors = {**vectors, **dict(zip(LATENTS_VECTORS, (latents.gain, latents.bias), strict=True))}
    np.testing.assert_array_equal(bench.run(bench.loop("quantized", vectors), program, reference.batch), made)


def test_a_closed_loop_lowers_the_error_of_the_runs_that_it_is_fitted_on(bench: VariantBench) -> None:
    plain, refreshes = bench.parts.exported.program(STEPS), (0, 2)
    reference = reference_of(bench, plain, closed_loop_batch(bench, settings(), plain))
    program, vectors = scheduled(bench, plain, refreshes), bench.identity_vectors(STEPS)
    naive = bench.run(bench.loop("quantized", vectors), program, reference.batch)
    _, made = fit_history(bench, program, vectors, refreshes, reference)
    errors = [float(np.square(x - reference.final).mean()) for x in (naive, made)]
    assert errors[1] < errors[0]
    _, bound = fit_history(bench, program, vectors, refreshes, reference, dict.fromkeys(range(STEPS), 0))
    assert errors[1] < float(np.square(bound - reference.final).mean()) < errors[0]


def test_without_quantization_and_cache_nothing_is_corrected(
    bench: VariantBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed loop over the float model's own run: every correction is the identity, exactly."""
    loop = bench.loop
    monkeypatch.setattr(bench, "loop", lambda mode, vectors: loop("float", vectors))
    plain = bench.parts.exported.program(STEPS)
    reference = reference_of(bench, plain, closed_loop_batch(bench, settings(), plain))
    history, _ = fit_history(bench, plain, {}, tuple(range(STEPS)), reference)
    assert history.kept == 0
    for fit in (fit_prediction, fit_latents):
        correction, final = fit(bench, plain, {}, reference)
        assert correction.kept == 0
        np.testing.assert_array_equal(final, reference.final)


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
    assert [name for name, _ in errors] == ["none", "feature", "history", "prediction", "latents"]  # no noise to absorb
    bench = _bench(parts, tmp_path, fit)
    plain = parts.exported.program(STEPS)
    squares = []
    for batch in check_batches(bench, settings(), plain):
        wanted = bench.run(bench.loop("float", bench.identity_vectors(STEPS)), plain, batch)
        made = bench.run(bench.loop("quantized", fit.vectors), fit.programs[STEPS], batch)
        squares.append((made.astype(np.float64) - wanted) ** 2)
    bench.close()
    kept = ("none", *fit.fits[STEPS].kept)
    assert np.concatenate(squares).mean() == pytest.approx(dict(errors)[kept[-1]], rel=1e-9)
    lowered = [dict(errors)[name] for name in kept]
    assert lowered == sorted(lowered, reverse=True)


def test_what_is_fitted_on_keeps_in_float_what_the_graph_of_the_engine_does(parts: CacheParts, tmp_path: Path) -> None:
    """As `--guard revert` leaves a plan: the bench runs the graph that the bundle will hold."""
    site = next(site.id for site in parts.plan.quantized() if site.id.endswith("ff.net.2"))
    plan = replace(parts.plan, dialects={"ort-f32": {site: Keep("slower on it")}})
    reverted = VariantBench(replace(parts, plan=plan), tmp_path, {"reuse.0": SUBLAYERS}, ())
    reverted.quantize_plainly()
    reverted.close()
    (written,) = tmp_path.glob("quantized.*/full.onnx")
    full = reverted.set.variants[FULL].graph

    def operators(graph: ir.Model) -> list[tuple[str, str]]:
        return [(node.op_type, str(node.outputs[0].name)) for node in graph.graph]

    def lowered(plan: QuantPlan) -> ir.Model:
        return lower_graphs(full, plan, parts.table, parts.weights, ("ort-f32",))["full.ort-f32"]

    assert operators(ir.load(written)) == operators(lowered(plan)) != operators(lowered(parts.plan))


def test_noise_of_the_sampler_takes_in_quantization_noise_where_it_adds_any(bench: VariantBench) -> None:
    """DDPM on the same model: absorption is a candidate, and the call that adds no noise is left alone."""
    plain = trace_program(DDPMScheduler(clip_sample=False), STEPS)
    cached = scheduled(bench, plain, every(STEPS, 2))
    asked = settings(corrections=("prediction", "noise", "latents"))
    fit = fit_corrections(bench, asked, plain, cached, every(STEPS, 2))
    assert [name for name, _ in fit.errors] == ["none", "prediction", "noise", "latents"]
    absorbed, shares = with_noise_absorbed(bench, settings(), replace(fit, program=cached))
    assert all(0 < share < 1 for share in shares[:-1])
    assert shares[-1] == 0
    coefficients = [latent_coefficients(call)[1] for call in absorbed.program.calls]
    for call, share, noise in zip(cached.calls, shares, coefficients, strict=True):
        wanted = {name: c * (1 - share) ** 0.5 for name, c in latent_coefficients(call)[1].items()}
        assert noise == pytest.approx(wanted)


def test_seeds_of_fit_check_and_calibration_are_disjoint(parts: CacheParts, tmp_path: Path) -> None:
    bench = VariantBench(parts, tmp_path, {"reuse.0": CUT})
    bench.close()
    plain = parts.exported.program(STEPS)
    sets = [{seed for batch in make(bench, settings(), plain) for seed in batch.seeds}
            for make in (check_batches, program_batches)]  # fmt: skip
    assert not sets[0] & sets[1]
    assert min(sets[0] | sets[1]) > FIRST_SEED + parts.recipe.samples


def test_noise_floor_is_in_the_report_with_its_inputs_and_decides(fit: CacheFit) -> None:
    floor = fit.report["steps"][str(STEPS)]["noise_floor"]
    assert [(entry["call"], entry["refresh"]) for entry in floor["entries"]] == [(1, 0), (3, 2)]
    for entry in floor["entries"]:
        assert 0 < entry["noise"] < 0.1
        assert entry["change"] > 0
        assert entry["order"] == int(entry["change"] > entry["noise"])


def test_fits_are_deterministic(parts: CacheParts, fit: CacheFit, tmp_path: Path) -> None:
    again = fit_cache(parts, settings(), tmp_path)
    assert again.plan == fit.plan
    assert again.programs == fit.programs
    for name, values in fit.vectors.items():
        np.testing.assert_array_equal(again.vectors[name], values)


def test_warm_up_and_cap_are_kept_while_it_runs(parts: CacheParts, tmp_path: Path) -> None:
    asked = settings("firstblock:0.3,warmup=3,cap=2", guidance=1.0)
    found = fit_dynamic(parts, asked, tmp_path / "a", (6,))
    program = found.programs[6]
    assert [call.decide is None for call in program.calls] == [True, True, False, False, False, False]
    # As if nothing ever moved: what then refreshes is warm-up and cap alone.
    still = [c if c.decide is None else replace(c, decide=replace(c.decide, threshold=1e9)) for c in program.calls]
    bench = VariantBench(parts, tmp_path / "b", found.plan.cuts, (), found.plan.probe)
    bench.quantize_plainly()
    seen: list[str] = []
    bench.run(
        bench.loop("quantized", {}), replace(program, calls=tuple(still)), fitting_batches(asked, 6, 10)[0],
        lambda call, outputs: seen.append(call.graph),
    )
    bench.close()
    facts = found.report["steps"]["6"]
    cap = min(2, facts["floor_cap"])  # the noise floor may allow less than the policy asks for
    assert facts["max_consecutive"] == cap
    wanted = [FULL] * 3 + (["reuse.0"] * cap + [FULL]) * 2
    assert [name for name in seen if name != "probe"] == wanted[:6]


@pytest.mark.parametrize("policy", ["teacache:0.3", "firstblock:0.3"])
def test_decisions_at_run_time_skip_about_what_was_asked_for(
    parts: CacheParts, tmp_path: Path, policy: str
) -> None:
    asked = settings(policy, guidance=1.0)
    found = fit_dynamic(parts, asked, tmp_path / "a", (8,) if 8 in parts.exported.programs else (6,))
    (steps, program), = found.programs.items()
    check_program(program, "test")
    assert found.report["steps"][str(steps)]["skipped"] >= 0.3
    bench = VariantBench(parts, tmp_path / "b", found.plan.cuts, (), found.plan.probe)
    bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
    loop = bench.loop("quantized", {})
    seen: list[str] = []
    batches = fitting_batches(asked, steps, 10)
    for batch in batches:
        bench.run(loop, program, batch, lambda call, outputs: seen.extend([call.graph] * len(call.samples)))
    bench.close()
    reused = seen.count("reuse.0") / (steps * 8)
    # Decisions were replayed on uncached runs; the cached ones wander off a little.
    assert abs(reused - found.report["steps"][str(steps)]["skipped"]) < 0.3
    assert seen.count("probe") == (steps - 1) * 8


class _Told:
    """Stands for whole runs: the search sees one schedule as the best, held-out runs see it as told."""

    best = (0, 3)
    agree = True

    def __init__(self, *given: object) -> None:
        self.held_out = False

    def lowest(self, count: int) -> list[tuple[int, ...]]:
        return [self.best, (0, 2)]

    def on(self, batches: object) -> _Told:
        other = _Told()
        other.held_out = True
        return other

    def error(self, refreshes: tuple[int, ...]) -> np.ndarray:
        good = refreshes == self.best if self.agree or not self.held_out else refreshes != self.best
        return np.full(4, 1.0 if good else 2.0 + abs(refreshes[1] - self.best[1]))


@pytest.mark.parametrize("best", [(0, 1), (0, 3)])
def test_a_programmed_schedule_is_taken_only_where_held_out_runs_agree(
    bench: VariantBench, monkeypatch: pytest.MonkeyPatch, best: tuple[int, int]
) -> None:
    monkeypatch.setattr(cache_schedules, "WholeRuns", _Told)
    monkeypatch.setattr(_Told, "best", best)
    given = settings(samples=8, checks=4)
    search = ScheduleSearch(bench, given, bench.parts.exported.program(STEPS))
    monkeypatch.setattr(_Told, "agree", True)
    assert search.schedule("programmed", 2) == best
    monkeypatch.setattr(_Told, "agree", False)
    assert search.schedule("programmed", 2) == every(STEPS, 2)


def test_means_decide_before_decibels_and_only_among_what_came_before_even_spacing() -> None:
    even, heavy, light, after = (0, 2), (0, 1), (0, 3), (0, 4)
    errors = {
        even: np.full(8, 1.0), heavy: np.array([0.1] * 7 + [20.0]), light: np.full(8, 0.9), after: np.full(8, 0.1)
    }
    assert judged(even, (heavy, light, even, after), errors.__getitem__) == light
    assert judged(even, (heavy, even, light), errors.__getitem__) == heavy
    assert judged(even, (even, light), errors.__getitem__) == even


@pytest.mark.parametrize("corrected", [False, True])
def test_whole_runs_measure_what_a_run_ends_with(bench: VariantBench, corrected: bool) -> None:
    plain = bench.parts.exported.program(STEPS)
    batch = search_batches(bench, settings(), plain)
    runs = WholeRuns(bench, plain, batch, corrected)
    held = runs.on(check_batches(bench, settings(), plain))
    wanted = bench.run(bench.loop("float", {}), plain, batch[0])
    made = bench.run(bench.loop("quantized", {}), runs.program((0, 2)), batch[0])
    errors = np.square(made.astype(np.float64) - wanted).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(runs.error((0, 2)), errors, rtol=1e-6)
    assert held.program((0, 2)) is runs.program((0, 2))  # held-out runs take no part in the fit
    assert not np.allclose(held.error((0, 2)), errors[:1])
    assert np.all(runs.error((0, 1, 2, 3)) < runs.error((0, 2)))


def test_the_schedule_of_the_publication_has_the_least_change_of_features(bench: VariantBench) -> None:
    search = ScheduleSearch(bench, settings(), bench.parts.exported.program(STEPS))
    found = search.schedule("dps", 2)
    changes = feature_changes(bench, settings(), bench.parts.exported.program(STEPS), 4)
    costs = sum_of_costs(changes.values())
    assert cost_of(costs, found) == min(cost_of(costs, (0, second)) for second in (1, 2, 3))


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
    assert parse_dynamic("teacache:0.25") == ("teacache", 0.25, 2, 4)
    assert parse_dynamic("firstblock:0.5,cap=6,warmup=3") == ("firstblock", 0.5, 3, 6)
    for text in ("teacache:0.5,cap", "teacache:0.5,cap=0", "teacache:0.5,warmup=1", "teacache:0.5,cap=2,cap=3"):
        with pytest.raises(RequestError, match="warmup=CALLS of at least 2, or cap=CALLS"):
            parse_dynamic(text)
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
