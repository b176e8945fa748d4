"""A loaded bundle as a pipeline: takes the call arguments of diffusers, returns pictures.

The engine is injected (`open_engine`), so this module knows no backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import GraphEntry
from quantempo.contracts.program import StepProgram, check_program
from quantempo.errors import BundleError, EngineError, RequestError, nearest
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.guidance import Mode
from quantempo.runtime.images import to_pil, to_unit
from quantempo.runtime.loop import Loop, LoopRequest, LoopResult, Observer, Port, StepCallback
from quantempo.runtime.request import Request, Resolved, resolve

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[Any]
Float32s = NDArray[np.float32]
OpenEngine = Callable[[Path, EngineOptions], Engine]
Callback = Callable[["Session", int, float, dict[str, Float32s]], "Mapping[str, Float32s] | None"]
"""As in diffusers: (pipe, step, timestep, {"latents": …}) → a mapping that may hold new latents."""

DIALECTS = ("ort", "portable", "fp8", "float")
"""Which denoiser graphs are taken when the caller does not say; the first that the bundle has."""
DECODE_ROWS = 8
"""Latents per call of the decoder, which needs far more memory per sample than the denoiser."""


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in seconds; `calls` counts engine calls of the denoiser."""

    total: float
    engine: float
    loop_overhead: float
    decode: float
    calls: int

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
    """

    def __init__(
        self, bundle: OpenBundle, open_engine: OpenEngine, options: EngineOptions | None = None,
        dialect: str | None = None,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._open_engine = open_engine
        self._options = options or EngineOptions()
        self._decoder: Engine | None = None
        self._decoder_ports: dict[int, tuple[Any, Port, Port]] = {}
        self._engines: dict[str, Engine] = {}
        try:
            for entry in self._denoisers(dialect):
                self._engines[entry.variant] = self._open(entry, self._options)
            self._loop = Loop(self._engines, self.manifest.denoiser, self.manifest.partition)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def open(
        path: str | Path, open_engine: OpenEngine, options: EngineOptions | None = None, dialect: str | None = None
    ) -> Session:
        """Verify a bundle and open its denoiser graphs.

        Raises:
            BundleError: see `read_bundle`.
            EngineError: an engine refuses a graph.
        """
        return Session(read_bundle(path), open_engine, options, dialect)

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

        return self.sample(request, self.program(num_inference_steps, program), output_type, on_step)

    def program(self, steps: int | None = None, program: StepProgram | None = None) -> StepProgram:
        """The step program of a call: the given one after a check, or the bundle's for a number of steps."""
        if program is None:
            return self.bundle.program(self.manifest.programs.default_steps if steps is None else _count(steps))
        if steps is not None and steps != program.steps:
            raise RequestError(
                "num_inference_steps", found=f"{steps} beside a program of {program.steps} steps",
                wanted="one of the two", cause="the program fixes the steps", remedy="leave num_inference_steps out",
            )
        check_program(program, "program")
        return program

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
        started = time.perf_counter()
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

    def _denoisers(self, dialect: str | None) -> list[GraphEntry]:
        """The denoiser graphs of one dialect and float type, one per variant."""
        decoder = self.manifest.decoder.graph
        entries = [entry for name, entry in self.manifest.graphs.items() if name != decoder]
        entries = [e for e in entries if any(s.name == self.manifest.denoiser.prediction for s in e.outputs)]
        there = [d for d in DIALECTS if any(e.dialect == d for e in entries)]
        chosen = dialect if dialect is not None else (there or [""])[0]
        found = [e for e in entries if e.dialect == chosen]
        if not found:
            raise BundleError(
                f"{self.bundle.root}", found=f"denoiser graphs of the dialects: {', '.join(there) or 'none'}",
                wanted=f"dialect {chosen!r}" if chosen else "a denoiser graph",
                cause="the bundle was compiled for another target",
                remedy=nearest(chosen, there) if there else "compile it again",
            )
        found.sort(key=lambda e: e.float_type != "float32")
        return [e for i, e in enumerate(found) if e.variant not in {f.variant for f in found[:i]}]

    def _open(self, entry: GraphEntry, options: EngineOptions) -> Engine:
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
        for engine in (*self._engines.values(), *([self._decoder] if self._decoder else [])):
            engine.close()
        self._engines, self._decoder, self._decoder_ports = {}, None, {}

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


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
    return Timings(total, result.engine_seconds, overhead, decode, result.engine_calls)
