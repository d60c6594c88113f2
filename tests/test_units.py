"""Bytes, counts and seconds as people read and write them."""

from __future__ import annotations

import pytest

from peftlab.units import GIB, MIB, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (150 * MIB, "150 MiB"),
        (1.25 * GIB, "1.25 GiB"),
        (-2 * GIB, "-2 GiB"),
    ],
)
def test_bytes(count: float | None, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, "–"), (999, "999"), (1_000, "1K"), (22_713_216, "22.7M"), (8_030_261_248, "8.03B")],
)
def test_counts(count: float | None, shown: str) -> None:
    assert format_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (0.04, "0.0s"), (59.9, "59.9s"), (75.2, "1m15s"), (3_660, "1h01m")],
)
def test_seconds(seconds: float | None, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 mib ", 3 * 2**19),
        ("800", 800),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_binary_unless_they_say_otherwise(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "12 parsecs", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
