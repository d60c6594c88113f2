"""The experiment's hash and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlab.config import load_yaml
from peftlab.errors import RunFolderError
from peftlab.experiment.library import names
from peftlab.experiment.resolve import resolve
from peftlab.experiment.schema import Experiment
from peftlab.experiment.store import EXPERIMENT, dump_yaml, read_experiment, write_experiment

Write = Callable[[str, str], Path]
SHIPPED = [(task, recipe) for task in names("tasks") for recipe in names("methods")]
BOOKKEEPING = [
    "train.logging_steps=7",
    "train.report_to=[tensorboard]",
    "train.save_strategy=epoch",
    "train.save_steps=5",
    "train.save_total_limit=9",
]
DECIDING = [
    "optim.learning_rate=2e-3",
    "optim.optim=sgd",
    "method.r=5",
    "method.lora_dropout=0.1",
    "model.revision=v2",
    "data.max_train_rows=10",
    "train.max_length=31",
    "train.max_steps=3",
    "precision.bf16=true",
    "metric=accuracy",
]


def _identity(*overrides: str, fingerprint: str = "rows", **options: Any) -> str:
    experiment = resolve("ours", "mine", overrides=overrides, **options).experiment
    return experiment.identity(fingerprint)


def test_the_same_experiment_has_the_same_hash_however_it_is_written(mine: Write) -> None:
    plain = _identity()
    assert _identity() == plain
    assert _identity("method.r=4", "optim.learning_rate=0.001", "method.lora_alpha=16") == plain
    mine("recipes/methods/copy.yaml", Path("recipes/methods/mine.yaml").read_text())
    assert resolve("ours", "copy").experiment.identity("rows") == plain


def test_the_hash_survives_parsing(mine: Write) -> None:
    content = resolve("ours", "mine").experiment.model_dump(mode="json")
    again = Experiment.parse(content)
    assert again.identity("rows") == _identity()
    assert len(_identity()) == 64


@pytest.mark.parametrize("override", DECIDING)
def test_what_decides_the_result_changes_the_hash(mine: Write, override: str) -> None:
    assert _identity(override) != _identity()


def test_the_rows_and_the_model_change_the_hash(mine: Write) -> None:
    assert _identity(fingerprint="other rows") != _identity()
    assert _identity(model="minilm") != _identity()


@pytest.mark.parametrize("override", BOOKKEEPING)
def test_bookkeeping_does_not_change_the_hash(mine: Write, override: str) -> None:
    assert _identity(override) == _identity()


def test_the_seed_is_not_part_of_the_hash(mine: Write) -> None:
    assert _identity(seed=4) == _identity()


def test_a_changed_row_changes_the_fingerprint(mine: Write) -> None:
    def fingerprint() -> str:
        return resolve("ours", "mine").experiment.build_kind().read().fingerprint

    before = fingerprint()
    assert fingerprint() == before
    rows = Path("recipes/tasks/rows.csv")
    rows.write_text(rows.read_text().replace("number 7,", "number seven,"))
    assert fingerprint() != before


@pytest.mark.parametrize(("task", "recipe"), SHIPPED)
def test_written_and_read_again_it_is_the_same(task: str, recipe: str, tmp_path: Path) -> None:
    experiment = resolve(task, recipe, seed=2).experiment
    write_experiment(tmp_path, experiment, experiment.identity("rows"))
    again, identity = read_experiment(tmp_path)
    assert again == experiment
    assert type(again.method) is type(experiment.method)
    assert type(again.data) is type(experiment.data)
    assert identity == again.identity("rows")


@pytest.mark.parametrize(
    "value",
    ["no", "off", "1e-4", "null", "true", "012", "- x", "a: b", "#x", " x ", "", "a\nb", "é", "{"],
)
def test_texts_survive_the_file(value: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml({"key": value, "list": [value]}), encoding="utf-8")
    assert load_yaml(path).data == {"key": value, "list": [value]}


@pytest.mark.parametrize("value", [1e-8, 1e-4, 5e-5, 0.1, 1e16, 3, True, None])
def test_numbers_survive_the_file(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml({"key": value}), encoding="utf-8")
    read = load_yaml(path).data["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("kind: lora", "kind: unheard_of"),
        lambda text: text.replace("identity:", "idntity:"),
        lambda text: text.replace("  r: 4", "  r: four"),
        lambda text: text + "more: 1\n",
        lambda text: text[: len(text) // 2] + "\n: [",
        lambda text: "",
    ],
)
def test_a_damaged_file_is_a_clear_error(
    mine: Write, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    experiment = resolve("ours", "mine").experiment
    write_experiment(tmp_path, experiment, "hash")
    path = tmp_path / EXPERIMENT
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(RunFolderError, match=r"experiment\.yaml: holds no experiment"):
        read_experiment(tmp_path)


def test_a_folder_without_one_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is no run folder: it has no experiment\.yaml"):
        read_experiment(tmp_path)
