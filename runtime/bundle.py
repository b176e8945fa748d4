"""Opens a bundle directory and proves it before anything is loaded.

Order of checks: the manifest is JSON, of a version and with features that this reader knows, closed; every path in it
is a plain relative one; every listed file is a regular file, reached through no link, of the listed size and digest;
nothing unlisted lies next to them; cached programs fit the graphs.  Folders in `SIDECARS` belong to whoever wrote them
and are not looked into.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantempo.contracts.codec import digest, from_data, parse_json
from quantempo.contracts.manifest import FEATURES, MANIFEST_NAME, MANIFEST_VERSION, FileEntry, Manifest
from quantempo.contracts.program import StepProgram, check_program
from quantempo.contracts.table import ScaleTable
from quantempo.contracts.variants import Vectors
from quantempo.errors import BundleError, DigestMismatch, NewerBundle, RequestError, UnknownFeature, UnsafePath, nearest
from quantempo.runtime.bundle_cache import check_cached, check_features, read_vectors

SIDECARS = ("engines", "report", "reference")
"""Folders that are no part of what the manifest vouches for."""
LOOSE = ("README.md", "LICENSE", "LICENSE.txt")
"""Files that may lie at the top of a bundle unlisted (model cards), as may names that begin with a dot."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class OpenBundle:
    """A verified bundle.

    Args:
        root: its directory.
        manifest: its table of contents.
        digest: SHA-256 of the manifest file, which names the whole bundle.
    """

    root: Path
    manifest: Manifest
    digest: str

    def path(self, name: str) -> Path:
        """Where a listed file lies.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise _unlisted(str(self.root), name, self.manifest)
        return self.root / name

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts that have a program, ascending."""
        return tuple(sorted(int(steps) for steps in self.manifest.programs.files))

    def program(self, steps: int) -> StepProgram:
        """The step program of the bundle's own scheduler for a number of steps.

        Raises:
            RequestError: there is none; the nearest is named.
            DataError: the file is not a program.
        """
        name = self.manifest.programs.files.get(str(steps))
        if name is None:
            available = self.steps
            close = min(available, key=lambda n: (abs(n - steps), n), default=None)
            near = "none is in the bundle" if close is None else f"the nearest in the bundle is {close}"
            raise RequestError(
                "num_inference_steps", found=str(steps), wanted=f"a step count with a program ({_ranges(available)})",
                cause=f"the bundle holds no {self.manifest.programs.scheduler} program for {steps} steps",
                remedy=f"{near}; or trace one with the extra 'compile' and pass it as program=",
            )
        return self._program(name)

    @property
    def cached_steps(self) -> tuple[int, ...]:
        """The step counts that have a cached program, ascending."""
        return tuple(sorted(int(steps) for steps in self.manifest.cache.programs)) if self.manifest.cache else ()

    def cached_program(self, steps: int) -> StepProgram:
        """The step program that reuses features across calls; see `cached_steps`.

        Raises:
            DataError: the file is not a program.
        """
        assert self.manifest.cache is not None
        return self._program(self.manifest.cache.programs[str(steps)])

    def _program(self, name: str) -> StepProgram:
        program = from_data(StepProgram, parse_json(self.path(name).read_bytes(), name), name)
        check_program(program, name)
        return program

    def vectors(self) -> Vectors:
        """The per-call vectors of corrections, (rows, channels) by name.

        Raises:
            BundleError: the file does not hold such arrays.
        """
        name = self.manifest.vectors
        return {} if name is None else read_vectors(self.path(name), name)

    def check_cached(self) -> None:
        """Refuse cached programs and vectors that do not fit the graphs, before anything is loaded.

        Raises:
            BundleError, DataError.
        """
        programs = (
            (steps, self.manifest.cache.programs[str(steps)] if self.manifest.cache else "", self.cached_program(steps))
            for steps in self.cached_steps
        )
        check_cached(self.manifest, programs, self.vectors())

    def scale_table(self) -> ScaleTable | None:
        """The activation scales that the graphs were built from; `None` in a float bundle."""
        if self.manifest.tables is None or self.manifest.partition is None:
            return None
        from safetensors.numpy import load_file

        return ScaleTable.from_arrays(self.manifest.partition, load_file(self.path(self.manifest.tables)))


def _ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers as people write them: `1 to 5, 10, 20`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs) or "none"


def read_bundle(path: str | Path) -> OpenBundle:
    """Open and verify a bundle.

    Raises:
        BundleError: not a bundle, a file missing, or a file too many.
        NewerBundle, UnknownFeature: it needs a newer reader.
        UnknownKey, DataError: the manifest does not have the shape that it should.
        UnsafePath: a path leaves the bundle or leads through a link.
        DigestMismatch: a file's size or bytes are not those that were written.
    """
    bundle = read_manifest(path)
    for name, entry in sorted(bundle.manifest.files.items()):
        _check_file(bundle.root, name, entry)
    _check_strangers(bundle.root, bundle.manifest)
    bundle.check_cached()
    return bundle


def read_manifest(path: str | Path) -> OpenBundle:
    """The bundle as its manifest describes it, with no other file opened: for looking at it, not for running it.

    Raises:
        BundleError, NewerBundle, UnknownFeature, UnknownKey, DataError, UnsafePath: as `read_bundle`.
    """
    root = Path(path)
    file = root / MANIFEST_NAME
    if not root.is_dir() or not (file.is_file() or file.is_symlink()):
        raise BundleError(
            f"{root}", found=f"no {MANIFEST_NAME}" if root.is_dir() else "no such directory",
            wanted="a bundle directory", cause="a wrong path, or a compile that did not finish",
            remedy="give the directory that `quantempo compile -o` wrote",
        )
    if file.is_symlink():
        raise _link(MANIFEST_NAME, MANIFEST_NAME)
    text = file.read_bytes()
    data = parse_json(text, MANIFEST_NAME)
    _check_age(data)
    manifest = from_data(Manifest, data, MANIFEST_NAME)
    check_references(manifest)
    for name in sorted(manifest.files):
        _check_links(root, name)
    return OpenBundle(root, manifest, digest(text))


def _check_age(data: Any) -> None:
    """Version and features come first: a newer manifest has keys that this reader would call unknown."""
    version = data.get("version", MANIFEST_VERSION) if isinstance(data, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise NewerBundle(
            f"{MANIFEST_NAME}.version", found=str(version), wanted=f"at most {MANIFEST_VERSION}",
            cause="the bundle was written by a newer quantempo", remedy="run: pip install --upgrade quantempo",
        )
    requires = data.get("requires", []) if isinstance(data, dict) else []
    for feature in requires if isinstance(requires, list) else []:
        if feature not in FEATURES:
            raise UnknownFeature(
                f"{MANIFEST_NAME}.requires", found=f"the feature {feature!r}",
                wanted=f"only {', '.join(sorted(FEATURES))}", cause="the bundle was written by a newer quantempo",
                remedy="run: pip install --upgrade quantempo",
            )


def check_path(name: str, where: str) -> None:
    """Refuse a path that is not plainly relative: absolute, with `.` or `..`, a backslash, a drive or a NUL.

    Raises:
        UnsafePath.
    """
    odd = any(c in name for c in "\\:\0")
    if odd or name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise UnsafePath(
            where, found=f"the path {name!r}", wanted="a path below the bundle, with forward slashes",
            cause="the manifest was changed by hand or made to reach other files", remedy="do not use this bundle",
        )


def _link(name: str, step: str) -> UnsafePath:
    return UnsafePath(
        name, found=f"{step!r} is a link", wanted="a plain file in plain folders",
        cause="the bundle was put together by hand", remedy="copy the file to where the link is",
    )


def references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(place in the manifest, file) of every file that the manifest points to."""
    for name, graph in manifest.graphs.items():
        yield f"graphs.{name}.file", graph.file
        for file in graph.data:
            yield f"graphs.{name}.data", file
    for steps, file in manifest.programs.files.items():
        yield f"programs.files.{steps}", file
    yield "programs.scheduler_file", manifest.programs.scheduler_file
    for place, optional in (("tables", manifest.tables), ("plan", manifest.plan), ("vectors", manifest.vectors)):
        if optional is not None:
            yield place, optional
    if manifest.cache is not None:
        yield "cache.plan", manifest.cache.plan
        for steps, file in manifest.cache.programs.items():
            yield f"cache.programs.{steps}", file


def check_references(manifest: Manifest) -> None:
    """Refuse a manifest that points at unlisted files or at places where a bundle's files may not lie.

    Raises:
        UnsafePath, BundleError.
    """
    for name in manifest.files:
        check_path(name, f"{MANIFEST_NAME}.files")
        if name.split("/")[0] in SIDECARS or name == MANIFEST_NAME:
            raise UnsafePath(
                f"{MANIFEST_NAME}.files", found=f"{name!r}", wanted=f"no file in {', '.join(SIDECARS)}",
                cause="sidecar folders change after the bundle is written", remedy="compile the bundle again",
            )
    for place, name in references(manifest):
        check_path(name, f"{MANIFEST_NAME}.{place}")
        if name not in manifest.files:
            raise _unlisted(f"{MANIFEST_NAME}.{place}", name, manifest)
    for graph, entry in manifest.graphs.items():
        for name in (entry.file, *entry.data):
            if not name.startswith("graphs/"):
                raise UnsafePath(
                    f"{MANIFEST_NAME}.graphs.{graph}", found=f"the path {name!r}", wanted="a path below graphs/",
                    cause="engines open files in graphs/ alone", remedy="compile the bundle again",
                )
    decoder = manifest.decoder.graph
    if decoder is not None and decoder not in manifest.graphs:
        raise BundleError(
            f"{MANIFEST_NAME}.decoder.graph", found=f"{decoder!r}", wanted="a key of graphs",
            cause="the manifest was changed by hand", remedy=nearest(decoder, manifest.graphs),
        )
    check_features(manifest)


def _unlisted(where: str, name: str, manifest: Manifest) -> BundleError:
    return BundleError(
        where, found=f"{name!r}, which the manifest does not list", wanted="a file with size and digest in `files`",
        cause="the manifest was changed by hand", remedy=nearest(name, manifest.files),
    )


def _check_links(root: Path, name: str) -> None:
    step = root
    for part in name.split("/"):
        step = step / part
        if step.is_symlink():
            raise _link(name, step.relative_to(root).as_posix())


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    path = root / name
    if not path.is_file():
        raise BundleError(
            name, found="no such file", wanted=f"a file of {entry.size} bytes",
            cause="the bundle was copied incompletely", remedy="copy or compile it again",
        )
    size = path.stat().st_size
    if size != entry.size:
        what = "cut short" if size < entry.size else "changed"
        raise DigestMismatch(
            name, found=f"{size} bytes", wanted=f"{entry.size} bytes", cause=f"the file was {what}",
            remedy="copy or compile the bundle again",
        )
    found = file_digest(path)
    if found != entry.sha256:
        raise DigestMismatch(
            name, found=f"SHA-256 {found}", wanted=f"SHA-256 {entry.sha256}",
            cause="the file was changed after the bundle was written", remedy="copy or compile the bundle again",
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _check_strangers(root: Path, manifest: Manifest) -> None:
    """An unlisted file could be reached by a graph; a link to a folder could hide many."""
    for folder, folders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        top = relative == Path()
        if top:
            folders[:] = [f for f in folders if f not in SIDECARS and not f.startswith(".")]
        for name in sorted(folders):
            if (Path(folder) / name).is_symlink():
                raise _link((relative / name).as_posix(), (relative / name).as_posix())
        for name in sorted(files):
            inner = (relative / name).as_posix()
            loose = top and (name in (*LOOSE, MANIFEST_NAME) or name.startswith("."))
            if inner not in manifest.files and not loose:
                raise BundleError(
                    inner, found="a file that the manifest does not list",
                    wanted=f"such files only in {', '.join(f + '/' for f in SIDECARS)}",
                    cause="something was added to the bundle by hand", remedy="move the file elsewhere",
                )
