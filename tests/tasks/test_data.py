import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from peftlab.config import load_yaml, validate_section
from peftlab.errors import DataError
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.base import DataConfig
from peftlab.tasks.data import Field, as_text, read_rows, read_splits
from peftlab.tasks.embedded import EMBEDDED_DATASETS
from peftlab.training.config import TrainConfig

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "tasks").glob("*.yaml"))
FIELDS = [Field("text", ("text",), as_text), Field("label", ("label",), as_text, target=True)]
ROWS = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(100)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def read(folder=".", **data):
    return read_splits(DataConfig(**data), str(folder), FIELDS, stratify="label")


def ids(rows):
    return {row["id"] for row in rows}


def texts(rows):
    return [row["text"] for row in rows]


@pytest.fixture
def folder(tmp_path):
    """A folder with the same rows in every format."""
    (tmp_path / "rows.csv").write_text(CSV)
    (tmp_path / "rows.tsv").write_text(CSV.replace(",", "\t"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path


def problems_of(folder, **data):
    with pytest.raises(DataError) as caught:
        read(folder, **data)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(folder, ending):
    splits = read(folder, train=f"rows.{ending}")
    reference = read(folder, train="rows.jsonl")
    assert splits == reference
    assert sum(len(splits[name]) for name in ("train", "validation", "test")) == 100


def test_csv_fields_may_hold_line_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufefftext,label\n"two\nlines, ""quoted""",a\n\nnext,\n', encoding="utf-8")
    assert problems_of(tmp_path, train="rows.csv") == ["rows.csv:5: column 'label' is empty."]
    rewrite(path, "next,\n", "next,b\n")
    assert texts(read_rows(path, FIELDS)) == ['two\nlines, "quoted"', "next"]


def rewrite(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def test_relative_paths_start_beside_the_task_then_in_the_working_directory(
    folder, tmp_path_factory, monkeypatch
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    (elsewhere / "only_here.csv").write_text(CSV)
    (elsewhere / "rows.csv").write_text("text,label\nwrong,a\n")
    assert len(read(folder, train="rows.csv").train) == 80
    assert len(read(folder, train="only_here.csv").train) == 80


MALFORMED = """
a.csv|text,label\\nx,a,b\\n|a.csv:2: has 3 fields where the header has 2. Quote fields
a.csv|text,label\\n"x,a\\ny,b\\n|a.csv:2: malformed row: unexpected end of data.
a.csv|text,text\\nx,a\\n|a.csv:1: columns named twice: text.
a.csv||a.csv: holds no rows.
a.csv|text,label\\n|a.csv: holds no rows.
a.csv|texts,label\\nx,a\\n|a.csv: has no column 'text' (data.text). Did you mean 'texts'? Columns:
a.csv|zzz,label\\nx,a\\n|a.csv: has no column 'text' (data.text). Columns: zzz, label.
a.csv|text,label\\nx,a\\n  ,b\\n|a.csv:3: column 'text' is empty.
a.jsonl|{"text": "x", "label": "a"}\\n\\n{"text": \\n|a.jsonl:3: bad JSON: Expecting value.
a.jsonl|{"text": "x", "label": null}|a.jsonl:1: column 'label' is empty.
a.jsonl|{"text": "x", "label": "a"}\\n{"text": "y"}|a.jsonl:2: column 'label' is empty.
a.jsonl|{"text": "x", "label": [1]}|a.jsonl:1: column 'label' must be text, got list.
a.jsonl|[1]|a.jsonl:1: must be an object with named values, got list.
a.json|[{"text": "x",\\n "label" "a"}]|a.json:2: bad JSON: Expecting ':' delimiter.
a.json|{"text": "x"}|a.json: must hold a list of objects. One object a line
a.parquet|text|a.parquet: is not a Parquet file: Could not open
a.txt|text|a.txt: files ending in '.txt' cannot be read. Known: .csv, .tsv, .json, .jsonl, .parquet.
a.csv|text,label\\n\xff,a|a.csv: is not UTF-8 text: 'utf-8' codec can't decode byte 0xff
"""


@pytest.mark.parametrize("case", MALFORMED.strip().splitlines())
def test_malformed_files(tmp_path, case):
    name, content, expected = case.split("|")
    (tmp_path / name).write_bytes(content.replace("\\n", "\n").encode("latin-1"))
    (problem,) = problems_of(tmp_path, train=name)
    assert problem.startswith(expected)


def test_missing_files_name_the_nearest_beside_them(folder):
    (problem,) = problems_of(folder, train="row.csv")
    assert problem.startswith("data.train: there is no file row.csv. Did you mean 'rows.csv'")
    (problem,) = problems_of(folder, train="nowhere/rows.csv")
    assert problem.endswith("there is no file nowhere/rows.csv. The folder nowhere does not exist.")


def test_everything_wrong_is_told_at_once(folder):
    (folder / "bad.csv").write_text("txt,label\nx,a\n")
    (folder / "empty.jsonl").write_text("")
    assert [problem.split(":")[0] for problem in problems_of(
        folder, train="bad.csv", validation="empty.jsonl", test="none.csv", revision="main"
    )] == ["data.revision", "data.test", "bad.csv", "empty.jsonl"]  # fmt: skip


def test_many_bad_rows_are_counted_not_listed(folder):
    (folder / "bad.csv").write_text("text,label\n" + ",a\n" * 25)
    problems = problems_of(folder, train="bad.csv")
    assert len(problems) == 11
    assert problems[-1] == "bad.csv: and 15 more rows like these."


def test_held_out_splits_are_stratified_disjoint_and_reported(folder):
    splits = read(folder, train="rows.csv")
    for name in ("validation", "test"):
        assert sorted(row["label"] for row in splits[name]) == ["a"] * 5 + ["b"] * 5
    parts = [ids(splits[name]) for name in ("train", "validation", "test")]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 100
    assert [note.split(":")[0] for note in splits.notes] == ["validation", "test"]


def test_a_split_that_is_given_is_not_held_out(folder):
    (folder / "other.csv").write_text("text,label\nother,a\n")
    splits = read(folder, train="rows.csv", test="other.csv")
    assert (len(splits.train), len(splits.validation), texts(splits.test)) == (90, 10, ["other"])
    assert [note.split(":")[0] for note in splits.notes] == ["validation"]
    splits = read(folder, train="rows.csv", validation="other.csv")
    assert (len(splits.train), len(splits.test)) == (90, 10)


def test_holding_out_follows_what_rows_say_not_where_they_stand(folder):
    (folder / "turned.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])))
    first, second = read(folder, train="rows.jsonl"), read(folder, train="turned.jsonl")
    assert sorted(texts(first.test)) == sorted(texts(second.test))
    assert first.fingerprint != second.fingerprint


def test_equal_inputs_are_held_out_together(folder):
    rows = [{"text": f"text {n % 40}", "label": "ab"[n % 3 == 0]} for n in range(200)]
    (folder / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = read(folder, train="twice.jsonl")
    parts = [set(texts(splits[name])) for name in ("train", "validation", "test")]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 40
    assert len(splits.test) == 20


def test_too_few_rows_to_hold_out(folder):
    (folder / "few.csv").write_text("text,label\nx,a\ny,b\n")
    (problem,) = problems_of(folder, train="few.csv")
    assert "too few different training inputs to hold out validation and test rows" in problem


def test_inputs_in_both_training_and_test_are_counted_and_kept(folder):
    (folder / "test.csv").write_text("text,label\ntext 1,a\ntext 2,b\nnew,a\n")
    splits = read(folder, train="rows.csv", validation="test.csv", test="test.csv")
    assert splits.notes == ("2 of 3 test inputs also occur in training.",)
    assert (len(splits.train), len(splits.test)) == (100, 3)


def test_smaller_subsets_are_part_of_larger_ones_and_keep_the_shares(folder):
    rows = [{"text": f"t{n}", "label": "a" if n % 4 == 0 else "b"} for n in range(1000)]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subsets = [
        read(folder, train="many.jsonl", max_train_rows=count).train for count in (20, 100, 400)
    ]
    assert [len(subset) for subset in subsets] == [20, 100, 400]
    assert ids(subsets[0]) < ids(subsets[1]) < ids(subsets[2])
    assert [sum(row["label"] == "a" for row in subset) for subset in subsets] == [5, 25, 100]


def test_eval_subsets_leave_training_alone(folder):
    whole, cut = read(folder, train="rows.csv"), read(folder, train="rows.csv", max_eval_rows=4)
    assert cut.train == whole.train
    assert ids(cut.validation) < ids(whole.validation)
    assert (len(cut.validation), len(cut.test)) == (4, 4)


def test_fingerprint_changes_with_the_rows_that_are_used(folder):
    whole = read(folder, train="rows.csv").fingerprint
    assert len(whole) == 64
    assert read(folder, train="rows.csv", max_train_rows=1000).fingerprint == whole
    assert read(folder, train="rows.csv", max_train_rows=50).fingerprint != whole
    rewrite(folder / "rows.csv", "text 7,", "text seven,")
    assert read(folder, train="rows.csv").fingerprint != whole


def test_splits_and_fingerprint_are_the_same_in_another_process(folder):
    script = (
        "import sys; from peftlab.tasks import TASK_KINDS; K = TASK_KINDS.get('classification');"
        f"s = K(K.Config(train='rows.csv', max_train_rows=30), {str(folder)!r}).read();"
        "assert not {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules);"
        "print(s.fingerprint, *(r['id'] for r in [*s.train, *s.test]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 41


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([7, 8, 9], ["7", "8", "9"]),
        (["x", "x", "y"], ["row-0", "row-1", "row-2"]),
        (["x", None, "y"], ["row-0", "row-1", "row-2"]),
    ],
)
def test_ids_come_from_an_id_column_that_tells_rows_apart(write_jsonl, column, expected):
    rows = [{"id": value, "text": "t"} for value in column]
    assert [row["id"] for row in read_rows(write_jsonl("rows.jsonl", rows), FIELDS)] == expected


def test_rows_to_predict_may_lack_the_target_but_not_the_input(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"text": "x"}])
    assert read_rows(path, FIELDS) == [{"id": "row-0", "text": "x"}]
    with pytest.raises(DataError, match="has no column 'text'"):
        read_rows(write_jsonl("bad.jsonl", [{"label": "x"}]), FIELDS)
    with pytest.raises(DataError, match="there is no file"):
        read_rows("nowhere.jsonl", FIELDS)


@pytest.fixture
def embedded(monkeypatch):
    from peftlab.tasks import embedded

    rows = {
        split: [{"id": f"{split}{n}", "text": f"{split} {n}", "label": "a"} for n in range(3)]
        for split in ("train", "validation", "test")
    }
    monkeypatch.setattr(embedded, "EMBEDDED_DATASETS", {"tiny": None})
    monkeypatch.setattr(embedded, "read_embedded", lambda name: rows)


@pytest.mark.usefixtures("embedded")
def test_embedded_set_by_name():
    splits = read(dataset="tiny")
    assert [row["id"] for row in splits.test] == ["test0", "test1", "test2"]
    assert splits.notes == ()


@pytest.mark.usefixtures("embedded")
def test_split_names_of_a_set_can_be_chosen_and_are_checked():
    assert texts(read(dataset="tiny", test="validation").test)[0] == "validation 0"
    with pytest.raises(DataError, match=r"tiny has no split 'tset'. Did you mean 'test'"):
        read(dataset="tiny", test="tset")


@pytest.mark.usefixtures("embedded")
def test_embedded_sets_have_no_revision():
    with pytest.raises(DataError, match="tiny is embedded"):
        read(dataset="tiny", revision="main")


def dataset_of(hidden=False):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    train = [{"text": f"t{n}", "label": n % 2} for n in range(40)]
    test = [{"text": f"u{n}", "label": -1 if hidden else n % 2} for n in range(4)]
    return DatasetDict(
        train=Dataset.from_list(train, features=features),
        test=Dataset.from_list(test, features=features),
    )


def test_datasets_id_with_class_names(monkeypatch):
    asked = []

    def load_dataset(path, **kwargs):
        asked.append((path, kwargs))
        return dataset_of()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    splits = read(dataset="some/set", dataset_config="en", revision="v1")
    assert asked == [("some/set", {"name": "en", "revision": "v1"})]
    assert {row["label"] for row in splits.train} == {"no", "yes"}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 4)


def test_a_test_split_with_hidden_labels_is_not_used_unless_asked_for(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda path, **kwargs: dataset_of(hidden=True))
    splits = read(dataset="some/set")
    assert splits.notes[0] == "some/set[test] is not used: its labels are hidden."
    assert {row["label"] for row in splits.test} == {"no", "yes"}
    assert {row["label"] for row in read(dataset="some/set", test="test").test} == {"-1"}


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it"), ValueError("BuilderConfig 'x' not found.")]
)
def test_a_set_that_cannot_be_loaded(monkeypatch, embedded, error):
    def load_dataset(path, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read(dataset="some/set")
    reason = str(error).rstrip(".")
    assert str(caught.value) == (
        f"data.dataset: the data set 'some/set' cannot be loaded: {reason}. "
        "Embedded sets need no network: tiny."
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_fit_their_kind(path):
    layer = load_yaml(path)
    assert list(layer.data) == ["kind", "summary", "model", "data", "metric", "train"]
    kind = TASK_KINDS.get(layer.data["kind"])
    for section, schema in (("data", kind.Config), ("train", TrainConfig)):
        value, problems = validate_section(schema, layer.data[section], (section,), layer.origins)
        assert value is not None, problems
    assert layer.data["data"]["dataset"] in EMBEDDED_DATASETS
    assert layer.data["metric"] in kind.traits.metrics
    header = path.read_text(encoding="utf-8").split("\nkind:")[0]
    assert header.startswith(f"# recipes/tasks/{path.name}: ")
    assert "MIT licence" in header
    assert f" {path.stem} --recipe" in header
