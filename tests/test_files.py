import json
from pathlib import Path

import pytest

from peftlab.files import replace_folder, write_json, write_text


def test_write_text_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "note.txt"
    write_text(target, "old")
    write_text(target, "new\n")
    assert target.read_bytes() == b"new\n"
    assert [path.name for path in target.parent.iterdir()] == ["note.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "note.txt"
    write_text(target, "old")

    def fail(self: Path, other: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_write_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5], "y": float("inf"), "z": (1,)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5], "y": None, "z": [1]}


def test_replace_folder_swaps_whole_folders(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for text in ("one", "two"):
        with replace_folder(target) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_replace_folder_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with replace_folder(target) as folder:
        (folder / "good").write_text("good")

    def fill_half() -> None:
        with replace_folder(target) as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_half()
    assert [path.name for path in target.iterdir()] == ["good"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
