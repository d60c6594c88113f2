"""peftlab validate: everything that is wrong, at once, before anything runs."""

from __future__ import annotations

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option
from peftlab.cli.output import answer, problems_json, say


@click.command(
    cls=Verb,
    examples=[
        "peftlab validate movie-sentiment --recipe lora",
        "peftlab validate recipes/tasks/my-task.yaml",
        "peftlab validate lora ptuning-v2 --json",
    ],
)
@click.argument("names", nargs=-1, required=True, metavar="TASK_OR_RECIPE...")
@click.option("--recipe", "-r", help="Check the tasks with this recipe.")
@click.option("--data/--no-data", default=True, help="Read the rows of tasks too (default: yes).")
@json_option
def validate(names: tuple[str, ...], recipe: str | None, data: bool) -> None:
    """Check tasks and recipes.

    By name or path; reports all problems at once. Exit code 0 if all are valid, 2 if not.
    """
    from peftlab.experiment.validate import validate as check

    findings = check(names, recipe, data=data)
    valid = not findings.problems
    answer({"valid": valid, "problems": problems_json(findings.problems)})
    for problem in findings.problems:
        say(f"error: {problem}", err=True)
    if valid:
        say(f"valid: {', '.join(names)}")
    for what in findings.left_out:
        say(f"not checked: {what}", err=True)
    click.get_current_context().exit(0 if valid else 2)


COMMAND = validate
