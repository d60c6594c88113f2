"""The resolved experiment for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftlab.config import load_yaml
from peftlab.experiment.explain import annotated_yaml, value_origins
from peftlab.experiment.library import names
from peftlab.experiment.resolve import resolve

Write = Callable[[str, str], Path]


def test_each_value_says_where_it_came_from(mine: Write) -> None:
    resolved = resolve("ours", "mine", model="minilm", seed=2, overrides=["method.r=16"])
    origins = value_origins(resolved)
    assert origins["method", "r"] == "--set method.r=16"
    assert origins["model", "model_name_or_path"] == "--model"
    assert origins["seed",] == "--seed"
    assert origins["optim", "learning_rate"] == "recipes/methods/mine.yaml:4"
    assert origins["metric",] == "recipes/tasks/ours.yaml:5"
    assert origins["task",] == "recipes/tasks/ours.yaml"
    # The task has a train section, but this key is not in it.
    assert origins["train", "logging_steps"] == "default"
    assert origins["method", "lora_alpha"] == "default"
    assert origins["precision", "dtype"] == "default"


def test_a_value_written_under_an_alias_is_no_default(mine: Write) -> None:
    mine(
        "recipes/methods/mine.yaml",
        "method: {kind: ptuning_v2, pre_seq_len: 7}\noptim: {learning_rate: 5e-3}\n",
    )
    origins = value_origins(resolve("ours", "mine"))
    assert origins["method", "num_virtual_tokens"] == "recipes/methods/mine.yaml:1"
    assert origins["method", "prefix_projection"] == "default"


@pytest.mark.parametrize("task", names("tasks"))
@pytest.mark.parametrize("recipe", names("methods"))
def test_it_reads_as_the_experiment_it_shows(task: str, recipe: str, tmp_path: Path) -> None:
    overrides = ["optim.learning_rate_multipliers={'a: b#': 0.5, ',': 1e-7}"]
    resolved = resolve(task, recipe, overrides=overrides)
    path = tmp_path / "shown.yaml"
    path.write_text(annotated_yaml(resolved.experiment, value_origins(resolved)), encoding="utf-8")
    assert load_yaml(path).data == resolved.experiment.model_dump(mode="json")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(" # " in line or line.endswith(":") for line in lines)
