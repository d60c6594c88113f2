"""The mistakes that users make: one clear message, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[str, str], Path]
Call = Callable[..., Any]
Listing = Callable[[], dict[str, bytes]]


def _replace(name: str, old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        path = Path("recipes", name)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def _nothing() -> None:
    pass


def _other_run() -> None:
    """A folder that holds another experiment."""
    from peftlab.experiment.resolve import resolve
    from peftlab.experiment.store import write_experiment

    other = resolve("movie-sentiment", "full").experiment
    write_experiment(Path("mine"), other, other.identity("rows"))


TRAIN = ("train", "films", "--recipe", "small-lora")
MISTAKES = {
    "unknown recipe": (
        _nothing,
        ("train", "films", "--recipe", "smal-lora"),
        ["no recipe 'smal-lora'.", "Did you mean 'small-lora'"],
    ),
    "misspelt key": (
        _replace("methods/small-lora.yaml", "r: 4", "rnak: 4"),
        TRAIN,
        ["recipes/methods/small-lora.yaml:2: ", "unknown key 'method.rnak'."],
    ),
    "wrong type": (
        _replace("tasks/films.yaml", "max_steps: 2", "max_steps: two"),
        TRAIN,
        ["recipes/tasks/films.yaml:5: ", "train.max_steps: must be a valid integer, got 'two'."],
    ),
    "missing file": (
        _replace("tasks/films.yaml", "train: train.csv", "train: trian.csv"),
        TRAIN,
        ["data.train: there is no file recipes/tasks/trian.csv.", "Did you mean 'train.csv'"],
    ),
    "missing column": (
        _replace("tasks/test.csv", "text,label", "text,lable"),
        TRAIN,
        ["test.csv: has no column 'label' (data.label).", "Did you mean 'lable'?"],
    ),
    "label absent from training": (
        _replace("tasks/test.csv", ",bad", ",awful"),
        TRAIN,
        ["data.test: label 'awful' does not occur in training", "bad, good"],
    ),
    "empty split": (
        lambda: Path("recipes/tasks/validation.csv").write_text("text,label\n"),
        TRAIN,
        ["recipes/tasks/validation.csv: holds no rows."],
    ),
    "prefix with gradient checkpointing": (
        _nothing,
        (
            "train", "films", "--recipe", "small-prefix",
            "--set", "train.gradient_checkpointing=true",
        ),
        [
            "--set train.gradient_checkpointing=true: ",
            "ptuning_v2 does not work with gradient checkpointing.",
        ],
    ),
    "rank larger than the matrix": (
        _nothing,
        (*TRAIN, "--set", "method.r=4096"),
        ["method.r: rank 4096 is larger than ", "(128×128)", "Use r of at most 128."],
    ),
    "longer than the model": (
        _nothing,
        (*TRAIN, "--set", "train.max_length=513"),
        [
            "train.max_length: 513 tokens, but the model has 512 positions. ",
            "Use --set train.max_length=512 or less.",
        ],
    ),
    "folder of another experiment": (
        _other_run,
        (*TRAIN, "--run-dir", "mine"),
        ["mine: holds another experiment (movie-sentiment × full, seed 0"],
    ),
    "unknown task": (
        _nothing,
        ("train", "film", "--recipe", "small-lora"),
        ["no task 'film'.", "Did you mean 'films'?"],
    ),
    "unknown override": (
        _nothing,
        (*TRAIN, "--set", "optim.learnin_rate=1"),
        ["--set optim.learnin_rate=1: unknown key 'optim.learnin_rate'.", "'learning_rate'"],
    ),
    "unknown model": (
        _nothing,
        (*TRAIN, "--model", "./nowhere"),
        ["./nowhere"],
    ),
    "folder that is no run": (
        lambda: Path("mine").mkdir() or Path("mine", "thesis.txt").write_text("precious"),
        (*TRAIN, "--run-dir", "mine", "--force"),
        ["mine: is no run folder"],
    ),
    "report of nothing": (
        lambda: Path("empty").mkdir(),
        ("report", "empty"),
        ["empty: holds no comparison and no runs."],
    ),
    "export of no run": (
        _nothing,
        ("export", "films/small-lora", "--to", "out"),
        ["no run 'films/small-lora'."],
    ),
    "prediction of no run": (
        _nothing,
        ("predict", "films/small-lora", "--text", "x"),
        ["no run 'films/small-lora'."],
    ),
    "comparison of an unknown recipe": (
        _nothing,
        ("compare", "films", "--recipes", "small-lora,smal-prefix", "--seeds", "1"),
        ["no recipe 'smal-prefix'.", "Did you mean 'small-prefix'"],
    ),
    "copy over a file": (
        _nothing,
        ("cp", "small-lora"),
        ["recipes/methods/small-lora.yaml: is there already."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_message_and_nothing_written(
    mistake: str, project: Write, call: Call, listing: Listing
) -> None:
    make, words, said = MISTAKES[mistake]
    make()
    before = listing()
    done = call(*words)
    assert done.code == 2
    assert len(done.errors) == 1
    for part in said:
        assert part in done.errors[0]
    assert "Traceback" not in done.out + done.err
    assert listing() == before


@pytest.mark.parametrize(
    "mistake", ["unknown recipe", "empty split", "rank larger than the matrix"]
)
def test_scripts_read_the_message_too(mistake: str, project: Write, call: Call) -> None:
    make, words, said = MISTAKES[mistake]
    make()
    done = call(*words, "--json")
    assert done.code == 2
    (problem,) = done.json["error"]["problems"]
    text = f"{problem['where']}: {problem['message']}" if problem["where"] else problem["message"]
    assert done.errors == [f"error: {text}"]
    assert all(part in text for part in said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian", "films"), "no command 'trian'. Did you mean 'train'?"),
        (("train", "films", "--recip", "x"), "--recipe"),
        (("train", "films"), "Missing option '--recipe'"),
        (("ls", "recipe"), "'recipes'"),
        (("train", "films", "-r", "small-lora", "--seed", "-1"), "--seed"),
        (("compare", "films", "-r", "small-lora", "--seeds", "many"), "must be how many, like 3"),
        (("show", "films", "--set", "method.r=1"), "need --recipe"),
        (("predict", "x", "--text", "a", "--file", "b.csv"), "not both"),
        (("report", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_command_line(
    words: tuple[str, ...], said: str, project: Write, call: Call
) -> None:
    done = call(*words)
    assert done.code == 2
    assert len(done.errors) == 1
    assert said in done.errors[0]


def test_every_problem_is_a_line(project: Write, call: Call) -> None:
    done = call(*TRAIN, "--set", "method.r=x", "--set", "optim.lr=1", "--set", "seed=-3")
    assert done.code == 2
    assert len(done.errors) == 2
    assert "method.r" in done.errors[0]
    assert "optim.lr" in done.errors[1]


def test_a_real_process_says_the_same(project: Write) -> None:
    words = ["train", "films", "--recipe", "smal-lora", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "peftlab", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe 'smal-lora'. Did you mean 'small-lora'")
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["error"]["problems"][0]["where"] == ""


def test_of_several_processes_one_speaks(project: Write) -> None:
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for words in (["ls", "--json"], ["train", "films", "--recipe", "nope", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "peftlab", *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == (0 if words[0] == "ls" else 2)
        assert (done.stdout, done.stderr) == ("", "")
