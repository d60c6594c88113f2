from typing import Any

from peftlab.report.findings import findings
from peftlab.results.build import build_comparison

# (accuracies over seeds, peak, seconds)
RECIPES = {
    "full": ((0.80, 0.82, 0.84), 400, 40.0),
    "lora": ((0.81, 0.80, 0.83), 200, 30.0),
    "freeze": ((0.82, 0.80, 0.83), 300, 10.0),
    "head": ((0.60, 0.62, 0.64), 50, 1.0),
}


def _cells(make_cell: Any, *recipes: str, seeds: int = 3, **values: Any) -> list[Any]:
    return [
        make_cell(
            recipe, seed, RECIPES[recipe][0][seed], peak=RECIPES[recipe][1],
            seconds=RECIPES[recipe][2], **values,
        )
        for recipe in recipes
        for seed in range(seeds)
    ]  # fmt: skip


def test_the_cheapest_within_noise_wins(make_cell: Any) -> None:
    found = findings(build_comparison(_cells(make_cell, "full", "lora", "head")))
    assert found.headline.startswith("lora: its accuracy (0.813 ± 0.015) is within noise")
    assert "least memory and time" in found.headline
    text = " ".join(found.details)
    assert "50% less peak memory and 25% less training time than full" in text
    assert "Shown to be worse than full: head." in text


def test_memory_and_time_may_have_different_winners(make_cell: Any) -> None:
    found = findings(build_comparison(_cells(make_cell, "full", "lora", "freeze")))
    assert found.headline.startswith("lora where memory is short (200 B), freeze where time is")


def test_one_winner_beyond_noise(make_cell: Any) -> None:
    found = findings(build_comparison(_cells(make_cell, "full", "head")))
    assert found.headline == "full: it has the best accuracy (0.820 ± 0.020), beyond noise."


def test_one_seed_without_rows_ranks_nothing(make_cell: Any) -> None:
    found = findings(build_comparison(_cells(make_cell, "full", "head", seeds=1)))
    assert found.headline.startswith("No recipe can be told from another yet")
    assert any("One seed a recipe" in detail for detail in found.details)


def test_one_recipe_and_none(make_cell: Any) -> None:
    assert findings(build_comparison(_cells(make_cell, "full"))).headline.startswith("full reaches")
    failed = build_comparison([make_cell("full", 0, None, status="oom")])
    assert findings(failed).headline.startswith("No answer")


def test_recipes_that_learned_nothing_are_named(make_cell: Any) -> None:
    cells = _cells(make_cell, "full", "head", majority_baseline=0.7)
    text = " ".join(findings(build_comparison(cells)).details)
    assert "No better than always giving the most frequent answer (0.700): head." in text
