"""The record of a bundle's TensorRT engines: read, chosen and refused as in Python, without TensorRT and a device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantempo.contracts.codec import digest
from quantempo.contracts.manifest import FileEntry
from quantempo.engines.cache import KeyParts
from quantempo.engines.trt_profiles import choose, parse_profile
from quantempo.engines.trt_record import (
    EngineRecord,
    PlanRecord,
    choose_record,
    find_plan,
    load_plan,
    require_fit,
    write_record,
)
from quantempo.errors import QuantempoError

VERSION, CAPABILITY = "10.13.3", "8.9"
PARTS = KeyParts(graph="g", backend="tensorrt", version=VERSION, device="sm_89")
NAME = "full.portable-f16"
Edit = Callable[[Path], object]


def plan(name: str, content: bytes, *profiles: str) -> PlanRecord:
    entry = FileEntry(digest(content), len(content))
    return PlanRecord(f"{name}.plan", entry, len(content), PARTS, tuple(parse_profile(text) for text in profiles))


def write(bundle: Path, target: str = "l4", names: tuple[str, ...] = (NAME,), **changes: Any) -> Path:
    """Engines whose plans are their own names; changes are to the record."""
    folder = bundle / "engines" / target
    folder.mkdir(mode=0o700, parents=True)
    plans = {name: plan(name, name.encode(), "batch=1:2:4", "batch=4:8:16,tokens=1:77:77") for name in names}
    for name in names:
        (folder / f"{name}.plan").write_bytes(name.encode())
    manifest = digest((bundle / "manifest.json").read_bytes())
    record = EngineRecord(target, "tensorrt", VERSION, CAPABILITY, manifest, plans)
    write_record(folder, replace(record, **changes))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "b"
    (root / "graphs").mkdir(parents=True)
    (root / "manifest.json").write_text("{}")
    return root


def python(bundle: Path, graph: str, target: str, capability: str, library: str) -> list[str]:
    """What Python loads, or its error."""
    try:
        folder, record = choose_record(bundle, "tensorrt", target, capability)
        require_fit(str(folder), record, library, capability)
        name = find_plan(str(folder), record, graph)
        content = load_plan(folder, record, name, bundle)
    except QuantempoError as error:
        return f"{type(error).__name__}: {error}".split("\n")
    return [str(folder / record.plans[name].file), digest(content)]


def cpp(built: Path, bundle: Path, graph: str, target: str, capability: str, library: str, *sizes: str) -> list[str]:
    file = bundle / "graphs" / f"{graph}.onnx"
    command = [str(built / "quantempo-record"), str(file), target, capability, library, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return (done.stderr if done.returncode else done.stdout).removesuffix("\n").split("\n")


FOUND: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "its own": ({}, {}),
    "named": ({}, {"target": "l4"}),
    "of this device": ({"capability": "12.0", "target": "b200"}, {}),
    "of a later patch with the same numbers": ({"library": "10.13.3.post1"}, {}),
    "another kind of the variant": ({}, {"graph": "full.fp8-f16"}),
    "the own dialect first": (
        {"names": ("full.fp8-f16", "full.portable-bf16", "full.portable-f16")}, {"graph": "full.portable-f32"}
    ),
    "a variant with a point": ({"names": ("reuse.0.portable-f16", NAME)}, {"graph": "reuse.0.portable-f32"}),
    "a float graph": ({"names": (NAME, "full.float-f16")}, {"graph": "full.float-f32"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_both_find_the_same_plan(built: Path, bundle: Path, case: str) -> None:
    changes, asked = FOUND[case]
    write(bundle, **changes)
    if "capability" in changes:
        write(bundle)
    graph, target = asked.get("graph", NAME), asked.get("target", "")
    wanted = python(bundle, graph, target, CAPABILITY, VERSION)
    assert len(wanted) == 2
    assert cpp(built, bundle, graph, target, CAPABILITY, VERSION) == wanted


def edited(change: Callable[[Any], object]) -> Edit:
    def edit(bundle: Path) -> None:
        path = bundle / "engines/l4/engine.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def edited_plan(change: Callable[[Any], object]) -> Edit:
    return edited(lambda data: change(data["plans"][NAME]))


def linked(bundle: Path) -> None:
    plan_file = bundle / f"engines/l4/{NAME}.plan"
    plan_file.rename(bundle / "elsewhere")
    plan_file.symlink_to(bundle / "elsewhere")


def replaceable(bundle: Path) -> None:
    (bundle / "engines").chmod(0o777)


REFUSED: dict[str, Edit] = {
    "no engines": lambda b: (b / "engines/l4").rename(b / "elsewhere"),
    "two targets": lambda b: write(b, target="l40"),
    "a damaged record beside": lambda b: (b / "engines/l4/engine.json").write_text("{"),
    "of TensorRT for RTX": edited(lambda d: d.update(backend="tensorrt_rtx")),
    "newer": edited(lambda d: d.update(version=2)),
    "another device": edited(lambda d: d.update(capability="9.0")),
    "not built": edited(lambda d: d.update(plans={})),
    "only a float plan": edited(lambda d: d.update(plans={"full.float-f32": d["plans"][NAME]})),
    "writable by others": lambda b: (b / "engines/l4").chmod(0o777),
    "replaceable by others": replaceable,
    "of another compile": lambda b: (b / "manifest.json").write_text("{ }"),
    "plan gone": lambda b: (b / f"engines/l4/{NAME}.plan").unlink(),
    "plan is a link": linked,
    "plan outside": edited_plan(lambda p: p.update(file="../l4/x.plan")),
    "plan exchanged": lambda b: (b / f"engines/l4/{NAME}.plan").write_bytes(b"other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_refuse_in_the_same_words(built: Path, bundle: Path, case: str) -> None:
    write(bundle)
    REFUSED[case](bundle)
    wanted = python(bundle, NAME, "", CAPABILITY, VERSION)
    assert len(wanted) == 3
    assert cpp(built, bundle, NAME, "", CAPABILITY, VERSION) == wanted


DAMAGED: dict[str, Edit] = {
    "no record": lambda b: (b / "engines/l4/engine.json").unlink(),
    "newer": edited(lambda d: d.update(version=2)),
    "unknown key": edited(lambda d: d.update(librari="1")),
    "unknown key in a plan": edited_plan(lambda p: p.update(digest="1")),
    "unknown key in an entry": edited_plan(lambda p: p["entry"].update(sha512="1")),
    "unknown key in a range": edited_plan(lambda p: p["profiles"][0]["sizes"]["batch"].update(step=1)),
    "missing key": edited(lambda d: d.pop("manifest")),
    "missing key in a plan": edited_plan(lambda p: p.pop("profiles")),
    "another backend": edited(lambda d: d.update(backend="onnx")),
    "plans in a list": edited(lambda d: d.update(plans=[])),
    "a number for a word": edited(lambda d: d.update(capability=8.9)),
    "a word for a number": edited_plan(lambda p: p["profiles"][0]["sizes"]["batch"].update(low="1")),
    "weights elsewhere": edited_plan(lambda p: p.update(weights="cloud")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_both_refuse_a_damaged_record_that_is_named_in_the_same_words(built: Path, bundle: Path, case: str) -> None:
    write(bundle)
    DAMAGED[case](bundle)
    wanted = python(bundle, NAME, "l4", CAPABILITY, VERSION)
    assert len(wanted) == 3
    assert cpp(built, bundle, NAME, "l4", CAPABILITY, VERSION) == wanted


def test_what_only_python_puts_together_is_refused(built: Path, bundle: Path) -> None:
    write(bundle)
    edited_plan(lambda p: p.update(weights="refit"))(bundle)
    said = "\n".join(cpp(built, bundle, NAME, "", CAPABILITY, VERSION))
    assert said.startswith("EngineError: ")
    assert "a plan without its weights" in said
    assert "--weights plan" in said


def test_plans_of_another_version_are_refused_without_the_hint_to_a_lean_runtime(built: Path, bundle: Path) -> None:
    write(bundle, library="10.13.2", version_compatible=True)
    wanted = python(bundle, NAME, "", CAPABILITY, VERSION)
    found = cpp(built, bundle, NAME, "", CAPABILITY, VERSION)
    assert "found plans of tensorrt 10.13.2, wanted plans of tensorrt 10.13.3" in found[0]
    assert found[0].partition(", wanted")[0] == wanted[0].partition(", wanted")[0]
    assert "lean" in "".join(wanted)
    assert "lean" not in "".join(found)


def test_text_that_is_no_json_is_a_data_error(built: Path, bundle: Path) -> None:
    folder = write(bundle)
    (folder / "engine.json").write_text("{")
    assert cpp(built, bundle, NAME, "l4", CAPABILITY, VERSION)[0].startswith("DataError: ")


@pytest.mark.parametrize(("batch", "tokens"), [(1, 77), (4, 77), (5, 1), (3, 77), (0, 77), (17, 77), (5, 78)])
def test_the_same_profile_is_chosen_or_refused(built: Path, bundle: Path, batch: int, tokens: int) -> None:
    write(bundle)
    profiles = (parse_profile("batch=1:2:4,tokens=77"), parse_profile("batch=4:8:16,tokens=1:77:77"))
    edited_plan(lambda p: p["profiles"][0]["sizes"].update(tokens={"low": 77, "best": 77, "high": 77}))(bundle)
    try:
        wanted = [str(choose("plan", profiles, {"batch": batch, "tokens": tokens}))]
    except QuantempoError as error:
        wanted = f"{type(error).__name__}: {error}".split("\n")
    found = cpp(built, bundle, NAME, "", CAPABILITY, VERSION, f"batch={batch}", f"tokens={tokens}")
    assert found[-len(wanted) :] == wanted
