"""What keeping each site in float would buy: same-seed PSNR of a bundle with one more site kept, measured.

    python benchmarks/sensitivity.py BUNDLE --guidance 4 --samples 20 --json build/sensitivity.json

Sites that share a tensor are kept together.  This is how the sites that the demo's recipe keeps were found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from quantempo.contracts.plan import Keep, Quantize, QuantPlan
from quantempo.pipeline import scale_table
from quantempo.report.measure import (
    Fidelity,
    ReportOptions,
    Sampler,
    Subject,
    open_subject,
    session_with_table,
    sessions,
)


def without(plan: QuantPlan, tensor: str) -> QuantPlan:
    """The plan with the sites that read a tensor kept in float."""
    decisions = dict(plan.decisions)
    for site in plan.quantized():
        if site.tensor == tensor:
            decisions[site.id] = Keep("tried in float")
    return dataclasses.replace(plan, decisions=decisions)


def psnr(subject: Subject, plan: QuantPlan, options: ReportOptions, scales: str, reference: object) -> float:
    """Mean same-seed PSNR of a plan, in dB."""
    variant = dataclasses.replace(subject, plan=plan)
    groups, method = scales.split("/")
    table = scale_table(subject.statistics, plan, groups, method)
    with session_with_table(variant, table, options) as session:
        images = Sampler(session, options).images(options.samples, options.guidance[0])
    return Fidelity.of(images, reference).psnr_db  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scales", nargs="+", default=["optimal:20/minmax", "single/mse"], help="GROUPS/METHOD")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    subject = open_subject(args.bundle)
    options = ReportOptions(samples=args.samples, guidance=(args.guidance,), threads=args.threads)
    with sessions(subject, options) as (_, floating):
        reference = Sampler(floating, options).images(options.samples, args.guidance)
    tensors = sorted({site.tensor for site in subject.plan.quantized()})
    base = {scales: psnr(subject, subject.plan, options, scales, reference) for scales in args.scales}
    print("as it is", {k: round(v, 2) for k, v in base.items()}, flush=True)
    rows = []
    for tensor in tensors:
        owner = next(
            s.id for s in subject.plan.quantized()
            if s.tensor == tensor and isinstance(subject.plan.decisions[s.id], Quantize)
        )
        gains = {s: psnr(subject, without(subject.plan, tensor), options, s, reference) - base[s] for s in args.scales}
        rows.append({"site": owner, "gain_db": gains})
        print(f"{owner:45s}", {k: round(v, 2) for k, v in gains.items()}, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"psnr_db": base, "sites": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
