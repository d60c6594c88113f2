"""The published figures: counts to the last parameter, and how printed numbers are read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftlab.experiment.library import names
from peftlab.planning.schema import Plan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "published-figures.md"


def _script() -> ModuleType:
    path = ROOT / "benchmarks" / "published.py"
    spec = importlib.util.spec_from_file_location("published", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pydantic looks annotations up there.
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module


published = _script()
FIGURES = published.load()


def figure(what: str) -> Any:
    return next(f for paper in FIGURES.papers for f in paper.figures if f.what.startswith(what))


def planned(what: str) -> Plan:
    """The figure's plan, whose row the page must hold as it is."""
    some = figure(what)
    found = published.plan_here(FIGURES.models[some.plan.model], some.plan)
    plan = Plan.model_validate(found["plan"])
    assert f"\n{published.row(some, plan)}\n" in PAGE.read_text(encoding="utf-8")
    return plan


def test_roberta_base_with_lora() -> None:
    plan = planned("RoBERTa-base, r = 8")
    assert plan.params.adapter == 12 * 2 * 8 * (768 + 768) == 294_912
    assert plan.params.head == 768 * 768 + 768 + 2 * 768 + 2
    assert published.base_parameters(plan) == 124_055_040 + plan.params.head


def test_bert_base_with_bitfit() -> None:
    plan = planned("BERT-base: share")
    assert plan.params.base_trainable == 12 * 11 * 768 + 2 * 768 == 102_912
    assert plan.params.head == 2 * 768 + 2
    assert published.base_parameters(plan) == 109_482_240


@pytest.mark.parametrize(
    ("text", "value", "shown", "deviation"),
    [
        ("0.3 M", 294_912, "0.295 M", "rounds to it"),
        ("4.7 M", 2_359_296, "2.359 M", "-50 %"),
        ("354.92 M", 354_823_168, "354.8232 M", "-0.027 %"),
        ("350 GB", 373.2e9, "373.20 GB", "+6.6 %"),
        ("1.2 TB", 1.4e12, "1.400 TB", "+17 %"),
        ("35 MB", 75.5e6, "75.50 MB", "+116 %"),
        ("0.1–3 %", 0.0177, "1.770 %", "within"),
        ("0.1–3 %", 0.07, "7.000 %", "**outside**"),
        ("> 780 GB", 783e9, "783.00 GB", "within"),
        ("< 48 GB", 49e9, "49.00 GB", "**outside**"),
    ],
)
def test_a_printed_number_and_its_deviation(
    text: str, value: float, shown: str, deviation: str
) -> None:
    figure = published.Published.parse(text)
    assert (figure.show(value), figure.deviation(value)) == (shown, deviation)


@pytest.mark.parametrize("text", ["0.3M", "many GB", "3 cubits", "1 2 GB"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no figure with a unit"):
        published.Published.parse(text)


def test_a_refusal_is_shown_in_the_planners_words() -> None:
    some = figure("RoBERTa-base, r = 8")
    row = published.row(some, "nothing trains | here\nat all")
    assert "| – | – | cannot be planned: nothing trains / here at all |" in row


def test_every_figure_is_on_the_page_and_can_be_planned() -> None:
    page = PAGE.read_text(encoding="utf-8")
    sizes = dict.fromkeys((*published.SIZES, "states", "reserved"), "1")
    for paper in FIGURES.papers:
        assert f"## {paper.title}\n\nRead: {paper.read}\n" in page
        for each in paper.figures:
            assert f"\n| {each.what} | {each.where} | {each.published} | " in page
            assert each.quantity in published.QUANTITIES
            assert each.why.format_map(sizes)
            assert each.plan.model in FIGURES.models
            assert each.plan.recipe in names("methods")
