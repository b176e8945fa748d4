"""The engine benchmark: a sample of its builds in every run, all of them with `make test-full`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


def run(*words: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks/rtx_builds.py"), "--check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_sample_builds_and_groups_cost_no_products(tmp_path: Path) -> None:
    file, folder = tmp_path / "r.json", tmp_path / "graphs"
    words = ("--models", "demo-dit", "--capabilities", "8.9", "--keep", str(folder), "--json", str(file))
    run("--graphs", "int8-f16", "int8-one-scale-f16", *words)
    builds = json.loads(file.read_text())["builds"]
    groups, one = builds["demo-dit/int8-f16/sm89"], builds["demo-dit/int8-one-scale-f16/sm89"]
    assert groups["gate"] == one["gate"] == "passed"
    assert groups["formats"] == {"int8": groups["sites"]}
    assert groups["products"] <= one["products"]
    assert groups["packed_bytes"] <= 0.15 * groups["plan_bytes"]
    before = file.read_text()
    assert "sm89:" not in run("--graphs", "int8-f16", *words), "what is there is not built again"
    assert file.read_text() == before


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_every_model_builds_for_every_device(tmp_path: Path) -> None:
    assert "96 builds, nothing unexpected" in run("--json", str(tmp_path / "r.json"))


def entry(**changes: object) -> dict[str, object]:
    built = {
        "cpu_seconds": 1.0, "plan_bytes": 100, "products": 5, "kernels": 9, "sites": 4, "formats": {"int8": 4},
        "gate": "passed", "attention": {"float": 0, "quantized": 0},
    }
    return {**built, **changes}


def test_the_check_finds_what_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rtx_builds import check

    half = entry(gate="3 breaches, first: conv: the product runs on half × half", formats={"int8": 1})
    fine = {
        "m/int8-f16/sm89": entry(), "m/int8-one-scale-f16/sm89": entry(), "m/fp8-f16/sm86": {"refused": "fp8"},
        "m/fp8-f16/sm89": entry(formats={"fp8": 4}), "m/int8-f16/sm75": entry(sites=3, formats={"int8": 3}),
    }
    assert check(fine) == []
    for name, wrong, words in (
        ("m/int8-f16/sm89", entry(products=6), "6 products, 5 with one scale"),
        ("m/int8-f16/sm89", entry(kernels=10), "10 kernels, 9 with one scale"),
        ("m/fp8-f16/sm89", entry(attention={"float": 1, "quantized": 0}), "1 attentions in float"),
        ("m/int8-f16/sm89", half, "the product runs on half"),
        ("m/int8-f16/sm75", half, "the product runs on half"),
        ("m/int8-f16/sm89", {"refused": "no room"}, "no room"),
        ("m/fp8-f16/sm86", entry(), "although the hardware lacks FP8"),
        ("m/int8-f16/sm89", entry(packed_bytes=20), "packed to 20%"),
    ):
        (failure,) = check({**fine, name: wrong})
        assert failure.startswith(name)
        assert words in failure
