"""What older versions of diffusers and torch lose of the classes that are covered with the newest.

Takes sweeps that tools/model_sweep.py made under other versions (`--json FILE`, with the older packages first on
PYTHONPATH) and writes docs/models_versions.json:

    python tools/model_versions.py sweep-of-older.json sweep-of-oldest.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
GOOD = ("covered", "float")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    newest = json.loads((DOCS / "models.json").read_text())
    runs = [compared(newest, json.loads(path.read_text())) for path in options.sweeps]
    data = {"against": newest["libraries"], "runs": runs}
    (DOCS / "models_versions.json").write_text(json.dumps(data, indent=1) + "\n")
    for run in runs:
        print(run["libraries"], f"{run['covered']} of {run['expected']}, lost: {', '.join(run['lost']) or 'none'}")
    return 0


def compared(newest: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """One run against the newest versions.

    Returns:
        `extent`: `int8` where classes went all the way, `float graph` where the run ended with the comparison of the
        float graph with the module; `absent`: classes that this diffusers does not have; `not run`; `expected`: those
        of the rest that are covered with the newest versions; `covered`: of these; `lost`: the others, with the cause.
    """
    found = older["classes"]
    absent = sorted(name for name, finding in found.items() if finding["cause"].startswith("LookupError"))
    wanted = [name for name, finding in newest["classes"].items() if finding["status"] == "covered"]
    expected = [name for name in wanted if name in found and name not in absent]
    lost = {name: found[name]["cause"] for name in expected if found[name]["status"] not in GOOD}
    statuses = {finding["status"] for finding in found.values()}
    return {
        "libraries": older["libraries"], "extent": "float graph" if "float" in statuses else "int8", "absent": absent,
        "not run": sorted(set(wanted) - set(found)), "expected": len(expected), "covered": len(expected) - len(lost),
        "lost": lost,
    }


if __name__ == "__main__":
    sys.exit(main())
