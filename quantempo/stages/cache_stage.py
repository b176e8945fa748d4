"""Feature caching as a stage of a compile: what is asked for, where the graph is cut, and what a bundle gets.

`quantempo.stages.caching` does the fitting.  Here its result is kept in the stage store, and its variants are lowered
for every float32 graph of the bundle with the same weights as `full`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantempo.contracts.cache import CachePlan, Cut, DeltaCut, FeatureCut, reuse_name
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json, to_data
from quantempo.contracts.manifest import CacheIndex, Manifest
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.tensor_file import map_tensors, write_tensors
from quantempo.errors import ExportError, RequestError
from quantempo.progress import Advance
from quantempo.recipe import Recipe
from quantempo.runtime.bundle_cache import CACHE, CORRECTIONS
from quantempo.runtime.bundle_writer import BundleWriter
from quantempo.stages.cache_runs import CacheParts, CacheSettings, Float32s
from quantempo.stages.caching import fit_cache, parse_policy
from quantempo.stages.conditioning import arrays_digest, deal_labels
from quantempo.stages.dialects import GraphChoice, lower_graphs, split_name
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.variants import VariantSet
    from quantempo.export.weights import QuantizedWeight

NONE = "none"
PLAN, VECTORS, REPORT = "cache.json", "vectors.safetensors", "report.json"
FIT_REPORT = "report/cache.json"
"""Sidecar with what the fit measured."""
SAMPLES, CHECKS = 64, 32
"""Trajectories to fit on and to judge by, at most; a recipe with fewer samples has fewer."""
_CUT = re.compile(r"delta:(\d+)-(\d+)|branch:(\d+)")


@dataclass(frozen=True, eq=False)
class CacheGraphs:
    """A model cut for caching, before anything is fitted.

    Args:
        cut: what a reusing call takes from the cache.
        set: the float variants.
    """

    cut: Cut
    set: VariantSet

    def keep_free(self, plan: QuantPlan) -> QuantPlan:
        """The plan without centres of tensors that a cut needs as they are: a feature is not shifted per group."""
        from quantempo.export.centring import centreable
        from quantempo.export.lower_variant import variant_plan

        centred = set(plan.centred)
        bare = replace(plan, centred=())
        for variant in self.set.variants.values():
            part = variant_plan(bare, variant.graph)
            centred -= set(part.scaled_tensors()) - set(centreable(variant.graph, part.sites, part.decisions))
        return replace(plan, centred=tuple(name for name in plan.centred if name in centred))


@dataclass(frozen=True, eq=False)
class FittedCache:
    """What the bundle's writer needs.

    Args:
        graphs: the float variants.
        plan: the cache plan.
        programs: by number of steps.
        vectors: arrays of corrections, (rows, channels) by name.
        tables: scales by variant.
        report: what the fit measured, as JSON.
    """

    graphs: CacheGraphs
    plan: CachePlan
    programs: Mapping[int, StepProgram]
    vectors: Mapping[str, Float32s]
    tables: Mapping[str, ScaleTable]
    report: bytes

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

    def write_report(self, root: Path) -> None:
        """Write the sidecar."""
        path = root / FIT_REPORT
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.report)


def check_cache_recipe(recipe: Recipe) -> None:
    """Refuse words about caching that mean nothing, before a model is opened.

    Raises:
        RequestError: a policy, cut, precision or step count.
    """
    if recipe.cache == NONE:
        return
    _, interval = parse_policy(recipe.cache)
    if interval < 2:
        raise _refuse(
            "cache", recipe.cache, "an interval of at least 2", "1 refreshes at every call", "take none, or 2 or more"
        )
    if recipe.precision != "int8":
        raise _refuse(
            "cache", f"{recipe.cache} with precision {recipe.precision}", "precision int8",
            "policies and corrections are fitted on INT8 graphs", "leave one of the two out",
        )
    if recipe.cache_cut and not _CUT.fullmatch(recipe.cache_cut):
        raise _refuse(
            "cache_cut", recipe.cache_cut, "delta:FIRST-LAST or branch:INDEX", "a misspelling",
            "write for example delta:1-4, or leave it out",
        )
    traced = {*range(1, recipe.max_steps + 1), *recipe.steps}
    for steps in recipe.cache_steps:
        if steps not in traced:
            raise _refuse(
                "cache_steps", steps, f"1 to {recipe.max_steps}, or one of {', '.join(map(str, recipe.steps))}",
                "the bundle has no program for it", "raise max_steps",
            )


def cut_for_caching(graph: Graph, recipe: Recipe) -> CacheGraphs | None:
    """The model's variants; `None` where the recipe asks for no caching.

    Raises:
        ExportError: the cut does not fit the model, or there is none that does.
    """
    from quantempo.export.variants import cut_variants

    if recipe.cache == NONE:
        return None
    error: ExportError | None = None
    for cut in [named_cut(graph, recipe.cache_cut)] if recipe.cache_cut else default_cuts(graph):
        try:
            return CacheGraphs(cut, cut_variants(graph, {reuse_name(0): cut}, None, ("feature",)))
        except ExportError as refused:
            error = error or refused
    raise error or ExportError(
        "recipe, cache", found="a model without long skips and without a list of blocks", wanted="one of the two",
        cause="there is no place to cut that is known to serve", remedy="compile without caching",
    )


def named_cut(graph: Graph, text: str) -> Cut:
    """The cut that a recipe names.

    Raises:
        ExportError: the model has no such branch, or no list of blocks.
    """
    from quantempo.export.cut_points import refuse_cut
    from quantempo.export.variants import branch_cut

    match = _CUT.fullmatch(text)
    assert match is not None
    if match[3] is not None:
        return branch_cut(graph, int(match[3]))
    found = _blocks(graph)
    if found is None:
        raise refuse_cut(
            f"cut {text!r}", "a model without a list of blocks", "one", "another architecture", "take branch:0"
        )
    blocks, depth = found
    first, last = int(match[1]), int(match[2])
    if not first <= last < depth:
        raise refuse_cut(
            f"cut {text!r}", f"blocks {first} to {last}", f"a range within 0 to {depth - 1}",
            f"{blocks} has {depth} blocks; it was meant for a model of another depth",
            "choose blocks that the model has",
        )
    return DeltaCut(first, last, depth, blocks)


def default_cuts(graph: Graph) -> Iterable[Cut]:
    """Cuts to try, the best guess first: long skips from the outermost, else the middle two thirds of the blocks."""
    from quantempo.export.cut_points import branches

    found = branches(graph)
    if found:
        return [FeatureCut((branch.deep,)) for branch in found]
    listed = _blocks(graph)
    if listed is None:
        return []
    blocks, depth = listed
    first = int(depth / 6 + 0.5)
    return [DeltaCut(first, depth - 1 - first, depth, blocks)]


def _blocks(graph: Graph) -> tuple[str, int] | None:
    """The longest list of blocks that lies in no other one."""
    from quantempo.export.cut_points import block_lists

    return max(block_lists(graph).items(), key=lambda item: (item[1], -len(item[0])), default=None)


def cache_settings(parts: CacheParts, cut: Cut) -> CacheSettings:
    """What a recipe's compile fits."""
    recipe, denoiser = parts.recipe, parts.manifest.denoiser
    return CacheSettings(
        recipe.cache, cut, guidance=recipe.default_guidance if max(recipe.guidance) > 1 else 1.0,
        samples=min(SAMPLES, recipe.samples), checks=min(CHECKS, recipe.samples), batch=min(32, recipe.samples),
        labels=deal_labels(denoiser, recipe),
    )


def cache_stage(store: StageStore, parts: CacheParts, graphs: CacheGraphs, keys: Iterable[str]) -> FittedCache:
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

    def make(folder: Path, advance: Advance) -> None:
        work = folder / "graphs"
        work.mkdir()
        fit = fit_cache(parts, settings, work, steps)
        shutil.rmtree(work)
        (folder / PLAN).write_text(canonical_json(fit.plan))
        (folder / REPORT).write_text(canonical_json(fit.report))
        for n, program in fit.programs.items():
            (folder / f"{n}.json").write_text(canonical_json(program))
        _write(folder / VECTORS, fit.vectors)
        for name, table in fit.tables.items():
            _write(folder / f"{name}.safetensors", table.arrays())

    result = store.run("cache", {
        "denoiser": exported.graph_digest, "calibration, scales and weights": list(keys),
        "plan": to_data(parts.plan), "scales": {n: digest(a.tobytes()) for n, a in parts.table.arrays().items()},
        "policy": recipe.cache, "cut": to_data(graphs.cut), "runs": runs,
        "programs": {n: to_data(exported.program(n)) for n in steps}, "arrays": arrays_digest(parts.arrays),
        "range method": recipe.range_method, "threads": recipe.threads,
        "libraries": libraries("numpy", "onnxruntime"),
        "code": code(
            "quantempo.calib", "quantempo.contracts", "quantempo.engines.ort", "quantempo.export", "quantempo.runtime",
            "quantempo.stages.cache_corrections", "quantempo.stages.cache_runs", "quantempo.stages.cache_stage",
            "quantempo.stages.caching", "quantempo.stages.teacher",
        ),
    }, make)  # fmt: skip
    return _read(result, parts, graphs, steps)


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    write_tensors(path, {n: (str(a.dtype), a.shape) for n, a in arrays.items()}, arrays.values())


def _read(result: StageResult, parts: CacheParts, graphs: CacheGraphs, steps: tuple[int, ...]) -> FittedCache:
    def load(kind: Any, name: str) -> Any:
        path = result.path(name)
        return from_data(kind, parse_json(path.read_bytes(), str(path)), str(path))

    partition = parts.table.partition
    return FittedCache(
        graphs, load(CachePlan, PLAN), {n: load(StepProgram, f"{n}.json") for n in steps},
        map_tensors(result.path(VECTORS)),
        {
            name: ScaleTable.from_arrays(partition, map_tensors(result.path(f"{name}.safetensors")))
            for name in graphs.set.variants
        },
        result.path(REPORT).read_bytes(),
    )


def _refuse(field: str, found: object, wanted: str, cause: str, remedy: str) -> RequestError:
    return RequestError(f"recipe, {field}", found=repr(found), wanted=wanted, cause=cause, remedy=remedy)
