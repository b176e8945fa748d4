"""What the Python reader refuses the C++ reader refuses too, with the same name and the same words."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from support.bundle_maker import Shape, cached_program, make_bundle, replace_file, rewrite_manifest
from support.cpp_library import Sampler
from support.onnx_bundles import write_onnx_bundle

from quantempo.contracts.codec import canonical_json
from quantempo.errors import QuantempoError
from quantempo.runtime.bundle import read_bundle

Edit = Callable[[Path], object]


@pytest.fixture(scope="session")
def reader(built: Path) -> Sampler:
    """Without an engine's library: what is asked of it is refused before, or at the engine."""
    return Sampler(built, None)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("refusals") / "b", Shape(steps=(1, 2, 4, 10), cached=(4, 10)))


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "b", symlinks=True)


def manifest(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return data


def changed(path: str, value: object) -> Edit:
    """A manifest with one value changed; `path` is its keys, joined by bars."""

    def edit(bundle: Path) -> None:
        data = manifest(bundle)
        *front, last = path.split("|")
        place = data
        for key in front:
            place = place[key]
        place[last] = value
        (bundle / "manifest.json").write_text(json.dumps(data))

    return edit


def removed(path: str) -> Edit:
    def edit(bundle: Path) -> None:
        data = manifest(bundle)
        *front, last = path.split("|")
        place = data
        for key in front:
            place = place[key]
        del place[last]
        (bundle / "manifest.json").write_text(json.dumps(data))

    return edit


def program(change: Callable[[Any], Any], name: str = "programs/cached.4.json") -> Edit:
    """A cached program with its JSON changed."""

    def edit(bundle: Path) -> None:
        data = json.loads((bundle / name).read_text())
        change(data)
        replace_file(bundle, name, json.dumps(data).encode())

    return edit


def decide(**fields: object) -> Edit:
    def change(data: Any) -> None:
        data["calls"][1]["decide"] = {"probe": "full", "threshold": 0.1, **fields}

    return program(change)


def vectors(content: bytes) -> Edit:
    return lambda bundle: replace_file(bundle, "vectors.safetensors", content)


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


def link_file(bundle: Path) -> None:
    shutil.move(bundle / "programs/2.json", bundle.parent / "outside.json")
    (bundle / "programs/2.json").symlink_to(bundle.parent / "outside.json")


def link_folder(bundle: Path) -> None:
    shutil.move(bundle / "programs", bundle.parent / "elsewhere")
    (bundle / "programs").symlink_to(bundle.parent / "elsewhere")


def link_manifest(bundle: Path) -> None:
    shutil.move(bundle / "manifest.json", bundle.parent / "m.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "m.json")


def unlisted(name: str) -> Edit:
    def edit(bundle: Path) -> None:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"x")

    return edit


def first_call_reuses(bundle: Path) -> None:
    before = cached_program(4)
    early = replace(before, calls=(replace(before.calls[0], graph="reuse.0"), *before.calls[1:]))
    replace_file(bundle, "programs/cached.4.json", canonical_json(early).encode())


FULL, REUSE = "full.ort-float32", "reuse.0.ort-float32"
GOOD = {"gain": np.ones((10, 4), np.float32), "bias": np.ones((10, 4), np.float32)}

SAME: dict[str, Edit] = {
    "no manifest": lambda b: (b / "manifest.json").unlink(),
    "no folder": shutil.rmtree,
    "unknown key": changed("precison", "int8"),
    "unknown key inside": changed("denoiser|clases", []),
    "feature not required": changed("requires", ["step-program-1", "scale-groups-1", "corrections-1"]),
    "corrections not required": changed("requires", ["step-program-1", "scale-groups-1", "feature-cache-1"]),
    "missing key": removed("denoiser"),
    "missing key inside": removed(f"graphs|{FULL}|variant"),
    "wrong type": changed("name", 3),
    "wrong number": changed("denoiser|latents_shape", [4, 8.5, 8]),
    "a flag as a number": changed("programs|default_steps", True),
    "null for a list": changed(f"graphs|{FULL}|reads", None),
    "wrong word": changed(f"graphs|{FULL}|dialect", "onnx"),
    "wrong precision": changed("precision", "int4"),
    "list for an object": changed("files", []),
    "absolute path": changed(f"graphs|{FULL}|file", "/etc/passwd"),
    "path above": changed("plan", "../secret"),
    "backslash": changed(f"graphs|{FULL}|data", ["graphs\\x"]),
    "drive": changed("tables", "C:/x"),
    "path with nothing": changed("vectors", ""),
    "path with NUL": changed("files|graphs/\0x", {"sha256": "0", "size": 1}),
    "sidecar": changed("files|engines/x", {"sha256": "0" * 64, "size": 1}),
    "itself": changed("files|manifest.json", {"sha256": "0" * 64, "size": 1}),
    "graph elsewhere": changed(f"graphs|{FULL}|file", "programs/2.json"),
    "not listed": changed("plan", "plan.json"),
    "no such decoder": changed("decoder|graph", "decoderr"),
    "steps that are no number": changed("cache|programs", {"four": "programs/cached.4.json"}),
    "steps with a zero": changed("cache|programs", {"04": "programs/cached.4.json"}),
    "program of other steps": changed("cache|programs", {"10": "programs/cached.4.json"}),
    "scheduler of another": changed("programs|scheduler", "Other"),
    "feature not written": changed(f"graphs|{FULL}|writes", ["cache.1"]),
    "feature not read": changed(f"graphs|{REUSE}|reads", ["cache.1"]),
    "feature written by none": changed(f"graphs|{FULL}|writes", []),
    "tampered": lambda b: (b / "programs/2.json").write_bytes((b / "programs/2.json").read_bytes().replace(b"9", b"8")),
    "cut short": lambda b: (b / "graphs/denoiser.json").write_bytes((b / "graphs/denoiser.json").read_bytes()[:-7]),
    "too long": lambda b: (b / "graphs/denoiser.json").write_bytes((b / "graphs/denoiser.json").read_bytes() + b"\n"),
    "file missing": lambda b: (b / "programs/2.json").unlink(),
    "file is a link": link_file,
    "folder is a link": link_folder,
    "manifest is a link": link_manifest,
    "unlisted folder is a link": lambda b: (b / "graphs/deep").symlink_to(b.parent),
    "unlisted link": lambda b: (b / "graphs/deep").symlink_to(b.parent / "nowhere"),
    "unlisted file": unlisted("graphs/evil.onnx"),
    "unlisted at the top": unlisted("loose.bin"),
    "unlisted and deep": unlisted("new/folder/file"),
    "program: no call": program(lambda p: p.update(calls=[])),
    "program: unknown op": program(lambda p: p["calls"][0]["update"].insert(0, {"kind": "fft", "to": "x"})),
    "program: op without a kind": program(lambda p: p["calls"][0]["update"].insert(0, {"to": "x"})),
    "program: op with another key": program(lambda p: p["calls"][0]["update"][0].update(axis=1)),
    "program: op that is none": program(lambda p: p["calls"][0]["update"].insert(0, [1, 2])),
    "program: terms of three": program(lambda p: p["calls"][0]["inputs"].update(sample=[["latents", 1.0, 2.0]])),
    "program: other version": program(lambda p: p.update(version=2)),
    "program: reads nothing": program(lambda p: p["calls"][0]["inputs"].update(sample=[["ghost", 1.0]])),
    "program: clamp of nothing": program(
        lambda p: p["calls"][0]["update"].insert(
            0, {"kind": "clamp", "to": "x", "source": "ghost", "low": 0, "high": 1}
        )
    ),
    "program: no latents": program(lambda p: p.update(state=[{"name": "x"}])),
    "program: missing graph": program(lambda p: p["calls"][1].update(graph="reuse.1")),
    "program: first call reuses": first_call_reuses,
    "program: other scheduler": program(lambda p: p.update(scheduler="Other")),
    "program: row below zero": program(lambda p: p["calls"][1]["update"][0].update(row=-1)),
    "program: row too large": program(lambda p: p["calls"][1]["update"][0].update(row=10)),
    "program: unknown vector": program(lambda p: p["calls"][1]["update"][0].update(gain="gian")),
    "program: vector for none": program(lambda p: p["calls"][1].update(vectors={"gain": 0})),
    "decide: threshold": decide(threshold=-1.0),
    "decide: consecutive": decide(max_consecutive=0),
    "decide: no indicator": decide(),
    "vectors: float64": vectors(save({**GOOD, "gain": np.ones((10, 4))})),
    "vectors: rank": vectors(save({**GOOD, "gain": np.ones((10, 4, 1), np.float32)})),
    "vectors: NaN": vectors(save({**GOOD, "gain": np.full((10, 4), np.nan, np.float32)})),
    "vectors: missing": vectors(save({"gain": GOOD["gain"]})),
    "vectors: too few rows": vectors(save({**GOOD, "gain": GOOD["gain"][:3]})),
    "vectors: too few channels": vectors(save({**GOOD, "gain": GOOD["gain"][:, :3].copy()})),
}


@pytest.mark.parametrize("case", SAME)
def test_both_readers_refuse_with_the_same_words(reader: Sampler, bundle: Path, case: str) -> None:
    SAME[case](bundle)
    with pytest.raises(QuantempoError) as caught:
        read_bundle(bundle)
    name, words = reader.refusal(bundle)
    assert (name, words.split("\n")) == (type(caught.value).__name__, str(caught.value).split("\n"))


OTHER_WORDS: dict[str, tuple[Edit, str]] = {
    "unknown feature": (
        lambda b: rewrite_manifest(b, requires=["step-program-1", "telepathy-1"]), "the feature 'telepathy-1', wanted"
    ),
    "decide: reference": (decide(reference="yesterday"), r"calls[1].decide"),
    "decide: no probe": (program(lambda p: p["calls"][1].update(decide={"threshold": 0.1})), r"calls[1].decide"),
    "manifest cut short": (lambda b: (b / "manifest.json").write_bytes(b'{"name": '), "text that is not JSON"),
    "newer": (lambda b: rewrite_manifest(b, version=2, hologram={}), "found 2, wanted at most 1"),
    "program is no JSON": (lambda b: replace_file(b, "programs/cached.4.json", b"{"), "text that is not JSON"),
    "not UTF-8": (lambda b: (b / "manifest.json").write_bytes(b'{"name": "\xff"}'), "text that is not JSON"),
    "deep": (lambda b: (b / "manifest.json").write_bytes(b"[" * 100_000), "text that is not JSON"),
    "no safetensors": (vectors(b"not safetensors"), "a file that safetensors refuses"),
    "oversize header": (vectors(b"\xff" * 8 + b"{}"), "a file that safetensors refuses"),
    "header cut short": (vectors(header("{}")[:9]), "a file that safetensors refuses"),
    "empty vectors file": (vectors(b""), "a file that safetensors refuses"),
    "truncated tensor": (vectors(save(GOOD)[:-8]), "a file that safetensors refuses"),
    "overlapping tensors": (
        vectors(
            header('{"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
                   '"b":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}', b"\0" * 4)
        ),
        "a file that safetensors refuses",
    ),
    "shape that overflows": (
        vectors(
            header('{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}')
        ),
        "a file that safetensors refuses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_WORDS)
def test_both_readers_refuse_damaged_files_with_the_same_name(reader: Sampler, bundle: Path, case: str) -> None:
    edit, words = OTHER_WORDS[case]
    edit(bundle)
    with pytest.raises(QuantempoError, match=re.escape(words)) as caught:
        read_bundle(bundle)
    name, said = reader.refusal(bundle)
    assert name == type(caught.value).__name__
    assert words in said


MORE: dict[str, tuple[Edit, str, str]] = {
    "partition that does not ascend": (changed("partition|edges", [3.0, 2.0]), "DataError", "ascend strictly"),
    "latents without a size": (changed("denoiser|latents_shape", [0, 8, 8]), "DataError", "sizes of at least 1"),
    "latents larger than memory": (changed("denoiser|latents_shape", [1 << 40] * 2), "DataError", "fits into memory"),
    "NaN": (lambda b: (b / "manifest.json").write_text('{"default_guidance": NaN}'), "DataError", "not JSON"),
    "number without end": (changed("default_guidance", 10**400), "DataError", "not JSON"),
    "table of other groups": (
        lambda b: replace_file(b, "tables.safetensors", save({"x|scale": np.ones(3, np.float32)})), "BundleError",
        "float32 of 4 groups",
    ),
    "scale of nought": (
        lambda b: replace_file(b, "tables.safetensors", save({"x|scale": np.zeros(4, np.float32)})), "BundleError",
        "finite scales above zero",
    ),
    "draw out of range": (
        program(lambda p: p["calls"][0]["update"].insert(0, {"kind": "noise", "to": "n", "draw": -1})), "DataError",
        "a draw of 0 to 2",
    ),
}  # fmt: skip
"""Where this reader is stricter, or reads at once what Python reads later."""


@pytest.mark.parametrize("case", MORE)
def test_the_reader_refuses_more(reader: Sampler, bundle: Path, case: str) -> None:
    edit, wanted, words = MORE[case]
    edit(bundle)
    name, said = reader.refusal(bundle)
    assert name == wanted
    assert words in said


def test_a_whole_bundle_gets_as_far_as_the_engine(reader: Sampler, bundle: Path) -> None:
    nothing = replace(reader, engine="nothing")
    assert nothing.refusal(bundle)[0] == "EngineError"
    for name in ("engines/x.plan", "report/r.json", "README.md", ".git/config"):
        unlisted(name)(bundle)
    name, words = nothing.refusal(bundle)
    assert name == "EngineError"
    assert "found 'nothing', wanted one of openvino, ort" in words


def graph_with(location: str) -> bytes:
    """An ONNX file of nothing but a weight in another file."""

    def field(number: int, body: bytes) -> bytes:
        assert len(body) < 128
        return bytes([number << 3 | 2, len(body)]) + body

    entry = field(13, field(1, b"location") + field(2, location.encode()))
    return field(7, field(5, field(8, b"w") + entry))


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (graph_with("../secret"), "UnsafePath", "found location '../secret'"),
        (graph_with("/etc/passwd"), "UnsafePath", "found location '/etc/passwd'"),
        (graph_with("weights.bin"), "EngineError", "found no file 'weights.bin'"),
        (graph_with("link.bin"), "UnsafePath", "'link.bin' is a link"),
        (b"\x3a\x7f", "EngineError", "ends after its message"),
        (b"", "EngineError", "no graph in it"),
        (b"\xff" * 20, "EngineError", "more than 64 bits"),
    ],
)
def test_graphs_that_reach_outside_are_refused_before_the_engine_sees_them(
    reader: Sampler, ort_library: Path, tmp_path: Path, content: bytes, name: str, words: str
) -> None:
    bundle = write_onnx_bundle(tmp_path / "b", tmp_path / "work")
    replace_file(bundle, "graphs/full.float-f32.onnx", content)
    if b"link.bin" in content:
        # Beside the manifest a link is refused at once; this one lies where only the graph knows it.
        (tmp_path / "target").write_bytes(b"x")
        data = manifest(bundle)
        rewrite_manifest(bundle, files=data["files"])
        (bundle / "graphs/link.bin").symlink_to(tmp_path / "target")
        name, words = "BundleError", "a file that the manifest does not list"
    found, said = replace(reader, library=ort_library).refusal(bundle)
    assert found == name
    assert words in said


@pytest.mark.parametrize(
    ("library_name", "setting", "words"),
    [
        ("libz.so.1", "", "found a library without ov_get_openvino_version, wanted OpenVINO 2024.3 or newer"),
        ("/nowhere/libopenvino_c.so", "", "no library that opens"),
        ("", "precision=f8", "found precision=f8, wanted one of f32, bf16, f16, auto"),
        ("", "streams=0", "found streams=0"),
        ("", "stream=1", "did you mean 'streams'"),
        ("", "shapes=free", ""),
    ],
)
def test_openvino_says_what_is_wrong_with_its_library_or_settings(
    built: Path, openvino_library: Path, tmp_path: Path, library_name: str, setting: str, words: str
) -> None:
    bundle = write_onnx_bundle(tmp_path / "b", tmp_path / "work")
    sampler = Sampler(built, Path(library_name or openvino_library), "openvino")
    done = sampler.run(bundle, "--class", 1, "--steps", 1, *(("--set", setting) if setting else ()))
    assert done.returncode == (1 if words else 0), done.stderr
    assert ("EngineError: " in done.stderr) == bool(words)
    assert words in done.stderr


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2023.3.0-13775-ceeafaf64f3-releases/2023/3", "found OpenVINO {}, wanted OpenVINO 2024.3 or newer"),
        ("2024.2.9", "found OpenVINO {}, wanted OpenVINO 2024.3 or newer"),
        ("2024.3.0-16041", "found OpenVINO {} without ov_get_last_err_msg, wanted OpenVINO 2024.3 or newer"),
        ("2025.0", "found OpenVINO {} without ov_get_last_err_msg"),
        ("custom_master_0", "found OpenVINO {} without ov_get_last_err_msg"),
    ],
)
def test_an_openvino_that_is_too_old_is_named_with_the_version_that_is_needed(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, words: str
) -> None:
    """Newer ones get as far as their functions, of which this library has none."""
    monkeypatch.setenv("OPENVINO_BUILD", version)
    bundle = write_onnx_bundle(tmp_path / "b", tmp_path / "work")
    name, said = Sampler(built, built / "libold_openvino.so", "openvino").refusal(bundle, "--class", 1)
    assert (name, said.startswith(f"engine 'openvino': {words.format(version)}")) == ("EngineError", True), said
