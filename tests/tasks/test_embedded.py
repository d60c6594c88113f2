from __future__ import annotations

from collections import Counter

import pytest

from peftlab.errors import UnknownNameError
from peftlab.tasks.embedded import CREDIT, EMBEDDED_DATASETS, Rows, read_embedded

# Counts by split and label: a change here is another benchmark, with results of its own.
COUNTS = {
    "movie-reviews": {
        "train": {"negative": 4245, "positive": 4245},
        "validation": {"negative": 250, "positive": 250},
        "test": {"negative": 500, "positive": 500},
    },
    "movie-ratings": {
        "train": {"negative": 4313, "neutral": 453, "positive": 4245},
        "validation": {"negative": 254, "neutral": 27, "positive": 250},
        "test": {"negative": 508, "neutral": 53, "positive": 500},
    },
    "tweets": {
        "train": {"negative": 740, "neutral": 537, "positive": 1620},
        "validation": {"negative": 106, "neutral": 77, "positive": 232},
        "test": {"negative": 211, "neutral": 154, "positive": 463},
    },
    "product-reviews": {
        "train": {"negative": 863, "neutral": 504, "positive": 1221},
        "validation": {"negative": 123, "neutral": 72, "positive": 174},
        "test": {"negative": 247, "neutral": 144, "positive": 349},
    },
    "news": {
        "train": {"negative": 1229, "neutral": 1531, "positive": 822},
        "validation": {"negative": 176, "neutral": 219, "positive": 117},
        "test": {"negative": 351, "neutral": 438, "positive": 235},
    },
}


def normalised(rows: Rows) -> set[str]:
    return {" ".join(row["text"].casefold().split()) for row in rows}


@pytest.mark.parametrize("name", EMBEDDED_DATASETS)
def test_counts_are_pinned(name: str) -> None:
    splits = read_embedded(name)
    assert {
        split: dict(sorted(Counter(row["label"] for row in rows).items()))
        for split, rows in splits.items()
    } == COUNTS[name]


@pytest.mark.parametrize("name", EMBEDDED_DATASETS)
def test_no_text_twice_and_ids_unique(name: str) -> None:
    rows = [row for part in read_embedded(name).values() for row in part]
    assert len(normalised(rows)) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", EMBEDDED_DATASETS)
def test_rows_are_clean(name: str) -> None:
    for row in (row for part in read_embedded(name).values() for row in part):
        assert list(row) == ["id", "text", "rating", "label"]
        assert -4 <= row["rating"] <= 4
        assert row["text"] == " ".join(row["text"].split())
        assert row["text"]
        assert not {"&amp;", "&lt;", "&gt;", "&quot;", "�"} & set(row["text"].split())
        signs = {"negative": row["rating"] <= -0.5, "positive": row["rating"] >= 0.5}
        assert signs.get(row["label"], abs(row["rating"]) < 0.5)


def test_the_binary_set_shares_its_splits_with_the_ratings() -> None:
    reviews, ratings = read_embedded("movie-reviews"), read_embedded("movie-ratings")
    for split, rows in reviews.items():
        assert {row["id"] for row in rows} < {row["id"] for row in ratings[split]}


def test_the_order_is_fixed_and_mixes_the_labels() -> None:
    first = read_embedded("movie-reviews")
    assert first == read_embedded("movie-reviews")
    assert [row["id"] for row in first["test"][:3]] == ["movie-36", "movie-9352", "movie-9119"]
    assert Counter(row["label"] for row in first["train"][:2000]) == {
        "positive": 1016,
        "negative": 984,
    }


def test_text_is_decoded_as_utf_8() -> None:
    texts = [row["text"] for part in read_embedded("movie-ratings").values() for row in part]
    assert sum("é" in text for text in texts) > 40
    assert not any("Ã" in text for text in texts)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tweets'"):
        read_embedded("tweet")


def test_the_source_is_credited() -> None:
    assert "Hutto" in CREDIT
    assert "2014" in CREDIT
