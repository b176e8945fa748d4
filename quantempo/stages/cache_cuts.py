"""Where caching cuts a model: by default, or as a recipe says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantempo.contracts.cache import CachePlan, Cut, DeltaCut, FeatureCut, reuse_name
from quantempo.contracts.plan import QuantPlan
from quantempo.errors import ExportError, RequestError
from quantempo.recipe import Recipe
from quantempo.stages.cache_runs import fitted_corrections, graph_corrections
from quantempo.stages.dynamic_caching import probe_of

if TYPE_CHECKING:
    from quantempo.export.graph_files import Graph
    from quantempo.export.variants import VariantSet

NONE = "none"
_CUT = re.compile(
    r"(?P<kind>delta|sublayers):(?P<first>\d+)-(?P<last>\d+)|branch:(?P<branch>\d+)|(?P<all>sublayers)"
)
CUT_WORDS = "delta:FIRST-LAST, sublayers, sublayers:FIRST-LAST or branch:INDEX"


def check_cut_words(text: str) -> None:
    """Refuse words that name no cut.

    Raises:
        RequestError.
    """
    if text and not _CUT.fullmatch(text):
        raise RequestError(
            "recipe, cache_cut", found=repr(text), wanted=CUT_WORDS, cause="a misspelling",
            remedy="write for example sublayers:0-3, or leave it out",
        )


@dataclass(frozen=True, eq=False)
class CacheGraphs:
    """A model cut for caching, before anything is fitted.

    Args:
        cut: what a reusing call takes from the cache.
        set: the float variants.
    """

    cut: Cut
    set: VariantSet

    def recut(self, graph: Graph, plan: CachePlan) -> CacheGraphs:
        """The model cut as a fitted plan has it."""
        from quantempo.export.variants import cut_variants

        return CacheGraphs(self.cut, cut_variants(graph, plan.cuts, plan.probe, graph_corrections(plan.corrections)))

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


def cut_for_caching(graph: Graph, recipe: Recipe) -> CacheGraphs | None:
    """The model's variants; `None` where the recipe asks for no caching.

    Raises:
        ExportError: the cut does not fit the model, or there is none that does.
    """
    from quantempo.export.variants import consumed, cut_variants

    if recipe.cache == NONE:
        return None
    error: ExportError | None = None
    for cut in [named_cut(graph, recipe.cache_cut)] if recipe.cache_cut else default_cuts(graph):
        try:
            probe = probe_of(recipe.cache, cut, graph)
            corrections = () if probe is not None else graph_corrections(fitted_corrections(cut, consumed(graph, cut)))
            return CacheGraphs(cut, cut_variants(graph, {reuse_name(0): cut}, probe, corrections))
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
    from quantempo.export.variants import branch_cut, sublayer_cut

    match = _CUT.fullmatch(text)
    assert match is not None
    if match["branch"] is not None:
        return branch_cut(graph, int(match["branch"]))
    found = _blocks(graph)
    if found is None:
        raise refuse_cut(
            f"cut {text!r}", "a model without a list of blocks", "one", "another architecture", "take branch:0"
        )
    blocks, depth = found
    first, last = (0, depth - 1) if match["all"] else (int(match["first"]), int(match["last"]))
    if not first <= last < depth:
        raise refuse_cut(
            f"cut {text!r}", f"blocks {first} to {last}", f"a range within 0 to {depth - 1}",
            f"{blocks} has {depth} blocks; it was meant for a model of another depth",
            "choose blocks that the model has",
        )
    if match["kind"] == "delta":
        return DeltaCut(first, last, depth, blocks)
    return sublayer_cut(graph, blocks, depth, range(first, last + 1))


def default_cuts(graph: Graph) -> Iterable[Cut]:
    """Cuts to try, the best guess first.

    Long skips from the outermost; else all attention and MLP layers, else the middle two thirds of the blocks.
    """
    from quantempo.export.cut_points import branches
    from quantempo.export.variants import sublayer_cut

    found = branches(graph)
    if found:
        return [FeatureCut((branch.deep,)) for branch in found]
    listed = _blocks(graph)
    if listed is None:
        return []
    blocks, depth = listed
    first = int(depth / 6 + 0.5)
    cuts: list[Cut] = [DeltaCut(first, depth - 1 - first, depth, blocks)]
    with suppress(ExportError):  # blocks without attention or MLP layers of their own
        cuts.insert(0, sublayer_cut(graph, blocks, depth, range(depth)))
    return cuts


def _blocks(graph: Graph) -> tuple[str, int] | None:
    """The longest list of blocks that lies in no other one."""
    from quantempo.export.cut_points import block_lists

    return max(block_lists(graph).items(), key=lambda item: (item[1], -len(item[0])), default=None)
