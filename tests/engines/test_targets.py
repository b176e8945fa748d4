"""Profiles are closed, and a CPU's profile never chooses integers that saturate."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from quantempo.engines.cpu import cpu_features, integer_types, parse_cpu, saturates
from quantempo.engines.targets import parse_version, require_format, target, targets, version_fits
from quantempo.errors import PlanError, RequestError

NAMES = (
    "cpu", "openvino", "orin-jp6", "orin-jp7", "thor", "ampere", "ada", "hopper", "blackwell", "rtx-turing",
    "rtx-a100", "rtx-spark", "rtx-ampere", "rtx-ada", "rtx-blackwell",
)
HASWELL = "model name : Xeon E5-2650\nflags : fpu sse4_1 avx avx2 fma\n"
SKYLAKE = "model name : Xeon Gold\nflags : sse4_1 avx2 avx512f avx512bw\n"
ICELAKE = "model name : Xeon Platinum\nflags : sse4_1 avx2 avx512f avx512bw avx512_vnni\n"
ALDER = "model name : Core i7-12700\nflags : sse4_1 avx2 avx_vnni\n"
SAPPHIRE = "flags : avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16\n"
GRAVITON = "Features : fp asimd asimddp i8mm bf16 sve\n"
RASPBERRY = "Features : fp asimd crc32\n"


def test_the_profiles_are_these() -> None:
    assert set(targets()) == set(NAMES)


@pytest.mark.parametrize(("wrong", "meant"), [("orin", "orin-jp"), ("rtx-adda", "rtx-ada"), ("hoper", "hopper")])
def test_an_unknown_target_is_refused_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(RequestError, match=rf"(?s)target: found '{wrong}'.*did you mean '{meant}"):
        target(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_each_profile_is_complete(name: str) -> None:
    profile = target(name)
    assert profile.name == name
    assert profile.formats
    assert profile.graphs
    assert profile.opset[0] <= 13 < 21 <= profile.opset[1]
    assert profile.versions[0]
    assert bool(profile.capability) == profile.tensorrt
    assert ("fp8" in profile.formats) == any(dialect == "fp8" for dialect, _ in profile.graphs)
    assert {kind for _, kind in profile.graphs} <= set(profile.formats)
    assert version_fits(profile, profile.versions[0])
    for bad in profile.known_bad:
        owner, _, number = bad.thread.split(",")[0].partition("#")
        assert owner.count("/") == 1
        assert number.isdecimal()


@pytest.mark.parametrize(
    ("name", "best"), [("orin-jp6", "int8"), ("ampere", "int8"), ("ada", "fp8"), ("hopper", "fp8"), ("thor", "nvfp4")]
)
def test_the_best_format_is_the_first(name: str, best: str) -> None:
    assert target(name).formats[0] == best


def test_a_format_that_a_target_lacks_is_refused_with_its_alternatives() -> None:
    with pytest.raises(PlanError, match=r"(?s)'orin-jp6': found number format 'fp8', wanted one of int8.*use 'int8'"):
        require_format(target("orin-jp6"), "fp8")
    require_format(target("ada"), "fp8")


@pytest.mark.parametrize(
    ("text", "machine", "bits", "exact", "words"),
    [
        (HASWELL, "x86_64", 7, False, "without VNNI"),
        (SKYLAKE, "x86_64", 7, False, "without VNNI"),
        (ICELAKE, "x86_64", 8, True, "avx512-vnni"),
        (ALDER, "AMD64", 8, True, "avx-vnni"),
        (SAPPHIRE, "x86_64", 8, True, "amx-int8"),
        (GRAVITON, "aarch64", 8, True, "i8mm"),
        (RASPBERRY, "aarch64", 8, True, "neon"),
        ("", "x86_64", 7, False, "without VNNI"),
        ("", "riscv64", 8, True, "plain code"),
    ],
)
def test_a_cpu_gets_integers_that_it_multiplies_exactly(
    text: str, machine: str, bits: int, exact: bool, words: str
) -> None:
    integers = integer_types(parse_cpu(text, machine))
    assert (integers.weight_bits, integers.exact) == (bits, exact)
    assert words in integers.reason
    top = 2 ** (integers.weight_bits - 1)
    assert not saturates(integers, -top, top - 1)


def test_saturation_is_what_the_instruction_does() -> None:
    """Two products of 255 with a weight, summed in 16 bits."""
    old = integer_types(parse_cpu(HASWELL, "x86_64"))
    for weight in (-128, -65, -64, 63, 64, 65, 127):
        total = 2 * 255 * weight
        clipped = int(np.clip(total, -32768, 32767))
        assert saturates(old, min(weight, 0), max(weight, 0)) == (clipped != total)


def test_a_feature_counts_only_where_every_core_has_it() -> None:
    mixed = "flags : avx2 avx_vnni\n\nflags : avx2\n"
    assert parse_cpu(mixed, "x86_64").features == ("avx2",)


def test_apples_processors_multiply_exactly_without_a_list_of_features() -> None:
    assert integer_types(parse_cpu("", "arm64", "Darwin")).reason.startswith("dotprod")


def test_the_fingerprint_follows_the_features_and_not_the_name() -> None:
    one, other = parse_cpu(HASWELL, "x86_64"), parse_cpu(SKYLAKE, "x86_64")
    renamed = parse_cpu(HASWELL.replace("E5-2650", "E5-2690"), "x86_64")
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == renamed.fingerprint
    assert "avx2" in one.fingerprint


def test_the_cpu_profiles_are_completed_with_the_cpu() -> None:
    old = parse_cpu(HASWELL, "x86_64")
    assert target("cpu", old).integers.weight_bits == 7
    assert target("openvino", old).integers.weight_bits == 7
    assert not target("openvino", old).integers.exact
    assert target("orin-jp6", old).integers.exact


def test_this_machine_is_recognised() -> None:
    if Path("/proc/cpuinfo").is_file():
        found = cpu_features()
        assert found.architecture in ("x86", "arm", "other")
        assert target("cpu").integers == integer_types(found)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("10.12.0.36", False), ("10.13", True), ("10.16.1.11", True), ("11.4.1", True), ("12.0", False), ("9.3", False)],
)
def test_versions_are_compared_by_number(version: str, fits: bool) -> None:
    assert version_fits(target("ada"), version) == fits


def test_local_versions_and_build_suffixes_do_not_matter() -> None:
    assert parse_version("2026.4.1-22000-abc+cpu")[:3] == (2026, 4, 1)
    assert parse_version("1.31.1rc1")[:2] == (1, 31)


def test_the_page_is_what_the_profiles_say() -> None:
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("targets_page", root / "tools" / "targets_page.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (root / "docs" / "targets.md").read_text() == tool.page(), "run: python tools/targets_page.py"
