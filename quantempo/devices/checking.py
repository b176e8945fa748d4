"""What a target will make of a model, a bundle or a graph, before any of them is built: seconds, no device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantempo.contracts.manifest import MANIFEST_NAME, GraphEntry
from quantempo.contracts.plan import Keep
from quantempo.engines.check import Finding, check_graph, refusals, summary
from quantempo.engines.guard import library_versions
from quantempo.engines.targets import Target, require_format, target
from quantempo.errors import EngineError
from quantempo.runtime.bundle import OpenBundle, read_manifest

_LIBRARIES = {"ort": "onnxruntime", "openvino": "openvino"}
"""Backends that may be installed where a check runs; for the others the lowest version of the range counts."""


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Args:
        subject: what was given.
        checked: which graph of it was looked at.
        target: name of the profile.
        version: of the target's library that the rules assumed.
        findings: refusals first.
    """

    subject: str
    checked: str
    target: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether something has to be mended before anything else."""
        return bool(refusals(self.findings))

    def text(self) -> str:
        """Findings by level and rule, with their remedies."""
        lines = [f"{self.subject} for {self.target} (library {self.version}); checked: {self.checked}"]
        for level, rule, count, first in summary(self.findings):
            more = f", and {count - 1} more" if count > 1 else ""
            lines += [f"  {level:<8} {rule}: {first.where}{more}", f"           {first.found}",
                      f"           → {first.remedy}"]  # fmt: skip
        if not self.findings:
            lines.append("  nothing found")
        return "\n".join(lines)


def check_subject(subject: Path, target_name: str, version: str = "") -> CheckReport:
    """Check a model directory, a bundle directory or an ONNX file for a target.

    Of a bundle, the graph that suits the target best is checked, by its structure: weight files are not opened.  A
    model directory is traced from its configuration without weights; its float graph and its default plan are checked,
    and the quantized graph once it is compiled.

    Args:
        subject: see above.
        target_name: see `quantempo.engines.targets.targets`.
        version: of the target's library; empty takes the installed one, or else the lowest of the profile's range.

    Raises:
        RequestError: no such target.
        PlanError: the target lacks the bundle's number format.
        EngineError: no such file, or not an ONNX graph.
        ModelError, BundleError: the directory is neither.
    """
    profile = target(target_name)
    assumed = version or _installed(profile) or profile.versions[0]
    if subject.is_dir() and (subject / MANIFEST_NAME).is_file():
        return _check_bundle(read_manifest(subject), profile, assumed)
    if subject.is_dir():
        return _check_model(subject, profile, assumed)
    if not subject.is_file():
        raise EngineError(
            str(subject), found="no such file or directory", wanted="a model directory, a bundle or an ONNX file",
            cause="the path is misspelt", remedy="check the path",
        )
    return CheckReport(str(subject), subject.name, profile.name, assumed, check_graph(subject, profile, assumed))


def _installed(profile: Target) -> str:
    return library_versions(profile.backend).get(_LIBRARIES.get(profile.backend, ""), "")


def _check_bundle(bundle: OpenBundle, profile: Target, version: str) -> CheckReport:
    manifest = bundle.manifest
    if manifest.precision == "int8":
        require_format(profile, "int8")
    elif manifest.precision == "fp8":
        require_format(profile, "fp8")
    decoder = manifest.decoder.graph
    entries = {name: entry for name, entry in manifest.graphs.items() if name != decoder}
    name = _best(entries, profile)
    if name is None:
        wanted = ", ".join(f"{dialect}/{kind}" for dialect, kind in profile.graphs)
        found = Finding(
            "refused", "no-graph", ", ".join(sorted(entries)), f"no graph that the target reads ({wanted})",
            "compile the model again for this target",
        )
        return CheckReport(str(bundle.root), "the manifest", profile.name, version, (found,))
    chosen = manifest.graphs[name]
    graphs = [g for g in entries if (entries[g].dialect, entries[g].float_type) == (chosen.dialect, chosen.float_type)]
    graphs += [decoder] if decoder is not None else []
    findings: list[Finding] = []
    for graph in graphs:
        # Listed and reached through no link; its own paths are a rule of the check.
        findings += check_graph(bundle.path(manifest.graphs[graph].file), profile, version)
    return CheckReport(str(bundle.root), ", ".join(graphs), profile.name, version, _sorted(findings))


def _best(entries: dict[str, GraphEntry], profile: Target) -> str | None:
    for dialect, kind in profile.graphs:
        for name, entry in entries.items():
            if (entry.dialect, entry.float_type) == (dialect, kind):
                return name
    return None


def _check_model(model: Path, profile: Target, version: str) -> CheckReport:
    from quantempo.export.structure import trace_structure

    require_format(profile, "int8")
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        graph = Path(folder) / "float.onnx"
        plan = trace_structure(model, graph).for_graph(profile.graphs[0][0])
        findings = list(check_graph(graph, profile, version))
    for site, decision in plan.decisions.items():
        if isinstance(decision, Keep):
            findings.append(Finding("kept", "plan", site, decision.reason, "edit the plan, if you know better"))
    sites = f"{len(plan.quantized())} of {len(plan.sites)} sites quantized"
    checked = f"the float graph from the configuration, and the default plan ({sites})"
    return CheckReport(str(model), checked, profile.name, version, _sorted(findings))


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda item: ("refused", "slow", "kept").index(item.level)))
