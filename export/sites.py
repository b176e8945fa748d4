"""Places to quantize, found in the graph by pattern, and the plan that quantizes them by default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from quantempo.contracts.plan import Decision, Keep, Quantize, QuantPlan, Rule, Share, Site
from quantempo.errors import NoSites, PlanError, nearest
from quantempo.export.centring import centreable, check_centred
from quantempo.export.passes.edit import module_of, stored_shape
from quantempo.export.passes.name_values import is_site

SMALLEST = 16
"""A product with fewer input or output channels gains nothing from integers on any engine."""
EMBEDDERS = ("time_embedding", "timestep_embedder", "time_embed", "class_embedding", "class_embedder")
SHAPERS = {"Reshape", "Transpose", "Slice", "Split", "Concat", "Identity", "Unsqueeze", "Squeeze", "Cast"}
FIRST, LAST = "reads the model's input", "writes the model's output"


@dataclass(frozen=True)
class PlanOptions:
    """What the default plan leaves in float, and how it quantizes the rest.

    Args:
        keep: module patterns (fnmatch, case-sensitive) to leave in float on top of the rules.
        quantize: module patterns to quantize although a rule would leave them.
        rules: changes in order, a later one wins; `keep` wins over all of them.
        symmetric_convs: fix the zero point of convolutions (the portable dialect always does).
        activation_bits, weight_bits: below 8 is simulated.
        smallest: channels below which a product stays in float.
        centre: centre every tensor that allows it (see `quantempo.export.centring`).
    """

    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    symmetric_convs: bool = False
    activation_bits: int = 8
    weight_bits: int = 8
    smallest: int = SMALLEST
    centre: bool = True


def find_sites(model: ir.Model, graph: str = "full") -> tuple[Site, ...]:
    """Every MatMul and Conv with a stored weight, sorted by id.

    Args:
        model: a graph in normal form.
        graph: name of the graph variant.
    """
    sites: list[Site] = []
    counts: Counter[str] = Counter()
    for node in model.graph:
        if not is_site(node):
            continue
        module = module_of(node) or node.op_type.lower()
        counts[module] += 1
        sites.append(_site(node, module, counts[module], graph))
    return tuple(sorted(sites, key=lambda site: site.id))


def _site(node: ir.Node, module: str, count: int, graph: str) -> Site:
    source, weight = node.inputs
    assert source is not None
    assert weight is not None
    dims = stored_shape(weight)
    if node.op_type == "Conv":
        n, k = dims[0], 1
        for size in dims[1:]:
            k *= size
    else:
        k, n = dims
    return Site(
        id=module if count == 1 else f"{module}#{count}",
        graph=graph,
        op="conv" if node.op_type == "Conv" else "matmul",
        tensor=str(source.name),
        output=str(node.outputs[0].name),
        weight=str(weight.name),
        module=module,
        k=k,
        n=n,
        rank=len(source.shape) if source.shape is not None else len(dims),
    )


def border_sites(model: ir.Model) -> Mapping[str, str]:
    """Products that see the sample input, or the output, through data movement and a bias alone.

    Returns:
        by the product's value name, why it is special.
    """
    borders: dict[str, str] = {}
    for first in _reach(model.graph.inputs[0], _after):
        borders[str(first.outputs[0].name)] = FIRST
    for last in _reach(model.graph.outputs[0], _before):
        borders[str(last.outputs[0].name)] = LAST
    return borders


def _reach(start: ir.Value, step: Callable[[ir.Value], tuple[list[ir.Node], list[ir.Value]]]) -> list[ir.Node]:
    """The sites next to a value; `step` returns the sites at a value and the values to look at next."""
    found: list[ir.Node] = []
    front, seen = [start], set[ir.Value]()
    while front:
        value = front.pop()
        if value not in seen:
            seen.add(value)
            sites, onward = step(value)
            found.extend(sites)
            front.extend(onward)
    return found


def _after(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    users = [use.node for use in value.uses()]
    moved = [output for user in users if user.op_type in SHAPERS for output in user.outputs]
    return [user for user in users if is_site(user)], moved


def _before(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    node = value.producer()
    if node is None:
        return [], []
    if is_site(node):
        return [node], []
    computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
    moves = node.op_type in SHAPERS or (node.op_type == "Add" and len(computed) == 1)
    return [], computed if moves else []


def default_plan(
    model: ir.Model, digest: str, options: PlanOptions | None = None, sites: Sequence[Site] | None = None
) -> QuantPlan:
    """Quantize every site but those that are known to be sensitive or too small to gain.

    Rules, in order: a `keep` pattern; the last of `rules` that says so; a `quantize` pattern; the layers next to input
    and output; timestep and class embedders; fewer than `smallest` channels in or out.  A site that reads the same
    tensor as an earlier one shares its scale.

    Args:
        model: a graph in normal form.
        digest: the graph's digest, to which the plan is bound.
        options: what to leave in float.
        sites: the graph's sites, where they are known already.

    Raises:
        PlanError: a pattern matches no site.
        NoSites: nothing would be quantized.
    """
    options = options or PlanOptions()
    found = tuple(sites) if sites is not None else find_sites(model)
    for pattern in (*options.keep, *options.quantize, *(rule.match for rule in options.rules)):
        check_pattern(pattern, found)
    borders = border_sites(model)
    reasons = {site.id: _reason(site, options, borders.get(site.output)) for site in found}
    if all(reason is not None for reason in reasons.values()):
        raise NoSites(
            "quantization plan", found=f"{len(found)} sites, none of them to be quantized", wanted="at least one",
            cause=_commonest(reasons.values()) if found else "the graph holds no MatMul or Conv with a stored weight",
            remedy="loosen the keep patterns, or compile with precision float32",
        )
    decisions: dict[str, Decision] = {}
    owners: dict[str, str] = {}
    for site in found:
        reason = reasons[site.id]
        if reason is not None:
            decisions[site.id] = Keep(reason)
            continue
        settings = _settings(site, options)
        owner = owners.setdefault(site.tensor, site.id)
        shared = decisions.get(owner)
        if isinstance(shared, Quantize) and shared.activation_bits != settings.activation_bits:
            raise PlanError(
                f"rules, site {site.id!r}", found=f"{settings.activation_bits} activation bits",
                wanted=f"{shared.activation_bits}, as {owner!r} has", cause="both read one tensor, which has one scale",
                remedy="give both the same activation_bits",
            )
        alike = shared == settings and site.op == _site_of(owner, found).op
        decisions[site.id] = Share(owner) if alike and owner != site.id else settings
    centred = centreable(model, found, decisions) if options.centre else ()
    return QuantPlan(model=digest, sites=found, decisions=decisions, centred=centred)


def check_plan(plan: QuantPlan, model: ir.Model, where: str) -> None:
    """Refuse a plan, from outside or edited, that does not fit the graph or itself.

    Args:
        plan: bound to this graph by its digest, as the caller has checked.
        model: a graph in normal form.
        where: the plan's file, for messages.

    Raises:
        PlanError: sites that are not the graph's, a site without a decision, a decision without a site, or a `Share`
            with a site that does not quantize the same tensor.
        NoSites: nothing would be quantized.
    """

    def refuse(place: str, found: str, wanted: str) -> PlanError:
        return PlanError(
            f"{where}: {place}", found=found, wanted=wanted, cause="a slip while the plan was edited",
            remedy="edit decisions alone, starting from the plan.json of a fresh compile",
        )

    sites = {site.id: site for site in plan.sites}
    strange = sorted(site.id for site in set(plan.sites) ^ set(find_sites(model)))
    if strange or len(sites) != len(plan.sites):
        raise refuse("sites", f"other sites than in the graph ({', '.join(strange[:3])})", "the sites as they were")
    for name in sorted(sites.keys() ^ plan.decisions.keys()):
        if name in sites:
            raise refuse("decisions", f"no decision for the site {name!r}", "one for every site")
        raise refuse(f"decisions.{name}", "a decision for a site that is not there", nearest(name, sites))
    for name, decision in sorted(plan.decisions.items()):
        if isinstance(decision, Share) and not _shares(plan, sites, name, decision.site):
            found, wanted = f"a share with {decision.site!r}", "a site that quantizes the same tensor by itself"
            raise refuse(f"decisions.{name}", found, wanted)
    check_centred(plan, model, where)
    for dialect, kept in sorted(plan.dialects.items()):
        for name in sorted(kept.keys() - sites.keys())[:1]:
            raise refuse(f"dialects.{dialect}", f"a decision for {name!r}, which is not there", nearest(name, sites))
        # A centre is taken off for every reader of a tensor, so none of them can stay in float in one dialect.
        check_centred(plan.for_graph(dialect), model, f"{where}: dialects.{dialect}")
    if not plan.quantized():
        raise NoSites(
            where, found=f"{len(sites)} sites, none of them to be quantized", wanted="at least one",
            cause="the plan keeps every site in float", remedy="quantize some, or compile with precision float32",
        )


def _shares(plan: QuantPlan, sites: Mapping[str, Site], name: str, owner: str) -> bool:
    """Whether a site may take its scale from another one."""
    other = sites.get(owner)
    return other is not None and isinstance(plan.decisions[owner], Quantize) and other.tensor == sites[name].tensor


def check_pattern(pattern: str, sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites whose module path or id a pattern matches.

    Raises:
        PlanError: none; names the nearest module.
    """
    sites = tuple(sites)
    matched = tuple(site for site in sites if _matches(site, pattern))
    if not matched:
        modules = sorted({site.module for site in sites})
        hint = nearest(pattern, modules)
        if not hint.startswith("did you mean"):
            hint = "known are " + ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
        raise PlanError(
            f"pattern {pattern!r}", found="no site that it matches", wanted="at least one module path",
            cause="a misspelling, or a pattern without * at its ends (the whole path has to match)", remedy=hint,
        )
    return matched


def _site_of(identifier: str, sites: Sequence[Site]) -> Site:
    return next(site for site in sites if site.id == identifier)


def _settings(site: Site, options: PlanOptions) -> Quantize:
    """How a site is quantized."""
    activation, weight = options.activation_bits, options.weight_bits
    for rule in options.rules:
        if _matches(site, rule.match):
            activation, weight = rule.activation_bits or activation, rule.weight_bits or weight
    return Quantize(options.symmetric_convs and site.op == "conv", activation, weight)


def _reason(site: Site, options: PlanOptions, border: str | None) -> str | None:
    """Why a site stays in float; `None` where it is quantized."""
    for pattern in options.keep:
        if _matches(site, pattern):
            return f"kept by pattern {pattern!r}"
    for rule in reversed(options.rules):
        if rule.action and _matches(site, rule.match):
            return None if rule.action == "quantize" else rule.reason or f"kept by rule {rule.match!r}"
    if any(_matches(site, pattern) for pattern in options.quantize):
        return None
    if border is not None:
        return border
    if any(part in EMBEDDERS for part in site.module.split(".")):
        return "timestep or class embedding: small, and every layer depends on it"
    if site.n < options.smallest or site.k < options.smallest:
        return f"k={site.k}, n={site.n}: fewer than {options.smallest} channels gain nothing"
    return None


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.module, pattern) or fnmatchcase(site.id, pattern)


def _commonest(reasons: Iterable[str | None]) -> str:
    counts = Counter(reason for reason in reasons if reason is not None)
    return counts.most_common(1)[0][0]
