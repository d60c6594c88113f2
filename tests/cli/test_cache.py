"""peftlab cache: what runs kept of frozen trunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peftlab.trunk.store import Store
from tests.cli.conftest import Call


@pytest.fixture(autouse=True)
def trunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two trunks, one row each."""
    monkeypatch.setenv("PEFTLAB_TRUNK_CACHE", str(tmp_path / "trunks"))
    for key in ("aaa", "abb"):
        opened = Store(tmp_path / "trunks" / key, {"model": f"{key}-model", "boundary": "block 1"})
        opened.add(b"0" * 16, np.ones((2, 4), np.float32))
        opened.flush()
    return tmp_path / "trunks"


def test_ls(call: Call, trunks: Path) -> None:
    listed = call("cache", "ls", "--json").json
    assert listed["folder"] == str(trunks)
    assert {each["key"]: each["rows"] for each in listed["trunks"]} == {"aaa": 1, "abb": 1}
    for each in listed["trunks"]:
        files = (trunks / each["key"]).iterdir()
        assert each["stored_bytes"] == sum(path.stat().st_size for path in files)
    shown = call("cache", "ls", "aa").out
    assert "aaa-model" in shown
    assert "abb" not in shown
    assert "1 trunk, " in shown


def test_clear(call: Call, trunks: Path) -> None:
    assert [each["key"] for each in call("cache", "clear", "abb", "--json").json["cleared"]] == [
        "abb"
    ]
    assert [path.name for path in trunks.iterdir()] == ["aaa"]
    assert "cleared 1 trunk, " in call("cache", "clear").out
    assert list(trunks.iterdir()) == []
    assert "0 trunks, 0 B" in call("cache", "ls").out


def test_wrong_key(call: Call, trunks: Path) -> None:
    done = call("cache", "clear", "aaa", "zzz")
    assert done.code == 2
    assert done.errors == ["error: no cached trunk 'zzz'. Known: aaa, abb."]
    assert len(list(trunks.iterdir())) == 2
