"""Cards: every figure has a source and is below what is sold."""

from __future__ import annotations

import re

import pytest

from peftlab.errors import ConfigError
from peftlab.memory.cards import CARDS, memory_of
from peftlab.units import GIB, MIB

SOLD_GB = {
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4090": 24,
    "l4": 24,
    "a10": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "l40s": 48,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}


@pytest.mark.parametrize("name", CARDS)
def test_figure_follows_from_its_source_and_is_near_what_is_sold(name: str) -> None:
    card = CARDS[name]
    form = r"\S+: ([\d.]+) ([GM]iB); github\.com/\S+/(?:issues|pull)/\d+"
    found = re.fullmatch(form, card.source)
    assert found is not None
    assert card.memory_bytes == int(float(found[1]) * {"GiB": GIB, "MiB": MIB}[found[2]])
    assert 0.9 * SOLD_GB[name] < card.memory_bytes / GIB < SOLD_GB[name]


def test_names_are_read_as_people_write_them() -> None:
    assert memory_of("RTX 4090") == memory_of("rtx4090") == CARDS["rtx4090"].memory_bytes
    assert memory_of("A100_80GB") == CARDS["a100-80gb"].memory_bytes
    assert memory_of("a10g") == CARDS["a10"].memory_bytes
    assert memory_of("24GiB") == 24 * GIB


def test_an_unknown_card_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="rtx4090"):
        memory_of("rtx4099")
