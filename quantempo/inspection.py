"""What is in a bundle, as facts and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from quantempo.contracts.cache import FULL, CachePlan
from quantempo.contracts.codec import from_data, parse_json, to_data
from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.runtime.bundle import OpenBundle, read_bundle

REFERENCE, STATISTICS = "reference", "report/statistics.safetensors"
"""Sidecars: the float twin, and the calibration statistics, from which other scale tables can be made."""


def describe(path: Path) -> dict[str, Any]:
    """Facts about a verified bundle: plain data for JSON."""
    bundle = read_bundle(path)
    manifest = bundle.manifest
    facts: dict[str, Any] = {
        "path": str(path), "name": manifest.name, "digest": bundle.digest, "precision": manifest.precision,
        "version": manifest.version, "requires": list(manifest.requires), "size": sizes(bundle),
        "graphs": {
            name: {"dialect": g.dialect, "float_type": g.float_type, "file": g.file}
            for name, g in sorted(manifest.graphs.items())
        },
        "scheduler": manifest.programs.scheduler, "steps": [min(bundle.steps), max(bundle.steps)],
        "provenance": dict(manifest.provenance),
    }
    if manifest.partition is not None:
        facts["scales"] = {
            "groups": manifest.partition.groups, "low": manifest.partition.low, "high": manifest.partition.high,
        }
    cache = cache_facts(bundle)
    if cache is not None:
        facts["cache"] = cache
    plan = load_plan(bundle)
    if plan is not None:
        facts["sites"] = site_counts(plan)
        reasons = Counter(d.reason for d in plan.decisions.values() if isinstance(d, Keep))
        facts["kept"] = dict(reasons.most_common())
    return facts


def load_plan(bundle: OpenBundle) -> QuantPlan | None:
    """The bundle's plan; `None` in a float bundle."""
    if bundle.manifest.plan is None:
        return None
    file = bundle.path(bundle.manifest.plan)
    return from_data(QuantPlan, parse_json(file.read_bytes(), str(file)), file.name)


def cache_facts(bundle: OpenBundle) -> dict[str, Any] | None:
    """Policy, cuts, and by number of steps the share of calls that reuse features; `None` without caching.

    With decisions at run time the share is the largest that is possible.
    """
    index = bundle.manifest.cache
    if index is None:
        return None
    file = bundle.path(index.plan)
    plan = from_data(CachePlan, parse_json(file.read_bytes(), str(file)), file.name)
    reused = {}
    for steps in sorted(index.programs, key=int):
        schedule = plan.schedules[steps]
        share = sum(call != FULL for call in schedule.calls) / len(schedule.calls)
        # Where calls decide for themselves, it is the share that they were fitted for.
        reused[steps] = share if schedule.decide is None else plan.parameters.get("share", share)
    cuts = {name: {"kind": cut.kind, **to_data(cut)} for name, cut in plan.cuts.items()}
    return {"policy": plan.policy, "reused": reused, "cuts": cuts}


def site_counts(plan: QuantPlan) -> dict[str, int]:
    """Sites in all, quantized and kept."""
    return {"total": len(plan.sites), "quantized": len(plan.quantized()), "kept": len(plan.kept())}


def sizes(bundle: OpenBundle) -> dict[str, int]:
    """Bytes of the bundle, and of the float reference beside it where there is one."""
    found = {"bundle_bytes": sum(entry.size for entry in bundle.manifest.files.values())}
    if (bundle.root / REFERENCE / "manifest.json").is_file():
        reference = read_bundle(bundle.root / REFERENCE)
        found["float_bytes"] = sum(entry.size for entry in reference.manifest.files.values())
    return found


def render(facts: dict[str, Any]) -> str:
    """The facts as lines of text."""
    size = facts["size"]
    lines = [
        f"{facts['name']}  ({facts['precision']}, manifest {facts['digest'][:12]})",
        f"  size       {size['bundle_bytes'] / 1e6:.2f} MB"
        + (f", float {size['float_bytes'] / 1e6:.2f} MB" if "float_bytes" in size else ""),
        f"  sampler    {facts['scheduler']}, programs for {facts['steps'][0]} to {facts['steps'][1]} steps",
    ]
    for name, graph in facts["graphs"].items():
        lines.append(f"  graph      {name}: {graph['dialect']}, {graph['float_type']}, {graph['file']}")
    if "scales" in facts:
        scales = facts["scales"]
        lines.append(f"  scales     {scales['groups']} groups over timesteps {scales['low']:g} to {scales['high']:g}")
    if "sites" in facts:
        sites = facts["sites"]
        lines.append(f"  sites      {sites['quantized']} of {sites['total']} quantized, {sites['kept']} kept in float:")
        lines += [f"               {count} × {reason}" for reason, count in facts["kept"].items()]
    if "cache" in facts:
        cache = facts["cache"]
        shares = ", ".join(f"{100 * share:.0f} % at {steps} steps" for steps, share in cache["reused"].items())
        lines.append(f"  cache      {cache['policy']}, calls that reuse features: {shares}")
    lines += [f"  made with  {', '.join(f'{k} {v}' for k, v in _versions(facts).items())}"]
    return "\n".join(lines)


def _versions(facts: dict[str, Any]) -> dict[str, str]:
    return {k: v for k, v in facts["provenance"].items() if v[:1].isdigit() and k != "seed" and len(v) < 30}
