"""Feature caching as a stage of a compile: what is asked for, and what a bundle gets.

`quantempo.stages.caching`, `mask_caching` and `dynamic_caching` do the fitting, `cache_search` chooses for `auto`.
Here their results are kept in the stage store, and the variants are lowered for every float32 graph of the bundle with
the same weights as `full`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantempo.contracts.cache import FULL, PROBE, CachePlan, Cut
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json, to_data
from quantempo.contracts.manifest import CacheIndex, Manifest
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensor_file import map_tensors, write_tensors
from quantempo.errors import RequestError, nearest
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.runtime.bundle_cache import CACHE, CORRECTIONS
from quantempo.runtime.bundle_writer import BundleWriter
from quantempo.stages import caching, dynamic_caching, mask_caching
from quantempo.stages.cache_cuts import NONE, CacheGraphs, check_cut_words
from quantempo.stages.cache_runs import CacheParts, CacheSettings, Float32s, fitted_corrections
from quantempo.stages.cache_search import AUTO, Budget, search
from quantempo.stages.conditioning import arrays_digest, deal_labels
from quantempo.stages.dialects import GraphChoice, lower_graphs, split_name
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.weights import QuantizedWeight

PLAN, VECTORS, REPORT = "cache.json", "vectors.safetensors", "report.json"
FIT_REPORT = "report/cache.json"
"""Sidecar with what the fit measured."""
MODULES = (
    "cache_corrections", "cache_cuts", "cache_images", "cache_runs", "cache_schedules", "cache_search", "cache_stage",
    "cache_times", "caching", "closed_loop", "dynamic_caching", "mask_caching", "teacher",
)
SAMPLES, CHECKS = 64, 32
"""Trajectories to fit on and to judge by, at most; a recipe with fewer samples has fewer."""



@dataclass(frozen=True, eq=False)
class FittedCache:
    """What the bundle's writer needs.

    Args:
        graphs: the float variants.
        plan: the cache plan.
        programs: by number of steps.
        vectors: arrays of corrections, (rows, channels) by name.
        tables: scales by variant.
    """

    graphs: CacheGraphs
    plan: CachePlan
    programs: Mapping[int, StepProgram]
    vectors: Mapping[str, Float32s]
    tables: Mapping[str, ScaleTable]

    def lower(
        self, plan: QuantPlan, weights: Mapping[str, QuantizedWeight], choice: GraphChoice
    ) -> dict[str, Graph]:
        """The quantized graphs of all variants, `full` among them, for each float32 graph of the bundle.

        Args:
            plan: of the whole model.
            weights: likewise, so that all variants hold the same bytes.
            choice: what the bundle holds.
        """
        from quantempo.export.lower_variant import variant_plan, variant_table

        names = tuple(name for name in choice.names if split_name(name)[1] == "float32")
        found: dict[str, Graph] = {}
        for name, variant in self.graphs.set.variants.items():
            part = variant_plan(plan, variant.graph)
            if part.quantized():
                table = variant_table(self.tables[name], part)
                chosen = replace(choice, names=names)
                found |= lower_graphs(variant.graph, part, table, weights, chosen, name)
            else:
                found |= {f"{name}.{dialect}": variant.graph.clone() for dialect in names}
        return found

    def plans(self, plan: QuantPlan) -> dict[str, QuantPlan]:
        """The part of a model's plan that each variant follows."""
        from quantempo.export.lower_variant import variant_plan

        return {name: variant_plan(plan, variant.graph) for name, variant in self.graphs.set.variants.items()}

    def write(self, writer: BundleWriter, manifest: Manifest) -> Manifest:
        """Write plan, programs and vectors; the manifest with them, and with what each graph reads and writes."""
        from safetensors.numpy import save

        files = {}
        for steps, program in sorted(self.programs.items()):
            files[str(steps)] = f"programs/cached.{steps:04d}.json"
            writer.add_json(files[str(steps)], program)
        writer.add_json(PLAN, self.plan)
        requires = {*manifest.requires, CACHE}
        if self.vectors:
            writer.add_bytes(VECTORS, save(dict(self.vectors)))
            requires.add(CORRECTIONS)
        variants, entries = self.graphs.set.variants, dict(manifest.graphs)
        for name, entry in entries.items():
            variant = variants.get(entry.variant)
            if variant is not None and entry.float_type == "float32":
                entries[name] = replace(entry, reads=variant.reads, writes=variant.writes)
        return replace(
            manifest, graphs=entries, cache=CacheIndex(PLAN, files), requires=tuple(sorted(requires)),
            vectors=VECTORS if self.vectors else None,
        )


def check_cache_recipe(recipe: Recipe) -> None:
    """Refuse words about caching that mean nothing, before a model is opened.

    Raises:
        RequestError: a policy, cut, budget, precision or step count.
    """
    if recipe.cache == NONE and not (recipe.cache_min_psnr or recipe.cache_max_ms):
        return
    check_policy(recipe.cache)
    if recipe.cache != AUTO and (recipe.cache_min_psnr or recipe.cache_max_ms):
        raise _refuse(
            "cache", f"{recipe.cache} with a budget", "auto with a budget, or a policy without one",
            "a budget chooses the policy", "take --cache auto, or leave the budget out",
        )
    if recipe.cache_min_psnr < 0 or recipe.cache_max_ms < 0:
        raise _refuse(
            "cache_min_psnr, cache_max_ms", f"{recipe.cache_min_psnr:g} dB, {recipe.cache_max_ms:g} ms", "0 or more",
            "a slip", "leave out what does not matter",
        )
    if recipe.precision != "int8":
        raise _refuse(
            "cache", f"{recipe.cache} with precision {recipe.precision}", "precision int8",
            "policies and corrections are fitted on INT8 graphs", "leave one of the two out",
        )
    check_cut_words(recipe.cache_cut)
    traced = {*range(1, recipe.max_steps + 1), *recipe.steps}
    for steps in recipe.cache_steps:
        if steps not in traced:
            raise _refuse(
                "cache_steps", steps, f"1 to {recipe.max_steps}, or one of {', '.join(map(str, recipe.steps))}",
                "the bundle has no program for it", "raise max_steps",
            )


def check_policy(text: str) -> None:
    """Refuse a word that names no policy.

    Raises:
        RequestError.
    """
    name = text.partition(":")[0]
    if text in (AUTO, NONE):
        return
    if name in mask_caching.POLICIES:
        mask_caching.parse_masks(text)
    elif name in dynamic_caching.POLICIES:
        dynamic_caching.parse_dynamic(text)
    elif name in caching.POLICIES:
        if caching.parse_policy(text)[1] < 2:
            raise _refuse(
                "cache", text, "an interval of at least 2", "1 refreshes at every call", "take none, or 2 or more"
            )
    else:
        known = (NONE, AUTO, *caching.POLICIES, *mask_caching.POLICIES, *dynamic_caching.POLICIES)
        raise _refuse(
            "cache", text, "none, auto, every:N, power:N, dps:N, programmed:N, masks:SHARE, greedy:SHARE, "
            "teacache:SHARE or firstblock:SHARE", "a misspelling", nearest(name, known),
        )


def cache_settings(parts: CacheParts, cut: Cut) -> CacheSettings:
    """What a recipe's compile fits."""
    from quantempo.export.variants import consumed

    recipe, denoiser = parts.recipe, parts.manifest.denoiser
    return CacheSettings(
        recipe.cache, cut, fitted_corrections(cut, consumed(parts.exported.graph, cut)),
        guidance=recipe.default_guidance if max(recipe.guidance) > 1 else 1.0,
        samples=min(SAMPLES, recipe.samples), checks=min(CHECKS, recipe.samples), batch=min(32, recipe.samples),
        labels=deal_labels(denoiser, recipe),
    )


@dataclass(frozen=True, eq=False)
class CacheResult:
    """What the stage gives to a compile.

    Args:
        fitted: `None` where `auto` found that no plan beats the float model with fewer steps.
        report: what was measured, as JSON.
    """

    fitted: FittedCache | None
    report: bytes

    def write_report(self, root: Path) -> None:
        """Write the sidecar."""
        path = root / FIT_REPORT
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.report)


def cache_stage(store: StageStore, parts: CacheParts, graphs: CacheGraphs, keys: Iterable[str]) -> CacheResult:
    """Policy, scales and corrections of the quantized model's cached runs, or an earlier result.

    Args:
        store: for results.
        parts: the quantized model.
        graphs: its variants.
        keys: of the stages that the parts came from.
    """
    recipe, exported = parts.recipe, parts.exported
    settings = cache_settings(parts, graphs.cut)
    steps = tuple(sorted(set(recipe.cache_steps or recipe.steps)))
    runs = {name: value for name, value in to_data(settings).items() if name not in ("policy", "cut")}
    budget = Budget(recipe.cache_min_psnr or None, recipe.cache_max_ms or None)

    def make(folder: Path, advance: Advance) -> None:
        work = folder / "graphs"
        work.mkdir()
        chosen, found = settings, {}
        if recipe.cache == AUTO:
            first = next((n for n in recipe.steps if n in steps), steps[0])
            (work / "search").mkdir()
            searched = search(parts, settings, work / "search", first, budget, advance)
            chosen, found = replace(settings, policy=searched.policy), {"auto": searched.report}
        if chosen.policy != NONE:
            found = {**_fit(parts, chosen, work, steps, folder), **found}
        shutil.rmtree(work)
        (folder / REPORT).write_text(canonical_json(found))

    result = store.run("cache", {
        "denoiser": exported.graph_digest, "calibration, scales and weights": list(keys),
        "plan": to_data(parts.plan), "scales": {n: digest(a.tobytes()) for n, a in parts.table.arrays().items()},
        "policy": recipe.cache, "cut": to_data(graphs.cut), "runs": runs, "budget": to_data(budget),
        "programs": {n: to_data(exported.program(n)) for n in steps}, "arrays": arrays_digest(parts.arrays),
        "range method": recipe.range_method, "threads": recipe.threads,
        "libraries": libraries("numpy", "onnxruntime"),
        "code": code(
            "quantempo.calib", "quantempo.contracts", "quantempo.engines.ort", "quantempo.export", "quantempo.runtime",
            *(f"quantempo.stages.{name}" for name in MODULES),
        ),
    }, make)  # fmt: skip
    report = result.path(REPORT).read_bytes()
    return CacheResult(_read(result, parts, graphs, steps) if result.path(PLAN).exists() else None, report)


def _fit(
    parts: CacheParts, settings: CacheSettings, work: Path, steps: tuple[int, ...], folder: Path
) -> Mapping[str, Any]:
    """Fit a policy, keep its artefacts in a stage's folder, and give its report."""
    name = settings.policy.partition(":")[0]
    vectors: Mapping[str, Float32s] = {}
    (work / "fit").mkdir()
    if name in dynamic_caching.POLICIES:
        dynamic = dynamic_caching.fit_dynamic(parts, settings, work / "fit", steps)
        plan, programs, report = dynamic.plan, dynamic.programs, dynamic.report
        tables: Mapping[str, ScaleTable] = dict.fromkeys((FULL, PROBE, *plan.cuts), parts.table)
    else:
        fit = mask_caching.fit_masks if name in mask_caching.POLICIES else caching.fit_cache
        fixed = fit(parts, settings, work / "fit", steps)
        plan, programs, report, vectors, tables = fixed.plan, fixed.programs, fixed.report, fixed.vectors, fixed.tables
    (folder / PLAN).write_text(canonical_json(plan))
    for n, program in programs.items():
        (folder / f"{n}.json").write_text(canonical_json(program))
    _write(folder / VECTORS, vectors)
    for variant, table in tables.items():
        _write(folder / f"{variant}.safetensors", table.arrays())
    return report


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    write_tensors(path, {n: (str(a.dtype), a.shape) for n, a in arrays.items()}, arrays.values())


def _read(result: StageResult, parts: CacheParts, graphs: CacheGraphs, steps: tuple[int, ...]) -> FittedCache:
    def load(kind: Any, name: str) -> Any:
        path = result.path(name)
        return from_data(kind, parse_json(path.read_bytes(), str(path)), str(path))

    partition, plan = parts.table.partition, load(CachePlan, PLAN)
    graphs = graphs.recut(parts.exported.graph, plan)
    return FittedCache(
        graphs, plan, {n: load(StepProgram, f"{n}.json") for n in steps},
        map_tensors(result.path(VECTORS)),
        {
            name: ScaleTable.from_arrays(partition, map_tensors(result.path(f"{name}.safetensors")))
            for name in graphs.set.variants
        },
    )


def _refuse(field: str, found: object, wanted: str, cause: str, remedy: str) -> RequestError:
    return RequestError(f"recipe, {field}", found=repr(found), wanted=wanted, cause=cause, remedy=remedy)
