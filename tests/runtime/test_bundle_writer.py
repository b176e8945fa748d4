from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundle_maker import Shape, make_bundle

from quantempo.contracts.manifest import Manifest
from quantempo.errors import BundleError, OutputExists, UnsafePath
from quantempo.runtime import bundle_writer
from quantempo.runtime.bundle import read_bundle
from quantempo.runtime.bundle_writer import BundleWriter, check_target, clean_up


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(target: Path, files: dict[str, bytes], manifest: Manifest) -> None:
    with BundleWriter(target, overwrite=True) as writer:
        for name, content in files.items():
            writer.add_bytes(name, content)
        writer.finish(manifest)


def fail_half_way(target: Path, error: BaseException) -> None:
    with BundleWriter(target, overwrite=True) as writer:
        writer.add_bytes("graphs/x", b"half")
        assert not (target / "graphs/x").exists()
        raise error


def test_two_writes_of_the_same_content_are_byte_identical(tmp_path: Path) -> None:
    assert tree(make_bundle(tmp_path / "a")) == tree(make_bundle(tmp_path / "b"))


def test_finish_gives_what_reading_gives(tmp_path: Path) -> None:
    first = read_bundle(make_bundle(tmp_path / "a"))
    with BundleWriter(tmp_path / "b") as writer:
        for name, content in tree(tmp_path / "a").items():
            if name != "manifest.json":
                writer.add_bytes(name, content)
        finished = writer.finish(first.manifest)
    assert finished == read_bundle(tmp_path / "b")
    assert finished.digest == first.digest


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(tmp_path / "b", KeyboardInterrupt())
    assert names(tmp_path) == []


def test_after_an_error_the_older_bundle_is_untouched(tmp_path: Path) -> None:
    before = tree(make_bundle(tmp_path / "b"))
    with pytest.raises(ValueError, match="boom"):
        fail_half_way(tmp_path / "b", ValueError("boom"))
    assert tree(tmp_path / "b") == before
    assert names(tmp_path) == ["b"]


def test_a_rename_that_fails_puts_the_older_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_bundle(tmp_path / "b")
    before, manifest = tree(old), read_bundle(old).manifest
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(bundle_writer, "_exchange", lambda first, second: False)
    with pytest.raises(OSError, match="disk on fire"):
        rewrite(old, before, manifest)
    assert tree(old) == before
    assert names(tmp_path) == ["b"]


def test_an_older_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(OutputExists, match=r"b: found a bundle[\s\S]*overwrite=True"):
        make_bundle(tmp_path / "b")
    manifest = read_bundle(make_bundle(tmp_path / "other", Shape(seed=5))).manifest
    rewrite(tmp_path / "b", tree(tmp_path / "other"), manifest)
    assert tree(tmp_path / "b") == tree(tmp_path / "other")
    assert names(tmp_path) == ["b", "other"]


@pytest.mark.parametrize("manifest", [None, "{}", "not json", '{"name": "a web page"}'])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years of work")
    if manifest is not None:
        (tmp_path / "b/manifest.json").write_text(manifest)
    with pytest.raises(OutputExists, match="a directory that is not a bundle"):
        check_target(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b/thesis.tex").read_text() == "years of work"


def test_files_and_links_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists, match="found a file"):
        check_target(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputExists, match="found a link"):
        BundleWriter(tmp_path / "link", overwrite=True).__enter__()


def test_an_empty_directory_and_missing_parents_are_free(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    read_bundle(make_bundle(tmp_path / "empty"))
    read_bundle(make_bundle(tmp_path / "a/b/c"))
    assert names(tmp_path) == ["a", "empty"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a\\x"])
def test_a_name_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePath), BundleWriter(tmp_path / "b") as writer:
        writer.add_bytes(name, b"x")
    assert names(tmp_path) == []


def test_a_manifest_that_names_an_unwritten_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json\.plan: found 'plan\.json'"):
        make_bundle(tmp_path / "b", changes={"plan": "plan.json"})
    assert names(tmp_path) == []


def test_everything_is_synced_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        assert not (tmp_path / "b").exists() or Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    make_bundle(tmp_path / "b")
    assert {"manifest.json", "denoiser.json", "graphs", tmp_path.name} <= set(synced)


KILLED = """
import os, signal, sys
from pathlib import Path
from quantempo.runtime import bundle_writer
from support.bundle_maker import make_bundle

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "writing":
    bundle_writer.BundleWriter.finish = die
elif sys.argv[2] == "between":  # the two renames of a system that cannot exchange
    bundle_writer._exchange = lambda first, second: False
    bundle_writer._sync = lambda path: None
    rename, Path.rename = Path.rename, lambda self, target: die() if ".partial-" in self.name else rename(self, target)
else:
    bundle_writer.shutil.rmtree = die
make_bundle(Path(sys.argv[1]), overwrite=True, changes={"name": "newer"})
"""


@pytest.mark.parametrize(("moment", "there"), [("writing", "older"), ("between", None), ("exchanged", "newer")])
def test_a_killed_writer_leaves_a_whole_bundle_and_the_next_one_cleans_up(
    tmp_path: Path, moment: str, there: str | None
) -> None:
    make_bundle(tmp_path / "b", changes={"name": "older"})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "b"), moment], env=environment, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(names(tmp_path)) > 1 or there is None
    if there is not None:
        assert read_bundle(tmp_path / "b").manifest.name == there
    clean_up(tmp_path / "b")
    assert names(tmp_path) == ["b"]
    assert read_bundle(tmp_path / "b").manifest.name == (there or "older")


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "b")
    writer.__enter__()
    clean_up(tmp_path / "b")
    assert writer.root.is_dir()
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert names(tmp_path) == []
