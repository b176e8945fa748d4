"""Plans are checked before they are loaded, and run in fixed device memory; a stand-in takes the library's place."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_tensorrt import FakeDevice, FakeLibrary
from support.trt_bundle import TOKENS, WIDTH, make_trt_bundle

from quantempo.contracts.codec import canonical_json, digest
from quantempo.contracts.engine import Engine, EngineOptions
from quantempo.contracts.manifest import FileEntry
from quantempo.engines.cache import KeyParts
from quantempo.engines.cuda_device import CudaDevice
from quantempo.engines.host import HostBuffer
from quantempo.engines.registry import open_engine
from quantempo.engines.trt_engine import TrtEngine, open_plan
from quantempo.engines.trt_profiles import parse_profile
from quantempo.engines.trt_record import (
    EngineRecord,
    PlanRecord,
    choose_record,
    find_plan,
    read_record,
    require_fit,
    version_loads,
    write_record,
)
from quantempo.errors import DataError, DigestMismatch, EngineError
from quantempo.runtime.session import Session

NAME = "full.portable-f16"
PLAN = b'{"factor": 2}'
PARTS = KeyParts(graph="g", backend="tensorrt_rtx", version="1.7.1.116", device="sm_89")


def write(bundle: Path, plan: bytes = PLAN, target: str = "rtx-ada", **changes: Any) -> Path:
    folder = bundle / "engines" / target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / f"{NAME}.plan").write_bytes(plan)
    made = PlanRecord(
        f"{NAME}.plan", FileEntry(digest(plan), len(plan)), len(plan), PARTS, (parse_profile("batch=1:2:4"),),
        changes.pop("weights", "plan"),
    )
    record = EngineRecord(
        target, "tensorrt_rtx", "1.7.1.116", "8.9", digest((bundle / "manifest.json").read_bytes()), {NAME: made}
    )
    write_record(folder, replace(record, **changes))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trt_bundle(tmp_path_factory.mktemp("engine") / "bundle")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "bundle"))


def opened(
    bundle: Path, device: FakeDevice | None = None, version: str = "1.7.1.116", graph: str = NAME, **settings: str
) -> TrtEngine:
    device = device or FakeDevice()
    path = bundle / "graphs" / f"{graph}.onnx"
    return open_plan(path, EngineOptions(settings=settings), "tensorrt_rtx", FakeLibrary(device, version), device)


def feeds(rows: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "sample": rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32),
        "timestep": np.zeros(rows, np.float32), "scale_group": np.array(3),
    }


def test_a_plan_runs_on_host_arrays(bundle: Path) -> None:
    write(bundle)
    engine = opened(bundle)
    assert not engine.host
    assert list(engine.inputs) == ["sample", "timestep", "scale_group"]
    assert engine.outputs["prediction"].dtype == "float32"
    for rows in (2, 4, 2):
        given = feeds(rows)
        np.testing.assert_array_equal(engine.run(given)["prediction"], given["sample"] * 2 + 3)
    engine.close()
    with pytest.raises(EngineError, match="closed engine"):
        engine.run(feeds())


def test_the_second_call_is_captured_and_later_ones_are_launched(bundle: Path) -> None:
    write(bundle)
    device = FakeDevice()
    engine = opened(bundle, device)
    binding = engine.bind({"batch": 2})
    binding.inputs["scale_group"].upload(np.array(0))
    for step in range(4):
        sample = np.full((2, TOKENS, WIDTH), step, np.float32)
        binding.inputs["sample"].upload(sample)
        binding.run()
        np.testing.assert_array_equal(binding.outputs["prediction"].download(), sample * 2)
    assert device.log == ["capture", "launch", "launch", "launch"]
    del binding
    gc.collect()
    assert device.log[-1] == "destroy"
    assert device.memory == {}, "all device memory is given back"
    plain = opened(bundle, device, cuda_graph="off").bind({"batch": 1})
    plain.run()
    plain.run()
    assert "capture" not in device.log[5:]


def test_kernels_are_compiled_for_the_fixed_shapes_before_a_graph_keeps_them(bundle: Path) -> None:
    write(bundle)
    device = FakeDevice()
    library = FakeLibrary(device)
    engine = open_plan(bundle / "graphs" / f"{NAME}.onnx", EngineOptions(), "tensorrt_rtx", library, device)
    engine.bind({"batch": 1})
    engine.bind({"batch": 2})
    one, two = library.configs
    assert one is not None
    assert two is not None
    assert one.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert one.cache is two.cache is not None, "what is compiled once serves every binding"
    plain = FakeLibrary(device, rtx=False)
    open_plan(bundle / "graphs" / f"{NAME}.onnx", EngineOptions(), "tensorrt_rtx", plain, device).bind({"batch": 1})
    assert plain.configs == [None], "TensorRT compiled everything when the plan was built"


def test_a_context_that_cannot_be_captured_runs_uncaptured(bundle: Path) -> None:
    write(bundle)
    device = FakeDevice()
    library = FakeLibrary(device, refuses=("capture",))
    engine = open_plan(bundle / "graphs" / f"{NAME}.onnx", EngineOptions(), "tensorrt_rtx", library, device)
    for _ in range(3):
        np.testing.assert_array_equal(engine.run(feeds())["prediction"], feeds()["sample"] * 2 + 3)
    assert device.log == []
    del engine
    gc.collect()
    assert device.log == ["destroy stream"]
    assert device.memory == {}


@pytest.mark.parametrize(
    ("what", "words"),
    [("context", "memory for an execution context"), ("profile", "profile 0"), ("address", "memory for 'sample'"),
     ("shape", "input 'sample' of (2, 64, 64)"), ("output", "a size for every dimension of 'prediction', not (-1, 4)")],
)  # fmt: skip
def test_what_the_library_does_not_take_is_an_error_at_once(bundle: Path, what: str, words: str) -> None:
    write(bundle)
    device = FakeDevice()
    library = FakeLibrary(device, refuses=(what,))
    engine = open_plan(bundle / "graphs" / f"{NAME}.onnx", EngineOptions(), "tensorrt_rtx", library, device)
    with pytest.raises(EngineError, match=re.escape(f"wanted {words}")):
        engine.bind({"batch": 2})


def test_shared_buffers_are_the_same_device_memory(bundle: Path) -> None:
    write(bundle)
    device = FakeDevice()
    one, two = opened(bundle, device), opened(bundle, device)
    first = one.bind({"batch": 2})
    second = two.bind({"batch": 2}, {"sample": first.outputs["prediction"]})
    assert second.inputs["sample"].address == first.outputs["prediction"].address  # type: ignore[attr-defined]
    given = feeds()
    for name, value in given.items():
        first.inputs[name].upload(value)
    second.inputs["scale_group"].upload(np.array(0))
    first.run()
    second.run()
    np.testing.assert_array_equal(second.outputs["prediction"].download(), (given["sample"] * 2 + 3) * 2)
    del first
    gc.collect()
    assert second.inputs["sample"].download().shape == (2, TOKENS, WIDTH), "the memory lives as long as it is used"
    with pytest.raises(EngineError, match=r"shared buffer 'sample'(.|\n)*bind both with the same sizes"):
        two.bind({"batch": 1}, {"sample": second.outputs["prediction"]})


def test_device_memory_is_not_handed_out_as_an_array(bundle: Path) -> None:
    write(bundle)
    buffer = opened(bundle).bind({"batch": 1}).inputs["sample"]
    with pytest.raises(EngineError, match="buffers live on its device"):
        _ = buffer.array
    with pytest.raises(EngineError, match="type float64"):
        buffer.upload(np.zeros((1, TOKENS, WIDTH)))


def test_sizes_outside_the_profile_are_refused_by_the_nearest_legal_one(bundle: Path) -> None:
    write(bundle)
    with pytest.raises(EngineError, match=r"found batch = 5(.|\n)*nearest legal sizes are batch = 4"):
        opened(bundle).bind({"batch": 5})
    with pytest.raises(EngineError, match="nearest legal sizes are batch = 4"):
        opened(bundle).run(feeds(9))


def test_a_variant_is_served_by_the_float_type_that_was_built(bundle: Path) -> None:
    write(bundle)
    assert opened(bundle, graph="full.portable-f32").name == f"tensorrt_rtx {NAME}"
    record = read_record(bundle / "engines" / "rtx-ada")
    with pytest.raises(EngineError, match=r"wanted a plan of 'decoder\.float-f32'(.|\n)*quantempo build"):
        find_plan("here", record, "decoder.float-f32")
    with pytest.raises(EngineError, match=r"wanted a plan of 'full\.float-f32'"):
        find_plan("here", record, "full.float-f32")


def test_among_several_kinds_the_own_dialect_then_the_order_of_the_target_counts(bundle: Path) -> None:
    write(bundle)
    record = read_record(bundle / "engines" / "rtx-ada")
    plan = record.plans[NAME]
    names = ("full.portable-bf16", "full.portable-f16", "full.fp8-f16", "full.float-f16", "reuse.2.portable-f16")
    record = replace(record, plans=dict.fromkeys(names, plan))
    for asked, kind, found in (
        ("full.portable-bf16", "", "full.portable-bf16"),
        ("full.portable-f32", "", "full.portable-f16"),
        ("full.ort-f32", "", "full.fp8-f16"),
        ("full.portable-f32", "fp8-f16", "full.fp8-f16"),
        ("full.float-f16", "fp8-f16", "full.float-f16"),
        ("reuse.2.portable-f32", "", "reuse.2.portable-f16"),
    ):
        assert find_plan("here", record, asked, kind) == found, (asked, kind)
    assert find_plan("here", replace(record, target="of-tomorrow"), "full.portable-f32") == "full.portable-bf16"
    with pytest.raises(EngineError, match=r"wanted a plan of 'full\.fp8-bf16'(.|\n)*rtx-ada --graphs fp8-bf16"):
        find_plan("here", record, "full.portable-f32", "fp8-bf16")
    with pytest.raises(EngineError, match=r"wanted a plan of 'reuse\.3\.portable-f32'"):
        find_plan("here", record, "reuse.3.portable-f32")


def test_the_kind_is_a_setting(bundle: Path) -> None:
    folder = write(bundle)
    assert opened(bundle, graph="full.portable-f32", graphs="portable-f16").name == f"tensorrt_rtx {NAME}"
    with pytest.raises(EngineError, match=r"plans of full\.portable-f16, wanted a plan of 'full\.fp8-f16'"):
        opened(bundle, graphs="fp8-f16")
    record = read_record(folder)
    plan = b'{"factor": 5}'
    (folder / "full.fp8-f16.plan").write_bytes(plan)
    other = replace(record.plans[NAME], file="full.fp8-f16.plan", entry=FileEntry(digest(plan), len(plan)))
    write_record(folder, replace(record, plans={**record.plans, "full.fp8-f16": other}))
    given = feeds()
    for kind, factor in (("", 2), ("portable-f16", 2), ("fp8-f16", 5)):
        found = opened(bundle, graphs=kind).run(given)["prediction"]
        np.testing.assert_array_equal(found, given["sample"] * factor + 3)


def test_no_engines_are_refused_with_the_command_that_makes_them(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"no engines(.|\n)*run: quantempo build BUNDLE --target TARGET"):
        opened(bundle)
    with pytest.raises(EngineError, match=r"no engine\.json(.|\n)*quantempo build"):
        opened(bundle, target="thor")


def test_among_several_targets_the_one_for_this_device_is_taken(bundle: Path) -> None:
    write(bundle)
    write(bundle, target="rtx-blackwell", capability="12.0")
    assert choose_record(bundle, "tensorrt_rtx", "", "12.0")[0].name == "rtx-blackwell"
    assert choose_record(bundle, "tensorrt_rtx", "rtx-ada", "12.0")[0].name == "rtx-ada"
    with pytest.raises(EngineError, match=r"engines for rtx-ada, rtx-blackwell(.|\n)*target=NAME"):
        choose_record(bundle, "tensorrt_rtx", "", None)
    with pytest.raises(EngineError, match="no engines"):
        choose_record(bundle, "tensorrt", "", "12.0")


def test_a_plan_with_another_digest_is_not_loaded(bundle: Path) -> None:
    folder = write(bundle)
    (folder / f"{NAME}.plan").write_bytes(b'{"factor": 3}')
    with pytest.raises(DigestMismatch, match="plans are code and are not loaded"):
        opened(bundle)


def test_a_plan_that_is_a_link_or_gone_is_not_loaded(bundle: Path, tmp_path: Path) -> None:
    plan = write(bundle) / f"{NAME}.plan"
    (tmp_path / "elsewhere").write_bytes(plan.read_bytes())
    plan.unlink()
    with pytest.raises(EngineError, match="no such plain file"):
        opened(bundle)
    plan.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="no such plain file"):
        opened(bundle)


def test_a_folder_that_others_can_write_to_is_refused(bundle: Path) -> None:
    write(bundle).chmod(0o777)
    with pytest.raises(EngineError, match="run: chmod 700"):
        opened(bundle)


def test_engines_of_another_compile_are_refused(bundle: Path) -> None:
    write(bundle, manifest="0" * 64)
    with pytest.raises(EngineError, match="compiled again after its engines were built"):
        opened(bundle)


def test_plans_for_another_device_are_refused(bundle: Path) -> None:
    write(bundle)
    with pytest.raises(EngineError, match=r"plans for compute capability 8\.9, wanted plans for 12\.0"):
        opened(bundle, FakeDevice("12.0"), target="rtx-ada")


def test_plans_of_another_version_are_refused(bundle: Path) -> None:
    folder = write(bundle)
    with pytest.raises(EngineError, match=r"plans of tensorrt_rtx 1\.7\.1\.116, wanted plans of tensorrt_rtx 1\.8\.0"):
        opened(bundle, version="1.8.0.1")
    record = read_record(folder)
    for here in ("1.8.0.1", "1.6.0"):
        with pytest.raises(EngineError, match="bound to the library version"):
            require_fit("here", replace(record, version_compatible=True), here, "8.9", str(folder / "engine.json"))


def test_plans_of_an_older_tensorrt_need_its_lean_runtime(bundle: Path, tmp_path: Path) -> None:
    folder = write(bundle, backend="tensorrt", library="10.13.3", version_compatible=True)
    device, lean = FakeDevice(), tmp_path / "libnvinfer_lean.so.10"
    lean.write_bytes(b"")

    def opened_by(version: str, **settings: str) -> TrtEngine:
        library = FakeLibrary(device, version, rtx=False)
        graph = bundle / "graphs" / f"{NAME}.onnx"
        engine = open_plan(graph, EngineOptions(settings=settings), "tensorrt", library, device)
        assert library.loaded == ([settings["lean_runtime"]] if version != "10.13.3" else [])
        return engine

    given = feeds()
    for version in ("10.13.3", "10.16.1", "11.4.0"):
        found = opened_by(version, lean_runtime=str(lean)).run(given)["prediction"]
        np.testing.assert_array_equal(found, given["sample"] * 2 + 3)
    with pytest.raises(EngineError, match=r"or the lean runtime of 10\.13\.3(.|\n)*lean_runtime=FILE"):
        opened_by("11.4.0")
    with pytest.raises(EngineError, match="and no file /nowhere"):
        opened_by("11.4.0", lean_runtime="/nowhere")
    with pytest.raises(EngineError, match=r"plans of tensorrt 10\.13\.3, wanted plans of tensorrt 10\.3\.0"):
        opened_by("10.3.0", lean_runtime=str(lean))
    write_record(folder, replace(read_record(folder), version_compatible=False))
    with pytest.raises(EngineError, match="with --version-compatible where later versions must load it"):
        opened_by("11.4.0", lean_runtime=str(lean))


@pytest.mark.parametrize(
    ("built", "here", "loads"),
    [("10.3.0", "10.16.1", True), ("10.16.1", "11.4.0", True), ("10.16.1", "10.3.0", False),
     ("11.4.0", "12.0.0", False), ("8.6.1", "11.0.0", False)],
)  # fmt: skip
def test_which_versions_run_which_plans(built: str, here: str, loads: bool) -> None:
    assert version_loads("tensorrt", built, here) is loads
    assert not version_loads("tensorrt_rtx", built, here)


def test_a_library_that_refuses_a_plan_is_quoted(bundle: Path) -> None:
    write(bundle, b"nonsense")
    with pytest.raises(EngineError, match=r"a refusal: magic tag does not match(.|\n)*quantempo build"):
        opened(bundle)


def test_a_call_that_fails_is_an_error(bundle: Path) -> None:
    write(bundle, b'{"factor": 0}')
    with pytest.raises(EngineError, match="wanted a call that runs"):
        opened(bundle).run(feeds())


def test_stripped_plans_are_refitted_from_the_graph(bundle: Path) -> None:
    write(bundle, weights="refit")
    device = FakeDevice()
    library = FakeLibrary(device)
    graph = bundle / "graphs" / f"{NAME}.onnx"
    open_plan(graph, EngineOptions(), "tensorrt_rtx", library, device)
    assert library.refitted == [str(graph)]


def test_a_session_samples_on_device_memory_as_it_does_on_the_host(bundle: Path) -> None:
    """The stand-in computes with ONNX Runtime, so only the way of the tensors differs."""
    write(bundle)
    host = open_engine("ort", bundle / "graphs" / "full.portable-f32.onnx", EngineOptions(threads=1))
    device = FakeDevice()
    library = FakeLibrary(device, compute=lambda given: host.run({n: a.copy() for n, a in given.items()})["prediction"])

    def on_device(graph: Path, options: EngineOptions) -> TrtEngine:
        return open_plan(graph, options, "tensorrt_rtx", library, device)

    def on_host(graph: Path, options: EngineOptions) -> Engine:
        return open_engine("ort", graph, options)

    latents = []
    for opener in (on_device, on_host):
        with Session.open(bundle, opener, EngineOptions(), "portable") as session:
            call = {"batch_size": 2, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
            latents.append(session(**call).latents)  # type: ignore[arg-type]
    np.testing.assert_array_equal(*latents)
    assert device.log.count("capture") == 1


def test_registers_are_computed_where_the_setting_says(bundle: Path) -> None:
    write(bundle)
    math = opened(bundle).math
    assert opened(bundle, registers="host").math is None
    assert math is not None
    out = math.allocate((2, 3))
    math.rows(out, 1, 1).upload(np.array([[1, 2, 3]], np.float32))
    np.testing.assert_array_equal(out.download(), [[0, 0, 0], [1, 2, 3]])
    foreign = HostBuffer(out.spec, np.zeros((2, 3), np.float32), "another engine")
    with pytest.raises(EngineError, match="found memory of another engine"):
        math.copy(foreign, out)


def test_unknown_settings_and_inner_tensors_are_refused(bundle: Path) -> None:
    write(bundle)
    with pytest.raises(EngineError, match="did you mean 'cuda_graph'"):
        opened(bundle, cuda_grpah="on")
    with pytest.raises(EngineError, match="cuda_graph=maybe"):
        opened(bundle, cuda_graph="maybe")
    with pytest.raises(EngineError, match="registers=maybe"):
        opened(bundle, registers="maybe")
    device = FakeDevice()
    with pytest.raises(EngineError, match="a plan has no inner tensors"):
        open_plan(bundle / "graphs" / f"{NAME}.onnx", EngineOptions(extra_outputs=("x",)), "tensorrt_rtx",
                  FakeLibrary(device), device)  # fmt: skip


def test_a_record_survives_the_disk_and_a_newer_one_is_refused(bundle: Path) -> None:
    folder = write(bundle)
    record = read_record(folder)
    assert read_record(write_record(folder, record).parent) == record
    path = folder / "engine.json"
    path.write_text(canonical_json(record).replace("{", '{\n  "version": 2,', 1))
    with pytest.raises(EngineError, match=r"found version 2(.|\n)*build them again"):
        read_record(folder)
    path.write_text("{}")
    with pytest.raises(DataError, match="no such key"):
        read_record(folder)


def has_gpu() -> bool:
    try:
        CudaDevice.open()
    except EngineError:
        return False
    return True


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
def test_without_a_gpu_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "_count", lambda _: 0)
    with pytest.raises(EngineError, match="no NVIDIA GPU that this process can use"):
        CudaDevice.open()


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
def test_a_gpu_that_is_there_says_what_it_is() -> None:
    if not has_gpu():
        pytest.skip("no NVIDIA GPU")
    device = CudaDevice.open()
    assert re.fullmatch(r"\d+\.\d", device.capability)
    assert device.name
