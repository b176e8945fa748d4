"""The benchmark page's tables of the C++ runtime."""

from __future__ import annotations

from typing import Any

STEPS = 8
"""Of the cached programs."""


def runtime(results: dict[str, Any]) -> str:
    """The C++ runtime beside Python and beside the bare engine."""
    lines = [
        "## C++ runtime", "", "```bash", "python benchmarks/cpp_runtime.py --json docs/cpp_runtime.json", "```", "",
    ]
    cells = results.get("identity", {})
    equal = sum(cell["latents"] and cell["png"] for cell in cells.values())
    cached = [cell for name, cell in cells.items() if name.endswith(" cached")]
    corrected = sum(bool(cell["corrections"]) for cell in cached)
    fewest = min((cell["reused"] / cell["evaluations"] for cell in cached), default=0)
    lines += [
        f"Python and C++ give the same latents, bit for bit, and the same PNG bytes in {equal} of {len(cells)} runs of",
        f"{STEPS} steps and 3 samples, on ONNX Runtime and OpenVINO, INT8 and float:",
        "; ".join(f"demo {model} with {', '.join(names)}" for model, names in sampled(cells).items()) + ";",
        f"without feature caching and ({len(cached)} of the runs) with the program that `--cache every:2` fitted for",
        f"the scheduler, which reuses at least {100 * fewest:.0f} % of the evaluations and has corrections in",
        f"{corrected} of them.", "",
    ]
    for name in (name for name, cell in cells.items() if not (cell["latents"] and cell["png"])):
        lines.append(f"- differs: {name}")
    if "cost" in results:
        lines += [
            f"ONNX Runtime, one thread, two rows a call (guidance), {results['processor']}, {results['conditions']}.",
            "*Bare* is a C program that opens and runs the same graphs and nothing else: the full one, and with",
            "caching the reusing one in turns with it.  *Opening* verifies all digests and opens the graphs, files in",
            "the page cache; *first latents* and *CPU* (seconds of the process) are those of opening and one step,",
            f"with caching of opening and {STEPS} steps.", "",
            f"The stripped library has {results['stripped_bytes']:,} bytes.", "",
            "| bundle | loop, µs a call | worst | resident, MB | bare | anonymous, MB | bare | opening, s "
            "| first latents, s | CPU, s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, found in results["cost"].items():
            lines.append(
                f"| {name} | {found['loop_us_per_call']:.1f} | {found['worst_loop_us_per_call']:.1f} | "
                f"{found['resident_mb']:.1f} | {found['bare_resident_mb']:.1f} | {found['anonymous_mb']:.1f} | "
                f"{found['bare_anonymous_mb']:.1f} | {found['open_seconds']:.3f} | "
                f"{found['first_latents_seconds']:.3f} | {found['process_cpu_seconds']:.3f} |"
            )
    if "memory" in results:
        lines += ["", *second_graph(results["memory"])]
    return "\n".join([*lines, ""])


def sampled(cells: dict[str, Any]) -> dict[str, list[str]]:
    """The schedulers of each model, from the names of the runs."""
    found: dict[str, list[str]] = {}
    for name in cells:
        _, model, _, scheduler, _ = name.split()
        names = found.setdefault({"dit": "DiT", "unet": "UNet"}[model], [])
        if scheduler not in names:
            names.append(scheduler)
    return found


def second_graph(models: dict[str, Any]) -> list[str]:
    """What the reusing graph adds to the process."""
    lines = [
        "What the reusing graph of a cached bundle adds to a process that has opened and run the full one, in MB of",
        "anonymous memory (`python benchmarks/cpp_runtime.py --only memory --variants FOLDER...`, the folders those of",
        "`benchmarks/caching_speed.py --keep`); both are run with two rows.  By default packed weights and activations",
        "are shared; *apart* is a library that refuses to share packed weights, and an arena of its own for each.",
        "", "| graphs | its own share of the weights | added, shared | packed apart | arenas apart | both apart |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    columns = ("own_weights_mb", "shared", "packed_apart", "arenas_apart", "apart")
    for name, found in models.items():
        cells = " | ".join(f"{found[key]:.1f}" for key in columns)
        lines.append(f"| {name} | {cells} |")
    return lines


def fuzzing(results: dict[str, Any]) -> str:
    """CPU minutes and inputs of each target."""
    lines = [
        "### Fuzzing of what reads bytes", "", "```bash",
        "python tools/cpp_fuzz.py --minutes 4 --json docs/cpp_fuzz.json", "```", "",
        "libFuzzer with AddressSanitizer, leaks included, and UndefinedBehaviorSanitizer: "
        f"{results['cpu_minutes']:.1f} CPU minutes,",
        f"{results['inputs']:,} inputs, {results['findings']} findings, all of it on one state of the sources that the",
        f"targets run (`{results['code'][:12]}`, tools/cpp_fuzz.py).  All targets mutate structure: JSON as JSON,",
        "safetensors headers with their length, ONNX files as trees of protobuf fields.", "",
        "| target | CPU minutes | inputs | edges covered | findings |", "| --- | --- | --- | --- | --- |",
    ]
    for name, found in results["targets"].items():
        lines.append(
            f"| {name} | {found['cpu_minutes']:.1f} | {found['inputs']:,} | {found['edges']} | {found['findings']} |"
        )
    return "\n".join([*lines, ""])


def sanitizers(results: dict[str, Any]) -> str:
    """The tests under sanitizers."""
    lines = [
        "### Tests under sanitizers", "", "```bash", "python tools/cpp_sanitizers.py --json docs/cpp_sanitizers.json",
        "```", "", "| sanitizers | passed | failed | skipped |", "| --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        lines.append(f"| {name} | {found.get('passed', 0)} | {found.get('failed', 0)} | {found.get('skipped', 0)} |")
    return "\n".join([*lines, ""])


def headers(results: dict[str, Any]) -> str:
    """What was compiled against the engine libraries' own headers."""
    lines = [
        "### Against the headers of engine libraries", "", "```bash",
        "python tools/cpp_headers.py --onnxruntime FOLDER --tensorrt FOLDER... --cuda FOLDER... "
        "--json docs/cpp_headers.json", "```", "", "| headers | what is compiled | compiler's words |",
        "| --- | --- | --- |",
    ]
    for found in results.get("onnxruntime", []):
        what = f"position and signature of the {found['functions']} functions that the backend calls"
        lines.append(f"| ONNX Runtime {found['version']} | {what} | {found['said'] or 'none'} |")
    for found in results.get("tensorrt", []):
        libraries = f"TensorRT {found['version']}, CUDA {found['cuda']}"
        lines.append(f"| {libraries} | the TensorRT backend | {found['said'] or 'none'} |")
    return "\n".join([*lines, ""])


def clean(results: dict[str, Any]) -> str:
    """A clean clone in an empty folder."""
    names = ("environment", "configure", "build", "test")
    lines = [
        "### From a clean clone", "", "```bash", "python tools/cpp_clean.py --json docs/cpp_clean.json", "```", "",
        f"{results['seconds']:.0f} seconds on {results['cores']} cores ({results['conditions']}) for everything after "
        "`apt install`:", "", "| step | seconds | CPU seconds |", "| --- | --- | --- |",
        *(f"| {name} | {results[name]['seconds']} | {results[name]['cpu_seconds']} |" for name in names),
    ]
    return "\n".join([*lines, ""])
