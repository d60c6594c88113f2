"""peftlab predict: what a run says of new texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option, root_option
from peftlab.cli.output import answer, say


@click.command(
    cls=Verb,
    examples=[
        'peftlab predict movie-sentiment/lora --text "A quiet, moving film."',
        "peftlab predict movie-sentiment/lora --file reviews.csv --json",
        "cat sentences.txt | peftlab predict movie-sentiment/lora",
    ],
)
@click.argument("run")
@click.option("--text", "-t", "texts", multiple=True, help="A text; again for more.")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV, TSV, JSON, JSON lines or Parquet with the task's columns.",
)
@root_option
@json_option
def predict(run: str, texts: tuple[str, ...], file: Path | None, root: Path) -> None:
    """Predict texts with a run.

    The texts are those given, the rows of a file, or the lines of standard input. RUN is a folder,
    "task/recipe" (its latest finished run) or the start of a run's hash. Prints one prediction a
    line, in the order of the texts.
    """
    from peftlab.predicting import predict as run_predict

    if texts and file is not None:
        raise click.UsageError("give --text or --file, not both.")
    rows: Sequence[Mapping[str, str]] | Path
    rows = file if file is not None else _rows(run, root, texts or _lines())
    predictions = run_predict(run, rows, root=root)
    answer({"predictions": predictions})
    for prediction in predictions:
        say(str(prediction["prediction"]))


def _lines() -> list[str]:
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise click.UsageError("nothing to predict: give --text, --file or lines on stdin.")
    return texts


def _rows(run: str, root: Path, texts: Sequence[str]) -> list[dict[str, str]]:
    from peftlab.experiment.store import read_experiment
    from peftlab.results.store import resolve_run

    experiment, _ = read_experiment(resolve_run(run, root))
    key = "text" if "text" in type(experiment.data).model_fields else "prompt"
    return [{key: text} for text in texts]


COMMAND = predict
