"""The data sets that come from the package registry: sentences with the mean rating of people.

Source: the ``vaderSentiment`` 3.3.2 source archive, which carries the four sets of C.J. Hutto and
E. Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text, ICWSM-14. At least 15 people rated each sentence with a whole number from −4 to 4.

What is made of it, the same in every run and on every machine:

- Text: UTF-8; HTML entities become characters (some were escaped twice), runs of space one space.
- Duplicates: of sentences equal without case and space the first stays.
- Label: ``neutral`` where the mean rating is nearer to 0 than to ±1 (|r| < 0.5), else its sign.
  The band is also what 20 raters can tell from zero: the median standard error of a mean is 0.15 to
  0.19, so a rating outside lies more than 2.5 standard errors from zero. A two-class set leaves the
  neutral sentences out.
- Splits: within each label, sentences are ordered by a SHA-256 of their normalised text; the first
  go to test, the next to validation, the rest to train. Data sets over the same sentences share
  their splits: none trains on another's test sentence.
- Balance: a two-class set keeps equally many of each label in each split, the first by that order.
- Order: by the same hash, so that the first n rows are a random sample.
"""

from __future__ import annotations

import hashlib
import html
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from peftlab.assets import RELEASES, fetch
from peftlab.registry import unknown
from peftlab.tasks.base import Split

NEUTRAL_BELOW = 0.5
CREDIT = RELEASES["vader"].credit


@dataclass(frozen=True)
class EmbeddedDataset:
    """One data set: columns ``id``, ``text``, ``rating`` (−4 to 4) and ``label``.

    Args:
        summary: what its rows are.
        source: the file's stem in the archive.
        prefix: heads the row ids.
        labels: the labels it keeps, in index order.
        test: the share of each label that is the test split.
        validation: the share that is the validation split.
    """

    summary: str
    source: str
    prefix: str
    labels: tuple[str, ...]
    test: float
    validation: float

    @property
    def balanced(self) -> bool:
        """Whether each split holds equally many rows of each label."""
        return len(self.labels) == 2


_TWO = ("negative", "positive")
_THREE = ("negative", "neutral", "positive")

EMBEDDED_DATASETS: Mapping[str, EmbeddedDataset] = MappingProxyType(
    {
        "movie-reviews": EmbeddedDataset(
            "movie-review sentences, negative or positive, balanced",
            "movieReviewSnippets",
            "movie",
            _TWO,
            test=0.10,
            validation=0.05,
        ),
        "movie-ratings": EmbeddedDataset(
            "movie-review sentences with their mean rating from −4 to 4",
            "movieReviewSnippets",
            "movie",
            _THREE,
            test=0.10,
            validation=0.05,
        ),
        "tweets": EmbeddedDataset(
            "tweets, negative, neutral or positive",
            "tweets",
            "tweet",
            _THREE,
            test=0.20,
            validation=0.10,
        ),
        "product-reviews": EmbeddedDataset(
            "sentences of product reviews, negative, neutral or positive",
            "amazonReviewSnippets",
            "product",
            _THREE,
            test=0.20,
            validation=0.10,
        ),
        "news": EmbeddedDataset(
            "sentences of newspaper editorials, negative, neutral or positive",
            "nytEditorialSnippets",
            "news",
            _THREE,
            test=0.20,
            validation=0.10,
        ),
    }
)

Rows = list[dict[str, Any]]


def read_embedded(name: str) -> dict[Split, Rows]:
    """The rows of an embedded data set by split; downloads 2.5 MB the first time.

    Raises:
        UnknownNameError: no such data set.
        AssetError: it cannot be had.
    """
    if name not in EMBEDDED_DATASETS:
        raise unknown("embedded data set", name, EMBEDDED_DATASETS)
    dataset = EMBEDDED_DATASETS[name]
    by_label: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for digest, row in sorted(_unique(dataset).items()):
        by_label.setdefault(row["label"], []).append((digest, row))
    splits: dict[Split, list[tuple[str, dict[str, Any]]]]
    splits = {"train": [], "validation": [], "test": []}
    parts = {label: _cut(by_label[label], dataset) for label in dataset.labels}
    for split, chosen in splits.items():
        smallest = min(len(part[split]) for part in parts.values())
        for part in parts.values():
            chosen += part[split][:smallest] if dataset.balanced else part[split]
        chosen.sort(key=lambda pair: pair[0])
    return {split: [row for _, row in chosen] for split, chosen in splits.items()}


def _cut(
    rows: list[tuple[str, dict[str, Any]]], dataset: EmbeddedDataset
) -> dict[Split, list[tuple[str, dict[str, Any]]]]:
    test = round(len(rows) * dataset.test)
    validation = test + round(len(rows) * dataset.validation)
    return {"test": rows[:test], "validation": rows[test:validation], "train": rows[validation:]}


def _unique(dataset: EmbeddedDataset) -> dict[str, dict[str, Any]]:
    """The first row of each text, by the hash of the normalised text."""
    rows: dict[str, dict[str, Any]] = {}
    for number, mean, raw in _lines(dataset.source):
        text = " ".join(html.unescape(html.unescape(raw)).split())
        rating = float(mean)
        row = {
            "id": f"{dataset.prefix}-{number}",
            "text": text,
            "rating": rating,
            "label": _label(rating),
        }
        rows.setdefault(hashlib.sha256(text.casefold().encode()).hexdigest(), row)
    return rows


def _label(rating: float) -> str:
    if abs(rating) < NEUTRAL_BELOW:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def _lines(source: str) -> Iterator[tuple[str, str, str]]:
    """Id, mean rating and text of each line of a file in the archive inside the release."""
    (inner,) = RELEASES["vader"].members
    with tarfile.open(fetch("vader") / inner) as archive:
        stream = archive.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
        assert stream is not None, f"{source} is a folder in the archive"
        with stream:
            content = stream.read().decode("utf-8")
    for line in content.split("\n"):
        number, mean, text = line.rstrip("\r").split("\t")
        yield number, mean, text
