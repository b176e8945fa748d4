from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from support.bundle_maker import Shape, cached_program, make_bundle, make_program, replace_file, rewrite_manifest

from quantempo.contracts.codec import canonical_json, digest
from quantempo.errors import (
    BundleError,
    DataError,
    DigestMismatch,
    NewerBundle,
    RequestError,
    UnknownFeature,
    UnknownKey,
    UnsafePath,
)  # fmt: skip
from quantempo.runtime.bundle import read_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "b", Shape(steps=(1, 2, 3, 5, 10)))


def manifest(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return data


def test_a_whole_bundle_opens_with_program_and_table(bundle: Path) -> None:
    opened = read_bundle(bundle)
    assert opened.steps == (1, 2, 3, 5, 10)
    assert opened.program(3).steps == 3
    table = opened.scale_table()
    assert table is not None
    assert table.of("x").zero_point.tolist() == [120] * 4
    assert opened.digest == digest((bundle / "manifest.json").read_bytes())


def test_a_float_bundle_has_no_table(tmp_path: Path) -> None:
    assert read_bundle(make_bundle(tmp_path / "f", Shape(groups=0))).scale_table() is None


def test_a_tampered_file_is_named_with_its_digest(bundle: Path) -> None:
    path = bundle / "programs/3.json"
    path.write_bytes(path.read_bytes().replace(b"0.9", b"0.8"))
    with pytest.raises(DigestMismatch, match=r"programs/3\.json: found SHA-256 [0-9a-f]{64}, wanted SHA-256"):
        read_bundle(bundle)


def test_a_truncated_file_is_named_with_both_sizes(bundle: Path) -> None:
    path = bundle / "graphs/denoiser.json"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    wanted = rf"graphs/denoiser\.json: found {size - 7} bytes, wanted {size} bytes[\s\S]*cut short"
    with pytest.raises(DigestMismatch, match=wanted):
        read_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "programs/2.json").unlink()
    with pytest.raises(BundleError, match=r"programs/2\.json: found no such file[\s\S]*copied incompletely"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["graphs/evil.onnx", "loose.bin", "new/folder/file"])
def test_an_unlisted_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=rf"{name}: found a file that the manifest does not list"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["engines/rtx/a.plan", "report/r.json", "reference/s.png", "README.md", ".gitattributes"]
)
def test_sidecars_and_model_cards_may_lie_beside(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    read_bundle(bundle)


def test_an_unknown_manifest_key_is_named(bundle: Path) -> None:
    rewrite_manifest(bundle, precison="int8")
    with pytest.raises(UnknownKey, match=r"an unknown key 'precison'[\s\S]*did you mean 'precision'"):
        read_bundle(bundle)


def test_a_newer_bundle_is_told_apart_from_an_unknown_key(bundle: Path) -> None:
    rewrite_manifest(bundle, version=2, hologram={})
    with pytest.raises(NewerBundle, match=r"found 2, wanted at most 1[\s\S]*pip install --upgrade quantempo"):
        read_bundle(bundle)


def test_an_unknown_required_feature_is_named(bundle: Path) -> None:
    rewrite_manifest(bundle, requires=["step-program-1", "telepathy-1"])
    with pytest.raises(UnknownFeature, match="found the feature 'telepathy-1', wanted only corrections-1"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "graphs/../../secret", "graphs\\denoiser.json", "C:/x", "./a", "a//b", ""]
)
def test_a_path_that_leaves_the_bundle_is_refused_wherever_it_stands(bundle: Path, path: str) -> None:
    data = manifest(bundle)
    rewrite_manifest(bundle, files={**data["files"], path: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(UnsafePath, match="a path below the bundle"):
        read_bundle(bundle)
    graphs = data["graphs"]
    graphs["decoder"]["data"] = [path]
    rewrite_manifest(bundle, files=data["files"], graphs=graphs)
    with pytest.raises(UnsafePath, match=r"manifest\.json\.graphs\.decoder\.data"):
        read_bundle(bundle)


def test_a_link_to_a_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    shutil.move(bundle / "programs/3.json", outside)
    (bundle / "programs/3.json").symlink_to(outside)
    with pytest.raises(UnsafePath, match=r"programs/3\.json: found 'programs/3\.json' is a link"):
        read_bundle(bundle)


def test_a_link_to_a_folder_on_the_way_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "programs", tmp_path / "elsewhere")
    (bundle / "programs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="'programs' is a link"):
        read_bundle(bundle)


def test_a_link_to_an_unlisted_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "graphs/deep").symlink_to(tmp_path)
    with pytest.raises(UnsafePath, match="'graphs/deep' is a link"):
        read_bundle(bundle)


def test_a_manifest_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "manifest.json", tmp_path / "m.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(UnsafePath, match=r"manifest\.json: found 'manifest\.json' is a link"):
        read_bundle(bundle)


def test_graphs_lie_in_their_folder(bundle: Path) -> None:
    data = manifest(bundle)
    data["graphs"]["decoder"]["file"] = "programs/3.json"
    rewrite_manifest(bundle, graphs=data["graphs"])
    words = r"graphs\.decoder: found the path 'programs/3\.json', wanted a path below graphs/"
    with pytest.raises(UnsafePath, match=words):
        read_bundle(bundle)


def test_a_reference_to_an_unlisted_file_is_refused(bundle: Path) -> None:
    rewrite_manifest(bundle, plan="plan.json")
    words = r"manifest\.json\.plan: found 'plan\.json', which the manifest does not list"
    with pytest.raises(BundleError, match=words):
        read_bundle(bundle)


def test_a_manifest_entry_in_a_sidecar_folder_is_refused(bundle: Path) -> None:
    files = manifest(bundle)["files"]
    rewrite_manifest(bundle, files={**files, "engines/x": {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(UnsafePath, match="'engines/x', wanted no file in engines, report, reference"):
        read_bundle(bundle)


def test_what_is_no_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found no such directory"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"found no manifest\.json, wanted a bundle directory"):
        read_bundle(tmp_path)


def test_a_manifest_that_was_cut_short_is_said_so(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"manifest\.json: found text that is not JSON"):
        read_bundle(bundle)


@pytest.mark.parametrize(("steps", "close"), [(4, 3), (7, 5), (100, 10), (0, 1)])
def test_a_step_count_without_a_program_names_the_nearest(bundle: Path, steps: int, close: int) -> None:
    found = rf"found {steps}, wanted a step count with a program \(1 to 3, 5, 10\)"
    with pytest.raises(RequestError, match=found + rf"[\s\S]*nearest in the bundle is {close};.*compile"):
        read_bundle(bundle).program(steps)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "c", Shape(steps=(1, 4, 10), cached=(4, 10)))


def test_a_bundle_with_a_cache_opens_with_programs_and_vectors(cached: Path, bundle: Path) -> None:
    opened = read_bundle(cached)
    assert opened.cached_steps == (4, 10)
    assert opened.cached_program(4) == cached_program(4)
    assert opened.program(4) == make_program(4)
    assert {name: a.shape for name, a in opened.vectors().items()} == {"gain": (10, 4), "bias": (10, 4)}
    plain = read_bundle(bundle)
    assert (plain.cached_steps, plain.vectors()) == ((), {})


def graphs_with(cached: Path, graph: str, **changes: Any) -> dict[str, Any]:
    graphs: dict[str, Any] = manifest(cached)["graphs"]
    graphs[graph].update(changes)
    return {"graphs": graphs}


def without(cached: Path, feature: str) -> dict[str, Any]:
    return {"requires": [name for name in manifest(cached)["requires"] if name != feature]}


FULL, REUSE = "full.ort-float32", "reuse.0.ort-float32"


def other_shape(cached: Path, *shape: int | str) -> dict[str, Any]:
    inputs = manifest(cached)["graphs"][REUSE]["inputs"]
    return graphs_with(cached, REUSE, inputs=[*inputs[:-1], {**inputs[-1], "shape": list(shape)}])


def rows_first(cached: Path) -> dict[str, Any]:
    """The feature without a batch dimension in both graphs."""
    graphs = manifest(cached)["graphs"]
    for graph, side in ((FULL, "outputs"), (REUSE, "inputs")):
        graphs[graph][side][-1]["shape"] = [2, 8, 8]
    return {"graphs": graphs}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda b: without(b, "feature-cache-1"), "requires: found no 'feature-cache-1', wanted 'feature-cache-1'"),
        (lambda b: without(b, "corrections-1"), "requires: found no 'corrections-1'"),
        (lambda b: {"vectors": "vectors.bin"}, "vectors: found 'vectors.bin', which the manifest does not list"),
        (
            lambda b: {"cache": {"plan": "cache.jsn", "programs": {}}},
            r"cache\.plan: found 'cache\.jsn', which the manifest[\s\S]*did you mean 'cache\.json'",
        ),
        (
            lambda b: {"cache": {"plan": "cache.json", "programs": {"4": "programs/cached.5.json"}}},
            r"cache\.programs\.4: found 'programs/cached\.5\.json', which the manifest does not list",
        ),
        (
            lambda b: {"cache": {"plan": "cache.json", "programs": {"four": "programs/cached.4.json"}}},
            r"cache\.programs: found the key 'four', wanted a number of steps",
        ),
        (
            lambda b: {"cache": {"plan": "cache.json", "programs": {"10": "programs/cached.4.json"}}},
            r"programs/cached\.4\.json: steps: found 4, wanted 10, as in the manifest",
        ),
        (lambda b: graphs_with(b, FULL, writes=["cache.1"]), "found feature 'cache.1' written, wanted an output"),
        (lambda b: graphs_with(b, REUSE, reads=["cache.1"]), "found feature 'cache.1' read, wanted an input"),
        (lambda b: graphs_with(b, FULL, writes=[]), "found feature 'cache.0', which no variant writes"),
        (
            lambda b: other_shape(b, "batch", 3, 8, 8),
            r"feature 'cache\.0' as float32 \('batch', 3, 8, 8\), wanted float32 \('batch', 2, 8, 8\), as it is",
        ),
        (rows_first, r"found feature 'cache\.0' of shape \(2, 8, 8\), wanted rows of the batch \(batch\) first"),
    ],
)  # fmt: skip
def test_a_manifest_whose_cache_does_not_fit_is_refused(cached: Path, changes: Any, words: str) -> None:
    rewrite_manifest(cached, **changes(cached))
    with pytest.raises(BundleError, match=words):
        read_bundle(cached)


def test_a_cached_program_that_the_graphs_cannot_replay_is_refused_when_the_bundle_is_opened(cached: Path) -> None:
    program = cached_program(4)
    early = replace(program, calls=(replace(program.calls[0], graph="reuse.0"), *program.calls[1:]))
    replace_file(cached, "programs/cached.4.json", canonical_json(early).encode())
    with pytest.raises(DataError, match=r"programs/cached\.4\.json: call 0: found graph 'reuse\.0', which reuses"):
        read_bundle(cached)
    missing = replace(program, calls=tuple(replace(c, graph=c.graph.replace("0", "1")) for c in program.calls))
    replace_file(cached, "programs/cached.4.json", canonical_json(missing).encode())
    with pytest.raises(DataError, match=r"call 1: found a call of graph 'reuse\.1'[\s\S]*did you mean 'reuse\.0'"):
        read_bundle(cached)


def test_a_cached_program_of_another_scheduler_is_refused(cached: Path) -> None:
    program = replace(cached_program(4), scheduler="Other")
    replace_file(cached, "programs/cached.4.json", canonical_json(program).encode())
    with pytest.raises(BundleError, match="scheduler: found Other, wanted EchoScheduler, as in the manifest"):
        read_bundle(cached)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not safetensors", "vectors.safetensors: found a file that safetensors refuses"),
        (save({"gain": np.ones((10, 4))}), "'gain': found float64 \\(10, 4\\), wanted float32 of shape"),
        (save({"gain": np.ones((10, 4, 1), np.float32)}), "'gain': found float32 \\(10, 4, 1\\), wanted"),
        (save({"gain": np.full((10, 4), np.nan, np.float32)}), "'gain': found NaN or infinity, wanted finite numbers"),
        (save({"gain": np.ones((10, 4), np.float32)}), "with the unknown vector 'bias'"),
        (
            save({"gain": np.ones((3, 4), np.float32), "bias": np.ones((10, 4), np.float32)}),
            "call 3: found correct of row 3 of 'gain', wanted rows 0 to 2",
        ),
    ],
)
def test_vectors_that_are_not_what_programs_need_are_refused(cached: Path, content: bytes, words: str) -> None:
    replace_file(cached, "vectors.safetensors", content)
    with pytest.raises((BundleError, DataError), match=words):
        read_bundle(cached)


def test_the_writer_refuses_a_cached_program_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the unknown vector 'gain'"):
        make_bundle(tmp_path / "b", Shape(cached=(4,)), {"vectors": None})
    assert not list(tmp_path.iterdir())
