import json
import os
from pathlib import Path
from typing import Any

import pytest

from peftlab.errors import RunFolderError, UnknownNameError
from peftlab.results.record import CurvePoint, Record
from peftlab.results.store import (
    RECORD,
    STEPS,
    StepLog,
    find_runs,
    read_predictions,
    read_record,
    read_steps,
    resolve_run,
    run_dir,
    write_predictions,
    write_record,
)

HASH = "3f2a91c0ffee" + "0" * 52


def _record(**values: Any) -> Record:
    defaults: dict[str, Any] = {
        "identity": HASH, "task": "movies", "recipe": "lora", "model": "minilm", "seed": 0,
        "status": "ok",
    }  # fmt: skip
    return Record(**(defaults | values))


def _run(root: Path, identity: str = HASH, age: int = 0, **values: Any) -> Path:
    record = _record(identity=identity, **values)
    folder = run_dir(root, record.task, record.recipe, identity, record.seed)
    write_record(folder, record)
    os.utime(folder / RECORD, (1_000_000 - age, 1_000_000 - age))
    return folder


def test_run_dir(tmp_path: Path) -> None:
    assert run_dir(tmp_path, "movies", "lora", HASH, 2) == tmp_path / "movies/lora/3f2a91c0ffee-s2"


@pytest.mark.parametrize("name", ["../../etc", "a/b", "/root", "..", "a b\n"])
def test_run_dir_stays_below_root(tmp_path: Path, name: str) -> None:
    folder = run_dir(tmp_path, name, name, HASH, 0)
    assert folder.parent.parent.parent == tmp_path
    assert folder.resolve() == folder


def test_record_round_trip(tmp_path: Path) -> None:
    record = _record(
        metrics={"accuracy": 0.5, "f1": None},
        curve=(CurvePoint(step=1, epoch=0.5, train_loss=None, metric=0.25),),
        notes=("a", "b"),
    )
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "is damaged"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99, this peftlab reads 1"),
        ('{"schema_version": 1, "identity": "x"}', "recipe: Field required"),
    ],
)
def test_a_bad_record_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        read_record(tmp_path)


def test_find_runs(tmp_path: Path) -> None:
    lora, full = _run(tmp_path), _run(tmp_path, recipe="full")
    other = _run(tmp_path, task="tweets")
    (tmp_path / "movies/lora/unfinished-s1").mkdir()
    assert find_runs(tmp_path) == [full, lora, other]
    assert find_runs(tmp_path, task="movies", recipe="lora") == [lora]
    assert find_runs(tmp_path / "nowhere") == []


def test_resolve_run(tmp_path: Path) -> None:
    old, new = _run(tmp_path, age=10), _run(tmp_path, seed=1)
    _run(tmp_path, identity="99" * 32, seed=2, status="failed")
    assert resolve_run(str(old), tmp_path) == old
    assert resolve_run(str(old / RECORD), tmp_path) == old
    assert resolve_run("movies/lora", tmp_path) == new
    assert resolve_run("3f2a-s0", tmp_path) == old
    with pytest.raises(RunFolderError, match="fits several runs"):
        resolve_run("3f2a", tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean 'movies/lora'"):
        resolve_run("movie/lora", tmp_path)


def test_resolve_run_that_did_not_finish(tmp_path: Path) -> None:
    _run(tmp_path, status="oom")
    with pytest.raises(RunFolderError, match=r"no run of it finished .*oom"):
        resolve_run("movies/lora", tmp_path)
    empty = run_dir(tmp_path, "movies", "lora", "ab" * 32, 0)
    empty.mkdir()
    with pytest.raises(RunFolderError, match="holds no record"):
        resolve_run(str(empty), tmp_path)


def test_steps_survive_a_kill(tmp_path: Path) -> None:
    with StepLog(tmp_path) as log:
        log.append(1, loss=float("nan"), note="a\u2028b")
        log.append(2, loss=0.5)
    with (tmp_path / STEPS).open("a") as file:
        file.write('{"step": 3, "lo')
    rows = [{"step": 1, "loss": None, "note": "a\u2028b"}, {"step": 2, "loss": 0.5}]
    assert read_steps(tmp_path) == rows
    with StepLog(tmp_path, resume_step=1) as log:
        log.append(2, loss=0.25)
        assert read_steps(tmp_path) == [rows[0], {"step": 2, "loss": 0.25}]


def test_steps_start_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with StepLog(tmp_path) as log:
            log.append(1, loss=1.0)
    assert len(read_steps(tmp_path)) == 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / STEPS).write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"steps\.jsonl:2: is damaged"):
        read_steps(tmp_path)


def test_predictions(tmp_path: Path) -> None:
    assert read_predictions(tmp_path) == []
    rows = [{"id": 1, "prediction": "ja\n", "label": "é"}, {"id": 2, "prediction": 0.5}]
    write_predictions(tmp_path, rows)
    assert read_predictions(tmp_path) == rows
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(rows[0])[:-3])
    with pytest.raises(RunFolderError, match=r"predictions\.jsonl:1"):
        read_predictions(tmp_path)
