"""Tables of the benchmark page about engines: TensorRT for RTX without a GPU, and two engines on one bundle."""

from __future__ import annotations

from typing import Any


def turing(builds: dict[str, Any]) -> str:
    """How many sites the graphs for Turing quantize."""
    counts = []
    for name, entry in builds.items():
        model, graph, capability = name.split("/")
        if (graph, capability) == ("int8-f16", "sm75") and "sites" in entry:
            whole = builds[f"{model}/{graph}/sm89"]["sites"]
            counts.append(f"{entry['sites']} of {whole} sites of {model} ({entry['products']} products)")
    return "\n".join([*(f"- {count}" for count in counts), "", "All of them run on INT8; the rest is float16."])


def attentions(entry: dict[str, Any], builds: dict[str, Any]) -> str:
    """How many attentions of an FP8 engine are one kernel, of those that are quantized."""
    name = next(name for name, found in builds.items() if found is entry)
    if "attention" not in entry:
        return "none: built before attention was quantized"
    pairs = entry["sites"] - builds[name.replace("/fp8-f16/", "/int8-f16/")]["sites"]
    return f"{entry['attention']['quantized']} of {pairs // 2}"


def both(built: dict[str, Any], key: str) -> str:
    """A count at capability 8.9 and, where it differs, at 12.0."""
    counts = [str(built[sm][key]) for sm in ("89", "120") if sm in built and key in built[sm]]
    return " / ".join(dict.fromkeys(counts)) or "–"


def engines(results: dict[str, Any]) -> str:
    """Engines of TensorRT for RTX: what builds for which device, how fast, how large, of how many kernels."""
    builds = results["builds"]
    lines = [
        f"## TensorRT for RTX engines ({results['library']}), built without a GPU", "", "```bash",
        "python benchmarks/rtx_builds.py --json docs/tensorrt.json", "```", "",
        "CPU time and MB over the capabilities that build; kernels (arithmetic on sizes apart) and the products (GEMMs",
        "and convolutions) among them at capability 8.9, after a slash at 12.0 where that differs; how many of the",
        "attentions with FP8 products are one kernel; *packed* is the plan at 8.9 with weights taken from the bundle,",
        "bit for bit.  No figure here is a run time.",
        "INT8 graphs for 7.5 (Turing, without INT8 convolutions) are of the dialect `unfold`:", "", turing(builds), "",
        "| model | graph | capabilities | refused | build, s | plan, MB | packed | kernels | products "
        "| attentions in FP8 | fusion gate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in dict.fromkeys(name.rsplit("/", 1)[0] for name in builds):
        found = {name.rsplit("/sm", 1)[1]: entry for name, entry in builds.items() if name.startswith(f"{pair}/sm")}
        built = {sm: entry for sm, entry in sorted(found.items(), key=lambda i: int(i[0])) if "plan_bytes" in entry}
        refused = ", ".join(sorted((sm for sm in found if sm not in built), key=int)) or "–"
        if not built:
            continue
        entry = built.get("89") or next(iter(built.values()))
        sizes = [e["plan_bytes"] for e in built.values()]
        # The clock counts in an entry of a quiet machine alone.
        seconds = [e[key] for e in built.values() for key in ("cpu_seconds", "seconds") if key in e]
        time = f"{min(seconds):.1f} to {max(seconds):.1f}" if seconds else "–"
        packed = f"{entry['packed_bytes'] / entry['plan_bytes']:.1%}" if "packed_bytes" in entry else "–"
        failed = [sm for sm, e in built.items() if e["gate"] != "passed"]
        gates = f"refuses {', '.join(failed)}" if failed else "passed"
        fused = attentions(entry, builds) if pair.endswith("/fp8-f16") else "–"
        sites = " + ".join(f"{count} {kind}" for kind, count in entry["formats"].items()) or "no sites"
        lines.append(
            f"| {pair.replace('/', ' | ')} | {', '.join(built)} | {refused} | "
            f"{time} | {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} | {packed} | "
            f"{both(built, 'kernels')} | {both(built, 'products')} | {fused} | {gates} ({sites}) |"
        )
    return "\n".join([*lines, ""])


def agreement(results: dict[str, Any]) -> str:
    """Two engines on one bundle, and what `auto` chooses."""
    machine = results["machine"]
    models = {name: facts for name, facts in results.items() if name != "machine"}
    lines = [
        "## Two engines, one bundle", "", "```bash",
        "python benchmarks/engine_agreement.py --json docs/engine_agreement.json", "```", "",
        f"{machine['cpu']}, OpenVINO {machine['versions']['openvino']}, ONNX Runtime "
        f"{machine['versions']['onnxruntime']}.  Same-seed PSNR in dB, mean over seeds, at guidance 1.5 / 4:", "",
        "| demo model | groups | seeds | ONNX Runtime – OpenVINO | ONNX Runtime – float | OpenVINO – float |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, facts in models.items():
        cells = [
            " / ".join(f"{facts['psnr'][guidance][pair]['mean_db']:.1f}" for guidance in ("1.5", "4"))
            for pair in ("ort, openvino", "ort, float", "openvino, float")
        ]
        title = "DiT" if name == "dit" else "UNet"
        lines.append(f"| {title} | {facts['groups']} | {facts['seeds']} | {' | '.join(cells)} |")
    for name, facts in models.items():
        if "auto" in facts:
            chosen = ", ".join(f"{label} {count} times" for label, count in sorted(facts["auto"]["chosen"].items()))
            lines += ["", f"`--engine auto` on the demo {'DiT' if name == 'dit' else 'UNet'} chose {chosen}."]
    return "\n".join([*lines, ""])
