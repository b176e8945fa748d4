"""What `caching.py --part noise` measures: corrections where the sampler adds noise of its own (DDPM)."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
from caching_results import Latents, compare, read, write

from quantempo.calib.cache.schedules import every
from quantempo.demo import MODEL
from quantempo.export.sampler import trace_program
from quantempo.stages.cache_corrections import fit_corrections, with_noise_absorbed
from quantempo.stages.cache_images import decoder_of
from quantempo.stages.cache_schedules import scheduled
from quantempo.stages.caching import variant_tables

STEPS = 20
INTERVALS = (2, 3)


def noise_effect(subject: Any, args: argparse.Namespace) -> None:
    """Even reuse under DDPM: the naive stack, corrections without and with PTQD's variance absorption, and the guard's.

    *absorbed* has the absorption whatever the guard says; *guarded* is what `compile` makes.  Besides the errors, the
    variance of final latents over that of the float model's.
    """
    import diffusers

    config = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    plain = trace_program(diffusers.DDPMScheduler.from_config(config), STEPS)
    bench, settings, parts = subject.bench, subject.settings, subject.parts
    reference = subject.latents("float", plain)
    rows = {}
    for interval in INTERVALS:
        refreshes = every(STEPS, interval)
        cached = scheduled(bench, plain, refreshes)
        bench.quantize(dict.fromkeys(bench.set.variants, parts.table))
        made = {"naive": subject.latents("quantized", cached)}
        bench.quantize(variant_tables(bench, settings, {STEPS: cached}))
        guarded = fit_corrections(bench, settings, plain, cached, refreshes)
        others = replace(settings, corrections=tuple(c for c in settings.corrections if c != "noise"))
        apart = fit_corrections(bench, others, plain, cached, refreshes)
        absorbed, shares = with_noise_absorbed(bench, settings, apart)
        for name, fit in (("corrected", apart), ("absorbed", absorbed), ("guarded", guarded)):
            made[name] = subject.latents("quantized", fit.program, fit.vectors)
        found = compare(decoder_of(parts), made, reference)
        for name, latents in made.items():
            found["variants"][name]["variance_ratio"] = variance_ratio(latents, reference)
        rows[f"N={interval}"] = {
            "scheduler": "DDPM", "steps": STEPS, "samples": subject.samples, "kept": list(guarded.kept),
            "absorbed_share": list(shares), **found,
        }
        print(interval, rows[f"N={interval}"], flush=True)
    results = read(args.json)
    results.setdefault("noise", {})[subject.name] = rows
    write(args.json, results)


def variance_ratio(latents: Latents, reference: Latents) -> float:
    """Variance of latents over that of the float model's, geometric mean over channels."""
    axes = (0, *range(2, latents.ndim))
    return float(np.exp(np.mean(np.log(latents.var(axis=axes) / reference.var(axis=axes)))))
