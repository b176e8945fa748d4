"""The speed of a bundle on this machine, by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantempo.devices.choosing import engine_named
from quantempo.engines.cpu import cpu_features
from quantempo.errors import BundleError, RequestError
from quantempo.report.measure import ReportOptions, Speed, measure_speed, open_subject, sessions, simulated
from quantempo.stages.conditioning import check_arrays, read_arrays


@dataclass(frozen=True)
class Bench:
    """Medians, and what they were measured on."""

    bundle: str
    device: str
    speed: Speed

    def data(self) -> dict[str, Any]:
        """For JSON."""
        gain = self.speed.float_ms_per_call / self.speed.int8_ms_per_call
        return {**asdict(self.speed), "bundle": self.bundle, "device": self.device, "speedup": round(gain, 3)}

    def text(self) -> str:
        """Three lines for people."""
        s = self.speed
        return (
            f"float      {s.float_ms_per_call:8.3f} ms a call\n"
            f"quantized  {s.int8_ms_per_call:8.3f} ms a call, {s.float_ms_per_call / s.int8_ms_per_call:.2f}×; "
            f"the loop itself {s.loop_overhead_ms_per_call:.3f} ms\n"
            f"medians of {s.rounds} rounds in turn, one sample at the bundle's own guidance, {s.engine}, "
            f"{s.threads or 'all'} threads, {self.device}"
        )


def bench(
    bundle: Path, *, rounds: int = 15, inputs: Path | None = None, engine: str = "ort", threads: int = 0
) -> Bench:
    """Time a bundle and its float reference in turn.

    Args:
        bundle: with `reference/`.
        rounds: of both.
        inputs: conditioning arrays, for a model that takes them.
        engine: what runs both.
        threads: of the engine.

    Raises:
        BundleError: there is no reference, or the bundle is only simulated here.
        RequestError: no round, or arrays that do not fit.
    """
    if rounds < 1:
        raise RequestError(
            "rounds", found=str(rounds), wanted="at least 1", cause="a slip", remedy="leave it out for 15 rounds"
        )
    subject = open_subject(bundle)
    format_name = simulated(subject.bundle)
    if format_name:
        raise BundleError(
            f"bench of {bundle}", found=f"{format_name}, which this machine only imitates",
            wanted="a number format that it computes in", cause="the bundle is for another device",
            remedy="measure it there, on its engine files",
        )
    arrays = {} if inputs is None else read_arrays(inputs, "inputs")
    guidance = (subject.bundle.manifest.default_guidance,)  # 1 where the model has no unconditional branch
    check_arrays(subject.bundle.manifest.denoiser, arrays, guidance, f"bench of {bundle}")
    chosen = engine_named(engine, subject.bundle, threads)
    options = ReportOptions(engine=chosen, threads=threads, timing_rounds=rounds, arrays=arrays, guidance=guidance)
    with sessions(subject, options) as (quantized, floating):
        speed = measure_speed(quantized, floating, options)
    return Bench(subject.bundle.digest, cpu_features().fingerprint, speed)
