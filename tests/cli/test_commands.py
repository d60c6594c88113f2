"""Commands that need no torch, and what all of them have in common."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.cli import COMMANDS
from peftlab.config import load_yaml
from peftlab.experiment.library import names

Write = Callable[[str, str], Path]
Call = Callable[..., Any]
HEAVY = ("torch", "peft", "transformers", "accelerate", "datasets", "bitsandbytes", "sklearn")


@pytest.mark.parametrize("name", COMMANDS.names)
def test_every_command_ends_its_help_with_examples(name: str, call: Call) -> None:
    done = call(name, "--help")
    assert done.code == 0
    examples = done.out.split("\nExamples:\n")[1].rstrip("\n").splitlines()
    assert examples
    for example in examples:
        assert example.startswith("  ")
        assert f"peftlab {name}" in example
    assert "..." not in done.out.split("Options:")[0].splitlines()[2]


@pytest.mark.parametrize("name", COMMANDS.names)
def test_examples_parse(name: str) -> None:
    import shlex

    import click

    command = COMMANDS.get(name)
    for example in command.examples:  # type: ignore[attr-defined]
        words = shlex.split(example.split(f"peftlab {name}", 1)[1])
        if name == "report":
            words[0] = "."
        context = command.make_context(name, words, parent=click.Context(click.Command("peftlab")))
        assert context.info_name == name


def test_without_a_command_help_lists_them_all(call: Call) -> None:
    done = call()
    shown = done.out + done.err
    assert all(f"\n  {name} " in shown for name in COMMANDS.names)
    assert call("--help").code == 0


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str, call: Call) -> None:
    assert call(option).out == f"peftlab {peftlab.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["ls", "--json"],
        ["show", "lora"],
        ["show", "movie-sentiment", "--recipe", "lora"],
        ["validate", "movie-sentiment", "--recipe", "lora"],
        ["cp", "lora", "copy"],
        ["--help"],
        *[[name, "--help"] for name in COMMANDS.names],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words: list[str], write: Write) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "peftlab", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:") and "|" in line
    }
    assert "peftlab" in imported
    assert imported.isdisjoint(HEAVY)


def test_report_imports_nothing_heavy(write: Write, comparison_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "peftlab", "report", str(comparison_folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "jinja2" in imported
    assert imported.isdisjoint(HEAVY)


def test_ls(project: Write, call: Call) -> None:
    listed = call("ls", "--json").json
    assert set(listed) == {"recipes", "tasks", "models"}
    assert {"name": "small-lora", "method": "lora", "summary": "LoRA"} in listed["recipes"]
    films = {"name": "films", "kind": "classification", "summary": "films"}
    assert films in listed["tasks"]
    assert {row["name"] for row in listed["recipes"]} == set(names("methods"))
    assert {row["name"] for row in listed["models"]} == {"minilm", "bert-tiny", "smollm2-135m"}
    assert all(row["source"] for row in listed["models"])


def test_ls_of_one_kind(project: Write, call: Call) -> None:
    assert set(call("ls", "tasks", "--json").json) == {"tasks"}
    text = call("ls", "recipes").out
    (line,) = [line for line in text.splitlines() if line.startswith("small-prefix ")]
    assert line.split(maxsplit=2) == ["small-prefix", "ptuning_v2", "a prefix"]


def test_ls_names_a_recipe_without_a_summary(project: Write, call: Call) -> None:
    project("recipes/methods/bare.yaml", "method: lora\n")
    listed = call("ls", "recipes", "--json").json["recipes"]
    assert {"name": "bare", "method": None, "summary": None} in listed
    assert call("ls").code == 0


def test_json_is_alone_on_stdout(project: Write, call: Call) -> None:
    done = call("ls", "--json")
    assert done.json
    assert "small-lora" in done.err


def test_show_prints_a_file(project: Write, call: Call) -> None:
    done = call("show", "small-lora")
    text = Path("recipes/methods/small-lora.yaml").read_text()
    assert done.out == "# recipe: recipes/methods/small-lora.yaml\n" + text
    shown = call("show", "films", "--json").json
    assert (shown["what"], shown["path"]) == ("task", "recipes/tasks/films.yaml")
    assert shown["content"]["train"]["max_steps"] == 2


def test_show_resolves(project: Write, call: Call) -> None:
    words = ("show", "films", "--recipe", "small-lora", "--set", "method.r=2", "--seed", "1")
    done = call(*words)
    project("shown.yaml", done.out)
    data = load_yaml(Path("shown.yaml")).data
    assert (data["method"]["r"], data["seed"]) == (2, 1)
    assert "# --set method.r=2\n" in done.out
    assert "# recipes/tasks/films.yaml:5\n" in done.out
    shown = call(*words, "--json").json
    assert shown["experiment"] == data
    assert shown["origins"]["method.r"] == "--set method.r=2"


def test_cp_makes_a_file_that_is_found_and_valid(project: Write, call: Call) -> None:
    done = call("cp", "lora", "my-lora")
    assert done.code == 0
    assert "next: peftlab validate my-lora" in done.out
    assert Path("recipes/methods/my-lora.yaml").read_text() == (
        names("methods")["lora"].read_text()
    )
    assert call("validate", "my-lora").code == 0
    call("cp", "films", "elsewhere/copy.yaml")
    assert Path("elsewhere/copy.yaml").is_file()
    call("cp", "movie-sentiment")
    assert call("show", "movie-sentiment", "--json").json["path"] == (
        "recipes/tasks/movie-sentiment.yaml"
    )


def test_validate_says_valid(project: Write, call: Call) -> None:
    done = call("validate", "films", "--recipe", "small-lora", "--json")
    assert done.code == 0
    assert done.json == {"valid": True, "problems": []}
    assert "valid: films" in call("validate", "films").out


def test_validate_says_all_that_is_wrong(project: Write, call: Call) -> None:
    project("recipes/methods/bad.yaml", "method: {kind: lora, r: x}\noptim: {learning_rat: 1}\n")
    done = call("validate", "films", "bad", "nope", "--recipe", "small-lora", "--json")
    assert done.code == 2
    assert done.json["valid"] is False
    places = [problem["where"] for problem in done.json["problems"]]
    bad = "recipes/methods/bad.yaml"
    assert places == [f"{bad}:1", f"{bad}:2", f"{bad}:2", ""]
    assert len(done.errors) == 4


def test_report_of_a_comparison_and_of_runs(
    write: Write, call: Call, comparison_folder: Path
) -> None:
    done = call("report", comparison_folder, "--json")
    page = Path(done.json["report"])
    assert page == comparison_folder / "report.html"
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert [row["recipe"] for row in done.json["methods"]] == ["full", "ptuning-v2"]
    again = call("report", "runs/films", "--json").json
    assert again["report"] == "runs/films/report.html"
    assert [row["metric_mean"] for row in again["methods"]] == [0.5, 0.75]
    assert again["command"] == "peftlab report runs/films --json"


def test_a_bug_keeps_its_traceback(project: Write, call: Call, monkeypatch: Any) -> None:
    import peftlab.experiment.library

    def broken(shelf: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(peftlab.experiment.library, "find_all", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call("ls")
