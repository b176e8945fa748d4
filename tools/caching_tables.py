"""The benchmark page's tables of feature caching."""

from __future__ import annotations

from typing import Any


def cached(results: dict[str, Any]) -> str:
    """Feature caching on the demo models."""
    lines = [
        "## Feature caching, fidelity", "", "```bash",
        *sorted(row["command"] + " --json docs/caching.json" for row in results.get("quality", {}).values()),
        *(f"{command} --json docs/caching.json" for command in sorted(results.get("commands", ()))),
        "```", "",
        "INT8 with reuse against float at the same steps, guidance 1.5, held-out seeds; mean squared error of final",
        "latents and, in brackets, PSNR of the images.  *Naive*: reuse at every N-th call and nothing else;",
        "*programmed*: the schedule that whole runs without corrections like best; *corrected*: on that same schedule,",
        "scales of reusing calls and corrections; *full*: these on the schedule that runs with corrections like best,",
        "which is what `compile --cache programmed:N` makes.  Gains are paired, in dB, with 95 % intervals over seeds.",
        "Corrections are fitted and judged on as many runs as in a compile; scales are from fewer trajectories than",
        "the demo recipes take (`--calibration`).",
        "", "| case | seeds | naive | programmed | corrected | full | gain of the schedule | of everything |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, row in sorted(results.get("quality", {}).items()):
        cells = [cell(row, v) for v in ("naive", "programmed", "corrected", "full")]
        gains = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["paired"][pair]["gain_db"]) if pair in row["paired"] else "–"
            for pair in ("naive - programmed", "naive - full")
        ]
        lines.append(f"| {name} | {row['samples']} | {' | '.join(cells)} | {' | '.join(gains)} |")
    lines += differences(results)
    lines += more_rows(results)
    lines += schedules(results)
    lines += parts(results)
    return "\n".join([*lines, ""])


def cell(row: dict[str, Any], variant: str) -> str:
    """Error and PSNR of one variant."""
    if variant not in row["variants"]:
        return "not measured"
    found = row["variants"][variant]
    return f"{found['final_latent_mse']:.2e} ({found['psnr_db']:.2f} dB)"


MORE = {
    "dps": "the schedule of least change of features (CacheQuant), no corrections",
    "even": "scales and corrections on the even schedule",
    "shared": "*full* with the model's own scales for reusing calls too",
    "apart": "*full* with scales of their own for refreshing calls too",
    "uncached": "INT8 without caching",
}


def more_rows(results: dict[str, Any]) -> list[str]:
    """Variants beside the nested ones."""
    found = [
        f"| {name} | {MORE[v]} | {cell(row, v)} |"
        for name, row in sorted(results.get("quality", {}).items()) for v in MORE if v in row["variants"]
    ]  # fmt: skip
    return ["", "| case | variant | |", "| --- | --- | --- |", *found] if found else []


def schedules(results: dict[str, Any]) -> list[str]:
    """At which calls the programmed runs refresh."""
    lines = ["", "Calls that refresh (*even* where that was chosen):", ""]
    for name, row in sorted(results.get("quality", {}).items()):
        for label, key in (("programmed", "plain"), ("full", "corrected")):
            found = row.get("schedules", {}).get(key)
            if found is not None:
                even = found == list(range(0, row["steps"], row["interval"]))
                lines.append(f"- {name}, {label}: {'even' if even else ' '.join(map(str, found))}")
    return lines


def differences(results: dict[str, Any]) -> list[str]:
    """Paired differences of the final error, and what the guard kept."""
    lines = ["", "Differences of final-latent error with 95 % intervals (times 1e-4), and what the guard kept:", ""]
    pairs = ("naive - programmed", "programmed - corrected", "naive - full")
    lines += [f"| case | {' | '.join(pairs)} | kept |", "| --- | --- | --- | --- | --- |"]
    for name, row in sorted(results.get("quality", {}).items()):
        spans = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*(1e4 * v for v in row["paired"][pair]["final_latent_mse"]))
            if pair in row["paired"] else "–"
            for pair in pairs
        ]
        lines.append(f"| {name} | {' | '.join(spans)} | {', '.join(row.get('kept', {}).get('full', ()))} |")
    return lines


def parts(results: dict[str, Any]) -> list[str]:
    """What is measured beside the cases."""
    lines: list[str] = []
    for model, rows in results.get("equal_time", {}).items():
        for name, row in rows.items():
            lines += ["", (
                f"At equal time, batch 32, 50 steps, {model}, {name}: {row['psnr_db']:.2f} dB; float with "
                f"{row['float_steps']} steps {row['float_psnr_db']:.2f} dB ({row['gain_db']:+.2f} dB)."
            )]  # fmt: skip
    for model, rows in results.get("dynamic", {}).items():
        for policy, row in rows.items():
            shares = ", ".join(f"{100 * v:.0f} % at {k} times" for k, v in row["reused_by_threshold"].items())
            lines += ["", f"{model}, {policy}, 20 steps: {row['psnr_db']:.2f} dB; reuse {shares} the threshold."]
    return [*lines, *selected(results.get("tap", {})), *noisy(results.get("noise", {}))]


def selected(found: dict[str, Any]) -> list[str]:
    """Calibration samples by TAP beside uniform draws."""
    if not found:
        return []
    pool, draws = (sorted({row[key] for row in found.values()}) for key in ("pool", "draws"))
    lines = [
        "", f"Calibration samples of cached trajectories, chosen by TAP from {pool[0]} or drawn uniformly, {draws[0]} "
        "times each: squared error of the quantized prediction at held-out calls.  The mean over calls is mostly that "
        "of the last call; *per call* every call counts alike (geometric mean).", "",
        "| model | ranges | samples | uniform | TAP | all | TAP saves (95 % interval) | per call (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for model, row in found.items():
        for count, made in sorted(row["counts"].items(), key=lambda item: int(item[0])):
            saved, per_call = (
                f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
                for middle, low, high in (made["saved"], made["saved_per_call"])
            )
            lines.append(
                f"| {model} | {row['ranges']} | {count} | {made['mse']['uniform']:.3e} | {made['mse']['tap']:.3e} | "
                f"{row['mse_of_all']:.3e} | "
                f"{saved} | {per_call} |"
            )
    return lines


def noisy(found: dict[str, Any]) -> list[str]:
    """Corrections where the sampler adds noise of its own."""
    if not found:
        return []
    lines = [
        "",
        "DDPM adds noise at every step: even reuse there.  *Absorbed*: quantization noise takes the place of a part of "
        "the sampler's (PTQD), whatever the guard says; *guarded* is what `compile` makes.  *Variance*: of final "
        "latents over the float model's.", "",
        "| model | N | seeds | | final latent MSE | PSNR, dB | variance |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for model, rows in found.items():
        for interval, row in rows.items():
            for name, made in row["variants"].items():
                lines.append(
                    f"| {model} | {interval.removeprefix('N=')} | {row['samples']} | {name} | "
                    f"{made['final_latent_mse']:.3e} | {made['psnr_db']:.2f} | {made['variance_ratio']:.3f} |"
                )
    return lines


def cached_speed(results: dict[str, Any]) -> str:
    """Feature caching on the full-size shapes."""
    lines = [
        "## Feature caching, speed", "", "```bash",
        "python benchmarks/caching_speed.py --model dit-s2 --keep graphs --json docs/caching_speed.json", "```", "",
        "One guided sample, ONNX Runtime, random weights, the default cuts; whole runs, medians.  *Precision* is INT8",
        "without caching over eager float32, *cache* what reuse adds to it.", "",
        "| model | run | predicted, ms | measured, ms | cache | precision | both |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, found in results.items():
        for name, row in found.get("trajectories", {}).items():
            lines.append(
                f"| {model} | {name} | {row['predicted_ms']:.0f} | {row['measured_ms']:.0f} | "
                f"{row['over_int8']:.2f}× | "
                + " | ".join(
                    f"{row[k]:.2f}×" if k in row else "–" for k in ("precision_factor", "over_eager_float32")
                )
                + " |"
            )
    for model, found in results.items():
        if "memory" in found:
            m = found["memory"]
            lines += ["", (
                f"{model}: the second graph adds {100 * m['disk_share']:.2f} % of the weights' size on disk and "
                f"{m['added']['after_a_call'] / 1e6:.1f} MB of memory; its own share of the weights is "
                f"{m['reuse_weights_bytes'] / 1e6:.1f} of {m['full_weights_bytes'] / 1e6:.1f} MB."
            )]  # fmt: skip
    return "\n".join([*lines, ""])
