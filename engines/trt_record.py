"""The sidecar of a bundle's engines for one target: `engines/TARGET/engine.json` and the plans beside it.

A plan is native code: it is loaded only when its digest is the one that was written down, by the library version that
wrote it, on the kind of device that it was made for, beside the bundle that it was made from, and from a folder that
nobody else can write to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json
from quantempo.contracts.manifest import MANIFEST_NAME, FileEntry
from quantempo.engines.cache import KeyParts, check_private
from quantempo.engines.gate import GateReport
from quantempo.engines.onnx_file import external_files
from quantempo.engines.plan_store import unpack, weight_sources
from quantempo.engines.targets import parse_version, target, targets
from quantempo.engines.trt_profiles import Profile
from quantempo.errors import DataError, DigestMismatch, EngineError, nearest

FOLDER = "engines"
RECORD_NAME = "engine.json"
RECORD_VERSION = 1
Weights = Literal["plan", "refit", "bundle"]
"""Where a plan's weights are: in the plan; left out by the builder and refitted at load; or referred to, bit for bit,
in the bundle's weight files."""


@dataclass(frozen=True)
class PlanRecord:
    """One built engine.

    Args:
        file: name in the folder.
        entry: digest and size of that file.
        plan_size: bytes of the plan itself, as it is loaded.
        parts: what it was made from; their digest is its key.
        profiles: sizes that it takes.
        weights: see `Weights`.
        seconds: the build took so long.
        gate: what the fusion gate saw; `None` for a graph in which nothing is quantized.
        notices: what the builder had to say.
    """

    file: str
    entry: FileEntry
    plan_size: int
    parts: KeyParts
    profiles: tuple[Profile, ...]
    weights: Weights = "plan"
    seconds: float = 0.0
    gate: GateReport | None = None
    notices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The content key."""
        return self.parts.key


@dataclass(frozen=True)
class EngineRecord:
    """The content of `engine.json`.

    Args:
        target: name of the profile.
        backend: `tensorrt` or `tensorrt_rtx`.
        library: its version.
        capability: compute capability that the plans are for, e.g. `8.9`.
        manifest: digest of the bundle's manifest.
        plans: by graph name.
        version_compatible: whether a newer TensorRT may run the plans, see `version_loads`.
        device: what they were built on.
        versions: of everything that took part.
    """

    target: str
    backend: Literal["tensorrt", "tensorrt_rtx"]
    library: str
    capability: str
    manifest: str
    plans: Mapping[str, PlanRecord]
    version_compatible: bool = False
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    version: int = RECORD_VERSION


def write_record(folder: Path, record: EngineRecord) -> Path:
    """Write `engine.json`, whole or not at all."""
    path, work = folder / RECORD_NAME, folder / f".{RECORD_NAME}.partial"
    work.write_text(canonical_json(record))
    work.replace(path)
    return path


def read_record(folder: Path) -> EngineRecord:
    """Read `engine.json`.

    Raises:
        EngineError: there is none, or a newer quantempo wrote it.
        DataError: it is no such record.
    """
    path = folder / RECORD_NAME
    if not path.is_file() or path.is_symlink():
        raise EngineError(
            str(folder), found=f"no {RECORD_NAME}", wanted="engines that `quantempo build` made",
            cause="nothing was built for this target yet", remedy="run: quantempo build BUNDLE --target TARGET",
        )
    data = parse_json(path.read_bytes(), str(path))
    version = data.get("version", RECORD_VERSION) if isinstance(data, dict) else None
    if isinstance(version, int) and version > RECORD_VERSION:
        raise EngineError(
            str(path), found=f"version {version}", wanted=f"version {RECORD_VERSION}",
            cause="a newer quantempo built these engines", remedy="build them again, or update quantempo",
        )
    return from_data(EngineRecord, data, str(path))


def bundle_of(graph: Path) -> Path:
    """The bundle that a graph file lies in."""
    return graph.parent.parent


def records(bundle: Path, backend: str) -> dict[str, EngineRecord]:
    """All readable records of a bundle for one library, by target."""
    folder = bundle / FOLDER
    found = {}
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (place / RECORD_NAME).is_file():
            try:
                record = read_record(place)
            except (DataError, EngineError):
                continue
            if record.backend == backend:
                found[place.name] = record
    return found


def choose_record(bundle: Path, backend: str, target: str, capability: str | None) -> tuple[Path, EngineRecord]:
    """The engines to load: those of the named target, else those for this device.

    Args:
        bundle: its directory.
        backend: `tensorrt` or `tensorrt_rtx`.
        target: a name, or empty.
        capability: of the device, where there is one.

    Raises:
        EngineError: there are none, or several and no reason to prefer one.
    """
    if target:
        folder = bundle / FOLDER / target
        return folder, read_record(folder)
    found = records(bundle, backend)
    fitting = [name for name, record in found.items() if record.capability == capability] or list(found)
    if len(fitting) == 1:
        return bundle / FOLDER / fitting[0], found[fitting[0]]
    raise EngineError(
        f"{bundle}: {FOLDER}", found=f"engines for {', '.join(fitting)}" if fitting else "no engines",
        wanted=f"engines that {backend} loads",
        cause="the target was not named" if fitting else "nothing was built yet",
        remedy="name one with the setting target=NAME" if fitting
        else "run: quantempo build BUNDLE --target TARGET",
    )


def require_fit(
    where: str, record: EngineRecord, library: str, capability: str | None, lean_runtime: str = ""
) -> None:
    """Refuse plans of another library version or another device.

    Args:
        where: the folder.
        record: of the plans.
        library: version that is installed here.
        capability: of the device here; `None` skips that part.
        lean_runtime: file of the runtime of the version that built the plans; empty for none.

    Raises:
        EngineError: with what to do.
    """
    if parse_version(record.library) != parse_version(library):
        _require_lean(where, record, library, lean_runtime)
    if capability is not None and capability != record.capability:
        raise EngineError(
            where, found=f"plans for compute capability {record.capability}",
            wanted=f"plans for {capability}, which this GPU has", cause="plans are bound to the GPU's generation",
            remedy="run `quantempo build` on this device, or with the target that names it",
        )


def _require_lean(where: str, record: EngineRecord, library: str, lean_runtime: str) -> None:
    """Refuse plans of another version, unless the lean runtime of that version is at hand to run them."""
    found, wanted = f"plans of {record.backend} {record.library}", f"plans of {record.backend} {library}"
    if not (record.version_compatible and version_loads(record.backend, record.library, library)):
        compatible = record.backend == "tensorrt" and not record.version_compatible
        raise EngineError(
            where, found=found, wanted=wanted, cause="plans are bound to the library version that built them",
            remedy=f"run: quantempo build BUNDLE --target {record.target}"
            + (", with --version-compatible where later versions must load it" if compatible else ""),
        )
    if not lean_runtime or not Path(lean_runtime).is_file():
        raise EngineError(
            where, found=found + (f", and no file {lean_runtime}" if lean_runtime else ""),
            wanted=f"{wanted}, or the lean runtime of {record.library}",
            cause="version-compatible plans are run by the runtime of the version that built them, which they do not "
            "contain",
            remedy=f"pass the setting lean_runtime=FILE, libnvinfer_lean of tensorrt-lean {record.library}; or build "
            "again",
        )


def version_loads(backend: str, built: str, here: str) -> bool:
    """Whether a library can run a version-compatible plan of another version, by that version's lean runtime.

    A later release of the same major version can, and TensorRT 11 the plans of 10.  Plans of TensorRT for RTX are never
    compatible between releases (NVIDIA's documentation, "Engine Compatibility").
    """
    one, two = parse_version(built), parse_version(here)
    return backend == "tensorrt" and two > one and (two[0] == one[0] or (one[0], two[0]) == (10, 11))


def find_plan(where: str, record: EngineRecord, graph: str, kind: str = "") -> str:
    """The built graph that serves a graph: itself, or the same variant in another dialect and float type.

    All quantized kinds of a variant have one contract.  Among several that were built, one of the graph's own dialect
    comes first, then the target's order counts.

    Args:
        where: for messages.
        record: what was built.
        graph: its name.
        kind: `DIALECT-TYPE` that the user wants in place of the graph's own.

    Raises:
        EngineError: names what was built.
    """
    variant, own = _split(graph)
    is_float = own.startswith("float")
    there = {_split(name)[1]: name for name in record.plans if _split(name)[0] == variant}
    there = {found: name for found, name in there.items() if found.startswith("float") == is_float}
    wanted = own if is_float or not kind else kind
    if wanted in there:
        return there[wanted]
    if there and wanted == own:
        dialect = own.partition("-")[0]
        order = target(record.target).kinds if record.target in targets() else ()
        ranks = {found: rank for rank, found in enumerate(order)}
        best = min(there, key=lambda f: (f.partition("-")[0] != dialect, ranks.get(f, len(ranks)), f))
        return there[best]
    raise EngineError(
        where, found=f"plans of {', '.join(sorted(record.plans)) or 'nothing'}",
        wanted=f"a plan of {f'{variant}.{wanted}'!r}", cause="this graph was not built for the target",
        remedy=f"run: quantempo build BUNDLE --target {record.target}"
        + (f" --graphs {wanted}" if wanted != own else "") + f"; {nearest(graph, record.plans)}",
    )


def _split(graph: str) -> tuple[str, str]:
    """Variant and kind of `VARIANT.DIALECT-TYPE`; a variant may hold points itself (`reuse.2`)."""
    variant, _, kind = graph.rpartition(".")
    return variant, kind


def load_plan(folder: Path, record: EngineRecord, name: str, bundle: Path) -> bytes:
    """The bytes of a plan, after every check that needs no device.

    Raises:
        EngineError: others can write to the folder, or the bundle was compiled again since.
        DigestMismatch: the file is not the one that was built.
    """
    check_private(folder)
    manifest = digest((bundle / MANIFEST_NAME).read_bytes()) if (bundle / MANIFEST_NAME).is_file() else ""
    if manifest != record.manifest:
        raise EngineError(
            str(folder), found=f"engines of the bundle {record.manifest[:12]}…",
            wanted=f"engines of {manifest[:12] or 'no bundle'}…",
            cause="the bundle was compiled again after its engines were built",
            remedy=f"run: quantempo build BUNDLE --target {record.target}",
        )
    plan = record.plans[name]
    path = folder / plan.file
    if Path(plan.file).name != plan.file or path.is_symlink() or not path.is_file():
        raise EngineError(
            str(path), found="no such plain file", wanted="the plan that engine.json names",
            cause="it was moved or replaced", remedy=f"run: quantempo build BUNDLE --target {record.target}",
        )
    data = path.read_bytes()
    if digest(data) != plan.entry.sha256:
        raise DigestMismatch(
            str(path), found=f"digest {digest(data)[:12]}…", wanted=f"{plan.entry.sha256[:12]}…",
            cause="the plan was damaged or exchanged; plans are code and are not loaded then",
            remedy=f"run: quantempo build BUNDLE --target {record.target}",
        )
    if plan.weights == "bundle":
        graph = bundle / "graphs" / f"{name}.onnx"
        data = unpack(data, weight_sources(graph), str(path))
    return data


def weight_files(graph: Path) -> dict[str, Path]:
    """The weight files of a graph by name."""
    return {name: graph.parent / name for name in external_files(graph)}
