"""What the user may choose when a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantempo.contracts.plan import Rule
from quantempo.errors import PlanError, nearest

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Settings of a compile; every field has a default that works.

    Args:
        precision: `int8`, `fp8` (simulated on a CPU), or `float32` for a float bundle.
        targets: devices whose graphs the bundle holds on top of those for the CPU; see `quantempo targets`.
        graphs: further graphs by name, e.g. `portable-bf16`; see docs/dialects.md.
        attention: `quantized`, `float`, or `auto`: quantized with FP8, with INT8 the scores in the graph of OpenVINO.
        groups: `auto`, `single`, `uniform:G` or `optimal:G`.
        range_method: how activations are clipped; see `quantempo.calib.ranges`.
        activation_bits: 8, or fewer (simulated in 8-bit storage).
        centre: shift channels per group where that is free (see `quantempo.export.centring`).
        weight_method: `gptq` (scales by `mse`, then rounding that makes up for its own errors on the calibration
            data), or plain rounding with scales by `mse` or `minmax`.
        samples: calibration trajectories in all; guidance scales and step counts share them evenly.
        batch: samples that run together, at most; fewer where each guidance scale would not get a batch otherwise.
        guidance: guidance scales that the calibration covers.
        steps: step counts that the calibration covers, with the model's own scheduler.
        schedulers: further scheduler folders whose trajectories contribute.
        classes: labels to calibrate on; empty means all labels with a name, or else spread over all.
        seed: of the calibration noise; results are deterministic in it.
        selection: which calls of the trajectories are looked at; see `quantempo.calib.selection`.
        hard_cases: samples of a second round, with the conditions that the first round quantizes worst; 0 for none.
        size: of a sample, for models that run at any: `HEIGHTxWIDTH`, `FRAMESxHEIGHTxWIDTH` or a preset's name, in
            pixels where the model has a VAE and in latents where it has none; empty for the model's own.
        tokens: prompt length; 0 for the model's usual one.
        controlnets: folders of ControlNets that become part of the graph.
        ip_adapters: files of IP-Adapters that become part of the graph.
        inputs: `.npz` file with an example call, for a denoiser class whose inputs do not follow from its signature.
        code: Python file that defines the denoiser's class, for one that diffusers does not have.
        calibration: file with conditioning arrays (`.npz`) or labels (`.txt`, `.json`); see docs/recipe.md.
        rules: changes to the default plan, in order; a later one wins.
        keep, exclude: module-path patterns kept in float, whatever the rules say (one list under two names).
        cache: feature caching: `none`, `auto`, or a policy; see docs/caching.md.
        cache_cut: where caching cuts the graph, `sublayers:FIRST-LAST`, `delta:FIRST-LAST` or `branch:INDEX`; empty for
            a default.
        cache_min_psnr, cache_max_ms: budget of `auto`: dB to the float model with as many steps, and milliseconds of a
            guided run of one sample; 0 for no limit.
        cache_steps: step counts that get cached programs; empty for those of the calibration.
        max_steps: programs for 1 to this many steps go into the bundle.
        default_guidance: what a run of the bundle uses when the caller does not say.
        reference: write the float twin beside the bundle, for reports and comparisons.
        threads: engine threads while calibrating; 0 lets the engine choose.
    """

    precision: Literal["int8", "fp8", "float32"] = "int8"
    targets: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    attention: Literal["auto", "float", "quantized"] = "auto"
    groups: str = "auto"
    range_method: str = "minmax"
    activation_bits: int = 8
    centre: bool = True
    weight_method: Literal["gptq", "mse", "minmax"] = "gptq"
    samples: int = 256
    batch: int = 16
    guidance: tuple[float, ...] = (1.0, 1.5, 4.0, 7.0)
    steps: tuple[int, ...] = (20, 50)
    schedulers: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    seed: int = 0
    selection: str = "all"
    hard_cases: int = 0
    size: str = ""
    tokens: int = 0
    controlnets: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    inputs: str = ""
    code: str = ""
    calibration: str = ""
    rules: tuple[Rule, ...] = ()
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    cache: str = "none"
    cache_cut: str = ""
    cache_min_psnr: float = 0.0
    cache_max_ms: float = 0.0
    cache_steps: tuple[int, ...] = ()
    max_steps: int = 100
    default_guidance: float = 1.5
    reference: bool = True
    threads: int = 0
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        for field, known in (("precision", ("int8", "fp8", "float32")), ("weight_method", ("gptq", "mse", "minmax"))):
            value = str(getattr(self, field))
            if value not in known:
                raise _refuse(field, value, " or ".join(known), nearest(value, known))
        if self.attention not in ("auto", "float", "quantized"):
            raise _refuse("attention", self.attention, "auto, float or quantized", "take auto")
        if self.precision == "fp8" and self.activation_bits != 8:
            raise _refuse("activation_bits", self.activation_bits, "8 with fp8", "compile fewer bits with int8")
        if not 2 <= self.activation_bits <= 8:
            raise _refuse("activation_bits", self.activation_bits, "2 to 8", "take 8; fewer are simulated")
        if not self.steps or min(self.steps) < 1:
            raise _refuse("steps", self.steps, "at least one positive step count", "give, for example, 20")
        if not self.guidance or min(self.guidance) < 0:
            raise _refuse("guidance", self.guidance, "at least one scale of 0 or more", "give, for example, 1.5")
        _check_counts(self)
        if self.hard_cases < 0 or (self.hard_cases and self.precision != "int8"):
            raise _refuse("hard_cases", self.hard_cases, "0, or more with precision int8", "leave it out")
        _check_version(self.version)
        _check_rules(self.rules)


def _check_counts(recipe: Recipe) -> None:
    if recipe.samples < 1 or recipe.batch < 1:
        raise _refuse("samples", recipe.samples, "at least one sample and a batch of at least 1", "give 32")
    if not recipe.max_steps >= 1:
        raise _refuse("max_steps", recipe.max_steps, "at least 1", "give the largest step count that you will sample")
    for field in ("seed", "threads"):
        if getattr(recipe, field) < 0:
            raise _refuse(field, getattr(recipe, field), "0 or more", f"leave {field} out, or give 0")
    if recipe.tokens < 0:
        raise _refuse("tokens", recipe.tokens, "0 for the model's usual length, or more", "leave it out")


def _check_version(version: int) -> None:
    if version > RECIPE_VERSION:
        raise _refuse("version", version, f"at most {RECIPE_VERSION}", "run: pip install --upgrade quantempo")


def _check_rules(rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        for name, bits in (("activation_bits", rule.activation_bits), ("weight_bits", rule.weight_bits)):
            if bits and not 2 <= bits <= 8:
                raise _refuse(f"rules, {rule.match!r}, {name}", bits, "2 to 8", "take 8; fewer are simulated")


def _refuse(field: str, found: object, wanted: str, remedy: str) -> PlanError:
    return PlanError(
        f"recipe, {field}", found=repr(found), wanted=wanted, cause="a slip in the recipe or flag", remedy=remedy
    )
