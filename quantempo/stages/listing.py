"""What a stage store holds, for people."""

from __future__ import annotations

import time
from pathlib import Path

from quantempo.progress import SilentProgress
from quantempo.stages.store import StageStore, default_root


def list_stages(root: Path | None = None, keep: float | None = None) -> str:
    """A line for each result; with `keep`, those that were not used for longest are removed first.

    Args:
        root: the store; `None` for the user's.
        keep: gigabytes that may stay.
    """
    store = StageStore(root or default_root(), SilentProgress())
    freed = store.trim(int(keep * 1e9)) if keep is not None else 0
    lines, total = [], 0
    for entry in sorted(store.entries(), key=lambda entry: -entry.used):
        total += entry.size
        days = (time.time() - entry.used) / 86400
        state = "unfinished" if entry.folder.suffix == ".partial" else ""
        lines.append(
            f"{entry.folder.parent.name:<10} {entry.folder.stem:<26}{entry.size / 1e6:>10.1f} MB "
            f"{days:>7.1f} days ago {state}".rstrip()
        )
    removed = f", {freed / 1e6:.1f} MB removed" if keep is not None else ""
    return "\n".join([*lines, f"{store.root}: {total / 1e6:.1f} MB{removed}"])
