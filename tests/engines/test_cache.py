"""An engine is compiled once, loaded only as it was written, and never from a folder that others can change."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.engines.cache import (
    ENTRY_NAME,
    SINGLE_NAME,
    EngineCache,
    Entry,
    KeyParts,
    check_private,
    differences,
    explain,
    file_digest,
    file_entry,
)
from quantempo.errors import EngineError

PARTS = KeyParts(
    graph="11" * 32, backend="openvino", version="2026.4.1", device="x86-avx512", weights={"w.bin": "22" * 32},
    tables={"full": "33" * 32}, shapes={"batch": "2"}, flags={"threads": "1", "precision": "f32"},
)


class Builder:
    """Counts its calls."""

    def __init__(self, content: bytes = b"compiled") -> None:
        self.calls, self.content = 0, content

    def __call__(self) -> bytes:
        self.calls += 1
        return self.content

    def files(self, folder: Path) -> None:
        self.calls += 1
        (folder / "graph.onnx").write_bytes(self.content)
        (folder / "weights.bin").write_bytes(self.content * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def cache(folder: Path, notices: list[str]) -> EngineCache:
    return EngineCache(folder, notices.append)


def test_a_hit_makes_no_builder_call(cache: EngineCache, folder: Path, notices: list[str]) -> None:
    builder = Builder()
    assert cache.get_or_build(PARTS, builder) == b"compiled"
    assert builder.calls == 1
    for _ in range(3):
        assert cache.get_or_build(PARTS, builder) == b"compiled"
        assert EngineCache(folder).get_or_build(replace(PARTS), builder) == b"compiled"
    assert builder.calls == 1
    assert notices == []


def test_a_hit_on_several_files_makes_no_builder_call_either(cache: EngineCache) -> None:
    builder = Builder()
    places = {cache.folder_for(PARTS, builder.files) for _ in range(3)}
    assert builder.calls == 1
    (place,) = places
    assert (place / "weights.bin").read_bytes() == b"compiled" * 2


@pytest.mark.parametrize(
    "changed",
    [
        {"graph": "00"}, {"weights": {}}, {"tables": {"full": "44"}}, {"shapes": {"batch": "4"}},
        {"flags": {"threads": "2", "precision": "f32"}}, {"backend": "ort"}, {"version": "2026.4.2"},
        {"device": "x86-avx2"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_each_part_changes_the_key_and_is_named_on_a_miss(cache: EngineCache, changed: dict[str, object]) -> None:
    builder = Builder()
    cache.get_or_build(PARTS, builder)
    other = replace(PARTS, **changed)  # type: ignore[arg-type]
    assert other.key != PARTS.key
    cache.get_or_build(other, builder)
    assert builder.calls == 2
    part = next(iter(changed))
    assert {d.part.split(".")[0] for d in differences(other, PARTS)} == {part}
    text = explain(other, PARTS)
    assert f"changed against {PARTS.key[:12]}:\n  {part}" in text


def test_the_explanation_of_a_miss_compares_with_the_closest_entry(cache: EngineCache) -> None:
    far = replace(PARTS, graph="99" * 32, shapes={"batch": "8"}, version="2025.0")
    for parts in (far, PARTS, replace(PARTS, backend="ort", flags={})):
        cache.get_or_build(parts, Builder())
    text = cache.explain(replace(PARTS, flags={"threads": "2", "precision": "f32"}))
    assert text.startswith("miss\nkey ")
    assert "  flags.threads: 2\n" in text
    assert text.endswith("  flags.threads: 2 (was 1)")


def test_the_explanation_of_a_hit_and_of_an_empty_cache(cache: EngineCache) -> None:
    assert cache.explain(PARTS).endswith("no earlier entry to compare with")
    cache.get_or_build(PARTS, Builder())
    assert cache.explain(PARTS).startswith("hit\n")
    assert cache.explain(PARTS).endswith("nothing changed")


def test_parts_that_come_and_go_are_named() -> None:
    texts = [str(d) for d in differences(replace(PARTS, tables={"half": "1"}), PARTS)]
    assert texts == [f"tables.full: gone (was {'33' * 32})", "tables.half: 1 (new)"]


@pytest.mark.parametrize("damage", ["bytes", "cut", "missing", "extra", "entry", "link", "moved"])
def test_a_damaged_entry_is_never_loaded_and_is_built_again(
    cache: EngineCache, notices: list[str], tmp_path: Path, damage: str
) -> None:
    cache.get_or_build(PARTS, Builder(b"good"))
    place = cache.folder / PARTS.key
    file = place / SINGLE_NAME
    if damage == "bytes":
        file.write_bytes(b"evil")
    elif damage == "cut":
        file.write_bytes(b"goo")
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        (place / "plugin.so").write_bytes(b"code")
    elif damage == "entry":
        (place / ENTRY_NAME).write_text("{}")
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(b"good")
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    else:
        place.rename(cache.folder / replace(PARTS, device="other").key)
    parts = replace(PARTS, device="other") if damage == "moved" else PARTS
    builder = Builder(b"good")
    assert cache.lookup(parts) is None
    assert cache.get_or_build(parts, builder) == b"good"
    assert builder.calls == 1
    assert len(notices) == 1
    assert "is not used and is built again" in notices[0]
    if damage == "moved":
        assert "device: other (was x86-avx512)" in notices[0]
    assert cache.get_or_build(parts, builder) == b"good"
    assert builder.calls == 1


def test_damage_is_a_warning_by_default(folder: Path) -> None:
    EngineCache(folder).get_or_build(PARTS, Builder())
    (folder / PARTS.key / SINGLE_NAME).write_bytes(b"x")
    with pytest.warns(UserWarning, match="another digest than when it was made"):
        EngineCache(folder).get_or_build(PARTS, Builder())


def test_a_builder_that_fails_leaves_nothing_behind(cache: EngineCache) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise EngineError("build", found="a refusal", wanted="an engine", cause="none", remedy="none")

    with pytest.raises(EngineError, match="a refusal"):
        cache.folder_for(PARTS, fail)
    assert list(cache.folder.iterdir()) == []


def test_an_entry_appears_whole_or_not_at_all(cache: EngineCache) -> None:
    seen = []

    def build(work: Path) -> None:
        (work / "a").write_bytes(b"1")
        seen.append((cache.lookup(PARTS), cache.entries()))

    cache.folder_for(PARTS, build)
    assert seen == [(None, ())]
    assert [entry.parts for entry in cache.entries()] == [PARTS]


def test_of_two_processes_that_build_at_once_one_wins_and_both_can_load(cache: EngineCache, folder: Path) -> None:
    other = EngineCache(folder)

    def build() -> bytes:
        other.get_or_build(PARTS, Builder(b"theirs"))
        return b"ours"

    assert cache.get_or_build(PARTS, build) == b"theirs"
    assert [p.name for p in folder.iterdir()] == [PARTS.key]


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    words = rf"(?s)engine cache.*others can write to \(mode {mode:o}\).*run: chmod 700"
    with pytest.raises(EngineError, match=words):
        EngineCache(folder)


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_folder_that_was_opened_up_later_is_refused_too(cache: EngineCache) -> None:
    cache.get_or_build(PARTS, Builder())
    cache.folder.chmod(0o777)
    with pytest.raises(EngineError, match="others can write to"):
        cache.get_or_build(PARTS, Builder())


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_folder_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(EngineError, match="where anyone can replace it"):
        EngineCache(shared / "cache")
    shared.chmod(0o1777)  # as /tmp is
    EngineCache(shared / "cache")


@pytest.mark.skipif(os.name != "posix", reason="owners")
def test_a_folder_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(EngineError, match=f"a folder of user {owner}"):
        check_private(folder)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(EngineError, match="choose another folder"):
        EngineCache(tmp_path / "cache")


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_new_folder_is_private(folder: Path) -> None:
    EngineCache(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_table_of_contents_names_parts_and_digests(cache: EngineCache) -> None:
    place = cache.folder_for(PARTS, Builder().files)
    entry = from_data(Entry, parse_json((place / ENTRY_NAME).read_bytes(), "entry"), "entry")
    assert entry.parts == PARTS
    assert entry.files == {name: file_entry(place / name) for name in ("graph.onnx", "weights.bin")}
    assert (place / ENTRY_NAME).read_text() == canonical_json(entry)


def test_what_was_not_used_for_longest_goes_first(cache: EngineCache) -> None:
    keys = []
    for index in range(3):
        parts = replace(PARTS, shapes={"batch": str(index)})
        cache.get_or_build(parts, Builder(b"x" * 100))
        os.utime(cache.folder / parts.key, (1000 + index, 1000 + index))
        keys.append(parts.key)
    os.utime(cache.folder / keys[0], (2000, 2000))
    assert cache.prune(250) == (keys[1],)
    assert {entry.parts.key for entry in cache.entries()} == {keys[0], keys[2]}
    assert cache.prune(250) == ()


def test_a_digest_is_computed_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"one")
    before = file_digest(path)
    assert file_digest(path) == before
    path.write_bytes(b"two!")
    assert file_digest(path) != before


def test_nothing_is_said_on_the_healthy_path(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = EngineCache(folder)
        cache.get_or_build(PARTS, Builder())
        cache.get_or_build(PARTS, Builder())
