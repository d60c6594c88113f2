import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftlab.errors import RunFolderError
from peftlab.results.build import build_comparison
from peftlab.results.comparison import read_comparison, write_comparison
from peftlab.results.record import Environment, TrunkCache
from peftlab.results.store import write_predictions

T2 = 4.30265


def _three_seeds(make_cell: Any) -> list[Any]:
    accuracies = {"full": (0.80, 0.84, 0.82), "lora": (0.82, 0.82, 0.85)}
    cost = {"full": (1000, 40.0), "lora": (250, 30.0)}
    return [
        make_cell(recipe, seed, value, peak=cost[recipe][0] + seed, seconds=cost[recipe][1] + seed)
        for recipe, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_figures_by_hand(make_cell: Any) -> None:
    comparison = build_comparison(_three_seeds(make_cell))
    full, lora = comparison.methods
    assert full.metric_mean == pytest.approx(0.82)
    assert full.metric_sd == pytest.approx(0.02)
    assert full.metric_ci95 == pytest.approx(T2 * 0.02 / math.sqrt(3), rel=1e-5)
    assert lora.metric_mean == pytest.approx(0.83)
    assert lora.metric_sd == pytest.approx(math.sqrt(0.0003))
    assert (full.peak_bytes, lora.peak_bytes) == (1001, 251)
    assert lora.peak_saving_percent == pytest.approx(100 * (1 - 251 / 1001))
    assert (lora.train_seconds, lora.train_seconds_sd) == (31, 1)
    assert lora.time_saving_percent == pytest.approx(100 * (1 - 31 / 41))
    assert lora.memory is not None
    assert lora.memory.named()["weights"] == pytest.approx((125 + 125 + 126) / 3)
    assert lora.trainable_percent == 1
    assert (lora.saved_bytes, lora.tokens_per_second) == (80, 1000)
    assert (lora.model_flops_utilisation, full.model_flops_utilisation) == (0.25, 0.25)
    assert (lora.seeds_ok, lora.seeds_total, lora.statuses) == (3, 3, {"ok": 3})
    assert comparison.reference.peak_source == "measured"
    # Differences 0.02, −0.02, 0.03.
    assert lora.difference is not None
    assert lora.difference.value == pytest.approx(0.01)
    assert lora.difference.verdict == "no difference shown"
    assert full.difference is None
    assert comparison.best == lora
    assert full.difference_to_best is not None
    assert full.difference_to_best.value == pytest.approx(-0.01)


def test_pareto_front(make_cell: Any) -> None:
    cells = [
        make_cell("small", 0, 0.7, peak=10, seconds=5.0),
        make_cell("good", 0, 0.9, peak=30, seconds=9.0),
        make_cell("beaten", 0, 0.7, peak=20, seconds=4.0),
        make_cell("unmeasured", 0, 0.9),
    ]
    rows = build_comparison(cells).methods
    assert [row.on_memory_front for row in rows] == [True, True, False, None]
    assert [row.on_time_front for row in rows] == [False, True, True, None]


def test_rows_are_paired_from_the_run_folders(make_cell: Any, tmp_path: Path) -> None:
    right = {"full": (1, 1, 1, 0), "lora": (0, 0, 1, 0)}
    cells = []
    for recipe, correct in right.items():
        rows = [{"id": at, "prediction": value, "label": 1} for at, value in enumerate(correct)]
        write_predictions(tmp_path / recipe, rows)
        cells.append(make_cell(recipe, 0, sum(correct) / 4, run_dir=recipe))
    lora = build_comparison(cells, root=tmp_path).methods[1]
    assert lora.difference is not None
    assert (lora.difference.value, lora.difference.rows) == (-0.5, 4)


def test_savings_against_a_plan_are_labelled(make_cell: Any) -> None:
    failed = make_cell("full", 0, None, status="oom", plan={"memory": {"peak_bytes": 500}})
    comparison = build_comparison([failed, make_cell("lora", 0, 0.8, peak=100, seconds=3.0)])
    lora = comparison.methods[1]
    assert comparison.reference.peak_source == "planned"
    assert lora.peak_saving_percent == pytest.approx(80)
    assert lora.time_saving_percent is None
    assert any("against its plan" in note for note in comparison.notes)


def test_a_plan_can_be_handed_in(make_cell: Any) -> None:
    cells = [make_cell("lora", 0, 0.8, peak=100)]
    comparison = build_comparison(cells, baseline_plan={"memory": {"peak_bytes": 400}})
    assert comparison.methods[0].peak_saving_percent == pytest.approx(75)
    assert build_comparison(cells).methods[0].peak_saving_percent is None


def test_failed_runs_are_counted_and_kept_out_of_means(make_cell: Any) -> None:
    cells = [
        make_cell("lora", 0, 0.8, peak=100, seconds=3.0),
        make_cell("lora", 1, 0.1, peak=900, seconds=9.0, status="diverged", error="loss is nan"),
    ]
    row = build_comparison(cells).methods[0]
    assert (row.seeds_ok, row.seeds_total) == (1, 2)
    assert row.statuses == {"ok": 1, "diverged": 1}
    assert (row.metric_mean, row.metric_sd, row.metric_ci95) == (0.8, None, None)
    assert (row.peak_bytes, row.train_seconds) == (100, 3)


def test_nothing_finished(make_cell: Any) -> None:
    comparison = build_comparison([make_cell("lora", 0, None, status="failed", metric="")])
    row = comparison.methods[0]
    assert comparison.best is None
    assert (row.metric_mean, row.difference_to_best, row.on_memory_front) == (None, None, None)


def test_a_lower_metric_can_be_better(make_cell: Any) -> None:
    cells = [
        make_cell(recipe, seed, value + seed / 100, metric_better="min")
        for recipe, value in (("full", 0.5), ("lora", 0.3))
        for seed in range(2)
    ]
    best = build_comparison(cells).best
    assert best is not None
    assert best.recipe == "lora"


def test_notes(make_cell: Any) -> None:
    elsewhere = Environment(
        device="cuda", num_processes=1, num_threads=2, python="3.11", platform="Linux",
        versions={"torch": "2.12.0"},
    )  # fmt: skip
    cells = [make_cell("full", 0, 0.8), make_cell("lora", 0, 0.8, environment=elsewhere)]
    notes = " ".join(build_comparison(cells).notes)
    assert "One seed: no spread for full, lora" in notes
    assert "do not compare their times" in notes
    assert "different versions" in notes


def test_times_without_what_other_runs_computed_are_named(make_cell: Any) -> None:
    alone = TrunkCache(key="a", boundary="blocks[4]", computed_rows=3000, replayed_rows=9000)
    again = TrunkCache(key="a", boundary="blocks[4]", replayed_rows=9000, found_rows=2000)
    above = TrunkCache(key="b", boundary="blocks[5]", filled_from="blocks[4]", computed_rows=3000)
    rows = {"train_rows": 2000}
    cells = [
        make_cell("freeze-top2", 0, 0.8, trunk_cache=alone, **rows),
        make_cell("freeze-top2", 1, 0.8, trunk_cache=again, **rows),
        make_cell("freeze-top1", 0, 0.8, trunk_cache=above, **rows),
        make_cell("freeze-top1", 1, 0.8, trunk_cache=again, **rows),
        make_cell("lora", 0, 0.8, **rows),
        make_cell("lora", 1, 0.8, **rows),
    ]
    (note,) = (note for note in build_comparison(cells).notes if "frozen blocks" in note)
    assert "in freeze-top2 (1 of 2 runs), freeze-top1 (2 of 2 runs): these training times" in note
    own = [cell for cell in cells if cell.trunk_cache in (alone, TrunkCache())]
    assert not any("frozen blocks" in note for note in build_comparison(own).notes)


def test_cells_that_do_not_belong_together(make_cell: Any) -> None:
    cells = [make_cell("full", 0, 0.8), make_cell("full", 0, 0.8, task="tweets", model="tiny")]
    with pytest.raises(RunFolderError) as raised:
        build_comparison(cells)
    assert [str(problem) for problem in raised.value.problems] == [
        "the runs differ in task: movie-sentiment, tweets.",
        "the runs differ in model: minilm, tiny.",
        "full with seed 0 is there 2 times.",
    ]
    with pytest.raises(RunFolderError, match="no runs"):
        build_comparison([])


def test_round_trip(make_cell: Any, tmp_path: Path) -> None:
    comparison = build_comparison(_three_seeds(make_cell), command="peftlab compare x")
    path = write_comparison(tmp_path, comparison)
    assert read_comparison(tmp_path) == comparison
    path.write_text(path.read_text()[:100])
    with pytest.raises(RunFolderError, match="is damaged"):
        read_comparison(path)


def test_results_and_report_do_without_torch() -> None:
    code = (
        "import sys, peftlab.results.build, peftlab.report.html, peftlab.report.table\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
