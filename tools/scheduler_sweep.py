"""Traces every scheduler class of the installed diffusers under many options and compares each with the stock loop.

Writes docs/schedulers.json (one entry per class and option) and docs/schedulers.md (the page made from it):

    python tools/scheduler_sweep.py            # all of it, a few minutes on one core
    python tools/scheduler_sweep.py DDIM UniPC # only these classes, printed, nothing written
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference_loop import relative_error, replay, stock_loop  # noqa: E402

from quantempo.errors import SchedulerRefused  # noqa: E402
from quantempo.export.sampler import scheduler_classes, trace_program  # noqa: E402

STEPS = (10, 20, 50)
LIMIT = 1e-5

# What a class cannot be built without.
REQUIRED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 5},
    "VQDiffusionScheduler": {"num_vec_classes": 9},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}

# What is set beside each single option, where the defaults need a pipeline of their own.
BASE: dict[str, dict[str, Any]] = {"HeliosScheduler": {"stages": 1}}

# Words of a refusal that no option of the class can change.
INTERFACE = ("a step that needs", "a state of integer tokens", "no method 'step'", "only its own pipeline has")

# Values tried one at a time for every class whose constructor has the parameter.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "algorithm_type": (
        "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "data_prediction", "noise_prediction",
    ),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "clip_denoised": (False,),
    "clip_sample": (True, False),
    "corrector_order": (1, 3),
    "disable_corrector": ([0, 1],),
    "euler_at_final": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("log_linear",),
    "invert_sigmas": (True,),
    "lower_order_final": (False,),
    "n_grid": (1,),
    "predict_x0": (False,),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction", "trigflow"),
    "predictor_order": (1, 3),
    "rescale_betas_zero_snr": (True,),
    "scheduler_type": ("euler", "unipc"),
    "set_alpha_to_one": (True, False),
    "shift": (3.0,),
    "shift_terminal": (0.1,),
    "sigma_schedule": ("karras", "exponential"),
    "skip_prk_steps": (True,),
    "snr_shift_scale": (1.0,),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "stages": (1,),
    "steps_offset": (1,),
    "stochastic_sampling": (True,),
    "thresholding": (True,),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "use_beta_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_flow_sigmas": (True,),
    "use_karras_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "variance_type": (
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range",
    ),
}  # fmt: skip

# Combinations that are used in practice, by class; keys of `call` go to the tracer, the rest to the constructor.
SOLVERS = [
    {"algorithm_type": a, "solver_order": o, "solver_type": s}
    for a, o, s in itertools.product(("dpmsolver++", "sde-dpmsolver++"), (2, 3), ("midpoint", "heun"))
]
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CONTINUOUS = {"prediction_type": "v_prediction", "timestep_type": "continuous"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
COMBINATIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [
        {"clip_sample": False, **ZERO_SNR},
        {"clip_sample": False, "call": {"eta": 1.0}},
    ],
    "DPMSolverMultistepScheduler": [
        *SOLVERS,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 2, "euler_at_final": True},
        {**FLOW, "flow_shift": 3.0},
        {**FLOW, "use_dynamic_shifting": True, "call": {"mu": 0.8}},
    ],
    "DPMSolverSinglestepScheduler": [
        *SOLVERS,
        {**FLOW, "flow_shift": 3.0},
    ],
    "EDMDPMSolverMultistepScheduler": SOLVERS,
    "EulerDiscreteScheduler": [
        {**CONTINUOUS, "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},
        ZERO_SNR,
    ],
    "FlowMatchEulerDiscreteScheduler": [
        {"use_dynamic_shifting": True, "call": {"mu": 1.15}},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1, "call": {"mu": 2.0}},
        {"use_dynamic_shifting": True},
    ],
    "FlowMatchLCMScheduler": [{"use_dynamic_shifting": True, "call": {"mu": 1.15}}],
    "HeliosScheduler": [{"call": {"stage_index": k}} for k in (0, 1, 2)] + [{"stages": 1, "scheduler_type": "euler"}],
    "HeliosDMDScheduler": [{"call": {"stage_index": 0}}],
    "LCMScheduler": [{"call": {"original_inference_steps": 100}}],
    "LMSDiscreteScheduler": [{"call": {"order": 2}}],
    "TCDScheduler": [{"call": {"eta": 0.0}}, {"call": {"eta": 1.0}}],
    "UniPCMultistepScheduler": [
        {"solver_order": 3, "solver_type": "bh1"},
        {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {**FLOW, "flow_shift": 5.0},
        ZERO_SNR,
    ],
    "SASolverScheduler": [{"predictor_order": 3, "corrector_order": 4, "use_karras_sigmas": True}],
}  # fmt: skip

Case = dict[str, Any]


def cases(name: str, cls: type) -> list[Case]:
    """The option sets of a class, each at most once: defaults, one option at a time, call options, combinations."""
    base = BASE.get(name, {})
    fixed = {**REQUIRED.get(name, {}), **base}
    signature = inspect.signature(cls).parameters
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    found: list[Case] = [{}]
    for option, values in VARIANTS.items():
        if option in signature:
            own = [v for v in values if v != signature[option].default and (not isinstance(v, str) or v in source)]
            found += [{**base, option: v} for v in own if _builds(cls, {**fixed, option: v})]
    found += [{"call": call} for call in _call_options(cls)]
    found += [case for case in COMBINATIONS.get(name, []) if case not in found]
    return found


def _builds(cls: type, config: Case) -> bool:
    """Whether the class has this option value at all: it refuses foreign ones itself, loudly or by falling back."""
    try:
        scheduler = cls(**config)
    except (ValueError, NotImplementedError, TypeError):
        return False
    return all(scheduler.config[key] == value for key, value in config.items())


def _call_options(cls: type) -> Iterator[dict[str, float]]:
    step = inspect.signature(cls.step).parameters if hasattr(cls, "step") else {}
    if "eta" in step:
        yield {"eta": 0.5}
    if "s_churn" in step:
        yield {"s_churn": 2.0, "s_noise": 1.01}
    if hasattr(cls, "add_noise") or hasattr(cls, "scale_noise"):
        yield {"start_index": 3}


def run_case(name: str, cls: type, case: Case, steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
    """One entry of docs/schedulers.json."""
    config = {**REQUIRED.get(name, {}), **{k: v for k, v in case.items() if k != "call"}}
    call = dict(case.get("call", {}))
    eta = call.pop("eta", None)
    worst = 0.0
    exact: list[int] = []
    refusals: dict[int, str] = {}
    for count in (*steps, 2):
        if count == 2 and (exact or not all("from set_timesteps" in why for why in refusals.values())):
            break  # two steps are for the few classes that take nothing else
        try:
            program = trace_program(cls(**config), count, eta=eta, options=call)
        except SchedulerRefused as refusal:
            refusals[count] = f"{refusal.found}: {refusal.cause}"
            refusals[count] += _contradiction(refusals[count], cls(**config), count, eta, call)
            continue
        stock = stock_loop(cls(**config), count, eta=eta, options=call)
        worst = max(worst, relative_error(replay(program), stock))
        exact.append(count)
    good = bool(exact) and worst <= LIMIT
    reason = "" if good else next(iter(refusals.values()), f"UNEXPLAINED: relative error {worst:.1e}")
    if good and refusals:
        reason = "not at " + ", ".join(map(str, refusals)) + " steps: " + next(iter(refusals.values()))
    return {
        "class": name, "options": case, "status": "exact" if good else "refused", "steps": exact,
        "error": _rounded_up(worst) if exact else None, "reason": reason,
    }  # fmt: skip


def _contradiction(reason: str, scheduler: Any, steps: int, eta: float | None, call: dict[str, float]) -> str:
    """Empty where the stock loop bears a refusal out: it fails, or it is not finite, as the reason says."""
    if any(words in reason for words in INTERFACE) or reason.startswith("torch operation"):
        return ""
    try:
        finite = all(np.isfinite(sample).all() for sample in stock_loop(scheduler, steps, eta=eta, options=call))
    except Exception:
        return "" if " from " in reason else " UNEXPLAINED: the stock loop fails instead"
    if not finite and "not finite" in reason:
        return ""
    return f" UNEXPLAINED: the stock loop runs{'' if finite else ' into values that are not finite'}"


def _rounded_up(value: float) -> float:
    """One significant digit, upwards, so that the last bits of a machine's arithmetic do not show."""
    if value == 0.0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit) * unit:.0e}")


def sweep_class(name: str, cls: type) -> list[dict[str, Any]]:
    """The entries of one class; only the defaults where its interface alone rules it out."""
    first = run_case(name, cls, {})
    if any(words in first["reason"] for words in INTERFACE):
        return [first]
    return [first, *(run_case(name, cls, case) for case in cases(name, cls)[1:])]


def sweep(names: list[str] | None = None) -> list[dict[str, Any]]:
    """All entries, sorted by class and options."""
    entries: list[dict[str, Any]] = []
    for name, cls in scheduler_classes().items():
        if names and not any(n in name for n in names):
            continue
        found = sweep_class(name, cls)
        entries += found
        print(f"{name}: {dict(Counter(e['status'] for e in found))}", file=sys.stderr, flush=True)
    return sorted(entries, key=lambda e: (e["class"], json.dumps(e["options"], sort_keys=True)))


SUMMARY = (
    "Of the {classes} scheduler classes of diffusers {version}, {working} become a step program"
    " ([how](step-program.md)): {exact} of {tried} tried option sets are exact. Exact means that the program and the"
    " scheduler's own loop differ by at most {limit}, relative to the largest value of the sample, over the first 20"
    " calls and at the end, at 10, 20 and 50 steps (or at the counts that the class takes), with a non-linear stand-in"
    " for the denoiser. The other option sets are refused with the reason given; where that is the scheduler's"
    " own failure, the stock loop was run and fails too. `call` holds arguments of the loop (eta, mu, start_index),"
    " the rest is configuration."
)


def document(entries: list[dict[str, Any]]) -> str:
    """docs/schedulers.json."""
    lines = ",\n".join("    " + json.dumps(entry, sort_keys=True) for entry in entries)
    header = json.dumps({"diffusers": diffusers.__version__, "limit": LIMIT, "steps": list(STEPS)}, sort_keys=True)
    return f'{{\n  "made_with": {header},\n  "entries": [\n{lines}\n  ]\n}}\n'


def page(entries: list[dict[str, Any]]) -> str:
    """docs/schedulers.md."""
    classes: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        classes.setdefault(entry["class"], []).append(entry)
    working = {n: es for n, es in classes.items() if any(e["status"] == "exact" for e in es)}
    exact = sum(e["status"] == "exact" for e in entries)
    lines = [
        "# Schedulers",
        "",
        "<!-- Generated by tools/scheduler_sweep.py from docs/schedulers.json; do not edit. -->",
        "",
        SUMMARY.format(
            classes=len(classes),
            version=diffusers.__version__,
            working=len(working),
            exact=exact,
            tried=len(entries),
            limit=f"{LIMIT:g}",
        ),
        "",
        "## Exact",
        "",
        "| class | option sets exact | largest error | refused option sets |",
        "| --- | --- | --- | --- |",
    ]
    for name, es in working.items():
        good = [e for e in es if e["status"] == "exact"]
        bad = [f"`{_shown(e['options'])}`" for e in es if e["status"] != "exact"]
        worst = max(e["error"] for e in good)
        lines.append(f"| {name} | {len(good)} of {len(es)} | {worst:.0e} | {', '.join(bad) or 'none'} |")
    lines += ["", "## Refused classes", "", "| class | reason |", "| --- | --- |"]
    for name, es in classes.items():
        if name not in working:
            lines.append(f"| {name} | {_cell(es[0]['reason'])} |")
    lines += ["", "## Refused options, and step counts that a scheduler does not take", ""]
    lines += ["| class | options | reason |", "| --- | --- | --- |"]
    for name, es in working.items():
        for entry in es:
            if entry["reason"]:
                lines.append(f"| {name} | `{_shown(entry['options'])}` | {_cell(entry['reason'])} |")
    return "\n".join(lines) + "\n"


def _shown(options: Case) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(options.items())) or "defaults"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Sweep, write the two files, and fail when an entry is unexplained."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    entries = sweep(arguments)
    unexplained = [e for e in entries if "UNEXPLAINED" in e["reason"]]
    if arguments:
        print(document(entries))
    else:
        (ROOT / "docs" / "schedulers.json").write_text(document(entries))
        (ROOT / "docs" / "schedulers.md").write_text(page(entries))
    for entry in unexplained:
        print("unexplained:", entry, file=sys.stderr)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
