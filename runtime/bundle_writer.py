"""Writes a bundle so that it is there whole or not at all.

Files go to a hidden sibling directory; `finish` hashes them, writes the manifest and syncs; leaving the `with` block
renames the directory into place.  After an error nothing is left, and an older bundle at the target is untouched.  A
process that is killed leaves its hidden directory; the next writer of the same target removes it.

An older bundle is exchanged for the new one in one step, where the system can do that (Linux); elsewhere two renames
are needed, and a process that is killed between them leaves the older bundle under a hidden name, from which the next
writer puts it back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import glob
import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from quantempo.contracts.codec import canonical_json, digest
from quantempo.contracts.manifest import MANIFEST_NAME, FileEntry, Manifest
from quantempo.errors import OutputExists
from quantempo.runtime.bundle import SIDECARS, OpenBundle, check_path, check_references, file_digest


class BundleWriter:
    """A context manager that makes a bundle directory.

    Args:
        target: the directory to be.
        overwrite: whether an older bundle there may be replaced; anything that is not a bundle never is.

    Raises:
        OutputExists: on entry, when the target is taken; nothing was written then.
    """

    def __init__(self, target: str | Path, overwrite: bool = False) -> None:
        # Only the parent is resolved: a link at the target itself must be seen as such.
        given = Path(target)
        self.target = given.parent.resolve() / given.name if given.name not in ("", "..") else given.resolve()
        self._overwrite = overwrite
        self._folder: Path | None = None
        self._finished: OpenBundle | None = None

    @property
    def root(self) -> Path:
        """The directory that is being filled."""
        if self._folder is None:
            raise RuntimeError("BundleWriter is used outside its with block")
        return self._folder

    def __enter__(self) -> BundleWriter:
        """Check the target and make the temporary directory."""
        clean_up(self.target)
        check_target(self.target, self._overwrite)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self.target.parent / f".{self.target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Move the bundle into place, or remove what was written."""
        try:
            if kind is None:
                if self._finished is None:
                    raise RuntimeError("BundleWriter.finish was not called")
                self._publish()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where to write a file of the bundle; its folders are made.

        Raises:
            UnsafePath: the name is not a plain relative path.
        """
        check_path(name, "bundle file")
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_bytes(self, name: str, content: bytes) -> None:
        """Write a file."""
        self.path(name).write_bytes(content)

    def add_json(self, name: str, value: Any) -> None:
        """Write a contract value as canonical JSON."""
        self.add_bytes(name, canonical_json(value).encode())

    def add_file(self, name: str, source: Path) -> None:
        """Copy a file."""
        shutil.copyfile(source, self.path(name))

    def finish(self, manifest: Manifest) -> OpenBundle:
        """Hash everything, fill in `files`, and write the manifest.

        Args:
            manifest: with any `files`; they are replaced by what lies in the directory, sidecars apart.

        Returns:
            The bundle as it will be at the target, where it lies once the `with` block has ended.

        Raises:
            BundleError, UnsafePath: the manifest names a file that was not written, or one at a wrong place.
            DataError: a cached program does not fit the graphs.
        """
        files = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name.split("/")[0] not in SIDECARS and name != MANIFEST_NAME:
                files[name] = FileEntry(file_digest(path), path.stat().st_size)
        complete = dataclasses.replace(manifest, files=files)
        check_references(complete)
        text = canonical_json(complete).encode()
        (self.root / MANIFEST_NAME).write_bytes(text)
        OpenBundle(self.root, complete, digest(text)).check_cached()
        self._finished = OpenBundle(self.target, complete, digest(text))
        return self._finished

    def set_aside(self) -> Path:
        """Let the finished bundle go to `aside(target)`, and leave the target alone; returns that path.

        Raises:
            OutputExists: something other than a bundle lies there.
        """
        self.target, self._overwrite = aside(self.target), True
        check_target(self.target, True)
        if self._finished is not None:
            self._finished = dataclasses.replace(self._finished, root=self.target)
        return self.target

    def _publish(self) -> None:
        _sync_tree(self.root)
        if not os.path.lexists(self.target):
            self.root.rename(self.target)
        else:
            check_target(self.target, self._overwrite)
            if not _exchange(self.root, self.target):
                self._replace()
        _sync(self.target.parent)

    def _replace(self) -> None:
        """Two renames, undone where the second one fails."""
        old = self.target.parent / f".{self.target.name}.old-{os.getpid()}-{secrets.token_hex(4)}"
        self.target.rename(old)
        try:
            self.root.rename(self.target)
        except OSError:
            old.rename(self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def aside(target: Path) -> Path:
    """Where a bundle goes that was not good enough for its target: `NAME.rejected` beside it."""
    return target.with_name(f"{target.name}.rejected")


def clean_up(target: Path) -> None:
    """Remove what killed writers of a target left beside it, and put back an older bundle that one had moved away."""
    for kind in ("old", "partial"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*-*"):
            owner = path.name.split("-")[-2]
            if not owner.isdecimal() or _alive(int(owner)):
                continue
            if kind == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is somebody else's
    return True


EXCHANGE, HERE = 2, -100
"""`RENAME_EXCHANGE` and `AT_FDCWD` of Linux."""


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; false where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    result: int = rename(HERE, os.fsencode(first), HERE, os.fsencode(second), EXCHANGE)
    return result == 0


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse an output path that is taken; to be called before hours of work, too.

    An empty directory counts as free.

    Raises:
        OutputExists: a file, a link, a directory that is no bundle, or a bundle without `overwrite`.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        found, remedy = "a link" if target.is_symlink() else "a file", "choose another output path"
    elif not any(target.iterdir()):
        return
    elif not _is_bundle(target):
        found, remedy = "a directory that is not a bundle", "choose another output path; it will not be overwritten"
    elif overwrite:
        return
    else:
        found, remedy = "a bundle", "choose another output path, or allow overwriting (--overwrite, overwrite=True)"
    raise OutputExists(
        f"{target}", found=found, wanted="a path that is free", cause="an earlier run wrote there", remedy=remedy
    )


def _is_bundle(folder: Path) -> bool:
    """Whether a directory is ours to replace: other tools have files of the name manifest.json as well."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"denoiser", "graphs", "files"} <= set(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
