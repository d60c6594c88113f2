"""From names and overrides to an experiment: who wins, where it came from, what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlab.config import locate
from peftlab.errors import ConfigError, UserError
from peftlab.experiment.library import names
from peftlab.experiment.resolve import resolve

Write = Callable[[str, str], Path]
SHIPPED = [(task, recipe) for task in names("tasks") for recipe in names("methods")]


def _problems(task: str = "ours", recipe: str = "mine", **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(task, recipe, **options)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("task", "recipe"), SHIPPED)
def test_every_shipped_pair_resolves(task: str, recipe: str) -> None:
    experiment = resolve(task, recipe).experiment
    assert (experiment.task, experiment.recipe, experiment.seed) == (task, recipe, 0)
    assert experiment.build_method().config is experiment.method
    assert experiment.metric in experiment.build_kind().traits.metrics


def test_overrides_win_over_recipe_over_task_over_defaults(mine: Write) -> None:
    recipe = "method: {kind: lora}\noptim: {learning_rate: 1e-3}\ntrain: {max_length: 64"
    mine("recipes/methods/mine.yaml", recipe + ", per_device_train_batch_size: 4}\n")
    resolved = resolve("ours", "mine", overrides=["train.per_device_train_batch_size=2"])
    train, origins = resolved.experiment.train, resolved.origins
    assert train.per_device_train_batch_size == 2
    assert train.max_length == 64
    assert train.num_train_epochs == 2
    assert train.logging_steps == 1

    def origin(*path: str) -> str:
        return locate(path, origins)

    assert origin("train", "per_device_train_batch_size") == (
        "--set train.per_device_train_batch_size=2"
    )
    assert origin("train", "max_length") == "recipes/methods/mine.yaml:3"
    assert origin("train", "num_train_epochs") == "recipes/tasks/ours.yaml:6"
    assert origin("precision", "dtype") == "precision.dtype"


def test_the_model_option_wins_over_the_task_and_set_over_it(mine: Write) -> None:
    def model(**options: Any) -> str:
        return resolve("ours", "mine", **options).experiment.model.model_name_or_path

    assert model() == "bert-tiny"
    assert model(model="minilm") == "minilm"
    assert model(overrides=["model=minilm"]) == "minilm"
    set_to = ["model.model_name_or_path=there"]
    assert model(model="minilm", overrides=set_to) == "there"


def test_the_seed_may_be_set(mine: Write) -> None:
    assert resolve("ours", "mine", seed=3).experiment.seed == 3
    assert resolve("ours", "mine", seed=3, overrides=["seed=5"]).experiment.seed == 5
    for wrong in ("-1", "x", "1.5"):
        (problem,) = _problems(overrides=[f"seed={wrong}"])
        assert problem.startswith(f"--set seed={wrong}: seed must be 0 or more")


def test_a_model_may_be_a_section(mine: Write) -> None:
    mine(
        "recipes/tasks/ours.yaml",
        "kind: classification\nmodel: {model_name_or_path: x, revision: v1}\n"
        "data: {train: rows.csv}\n",
    )
    model = resolve("ours", "mine").experiment.model
    assert (model.model_name_or_path, model.revision) == ("x", "v1")
    assert resolve("ours", "mine", model="y").experiment.model.revision == "v1"


def test_the_metric_is_the_kinds_first_where_none_is_given(mine: Write) -> None:
    mine("recipes/tasks/ours.yaml", "kind: regression\nmodel: x\ndata: {train: rows.csv}\n")
    assert resolve("ours", "mine").experiment.metric == "pearson"


def test_an_alias_becomes_the_key_it_stands_for(mine: Write) -> None:
    mine(
        "recipes/methods/mine.yaml",
        "method: {kind: ptuning_v2, pre_seq_len: 7}\noptim: {learning_rate: 5e-3}\n",
    )
    method: Any = resolve("ours", "mine").experiment.method
    assert method.num_virtual_tokens == 7
    (problem,) = _problems(overrides=["method.num_virtual_tokens=3"])
    assert "pre_seq_len is another name for num_virtual_tokens" in problem


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "optm.learning_rate=1e-4",
            "--set optm.learning_rate=1e-4: unknown section 'optm'. Did you mean 'optim'?",
        ),
        (
            "optim.learning_rat=1e-4",
            "unknown key 'optim.learning_rat'. Did you mean 'learning_rate' or ",
        ),
        ("summary=x", "unknown section 'summary'."),
        ("task=x", "unknown section 'task'."),
        ("method.r=many", "--set method.r=many: method.r: must be a valid integer, got 'many'."),
        ("method.kind=lroa", "--set method.kind=lroa: no method 'lroa'. Did you mean 'lora'"),
        ("kind=clasification", "no task kind 'clasification'. Did you mean 'classification'?"),
        ("metric=acuracy", "classification has no metric 'acuracy'. Did you mean 'accuracy'?"),
        ("optim.optim=adamw_8bits", "no optimizer 'adamw_8bits'. Did you mean 'adamw_8bit'"),
        ("optim.learning_rate=0", "optim.learning_rate: must be greater than 0, got 0."),
        ("train.report_to=[tensorbord]", "no tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        ("metric=3", "--set metric=3: 3 is no metric's name."),
        ("metric=null", "--set metric=null: None is no metric's name."),
        ("kind=null", "--set kind=null: kind is missing."),
        ("data=null", "--set data=null: data is missing."),
        ("method.kind=null", "recipes/methods/mine.yaml:2: method has no kind. Known: "),
        ("train=3", "--set train=3: train: "),
    ],
)
def test_a_wrong_override_is_one_problem_that_names_it(
    mine: Write, override: str, problem: str
) -> None:
    (found,) = _problems(overrides=[override])
    assert problem in found


def test_keys_that_contradict_each_other_are_one_problem_of_their_section(mine: Write) -> None:
    (problem,) = _problems(overrides=["train.eval_strategy=steps"])
    assert problem == "recipes/tasks/ours.yaml:6: train: eval_strategy 'steps' needs eval_steps."


def test_problems_of_both_files_come_together_with_their_lines(mine: Write) -> None:
    mine("recipes/methods/mine.yaml", "method: {kind: lora, rank: 4}\noptim: {}\ndata: {x: 1}\n")
    mine(
        "recipes/tasks/ours.yaml",
        "kind: classification\nmodel: m\ndata: {trian: rows.csv}\nmethod: {kind: full}\n",
    )
    found = _problems(overrides=["train.max_length=x"])
    assert [line.split(": ")[0] for line in found] == [
        "recipes/tasks/ours.yaml:4",
        "recipes/methods/mine.yaml:3",
        "recipes/tasks/ours.yaml:3",
        "recipes/methods/mine.yaml:3",
        "recipes/methods/mine.yaml:1",
        "recipes/methods/mine.yaml:2",
        "--set train.max_length=x",
    ]


@pytest.mark.parametrize("key", ["kind", "model", "data"])
def test_what_a_task_must_have(mine: Write, key: str) -> None:
    lines = {"kind": "classification", "model": "m", "data": "{train: rows.csv}"}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items() if name != key)
    mine("recipes/tasks/ours.yaml", text)
    (problem,) = _problems()
    assert problem.endswith(f"ours.yaml: {key} is missing.")


def test_a_recipe_must_have_a_method_and_a_learning_rate(mine: Write) -> None:
    mine("recipes/methods/mine.yaml", "optim: {}\n")
    found = _problems()
    assert len(found) == 2
    assert found[0].endswith("mine.yaml: method is missing.")
    assert found[1].endswith("optim.learning_rate is missing.")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{r: 8}", "method has no kind. Known: "),
        ("lora", "method has no kind. Known: "),
        ("[]", "method has no kind. Known: "),
        ("null", "method is missing."),
    ],
)
def test_a_method_without_a_kind_is_a_problem(mine: Write, method: str, message: str) -> None:
    mine("recipes/methods/mine.yaml", f"method: {method}\noptim: {{learning_rate: 1e-3}}\n")
    (problem,) = _problems()
    assert problem.startswith(f"recipes/methods/mine.yaml:1: {message}")


@pytest.mark.parametrize(
    ("recipe", "override", "problem"),
    [
        (
            "ptuning-v2",
            "train.gradient_checkpointing=true",
            "ptuning_v2 does not work with gradient checkpointing.",
        ),
        ("full", "precision.quantization=nf4", "full trains base weights, which nf4 cannot hold."),
        ("full", "precision.dtype=float16", "training float16 weights underflows."),
    ],
)
def test_rules_between_sections(recipe: str, override: str, problem: str) -> None:
    (found,) = _problems("movie-sentiment", recipe, overrides=[override])
    assert found.startswith(f"--set {override}: {problem}")


def test_what_updates_in_backward_do_not_go_with() -> None:
    early = "optim.optimizer_in_backward=true"
    others = ["train.gradient_accumulation_steps=2", "precision.fp16=true"]
    found = _problems("movie-sentiment", "full", overrides=[early, *others])
    assert len(found) == 3
    message = "optim.optimizer_in_backward updates before all gradients are there."
    assert all(message in problem for problem in found)
    assert sum("Use optim.max_grad_norm=null" in problem for problem in found) == 1
    fine = [early, "optim.max_grad_norm=null"]
    assert resolve("movie-sentiment", "full", overrides=fine).experiment.optim


def test_selective_recomputation_and_compilation_exclude_each_other() -> None:
    selective = "train.gradient_checkpointing=selective"
    (found,) = _problems(
        "movie-sentiment", "full", overrides=[selective, "train.torch_compile=true"]
    )
    assert found.startswith(f"--set {selective}: 'selective' reads single operations")
    whole = ["train.gradient_checkpointing=true", "train.torch_compile=true"]
    assert resolve("movie-sentiment", "full", overrides=whole).experiment.train


def test_stages_are_not_compiled() -> None:
    compiled = "train.torch_compile=true"
    (found,) = _problems("movie-sentiment", "unfreeze-top4", overrides=[compiled])
    assert found.startswith(f"--set {compiled}: this freeze trains in stages")
    plain = [compiled, "method.unfreeze_ratio=null"]
    assert resolve("movie-sentiment", "unfreeze-top4", overrides=plain).experiment.train


def test_a_combination_that_is_fine_is_left_alone() -> None:
    overrides = ["train.gradient_checkpointing=true", "precision.quantization=nf4"]
    assert resolve("movie-sentiment", "lora", overrides=overrides).experiment.train


def test_wrong_text_is_a_user_error_of_its_own_class(mine: Write) -> None:
    with pytest.raises(ConfigError):
        resolve("ours", "mine", overrides=["no equals sign"])
