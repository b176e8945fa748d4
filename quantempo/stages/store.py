"""Results of stages, addressed by what they were made from.

A stage's *key* is a digest over its name and its inputs: digests of files, the recipe's fields that it reads, keys of
the stages before it, versions of libraries and a digest of the code.  Its result is a folder of plain files under
`STAGE/KEY/`, with `stage.json` (inputs, sizes and digests of the files), and it is renamed into place when it is
complete.  So an interrupted run leaves whole results, which the next run takes, and at most one unfinished folder.

Two processes may share a store: a key is locked while it is made and while its files are in use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json
from quantempo.contracts.manifest import FileEntry
from quantempo.errors import DataError, DiskFull, RequestError
from quantempo.progress import Advance, Progress
from quantempo.runtime.bundle import file_digest

RECORD = "stage.json"
WORK_VARIABLE, LIMIT_VARIABLE = "QUANTEMPO_WORK", "QUANTEMPO_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
KEY_LENGTH = 24
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class StageRecord:
    """What `stage.json` holds.

    Args:
        inputs: digest of each input by its name.
        files: every other file of the folder.
    """

    stage: str
    inputs: Mapping[str, str]
    files: Mapping[str, FileEntry]


@dataclass(frozen=True)
class StageRun:
    """What happened to a stage in this compile.

    Args:
        stage: its name.
        reused: whether an earlier result was taken.
        why: for people: which input changed, or that none did.
    """

    stage: str
    reused: bool
    why: str


@dataclass(frozen=True)
class StageResult:
    """A complete stage: its folder, and its key for the stages after it."""

    folder: Path
    key: str

    def path(self, name: str) -> Path:
        """One of its files."""
        return self.folder / name


Make = Callable[[Path, Advance], None]
"""Fills the given folder; the second argument takes (done, total)."""


def default_root() -> Path:
    """`$QUANTEMPO_WORK`, else `quantempo/stages` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    if os.environ.get(WORK_VARIABLE):
        return Path(os.environ[WORK_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The XDG specification asks that relative paths are ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quantempo" / "stages"


def cache_limit() -> int:
    """Bytes that a store may hold: `$QUANTEMPO_CACHE_GB` (10^9 bytes), else 20 GB; 0 for no limit.

    Raises:
        RequestError: the variable does not hold a number of at least 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT_GB
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise RequestError(
            f"environment variable {LIMIT_VARIABLE}", found=repr(text), wanted="gigabytes, a number of at least 0",
            cause="a misspelling", remedy=f"set it to {DEFAULT_LIMIT_GB:g}, or to 0 for no limit",
        )
    return int(limit * 1e9)


def open_store(work: Path | str | None, progress: Progress) -> StageStore:
    """The user's store with its limit, or one in a folder of the caller's, which nothing limits."""
    if work is None:
        return StageStore(default_root(), progress, cache_limit())
    return StageStore(Path(work), progress)


class StageStore:
    """Runs stages or takes their earlier results.  A context manager; folders stay locked until it ends.

    Args:
        root: made when the first stage runs.
        progress: where each stage is shown, with the reason why it runs.
        limit: bytes that may stay on disk afterwards; the results that were not used for longest go first.
    """

    def __init__(self, root: Path, progress: Progress, limit: int = 0) -> None:
        self.root = root
        self.runs: list[StageRun] = []
        self._progress = progress
        self._limit = limit
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> StageStore:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the results, and keep to the limit.

        Raises:
            DiskFull: the block ended because a file could not be written.
        """
        self._locks.close()
        if self._limit and kind is None:
            self.trim(self._limit)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise DiskFull(
                f"disk of {error.filename or self.root}", found=os.strerror(error.errno), wanted="room for the files",
                cause="the disk, the quota or the limit on file sizes is reached",
                remedy="make room (`quantempo stages --keep 0` removes results of earlier compiles), or choose another "
                "disk with --work, and run the same command again: it goes on where it stopped",
            ) from error

    def run(self, stage: str, inputs: Mapping[str, Any], make: Make, *, resumes: bool = False) -> StageResult:
        """The result of a stage.

        Args:
            stage: its name, which is also the name of a folder.
            inputs: everything that the result depends on, JSON data by names that people read.
            make: fills a folder when there is no result yet.
            resumes: whether `make` goes on from what an interrupted run left in the folder.
        """
        digests = {name: digest(canonical_json({"value": value})) for name, value in inputs.items()}
        key = digest(canonical_json({"stage": stage, "inputs": digests}))[:KEY_LENGTH]
        place = self.root / stage / key
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = self._locks.enter_context(KeyLock(place.with_name(f"{key}.lock")))
        lock.take(self._progress, shared=True)
        state = _state(place)
        if state != "complete":
            lock.release()
            lock.take(self._progress)
            state = _state(place)  # another process may have made it meanwhile
        if state == "complete":
            self._progress.reused(stage, "same inputs")
            self.runs.append(StageRun(stage, True, "same inputs"))
            os.utime(place / RECORD)
        else:
            why = "its files were damaged" if state == "damaged" else self._why(stage, digests)
            partial = place.with_name(f"{key}.partial")
            if resumes and partial.is_dir():
                why += "; goes on from an interrupted run"
            with self._progress.stage(stage, why) as advance:
                self._make(stage, digests, place, partial, lambda folder: make(folder, advance), resumes)
            self.runs.append(StageRun(stage, False, why))
        lock.share()
        return StageResult(place, key)

    def _make(
        self, stage: str, inputs: Mapping[str, str], place: Path, partial: Path, make: Callable[[Path], None],
        resumes: bool,
    ) -> None:
        shutil.rmtree(place, ignore_errors=True)
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        try:
            make(partial)
            seal(partial, stage, inputs)
            partial.rename(place)
        except BaseException:
            if not resumes:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _why(self, stage: str, inputs: Mapping[str, str]) -> str:
        """Which inputs differ from the earlier result that is most like this one; the latest of several."""
        best: tuple[int, float] | None = None
        changed: list[str] = []
        for file in (self.root / stage).glob(f"*/{RECORD}"):
            try:
                earlier = from_data(StageRecord, parse_json(file.read_bytes(), str(file)), str(file)).inputs
                age = file.stat().st_mtime
            except (OSError, DataError):
                continue
            differing = sorted(n for n in {*earlier, *inputs} if earlier.get(n) != inputs.get(n))
            if best is None or (-len(differing), age) > best:
                best, changed = (-len(differing), age), differing
        return f"changed: {', '.join(changed)}" if changed else "first run"

    def trim(self, limit: int) -> int:
        """Remove the results that were not used for longest until at most `limit` bytes remain; returns bytes freed.

        Results that another process uses stay.
        """
        found = sorted(self.entries(), key=lambda entry: entry.used)
        excess = sum(entry.size for entry in found) - limit
        freed = 0
        for entry in found:
            if freed >= excess:
                break
            with contextlib.suppress(BlockingIOError), KeyLock(entry.lock) as lock:
                lock.take(None)
                shutil.rmtree(entry.folder, ignore_errors=True)
                freed += entry.size
        return freed

    def entries(self) -> list[Entry]:
        """All results, unfinished ones too."""
        found = []
        for folder in self.root.glob("*/*/"):
            if folder.is_dir():
                files = [path.stat() for path in folder.rglob("*") if path.is_file()]
                record = folder / RECORD
                used = record.stat().st_mtime if record.is_file() else folder.stat().st_mtime
                lock = folder.with_name(folder.name.removesuffix(".partial") + ".lock")
                found.append(Entry(folder, lock, sum(f.st_size for f in files), used))
        return found


@dataclass(frozen=True)
class Entry:
    """A folder of a store: its lock file, its size in bytes and when it was last used (seconds since 1970)."""

    folder: Path
    lock: Path
    size: int
    used: float


def seal(folder: Path, stage: str, inputs: Mapping[str, str]) -> None:
    """Write `stage.json` for the files of a folder, and bring everything to disk."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(file_digest(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    (folder / RECORD).write_text(canonical_json(StageRecord(stage, dict(inputs), files)))
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _state(folder: Path) -> str:
    """`complete`, `missing`, or `damaged`: files are not those that were written."""
    if not folder.is_dir():
        return "missing"
    try:
        record = from_data(StageRecord, parse_json((folder / RECORD).read_bytes(), RECORD), RECORD)
        for name, entry in record.files.items():
            path = folder / name
            if path.stat().st_size != entry.size or file_digest(path) != entry.sha256:
                return "damaged"
    except (OSError, DataError):
        return "damaged"
    return "complete"


class KeyLock:
    """A lock file: many may read, one may write.  It ends with the block, or with the process however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> KeyLock:
        """Open the file; nothing is locked yet."""
        self._file = self._path.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        if self._file is not None:
            self._file.close()

    def take(self, progress: Progress | None, shared: bool = False) -> None:
        """Lock, waiting for others.

        Args:
            progress: shows that this process waits; `None` not to wait.
            shared: for reading only.

        Raises:
            BlockingIOError: another process holds the lock, and nobody waits.
        """
        try:
            self._flock(shared)
        except BlockingIOError:
            if progress is None:
                raise
            with progress.stage(f"{self._path.parent.name}: wait for another process"):
                while True:
                    time.sleep(0.2)  # polled, so that Ctrl-C is heard
                    with contextlib.suppress(BlockingIOError):
                        return self._flock(shared)

    def share(self) -> None:
        """Let others read, too."""
        self._flock(True)

    def release(self) -> None:
        """Unlock."""
        fcntl = _fcntl()
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _flock(self, shared: bool) -> None:
        fcntl = _fcntl()
        if fcntl is not None:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _fcntl() -> Any:
    """File locks, where the system has them (POSIX)."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl
