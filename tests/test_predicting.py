"""A finished run, loaded again without its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftlab.errors import DataError, RunFolderError, UnknownNameError
from peftlab.predicting import load_run, predict
from peftlab.results.store import read_predictions, read_record, write_record
from peftlab.run import Request, train

WORDS = ("awful", "dull", "fine", "great")


def text(number: int) -> str:
    return f"a {WORDS[number % 4]} film number {number}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run on BERT-Tiny whose data are gone."""
    folder = tmp_path_factory.mktemp("predict")
    lines = [
        f"a {WORDS[i % 4]} film number {i},{'good' if i % 4 > 1 else 'bad'}" for i in range(60)
    ]
    (folder / "rows.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    (folder / "films.yaml").write_text(
        "kind: classification\nmodel: bert-tiny\ndata: {train: rows.csv, text: sentence}\n"
    )
    run = train(
        str(folder / "films.yaml"),
        "lora",
        overrides=["train.max_steps=3", "train.max_length=16", "train.eval_strategy=no"],
        request=Request(root=folder / "runs", progress=False),
    )
    (folder / "rows.csv").unlink()
    return run.folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_loaded_run_says_what_the_run_said(finished):
    tested = read_predictions(finished)
    loaded = load_run(finished)
    assert loaded.labels == ("bad", "good")
    assert not loaded.model.training
    # Rows that are held out keep the name of the file that they come from: train-<number>.
    said = predict(loaded, [{"text": text(int(row["id"].partition("-")[2]))} for row in tested])
    assert [p["prediction"] for p in said] == [row["prediction"] for row in tested]
    for now, then in zip(said, tested, strict=True):
        assert now["logits"] == pytest.approx(then["logits"], abs=1e-6)


def test_rows_come_from_a_file_with_the_tasks_columns(finished, tmp_path):
    (tmp_path / "new.csv").write_text("sentence\na great film\nan awful film\n")
    predictions = predict("films/lora", tmp_path / "new.csv", root=finished.parents[2])
    assert [set(p) for p in predictions] == [{"id", "prediction", "logits"}] * 2
    rows = [{"text": "a great film"}, {"text": "an awful film"}]
    again = predict(finished, rows)
    assert [p["logits"] for p in again] == [pytest.approx(p["logits"]) for p in predictions]
    assert [p["id"] for p in again] == ["0", "1"]


def test_a_row_that_lacks_what_the_task_reads_is_named(finished):
    with pytest.raises(DataError, match="row b: has no 'text'"):
        predict(finished, [{"id": "a", "text": "fine"}, {"id": "b", "sentence": "fine"}])
    with pytest.raises(DataError, match="nothing to predict"):
        predict(finished, [])


def test_a_run_that_did_not_end_well_is_refused(run):
    failed = read_record(run).model_copy(update={"status": "oom", "error": "out of memory"})
    write_record(run, failed)
    with pytest.raises(RunFolderError, match=r"did not end well \(oom: out of memory\)"):
        load_run(run)


def test_a_missing_or_damaged_adapter_is_refused(run):
    state = run / "adapter" / "adapter_model.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="is damaged"):
        load_run(run)
    state.unlink()
    with pytest.raises(RunFolderError, match="has no adapter"):
        load_run(run)


def test_no_such_run(tmp_path):
    with pytest.raises(UnknownNameError):
        load_run("films/lora", root=tmp_path)


def test_the_record_holds_the_labels(finished):
    assert json.loads((finished / "record.json").read_text())["labels"] == ["bad", "good"]
