"""Compile what the C++ runtime says about engine libraries against the libraries' own headers.

    python tools/cpp_headers.py [--onnxruntime FOLDER...] [--tensorrt FOLDER... --cuda FOLDER...] [--json FILE]

The ONNX Runtime backend calls functions by their position in one table; `tests/ort_slots.cpp` of the runtime proves
the positions and how each function is called.  The TensorRT backend is compiled as it is.  Warnings are errors.
FOLDERs are those that hold `onnxruntime_c_api.h`, `NvInferRuntime.h`, and `cuda_runtime_api.h` with what it includes;
docs/cpp.md, Backends, says where they come from.  Figures of headers that are not named are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "runtime" / "cpp"
SLOTS, TENSORRT = SOURCE / "tests" / "ort_slots.cpp", SOURCE / "src" / "backends" / "tensorrt.cpp"
PARTS = ("MAJOR", "MINOR", "PATCH")
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-ffp-contract=off", "-fsyntax-only")


def compiled(source: Path, *headers: Path, compiler: str = "c++") -> str:
    """Compile a file with these folders of headers; returns the compiler's words, empty where it had none."""
    included = [word for folder in headers for word in ("-isystem", str(folder))]
    command = [compiler, *FLAGS, *included, f"-I{SOURCE / 'src'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def defined(header: Path, *names: str) -> list[int]:
    """The numbers that a header gives to names."""
    text = header.read_text(errors="replace")
    found = dict(re.findall(r"^#define +(\w+) +(\d+)\b", text, re.MULTILINE))
    missing = [name for name in names if name not in found]
    if missing:
        raise SystemExit(f"{header} does not define {', '.join(missing)}")
    return [int(found[name]) for name in names]


def onnxruntime(folder: Path) -> dict[str, Any]:
    """The table of ONNX Runtime's functions."""
    (version,) = defined(folder / "onnxruntime_c_api.h", "ORT_API_VERSION")
    slots = len(re.findall(r"^SAME\(\w+\);", SLOTS.read_text(), re.MULTILINE))
    return {"version": f"1.{version}", "functions": slots, "said": compiled(SLOTS, folder)}


def tensorrt(folder: Path, cuda: list[Path]) -> dict[str, Any]:
    """The TensorRT backend."""
    # Of older versions the numbers have other names.
    header = folder / "NvInferVersion.h"
    now = "TRT_MAJOR_ENTERPRISE" in header.read_text(errors="replace")
    version = defined(header, *(f"TRT_{part}_ENTERPRISE" if now else f"NV_TENSORRT_{part}" for part in PARTS))
    holding = next(each for each in cuda if (each / "cuda_runtime_api.h").exists())
    (toolkit,) = defined(holding / "cuda_runtime_api.h", "CUDART_VERSION")
    return {
        "version": ".".join(map(str, version)), "cuda": f"{toolkit // 1000}.{toolkit % 1000 // 10}",
        "said": compiled(TENSORRT, folder, *cuda),
    }  # fmt: skip


def main() -> int:
    """Compile, print and store; fails where a compiler said anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnxruntime", type=Path, nargs="+")
    parser.add_argument("--tensorrt", type=Path, nargs="+")
    parser.add_argument("--cuda", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    file: Path | None = arguments.json
    known = file is not None and file.exists()
    results: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file is not None and known else {}
    if arguments.onnxruntime is not None:
        results["onnxruntime"] = [onnxruntime(folder) for folder in arguments.onnxruntime]
    if arguments.tensorrt is not None:
        results["tensorrt"] = [tensorrt(folder, arguments.cuda) for folder in arguments.tensorrt]
    print(json.dumps(results, indent=2))
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(each["said"] for library in results.values() for each in library) else 0


if __name__ == "__main__":
    sys.exit(main())
