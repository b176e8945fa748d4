"""Compiled engines on disk, found by what they were made from.

A key is the digest of everything that decides what a compiled engine is: graph, weights, tables, shapes, flags, backend
with its version, and the device.  Nothing is found by name or date.  A compiled engine is code that this process will
run: the folder must be writable by its owner alone, and a file is handed out only when its digest is the one that was
written down when it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json
from quantempo.contracts.manifest import FileEntry
from quantempo.errors import DataError, EngineError

ENTRY_NAME = "entry.json"
SINGLE_NAME = "engine.bin"
ENTRY_VERSION = 1
CHUNK_BYTES = 1 << 20
_LEFTOVER = "."
"""Unfinished entries start with this."""

Notice = Callable[[str], None]


@dataclass(frozen=True)
class KeyParts:
    """What a compiled engine depends on.

    Args:
        graph: digest of the graph file.
        backend, version: the library that compiles.
        device: fingerprint of the device or of the CPU's features.
        weights: digest by weight file.
        tables: digest by scale table, where they are not part of the graph.
        shapes: sizes of the symbolic dimensions.
        flags: options of the compilation.
    """

    graph: str
    backend: str
    version: str
    device: str
    weights: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The content address."""
        return digest(canonical_json(self))

    def flat(self) -> dict[str, str]:
        """All parts by name, e.g. `flags.threads`."""
        found: dict[str, str] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, str):
                found[part.name] = value
            else:
                found.update({f"{part.name}.{key}": item for key, item in sorted(value.items())})
        return found


@dataclass(frozen=True)
class Entry:
    """What lies beside the files of an entry.

    Args:
        parts: what it was made from.
        files: digest and size by name.
    """

    parts: KeyParts
    files: Mapping[str, FileEntry]
    version: int = ENTRY_VERSION


@dataclass(frozen=True)
class Difference:
    """One part that differs between two keys; `None` where one of them does not have it."""

    part: str
    now: str | None
    before: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.part}: {self.now} (new)"
        if self.now is None:
            return f"{self.part}: gone (was {self.before})"
        return f"{self.part}: {self.now} (was {self.before})"


def differences(parts: KeyParts, previous: KeyParts) -> tuple[Difference, ...]:
    """The parts in which two keys differ, in the order of their names."""
    now, before = parts.flat(), previous.flat()
    return tuple(
        Difference(name, now.get(name), before.get(name))
        for name in sorted({*now, *before})
        if now.get(name) != before.get(name)
    )


def explain(parts: KeyParts, previous: KeyParts | None) -> str:
    """The parts of a key, one a line, and what changed against another one.

    Args:
        parts: the key that was looked for.
        previous: the key of an earlier entry; `None` where there is none.
    """
    lines = [f"key {parts.key}", *(f"  {name}: {value}" for name, value in parts.flat().items())]
    if previous is None:
        return "\n".join([*lines, "no earlier entry to compare with"])
    changed = differences(parts, previous)
    if not changed:
        return "\n".join([*lines, "nothing changed"])
    return "\n".join([*lines, f"changed against {previous.key[:12]}:", *(f"  {item}" for item in changed)])


class EngineCache:
    """A folder of compiled engines.

    Args:
        folder: made with mode 700 where it is missing.
        notice: is told when an entry is damaged, or was made for another device or library version, and is built
            again; a warning by default.

    Raises:
        EngineError: others can write to the folder, or it belongs to somebody else.
    """

    def __init__(self, folder: Path, notice: Notice | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self._notice = notice or (lambda text: warnings.warn(text, stacklevel=3))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, str(error), "choose another folder") from error
        check_private(self.folder)

    def get_or_build(self, parts: KeyParts, build: Callable[[], bytes]) -> bytes:
        """The bytes of a compiled engine; `build` is called on a miss alone."""

        def write(folder: Path) -> None:
            (folder / SINGLE_NAME).write_bytes(build())

        for attempt in (0, 1):
            folder = self.folder_for(parts, write)
            # Verified and used are the same bytes: the file is read once.
            data = (folder / SINGLE_NAME).read_bytes()
            entry = self._read_entry(folder)
            if entry is not None and digest(data) == entry.files[SINGLE_NAME].sha256:
                return data
            if attempt == 0:
                self._discard(folder, "its bytes changed while they were read")
        raise _unusable(self.folder, f"an entry that changes while it is read ({parts.key})", "choose another folder")

    def folder_for(self, parts: KeyParts, build: Callable[[Path], None]) -> Path:
        """A folder with the files of a compiled engine, each of them verified.

        Args:
            parts: what it is made from.
            build: writes the files into the folder that it is given; called on a miss alone.  Where it raises, nothing
                is left behind.
        """
        place = self.folder / parts.key
        check_private(self.folder)
        if place.exists():
            fault = self._fault(place, parts)
            if fault is None:
                os.utime(place)
                return place
            self._discard(place, fault)
        else:
            self._tell_of_elsewhere(parts)
        work = Path(tempfile.mkdtemp(prefix=f"{_LEFTOVER}{parts.key[:12]}-", dir=self.folder))
        try:
            build(work)
            names = sorted(p.name for p in work.iterdir())
            entry = Entry(parts, {name: file_entry(work / name) for name in names})
            (work / ENTRY_NAME).write_text(canonical_json(entry))
            _flush(work)
            self._publish(work, place, parts)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return place

    def _tell_of_elsewhere(self, parts: KeyParts) -> None:
        """Say why an entry of the same graph is no hit, where device or library are the only difference."""
        for entry in self.entries():
            changed = differences(parts, entry.parts)
            if changed and {item.part for item in changed} <= {"device", "version"}:
                what = ", ".join(str(item) for item in changed)
                self._notice(f"engine cache: entry {entry.parts.key[:12]} does not fit here and is built anew: {what}")
                return

    def _publish(self, work: Path, place: Path, parts: KeyParts) -> None:
        try:
            work.rename(place)
        except OSError:
            # Another process was faster; its entry is as good, if it is whole.
            fault = self._fault(place, parts)
            if fault is not None:
                self._discard(place, fault)
                work.rename(place)

    def lookup(self, parts: KeyParts) -> Entry | None:
        """The entry of a key; `None` on a miss or where its files are damaged."""
        place = self.folder / parts.key
        return self._read_entry(place) if place.exists() and self._fault(place, parts) is None else None

    def entries(self) -> tuple[Entry, ...]:
        """All readable entries, most recently used first."""
        places = [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(_LEFTOVER)]
        places.sort(key=lambda p: (-p.stat().st_mtime_ns, p.name))
        found = (self._read_entry(place) for place in places)
        return tuple(entry for entry in found if entry is not None)

    def explain(self, parts: KeyParts) -> str:
        """Hit or miss, the parts of the key, and on a miss what differs from the closest entry of the same backend."""
        if self.lookup(parts) is not None:
            return "hit\n" + explain(parts, parts)
        same = [entry.parts for entry in self.entries() if entry.parts.backend == parts.backend]
        closest = min(same, key=lambda other: len(differences(parts, other)), default=None)
        return "miss\n" + explain(parts, closest)

    def prune(self, keep_bytes: int) -> tuple[str, ...]:
        """Remove what was not used for longest until the rest fits; returns the keys that went."""
        gone = []
        for entry in self.entries():
            keep_bytes -= sum(item.size for item in entry.files.values())
            if keep_bytes < 0:
                shutil.rmtree(self.folder / entry.parts.key)
                gone.append(entry.parts.key)
        return tuple(gone)

    def _read_entry(self, place: Path) -> Entry | None:
        try:
            text = (place / ENTRY_NAME).read_bytes()
            return from_data(Entry, parse_json(text, str(place)), str(place))
        except (OSError, DataError):
            return None

    def _fault(self, place: Path, parts: KeyParts) -> str | None:
        """What is wrong with an entry; `None` where it may be loaded."""
        entry = self._read_entry(place)
        if entry is None or entry.version != ENTRY_VERSION:
            return "its table of contents cannot be read"
        if entry.parts.key != parts.key:
            return "it was made for " + ", ".join(str(item) for item in differences(parts, entry.parts))
        present = {p.name for p in place.iterdir()} - {ENTRY_NAME}
        if present != set(entry.files):
            return f"its files are {', '.join(sorted(present)) or 'none'}"
        for name, wanted in entry.files.items():
            path = place / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is no plain file"
            if file_entry(path) != wanted:
                return f"{name} has another digest than when it was made"
        return None

    def _discard(self, place: Path, fault: str) -> None:
        self._notice(f"engine cache: entry {place.name[:12]} is not used and is built again: {fault}")
        if place.is_symlink() or place.is_file():
            place.unlink()
        else:
            shutil.rmtree(place, ignore_errors=True)


def check_private(folder: Path) -> None:
    """Refuse a folder that anyone but this user (and root) can write to, or replace.

    Raises:
        EngineError: with the command that mends it.
    """
    if os.name != "posix":
        return  # other systems keep no mode bits; their user folders are private by default
    real = folder.resolve()
    state = real.stat()
    if state.st_uid not in (os.getuid(), 0):
        raise _unusable(folder, f"a folder of user {state.st_uid}", "choose a folder of your own")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(state.st_mode)
        raise _unusable(folder, f"a folder that others can write to (mode {mode:o})", f"run: chmod 700 {real}")
    for parent in real.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            found = f"a folder in {parent}, where anyone can replace it (mode {stat.S_IMODE(mode):o})"
            raise _unusable(folder, found, f"run: chmod o-w {parent}, or choose another folder")


def _unusable(folder: Path, found: str, remedy: str) -> EngineError:
    return EngineError(
        f"engine cache {folder}", found=found, wanted="a folder that you alone can write to",
        cause="compiled engines are code: whoever can change them runs code as you", remedy=remedy,
    )


_digests: dict[tuple[Any, ...], str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; computed once per process while size, time and identity stay the same."""
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    if key not in _digests:
        _digests[key] = file_entry(path).sha256
    return _digests[key]


def file_entry(path: Path) -> FileEntry:
    """Digest and size of a file, from its bytes."""
    state, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
            size += len(chunk)
    return FileEntry(state.hexdigest(), size)


def _flush(folder: Path) -> None:
    """Make sure that the bytes are on the disk before the entry gets its name."""
    for path in folder.iterdir():
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
