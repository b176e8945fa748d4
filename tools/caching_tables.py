"""The benchmark page's tables of feature caching."""

from __future__ import annotations

from typing import Any


def cached(results: dict[str, Any]) -> str:
    """Feature caching on the demo models."""
    lines = [
        "## Feature caching, fidelity", "", "```bash",
        "python benchmarks/caching.py --model dit --json docs/caching.json", "```", "",
        "INT8 with reuse against float at the same steps, guidance 1.5, held-out seeds; mean squared error of final",
        "latents and, in brackets, PSNR of the images.  *Naive*: reuse at every N-th call and nothing else;",
        "*programmed*: the measured schedule; *full*: with scales and corrections too.  Gains are paired, with 95 %",
        "intervals over seeds.", "",
        "| case | seeds | naive | programmed | full | gain of the schedule, dB | of everything, dB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(results.get("quality", {}).items()):
        cells = [
            f"{row['variants'][v]['final_latent_mse']:.2e} ({row['variants'][v]['psnr_db']:.2f} dB)"
            if v in row["variants"] else "not measured"
            for v in ("naive", "programmed", "full")
        ]
        gains = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["paired"][pair]["gain_db"]) if pair in row["paired"] else "–"
            for pair in ("naive - programmed", "naive - full")
        ]
        lines.append(f"| {name} | {row['samples']} | {' | '.join(cells)} | {' | '.join(gains)} |")
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
    for model, row in results.get("tap", {}).items():
        lines += ["", (
            f"Calibration samples by TAP instead of uniform draws, {model}: error per held-out call "
            f"{100 * row['relative']:+.2f} % lower ({row['draws']} draws of {row['selected']} from {row['pool']})."
        )]  # fmt: skip
    return "\n".join([*lines, ""])


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
