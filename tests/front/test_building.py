"""`quantempo build` with TensorRT for RTX, which compiles without a GPU: engines, keys, sidecars, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.fake_tensorrt import FakeDevice
from support.trt_bundle import make_trt_bundle

from quantempo import building
from quantempo.building import BuildOptions, build_bundle, choose_graphs
from quantempo.engines import trt_process
from quantempo.engines.cuda_device import CudaDevice
from quantempo.engines.plan_store import unpack, weight_sources
from quantempo.engines.targets import target
from quantempo.engines.tensorrt import BuildJob, build_here, capabilities
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import read_record, write_record
from quantempo.errors import BundleError, EngineError, FusionError, MissingExtra, PlanError, RequestError
from quantempo.runtime.bundle import read_bundle

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trt_bundle(tmp_path_factory.mktemp("trt") / "bundle")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose weights outweigh what the compiler adds."""
    return make_trt_bundle(tmp_path_factory.mktemp("trt") / "wide", ("full.portable-f16",), hidden=4096)


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a refusal comes only after the builder was started."""

    def build(job: BuildJob) -> None:
        raise AssertionError("the builder was started")

    monkeypatch.setattr(building.trt_process, "build", build)


def test_a_build_leaves_plans_and_a_record(bundle: Path) -> None:
    made = build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-f16"))
    assert made.folder == bundle / "engines" / "rtx-ada"
    record = read_record(made.folder)
    assert record == made.record
    assert (record.target, record.backend, record.capability) == ("rtx-ada", "tensorrt_rtx", "8.9")
    assert record.manifest == read_bundle(bundle).digest
    plan = record.plans["full.portable-f16"]
    assert plan.gate is not None
    assert (plan.gate.sites, dict(plan.gate.formats)) == (2, {"int8": 2})
    assert (made.folder / plan.file).stat().st_size == plan.entry.size == plan.plan_size > 0
    assert plan.profiles == (parse_profile("batch=1:2:8"),)
    assert made.folder.stat().st_mode & 0o777 == 0o700
    text = made.text()
    assert "2 sites, 2 on int8" in text
    assert f"tensorrt_rtx --onnx={bundle}/graphs/full.portable-f16.onnx" in text
    assert "--maxShapes=sample:8x64x64,timestep:8" in text
    read_bundle(bundle)  # engines are sidecars: the bundle is still whole


@pytest.mark.parametrize(
    ("name", "kind"), [("rtx-turing", "portable-f16"), ("rtx-ada", "fp8-f16"), ("rtx-ampere", "portable-f16")]
)
def test_each_target_takes_the_best_graph_that_it_reads(bundle: Path, name: str, kind: str) -> None:
    assert list(choose_graphs(read_bundle(bundle).manifest, target(name))) == [f"full.{kind}"]


def test_fp8_runs_on_fp8(bundle: Path) -> None:
    gate = build_bundle(bundle, BuildOptions("rtx-blackwell")).record.plans["full.fp8-f16"].gate
    assert gate is not None
    assert dict(gate.formats) == {"fp8": 2}


def test_the_same_build_has_the_same_key_and_is_kept(bundle: Path) -> None:
    options = BuildOptions("rtx-ampere")
    first = build_bundle(bundle, options)
    again = build_bundle(bundle, options)
    assert first.kept == ()
    assert again.kept == ("full.portable-f16",)
    forced = build_bundle(bundle, replace(options, force=True))
    one, two = (made.record.plans["full.portable-f16"] for made in (first, forced))
    assert forced.kept == ()
    assert one.key == two.key
    assert one.entry == two.entry, "TensorRT for RTX is deterministic"


def test_kinds_of_graphs_lie_side_by_side(tmp_path: Path) -> None:
    bundle = make_trt_bundle(tmp_path / "bundle")
    first = build_bundle(bundle, BuildOptions("rtx-spark", graphs="portable-f16"))
    second = build_bundle(bundle, BuildOptions("rtx-spark", graphs="fp8-f16"))
    assert (first.beside, second.beside) == ((), ("full.portable-f16",))
    assert set(second.record.plans) == {"full.fp8-f16", "full.portable-f16"}
    assert read_record(second.folder) == second.record
    assert "full.portable-f16: stays beside it" in second.text()
    assert second.text().count("--onnx=") == 1
    assert second.record.plans["full.portable-f16"] == first.record.plans["full.portable-f16"]
    again = build_bundle(bundle, BuildOptions("rtx-spark", graphs="portable-f16"))
    assert (again.kept, again.beside) == (("full.portable-f16",), ("full.fp8-f16",))
    # What a record does not hold for any more, or what is damaged, goes, and the user hears of it.
    (again.folder / "full.fp8-f16.plan").write_bytes(b"cut short")
    third = build_bundle(bundle, BuildOptions("rtx-spark", graphs="portable-f16"))
    assert third.beside == ()
    assert third.notices == ("full.fp8-f16 was removed: its file is damaged or gone",)
    assert not (third.folder / "full.fp8-f16.plan").exists()
    write_record(third.folder, replace(third.record, library="1.6.1.120"))
    fourth = build_bundle(bundle, BuildOptions("rtx-spark", graphs="fp8-f16"))
    assert fourth.beside == ()
    words = "full.portable-f16 was removed: it was built with another library; build it again if you need it"
    assert fourth.notices == (words,)
    assert {path.name for path in fourth.folder.iterdir()} == {"engine.json", "full.fp8-f16.plan"}


def test_another_flag_is_another_key_and_says_which(bundle: Path) -> None:
    first = build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-f16"))
    other = build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-f16", shapes=("batch=1:4:4",)))
    keys = {made.record.plans["full.portable-f16"].key for made in (first, other)}
    assert len(keys) == 2
    assert any("shapes.0: batch=1:4:4 (was batch=1:2:8)" in notice for notice in other.notices)


def test_a_damaged_plan_is_built_again(bundle: Path) -> None:
    options = BuildOptions("rtx-ampere")
    plan = build_bundle(bundle, options).folder / "full.portable-f16.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert build_bundle(bundle, options).kept == ()


def test_weights_taken_from_the_bundle_leave_little_of_a_plan(wide: Path) -> None:
    full = build_bundle(wide, BuildOptions("rtx-ada"))
    plan = (full.folder / "full.portable-f16.plan").read_bytes()
    packed = build_bundle(wide, BuildOptions("rtx-ada", weights="bundle")).record.plans["full.portable-f16"]
    assert packed.plan_size == len(plan)
    assert packed.entry.size <= 0.15 * packed.plan_size
    assert packed.key == full.record.plans["full.portable-f16"].key, "the plan is the same one"
    stored = (full.folder / packed.file).read_bytes()
    assert unpack(stored, weight_sources(wide / "graphs/full.portable-f16.onnx")) == plan


def test_stripping_by_the_builder_needs_a_device_and_says_so(bundle: Path) -> None:
    try:
        CudaDevice.open()
    except (EngineError, MissingExtra):
        with pytest.raises(EngineError, match=r"no usable GPU(.|\n)*--weights bundle"):
            build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-f16", weights="refit"))
    else:
        pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("no_builder")
def test_plans_of_rtx_are_never_version_compatible(bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"load in the release that built them alone(.|\n)*leave the option out"):
        build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-f16", version_compatible=True))


@pytest.mark.parametrize("name", ["rtx-turing", "rtx-a100", "rtx-ampere", "orin-jp6", "orin-jp7", "ampere"])
@pytest.mark.usefixtures("no_builder")
def test_fp8_is_refused_by_name_where_the_hardware_lacks_it(bundle: Path, name: str) -> None:
    with pytest.raises(PlanError, match=rf"target '{name}': found number format 'fp8', wanted one of int8"):
        build_bundle(bundle, BuildOptions(name, graphs="fp8-f16"))


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6"])
def test_the_builder_itself_refuses_fp8_there(bundle: Path, tmp_path: Path, capability: str) -> None:
    graph = bundle / "graphs/full.fp8-f16.onnx"
    job = BuildJob("tensorrt_rtx", str(graph), str(tmp_path / "p"), capability, (parse_profile("batch=2"),))
    with pytest.raises(EngineError, match=r"values of type fp8_e4m3.*\n.*FP8 needs capability 8\.9"):
        trt_process.build(job)


def test_turing_has_no_float32_products(bundle: Path, tmp_path: Path) -> None:
    words = r"not portable-f32: rtx-turing reads unfold-f16, portable-f16(.|\n)*leave --graphs out"
    with pytest.raises(BundleError, match=words):
        build_bundle(bundle, BuildOptions("rtx-turing", graphs="portable-f32"))
    graph = bundle / "graphs/full.portable-f32.onnx"
    job = BuildJob("tensorrt_rtx", str(graph), str(tmp_path / "p"), "7.5", (parse_profile("batch=2"),))
    with pytest.raises(EngineError, match=r"FP32 GEMM.*blocks\.0\.ff"):
        trt_process.build(job)


def test_a_failed_build_does_not_spoil_the_next_one(bundle: Path, tmp_path: Path) -> None:
    jobs = [
        BuildJob("tensorrt_rtx", str(bundle / f"graphs/full.{graph}.onnx"), str(tmp_path / "p"), capability,
                 (parse_profile("batch=2"),))
        for graph, capability in (("portable-f32", "7.5"), ("portable-f32", "8.9"))
    ]  # fmt: skip
    with pytest.raises(EngineError):
        trt_process.build(jobs[0])
    assert trt_process.build(jobs[1]).size > 0


def test_too_little_memory_is_explained(wide: Path) -> None:
    graph = wide / "graphs/full.portable-f16.onnx"
    job = BuildJob("tensorrt_rtx", str(graph), str(wide.parent / "p"), "8.9", (parse_profile("batch=64"),))
    with pytest.raises(EngineError, match=r"no room to compute some layer: .*more memory than 1 MiB"):
        trt_process.build(replace(job, memory_mib=1))


def test_a_graph_that_the_parser_refuses_names_node_and_module(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "graphs/full.portable-f32.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.name = "Bernoulli", "blocks.0.ff/act"
    del node.attribute[:]
    path = bundle / "graphs" / "broken.onnx"
    onnx.save(model, path)
    try:
        job = BuildJob("tensorrt_rtx", str(path), str(tmp_path / "p"), "8.9", (parse_profile("batch=2"),))
        with pytest.raises(EngineError) as caught:
            trt_process.build(job)
    finally:
        path.unlink()
    assert "Bernoulli at node 'blocks.0.ff/act' of module 'blocks.0.ff' that the parser refuses" in str(caught.value)


def test_a_graph_that_would_run_in_float_fails_the_build(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> building.GateReport:
        report = original(*_, **__)
        return replace(report, breaches=(building.fusion.Breach("blocks.0.ff.in", "the product runs on half × half"),))

    original = building.fusion.check_rtx
    monkeypatch.setattr(building.fusion, "check_rtx", refuse)
    with pytest.raises(FusionError, match=r"blocks\.0\.ff\.in: the product runs on half"):
        build_bundle(bundle, BuildOptions("rtx-spark", graphs="portable-f16"))
    assert not list((bundle / "engines" / "rtx-spark").iterdir()), "no plan stays that did not pass"


@pytest.mark.usefixtures("no_builder")
def test_bad_requests_are_refused_before_the_builder_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="runs on onnxruntime"):
        build_bundle(bundle, BuildOptions("cpu"))
    with pytest.raises(RequestError, match="did you mean 'rtx-ada'"):
        build_bundle(bundle, BuildOptions("rtx-adda"))
    with pytest.raises(RequestError, match="did you mean 'batch'"):
        build_bundle(bundle, BuildOptions("rtx-ada", shapes=("bacth=2",)))
    with pytest.raises(BundleError, match="found a bundle with graphs fp8-f16, portable-f16, portable-f32"):
        build_bundle(bundle, BuildOptions("rtx-ada", graphs="portable-bf16"))
    monkeypatch.setattr(building, "version", lambda library: "1.3.0")
    with pytest.raises(EngineError, match=r"found tensorrt_rtx 1\.3\.0, wanted tensorrt_rtx from 1\.4 to below 2"):
        build_bundle(bundle, BuildOptions("rtx-ada"))


@pytest.mark.parametrize(
    ("name", "installed", "words"),
    [("orin-jp6", "10.16.1", r"found tensorrt 10\.16\.1, wanted tensorrt from 10\.3 to below 10\.14"),
     ("ada", "10.12.0", r"from 10\.13 to below 12"), ("thor", "12.0.1", r"pip install 'tensorrt>=10\.13,<12'"),
     ("rtx-spark", "2.0", r"pip install 'tensorrt-rtx>=1\.4,<2'")],
)  # fmt: skip
@pytest.mark.usefixtures("no_builder")
def test_a_library_outside_the_range_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, installed: str, words: str
) -> None:
    monkeypatch.setattr(building, "version", lambda library: installed)
    with pytest.raises(EngineError, match=words):
        build_bundle(bundle, BuildOptions(name, graphs="portable-f16"))


def test_a_graph_that_check_refuses_is_not_built(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> tuple[object, ...]:
        from quantempo.engines.check import Finding

        return (Finding("refused", "zero-point", "blocks.0", "a zero point of 3", "compile again"),)

    monkeypatch.setattr(building, "check_graph", refused)
    with pytest.raises(EngineError, match=r"a zero point of 3 \(blocks\.0\)(.|\n)*rule 'zero-point'"):
        build_bundle(bundle, BuildOptions("rtx-ada"))


def test_an_unknown_capability_is_refused_in_this_process_too(bundle: Path, tmp_path: Path) -> None:
    assert {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"} <= set(capabilities())
    graph = bundle / "graphs/full.portable-f16.onnx"
    job = BuildJob("tensorrt_rtx", str(graph), str(tmp_path / "p"), "9.0", (parse_profile("batch=2"),))
    with pytest.raises(EngineError, match=r"compute capability 9\.0, wanted one of 7\.5"):
        build_here(job)


BLOCKED = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "diffusers", "transformers", "openvino", "scipy"):
    sys.modules[name] = None
sys.argv = ["quantempo", *sys.argv[1:]]
from quantempo.cli import main
main()
"""


def test_the_command_builds_without_torch_and_onnx(bundle: Path, tmp_path: Path) -> None:
    # The child process that builds must do without them as well.
    (tmp_path / "sitecustomize.py").write_text(BLOCKED.split("sys.argv")[0])
    words = ["build", str(bundle), "--target", "rtx-blackwell", "--graphs", "portable-f16", "--weights", "bundle"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "fusion gate, tensorrt_rtx: 2 sites, 2 on int8" in done.stdout
    record = json.loads((bundle / "engines/rtx-blackwell/engine.json").read_text())
    assert record["plans"]["full.portable-f16"]["weights"] == "bundle"
    probe = subprocess.run(
        [sys.executable, "-c", "import onnx"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert probe.returncode != 0, "the block reaches child processes"


def test_a_float_twin_builds_too(tmp_path: Path) -> None:
    made = build_bundle(make_trt_bundle(tmp_path / "float", ("full.float-f32",)), BuildOptions("rtx-ada"))
    assert made.record.plans["full.float-f32"].gate is None
    assert np.isfinite(made.record.plans["full.float-f32"].seconds)


def test_tensorrt_builds_for_the_device_at_hand_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "version", lambda library: "10.16.1")
    monkeypatch.setattr(building.CudaDevice, "open", staticmethod(lambda: FakeDevice("9.0")))
    with pytest.raises(EngineError, match=r"a fake device, compute capability 9\.0(.|\n)*build on the target device"):
        build_bundle(bundle, BuildOptions("ada", graphs="portable-f16"))


def test_the_line_for_trtexec_holds_every_option(bundle: Path) -> None:
    job = BuildJob(
        "tensorrt", str(bundle / "graphs/full.portable-f16.onnx"), "", "8.7", (parse_profile("batch=1:2:4"),), "refit",
        2048, "t.cache", 4, True,
    )
    assert building.tool_line(job).split()[2:] == [
        "--saveEngine=full.portable-f16.plan", "--minShapes=sample:1x64x64,timestep:1",
        "--optShapes=sample:2x64x64,timestep:2", "--maxShapes=sample:4x64x64,timestep:4", "--stronglyTyped",
        "--profilingVerbosity=detailed", "--skipInference", "--timingCacheFile=t.cache",
        "--memPoolSize=workspace:2048M", "--builderOptimizationLevel=4", "--stripWeights", "--versionCompatible",
        "--excludeLeanRuntime",
    ]
