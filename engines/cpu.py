"""What this CPU can do with integers, and which integer types it multiplies without losing anything.

On x86, `VPMADDUBSW` multiplies unsigned activations with signed weights and adds two products into 16 bits, where two
extreme products no longer fit: sums saturate and results are silently wrong.  The instructions that replaced it
(AVX512-VNNI, AVX-VNNI, AMX) add into 32 bits.  What is not known counts as absent.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")

_X86 = {
    "sse4_1": "sse4.1", "avx2": "avx2", "avx512f": "avx512", "avx512bw": "avx512bw", "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni", "avx512_bf16": "avx512-bf16", "avx512_fp16": "avx512-fp16", "amx_tile": "amx",
    "amx_int8": "amx-int8", "amx_bf16": "amx-bf16", "avx_vnni_int8": "avx-vnni-int8",
}
_ARM = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "asimdhp": "fp16", "sve": "sve"}
_MACHINES = {"x86_64": "x86", "amd64": "x86", "i686": "x86", "aarch64": "arm", "arm64": "arm"}


@dataclass(frozen=True)
class CpuFeatures:
    """What matters here about a CPU.

    Args:
        architecture: `x86`, `arm` or `other`.
        features: words of ours, sorted.
        model: as the system calls it; not part of the fingerprint.
    """

    architecture: Literal["x86", "arm", "other"]
    features: tuple[str, ...]
    model: str = ""

    def has(self, *names: str) -> bool:
        """Whether any of these features is there."""
        return any(name in self.features for name in names)

    @property
    def fingerprint(self) -> str:
        """What compiled code depends on, as a short word: `x86-avx512+avx512-vnni-1a2b3c4d` and the like."""
        text = "+".join(self.features) or "plain"
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:8]} ({text})"


@dataclass(frozen=True)
class IntegerTypes:
    """How to store a bundle's integers for a CPU, and what to do with one that was stored differently.

    Args:
        weight_bits: 7 keeps weights in -64 .. 63, where 16-bit sums cannot overflow.
        exact: whether full 8-bit weights are multiplied without saturation.
        reason: for people.
    """

    weight_bits: Literal[7, 8]
    exact: bool
    reason: str


@cache
def cpu_features() -> CpuFeatures:
    """The CPU that this process runs on."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    return parse_cpu(text, platform.machine(), platform.system())


def parse_cpu(cpuinfo: str, machine: str, system: str = "Linux") -> CpuFeatures:
    """Features from the text of `/proc/cpuinfo`; a feature counts only where every core has it.

    Args:
        cpuinfo: empty where the system has no such file.
        machine: as `platform.machine()` says.
        system: as `platform.system()` says.
    """
    kind = _MACHINES.get(machine.lower(), "other")
    architecture: Literal["x86", "arm", "other"] = "x86" if kind == "x86" else "arm" if kind == "arm" else "other"
    model = ""
    flags: set[str] | None = None
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() in ("flags", "Features"):
            words = set(value.split())
            flags = words if flags is None else flags & words
    known = _X86 if architecture == "x86" else _ARM if architecture == "arm" else {}
    found = {ours for word, ours in known.items() if word in (flags or ())}
    if system == "Darwin" and architecture == "arm":
        found |= {"neon", "dotprod", "fp16"}  # every Apple processor that runs macOS has them
    return CpuFeatures(architecture, tuple(sorted(found)), model)


def integer_types(cpu: CpuFeatures) -> IntegerTypes:
    """The integer types that this CPU multiplies exactly and fast."""
    if cpu.architecture == "x86":
        if cpu.has("amx-int8", "avx512-vnni", "avx-vnni"):
            name = next(n for n in ("amx-int8", "avx512-vnni", "avx-vnni") if cpu.has(n))
            return IntegerTypes(8, True, f"{name} adds products of U8 and S8 into 32 bits")
        return IntegerTypes(
            7, False,
            "without VNNI, sums of two U8·S8 products saturate at 16 bits; weights of 7 bits cannot",
        )
    if cpu.architecture == "arm":
        name = next((n for n in ("i8mm", "dotprod") if cpu.has(n)), "neon")
        return IntegerTypes(8, True, f"{name} adds products of S8 and S8 into 32 bits")
    return IntegerTypes(8, True, "plain code adds into 32 bits")


def saturates(integers: IntegerTypes, lowest: int, highest: int) -> bool:
    """Whether weights of this range could saturate under U8 activations on a CPU that multiplies in this way.

    Two products of at most `255 * w` must fit into a signed 16-bit sum.
    """
    return not integers.exact and (2 * 255 * highest > 32767 or 2 * 255 * lowest < -32768)
