"""A loaded bundle as a pipeline: takes the call arguments of diffusers, returns pictures.

The engine is injected (`open_engine`), so this module knows no backend.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.program import FITTED_GUIDANCE, StepProgram, check_program
from quantempo.contracts.variants import Variant, is_cached, variants_of
from quantempo.errors import BundleError, EngineError, RequestError, nearest
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.bundle_cache import denoisers
from quantempo.runtime.guidance import Mode
from quantempo.runtime.images import to_pil, to_unit
from quantempo.runtime.lanes import Port
from quantempo.runtime.loop import Loop, LoopRequest, LoopResult, Observer, StepCallback, Tally
from quantempo.runtime.request import Request, Resolved, resolve

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[Any]
Float32s = NDArray[np.float32]
OpenEngine = Callable[[Path, EngineOptions], Engine]
Callback = Callable[["Session", int, float, dict[str, Float32s]], "Mapping[str, Float32s] | None"]
"""As in diffusers: (pipe, step, timestep, {"latents": …}) → a mapping that may hold new latents."""

DIALECTS = ("ort", "portable", "unfold", "fp8", "float")
"""Which denoiser graphs are taken when the caller does not say; the first that the bundle has."""
CACHE_MODES = ("auto", "none", "plan")
"""Feature caching: where the bundle has a plan for the call (with a notice where not), never, or not without one."""
DECODE_ROWS = 8
"""Latents per call of the decoder, which needs far more memory per sample than the denoiser."""


class CacheUnused(UserWarning):
    """The bundle reuses features, but has no plan for these steps, this sampler and guidance; it runs without."""


class _Engines(dict[str, Engine]):
    """Engines by variant, opened when they are first looked up: a run without caching needs no second graph."""

    def __init__(self, open_variant: Callable[[str], Engine]) -> None:
        super().__init__()
        self._open_variant = open_variant

    def __missing__(self, variant: str) -> Engine:
        engine = self[variant] = self._open_variant(variant)
        return engine


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in seconds; `calls` counts engine calls of the denoiser.

    Args:
        rows: evaluations of the denoiser, one for each row of each call.
        reused: how many of them took cached features instead of computing everything.
        variants: engine calls, rows and seconds by graph variant.
    """

    total: float
    engine: float
    loop_overhead: float
    decode: float
    calls: int
    rows: int = 0
    reused: int = 0
    variants: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def overhead_per_call(self) -> float:
        """Seconds of the loop itself per engine call."""
        return self.loop_overhead / max(1, self.calls)


@dataclass(frozen=True, eq=False)
class Output:
    """What a call returns.

    Args:
        images: pictures (`pil`), float32 (batch, height, width, channels) in [0, 1] (`np`), or latents (`latent`).
        latents: final latents, float32 (batch, …).
        seeds: as used; drawn from the system where none was given, so that the call can be repeated.
    """

    images: list[Image] | Float32s
    latents: Float32s
    timings: Timings
    seeds: int | tuple[int, ...] | None


class Session:
    """An open bundle with its engines.  Not thread-safe; open one per thread.

    Args:
        bundle: verified.
        open_engine: opens a graph file.
        options: for every engine.
        dialect: which denoiser graphs; `None` takes the first of `DIALECTS` that the bundle has.
        feature_cache: what calls do that do not say, one of `CACHE_MODES`.
    """

    def __init__(
        self, bundle: OpenBundle, open_engine: OpenEngine, options: EngineOptions | None = None,
        dialect: str | None = None, feature_cache: str = "auto",
    ) -> None:
        self._cache_mode = _cache_mode(feature_cache)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._open_engine = open_engine
        self._options = options or EngineOptions()
        self._decoder: Engine | None = None
        self._decoder_ports: dict[int, tuple[Any, Port, Port]] = {}
        entries = self._denoisers(dialect)
        self._closed = False
        self._engines = _Engines(lambda variant: self._open(entries[variant], self._options))
        self._variants = {name: Variant.of(entry) for name, entry in entries.items()}
        cached = {steps: bundle.cached_program(steps) for steps in bundle.cached_steps}
        self._cached = {s: p for s, p in cached.items() if set(variants_of(p)) <= set(self._variants)}
        try:
            for name, variant in self._variants.items():
                if not variant.reads and self.manifest.denoiser.prediction in variant.outputs:
                    self._engines[name]  # opened now, so that what an engine refuses is refused here
            self._loop = Loop(
                self._engines, self.manifest.denoiser, self.manifest.partition, self._variants, bundle.vectors()
            )
        except BaseException:
            self.close()
            raise

    @staticmethod
    def open(
        path: str | Path, open_engine: OpenEngine, options: EngineOptions | None = None, dialect: str | None = None,
        feature_cache: str = "auto",
    ) -> Session:
        """Verify a bundle and open its denoiser graphs.

        Raises:
            BundleError: see `read_bundle`.
            EngineError: an engine refuses a graph.
        """
        return Session(read_bundle(path), open_engine, options, dialect, feature_cache)

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Array | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: Float32s | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callback | None = None,
        rng: Literal["philox", "torch-cpu"] | None = None,
        batch_size: int | None = None,
        program: StepProgram | None = None,
        guidance_mode: Mode | None = None,
        feature_cache: Literal["auto", "none", "plan"] | None = None,
        **arrays: Array,
    ) -> Output:
        """Sample.

        Args:
            class_labels: one label or name, or one per sample.
            num_inference_steps: default: the bundle's.
            guidance_scale: one number, or one per sample; at 1 or less a sample costs no unconditional row.
            guidance_rescale: 0 to 1, see `quantempo.runtime.guidance`.
            seed: sample `i` of one seed is the same whatever the batch (`philox`); a list gives each sample its own.
            generator: a `torch.Generator` on the CPU, or one per sample; goes on where it stands, as in diffusers.
            latents: standard normals to start from; as in diffusers they are scaled by the sampler's initial sigma.
            output_type: what `images` is.
            callback_on_step_end: called after each step as in diffusers; may return new latents.
            rng: `philox` (default), or `torch-cpu` for the noise that diffusers draws on the CPU.
            batch_size: samples, where nothing else tells.
            program: another sampler's step program; `num_inference_steps` is then left out.
            guidance_mode: both branches in one engine call or in two; default: one, where the graph takes so many rows.
            feature_cache: `auto` reuses features across calls where the bundle has a plan for the step count, sampler
                and guidance (and warns where its plans are for others), `none` never, `plan` refuses to run without.
            arrays: conditioning by input name, `negative_NAME` for the unconditional branch.

        Raises:
            RequestError: an argument is outside what the bundle takes; the nearest legal value is named.
        """
        request = Request(
            class_labels, guidance_scale, guidance_rescale, seed, generator, latents, rng, batch_size, guidance_mode,
            arrays,
        )
        on_step: StepCallback | None = None
        if callback_on_step_end is not None:
            user = callback_on_step_end

            def on_step(step: int, timestep: float, current: Float32s) -> Float32s | None:
                changed = user(self, step, timestep, {"latents": current})
                return None if changed is None else changed.get("latents")

        chosen = self.program(num_inference_steps, program, feature_cache, guidance_scale)
        return self.sample(request, chosen, output_type, on_step)

    def program(
        self, steps: int | None = None, program: StepProgram | None = None, feature_cache: str | None = None,
        guidance: float | Sequence[float] | None = None,
    ) -> StepProgram:
        """The step program of a call: the given one after a check, or the bundle's for a number of steps.

        Args:
            steps: default: the bundle's.
            program: another one.
            feature_cache: see `__call__`.
            guidance: as asked for; a cache plan is for the scale that it was fitted at.

        Raises:
            RequestError: there is none, or none of the kind that `feature_cache` asks for.
            DataError: the given one is damaged, or does not fit the bundle's graphs.
        """
        mode = self._cache_mode if feature_cache is None else _cache_mode(feature_cache)
        if program is None:
            count = self.manifest.programs.default_steps if steps is None else _count(steps)
            cached = self._cached.get(count) if mode != "none" else None
            if cached is not None and self._fitted_at(cached, guidance):
                return cached
            plain = self.bundle.program(count)
            self._run_uncached(mode, plain, cached)
            return plain
        if steps is not None and steps != program.steps:
            raise RequestError(
                "num_inference_steps", found=f"{steps} beside a program of {program.steps} steps",
                wanted="one of the two", cause="the program fixes the steps", remedy="leave num_inference_steps out",
            )
        check_program(program, "program")
        self._loop.check(program)
        if not is_cached(program, self._variants):
            self._run_uncached(mode, program)
        elif mode == "none":
            raise RequestError(
                "feature_cache", found="'none' beside a program that reuses features", wanted="one of the two",
                cause="the program says which calls reuse", remedy="pass another program, or leave feature_cache out",
            )
        return program

    def _fitted_at(self, cached: StepProgram, guidance: float | Sequence[float] | None) -> bool:
        """Whether a plan is for the guidance that was asked for; scales of 1 or less all mean no guidance."""
        fitted = cached.options.get(FITTED_GUIDANCE)
        if fitted is None:
            return True
        asked = self.manifest.default_guidance if guidance is None else guidance
        try:
            scales = np.atleast_1d(np.asarray(asked, np.float64))
        except (TypeError, ValueError):
            return True  # refused where the request is resolved, in words of its own
        return bool(np.all((scales == fitted) | ((scales <= 1.0) & (fitted <= 1.0))))

    def _run_uncached(self, mode: str, program: StepProgram, cached: StepProgram | None = None) -> None:
        """Say, or refuse, that features are not reused.

        Args:
            mode: of caching.
            program: that runs instead.
            cached: the plan for these steps, which is for another guidance scale.
        """
        there = ", ".join(map(str, self._cached))
        wanted = f"{self.manifest.programs.scheduler} with {there} steps" if there else "none for these graphs"
        run = f"{program.steps} steps of {program.scheduler}"
        if cached is not None:
            run += " at this guidance scale"
            wanted += f" at guidance {cached.options[FITTED_GUIDANCE]:g}"
        if mode == "plan":
            raise RequestError(
                "feature_cache", found=f"'plan' for {run}", wanted=f"a call that the bundle has a plan for ({wanted})",
                cause="a plan is fitted for one step count, scheduler and guidance scale",
                remedy="take such a call, compile with feature caching for this one, or pass feature_cache='none'",
            )
        if mode == "auto" and self.manifest.cache is not None:
            warnings.warn(
                f"the bundle has no cache plan for {run}, which run without feature caching; it has plans for: "
                f"{wanted} (feature_cache='none' runs without this notice)", CacheUnused, stacklevel=4,
            )

    def sample(
        self,
        request: Request,
        program: StepProgram,
        output_type: str = "pil",
        on_step: StepCallback | None = None,
        observer: Observer | None = None,
    ) -> Output:
        """The call behind `__call__`, for programs: with an observer of each engine call (calibration)."""
        if output_type not in ("pil", "np", "latent"):
            raise RequestError(
                "output_type", found=repr(output_type), wanted="'pil', 'np' or 'latent'", cause="a misspelling",
                remedy=nearest(str(output_type), ("pil", "np", "latent")),
            )
        shape = self.manifest.denoiser.latents_shape
        if output_type != "latent" and self.manifest.decoder.graph is None and len(shape) != 3:
            raise RequestError(
                "output_type", found=f"{output_type!r} for latents of shape {shape}", wanted="'latent'",
                cause="the bundle has no decoder, and such latents are no picture",
                remedy="pass output_type='latent' and decode with the model's VAE",
            )
        started = time.perf_counter()
        channels = self.manifest.denoiser.latents_shape[0]
        if output_type == "pil" and self.manifest.decoder.graph is None and channels not in (1, 3):
            raise RequestError(
                "output_type", found=f"'pil' for latents of {channels} channels without a decoder",
                wanted="'latent' or 'np'", cause="the bundle was compiled from a denoiser directory alone",
                remedy="ask for output_type='latent' (on the command line: -o FILE.npy), or compile the pipeline "
                "directory, with its vae/ folder",
            )
        resolved = resolve(request, self.manifest)
        result = self._loop.run(program, _loop_request(resolved, observer, on_step))
        resolved.store()
        looped = time.perf_counter()
        images: list[Image] | Float32s = result.latents
        if output_type != "latent":
            unit = to_unit(self.decode(result.latents))
            images = to_pil(unit) if output_type == "pil" else unit
        ended = time.perf_counter()
        return Output(images, result.latents, _timings(result, ended - started, ended - looped), resolved.seeds)

    def decode(self, latents: Float32s) -> Float32s:
        """Latents (batch, …) to what the decoder makes of them, (batch, channels, height, width) in about [-1, 1]."""
        decoder = self.manifest.decoder
        scaled = latents / np.float32(decoder.scaling) + np.float32(decoder.shift)
        if decoder.graph is None:
            return scaled
        if self._decoder is None:
            # Taps are tensors of the denoiser; the decoder has none of these names.
            plain = replace(self._options, extra_outputs=())
            self._decoder = self._open(self.manifest.graphs[decoder.graph], plain)
        parts = [self._decode(self._decoder, scaled[i : i + DECODE_ROWS]) for i in range(0, len(scaled), DECODE_ROWS)]
        return np.concatenate(parts)

    def _decode(self, engine: Engine, latents: Float32s) -> Float32s:
        rows = len(latents)
        if rows not in self._decoder_ports:
            (name, spec), (result, _) = next(iter(engine.inputs.items())), next(iter(engine.outputs.items()))
            sizes = {d: n for d, n in zip(spec.shape, latents.shape, strict=True) if isinstance(d, str)}
            binding = engine.bind(sizes)
            ports = Port(binding.inputs[name], engine.host), Port(binding.outputs[result], engine.host)
            # One full chunk and one remainder are worth their memory, no more.
            self._decoder_ports = {k: v for k, v in self._decoder_ports.items() if k == DECODE_ROWS}
            self._decoder_ports[rows] = (binding, *ports)
        binding, given, made = self._decoder_ports[rows]
        np.copyto(given.array, latents)
        given.push()
        binding.run()
        made.pull()
        decoded: Float32s = made.array.copy()
        return decoded

    def _denoisers(self, dialect: str | None) -> dict[str, GraphEntry]:
        """The denoiser graphs of one dialect, one per variant."""
        there = [d for d in DIALECTS if denoisers(self.manifest, d)]
        chosen = dialect if dialect is not None else (there or [""])[0]
        found = denoisers(self.manifest, chosen)
        if not found:
            raise BundleError(
                f"{self.bundle.root}", found=f"denoiser graphs of the dialects: {', '.join(there) or 'none'}",
                wanted=f"dialect {chosen!r}" if chosen else "a denoiser graph",
                cause="the bundle was compiled for another target",
                remedy=nearest(chosen, there) if there else "compile it again",
            )
        return found

    def _open(self, entry: GraphEntry, options: EngineOptions) -> Engine:
        if self._closed:
            raise EngineError(
                f"{entry.file}", found="a closed session", wanted="an open one", cause="close() was called before",
                remedy="open the bundle again",
            )
        engine = self._open_engine(self.bundle.path(entry.file), options)
        listed = sorted(s.name for s in entry.inputs), sorted(s.name for s in entry.outputs)
        found = sorted(engine.inputs), sorted(set(engine.outputs) - set(options.extra_outputs))
        if listed != found:
            engine.close()
            raise EngineError(
                f"{entry.file}", found=f"inputs {found[0]} and outputs {found[1]}",
                wanted=f"inputs {listed[0]} and outputs {listed[1]}",
                cause="manifest and graph do not belong together", remedy="compile the bundle again",
            )
        return engine

    def close(self) -> None:
        """Close all engines; a second call does nothing."""
        self._closed = True
        # Closed engines stay where the loop finds them: they say what they are.
        for engine in (*self._engines.values(), *([self._decoder] if self._decoder else [])):
            engine.close()
        self._decoder, self._decoder_ports = None, {}

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _cache_mode(mode: str) -> str:
    if mode not in CACHE_MODES:
        raise RequestError(
            "feature_cache", found=repr(mode), wanted="'auto', 'none' or 'plan'", cause="a misspelling",
            remedy=nearest(str(mode), CACHE_MODES),
        )
    return mode


def _count(steps: Any) -> int:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise RequestError(
            "num_inference_steps", found=repr(steps), wanted="a whole number", cause="a value of another type",
            remedy="pass an int",
        )
    return int(steps)


def _loop_request(resolved: Resolved, observer: Observer | None, on_step: StepCallback | None) -> LoopRequest:
    return LoopRequest(
        batch=resolved.batch, guidance=resolved.guidance, noise=resolved.noise, latents=resolved.latents,
        conditioning=resolved.conditioning, rescale=resolved.rescale, mode=resolved.mode,
        seeds=resolved.seed_per_sample, observer=observer, on_step=on_step,
    )


def _timings(result: LoopResult, total: float, decode: float) -> Timings:
    overhead = result.total_seconds - result.engine_seconds
    return Timings(
        total, result.engine_seconds, overhead, decode, result.engine_calls, result.rows, result.reused, result.variants
    )
