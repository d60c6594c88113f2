"""The benchmark against transformers.Trainer: both sides train the same, and its page says it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftlab.trunk.store import CACHE_VARIABLE

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    """benchmarks/speed.py, which finds its parts beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import speed as module  # type: ignore[import-not-found]
    return module  # type: ignore[no-any-return]


@pytest.fixture
def without_dropout(bert_tiny: str, tmp_path: Path) -> Path:
    """bert-tiny with nothing random left in it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(bert_tiny).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_both_sides_train_the_same_and_what_is_there_is_not_run_again(
    speed: ModuleType, without_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One batch an epoch: the order of rows, in which the sides differ, then changes nothing.
    words = ["--model", str(without_dropout), "--rows", "16", "--batch-size", "16"]
    words += ["--epochs", "4", "--methods", "head-only,lora", "--peers", "trainer"]
    words += ["--results", "results.json", "--write", "page.md"]
    command = [sys.executable, str(FOLDER / "speed.py"), *words]
    shared = tmp_path / "shared"
    monkeypatch.setenv(CACHE_VARIABLE, str(shared))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results.json"
    pairs = json.loads(results.read_text(encoding="utf-8"))["pairs"]
    assert [pair["method"] for pair in pairs] == ["head-only", "lora"]
    for pair in pairs:
        ours, peer = pair["sides"]["peftlab"], pair["sides"]["trainer"]
        assert ours["train_loss"] == pytest.approx(peer["train_loss"], abs=1e-5)
        assert ours["test_loss"] == pytest.approx(peer["test_loss"], abs=1e-5)
        assert ours["steps"] == peer["steps"] == 4
        for side in (ours, peer):
            assert 0 < side["train_seconds"] < side["run_seconds"]
            assert 0 < side["live_peak_bytes"] < side["process_peak_bytes"]
    assert not shared.exists()
    head_only = pairs[0]["sides"]["peftlab"]
    assert head_only["trunk_cache"]["computed_rows"] > 16
    assert head_only["cache_bytes"] > head_only["trunk_cache"]["stored_bytes"] > 0
    before = results.read_bytes()
    monkeypatch.setattr(speed, "in_fresh_process", lambda *_: pytest.fail("it was run again"))
    there = json.loads(before)["environment"]
    speed.run_pairs(speed.Results(results, there), speed._arguments(words))
    assert results.read_bytes() == before
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| lora | trainer | 1 |" in page
    assert "--results results.json" in page


def test_a_replayed_step_is_taken_apart(bert_tiny: str, tmp_path: Path) -> None:
    words = ["--recipes", "freeze-top1", "--model", bert_tiny, "--rows", "192"]
    words += ["--seeds", "2", "--epochs", "3"]
    command = [sys.executable, str(FOLDER / "replayed_step.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "**freeze-top1**" in done.stdout
    shares = re.findall(r"\| .* \| (-?[\d.]+) \| (-?\d+)% \|", done.stdout)
    assert len(shares) == 5
    assert all(float(own) > 0 for own, _ in shares[:4])
    assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=3)
    assert "freeze-top1 × 2 seeds × 3 epochs" in done.stdout
    (ratio,) = re.findall(r"operations ([\d.]+) times", done.stdout)
    # The frozen block once, and not in each of six epochs.
    assert 1 < float(ratio) < 6
    assert list(tmp_path.iterdir()) == []


def side(train_seconds: float, accuracy: float) -> dict[str, Any]:
    return {
        "train_seconds": train_seconds,
        "run_seconds": train_seconds + 1,
        "live_peak_bytes": 2**20,
        "process_peak_bytes": None,
        "cache_bytes": None,
        "metrics": {"accuracy": accuracy},
        "train_loss": 0.5,
        "test_loss": 0.6,
    }


def environment(threads: int = 2) -> dict[str, Any]:
    versions = dict.fromkeys(("torch", "transformers", "peft", "accelerate"), "1.0")
    machine = {"device": "a box", "cores": 2, "threads": threads}
    return {**machine, "python": "3.11", "versions": versions}


def content(speed: ModuleType) -> dict[str, Any]:
    """Three pairs of two seeds, one without the second peer, and one growth."""
    setting = {"model": "m", "rows": 8, "epochs": 3, "batch_size": 4, "max_steps": None}
    base = {"setting": setting, "method": "lora", "commit": "abc+"}
    ours = side(2.0, 0.75)
    pairs = [
        {**base, "seed": 0, "repeat": 0, "sides": {"peftlab": ours, "trainer": side(4, 0.75)}},
        {
            **base, "seed": 1, "repeat": 0,
            "sides": {
                "peftlab": ours, "trainer": side(6, 0.5), "trainer-by-length": side(3, 0.5)
            },
        },
        {**base, "seed": 1, "repeat": 1, "sides": {"peftlab": ours, "trainer": side(7, 0.5)}},
    ]  # fmt: skip
    growing = {"model": "m", "rows": 8, "recipes": ["head-only"], "seeds": 2, "epochs": 5}
    cached, uncached = (
        {
            "wall_seconds": seconds,
            "cells": [
                {
                    "recipe": "head-only",
                    "seed": seed,
                    "metric": 0.5,
                    "train_seconds": seconds / 4,
                    "train_flops": seconds * 1e12,
                    "eval_seconds": 0.5,
                }
                for seed in range(2)
            ],
        }
        for seconds in (2.0, 9.0)
    )
    growth = {"setting": growing, "repeat": 0, "cached": cached, "uncached": uncached}
    return {
        "schema_version": speed.SCHEMA_VERSION,
        "environment": environment(),
        "pairs": pairs,
        "growth": [{**growth, "commit": None}],
    }


def test_the_pages_figures(speed: ModuleType) -> None:
    page = speed.page(content(speed), Path("some/where.json"))
    assert "| lora | trainer | 3 | 6.0 | **3.00** (2.00–3.50) | 7.0 |" in page
    assert "| lora | trainer-by-length | 1 | 3.0 | **1.50** | 4.0 | **1.33** |" in page
    assert "| lora | trainer | 3 | 1 | **1.00** (1.00–1.00) | – | – | – |" in page
    # Two seeds: differences 0 and 0.25; Student's quantile for one degree of freedom is 12.7.
    assert "| 2 | 0.6250 ± 0.1768 | +0.1250 [-1.4633, +1.7133] |" in page
    assert "--seeds 2 --pairs 2 --model m --rows 8 --epochs 3 --batch-size 4" in page
    assert "2 cores of a box, torch threads: 2" in page
    assert "Source: abc+." in page
    assert "| head-only | 2 | 5 | 1 | the whole command | 2.0 | 9.0 | **4.50** |" in page
    assert "| head-only | 2 | 5 |  | arithmetic | 4.0 TFLOP | 18.0 TFLOP | **4.50** |" in page
    assert "| head-only | 2 | 5 | 1 | rate | 4000 GFLOP/s | 4000 GFLOP/s |  |" in page
    assert "| training | 1.0 | 4.5 | **4.50** |" in page
    assert "| training and evaluation | 2.0 | 5.5 | **2.75** |" in page
    assert "| head-only | cached | 0.50 | 0.50 | 0.5000 ± 0.0000 |" in page


def test_the_growth_part_compares_with_and_without_the_cache(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[bool] = []

    def comparisons(setting: dict[str, Any], order: tuple[bool, ...]) -> dict[bool, dict[str, Any]]:
        ran.extend(order)
        return {c: {"wall_seconds": 1.0 if c else 4.0, "cells": []} for c in order}

    monkeypatch.setattr(speed, "_comparisons", comparisons)
    results = speed.Results(tmp_path / "results.json", environment())
    arguments = speed._arguments(["--growth", "--growth-seeds", "2", "--pairs", "2"])
    for _ in range(2):
        speed.run_growth(results, arguments)
    assert ran == [True, False, False, True]
    kept = speed.Results(tmp_path / "results.json", environment()).content["growth"]
    assert [entry["repeat"] for entry in kept] == [0, 1]
    command = speed.growth_command(kept[0]["setting"], cached=False)
    assert command[-1] == "train.trunk_cache=off"


def test_comparisons_take_turns_cell_by_cell(
    speed: ModuleType, bert_tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[bool, float]] = []
    take = speed.Turns.take

    def watched(command: Any) -> None:
        before = command.seconds
        take(command)
        turns.append((command.output.parent.name == "cached-True", command.seconds - before))

    monkeypatch.setattr(speed.Turns, "take", watched)
    setting = {"model": bert_tiny, "rows": 16, "recipes": ["head-only"], "seeds": 2, "epochs": 1}
    found = speed._comparisons(setting, (False, True))
    # A start and two cells each; who goes first changes.
    assert [cached for cached, _ in turns] == [False, True, True, False, False, True]
    for cached, side in found.items():
        own = [seconds for one, seconds in turns if one is cached]
        assert side["wall_seconds"] == pytest.approx(sum(own))
        assert [cell["seed"] for cell in side["cells"]] == [0, 1]
        for cell, seconds in zip(side["cells"], own[1:], strict=True):
            assert 0 < cell["train_seconds"] < seconds
    without, with_it = (found[cached]["cells"] for cached in (False, True))
    assert [cell["metric"] for cell in without] == [cell["metric"] for cell in with_it]
    assert with_it[1]["train_flops"] < without[1]["train_flops"]


def test_a_command_that_fails_ends_the_one_that_waits(speed: ModuleType, tmp_path: Path) -> None:
    waits, fails = (
        speed.Turns(
            ["compare", "movie-sentiment", "--recipes", "lorra"], os.environ, tmp_path / name
        )
        for name in ("waits", "fails")
    )
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    waits._command = [sys.executable, "-c", stop]
    with pytest.raises(SystemExit, match="exit code 2"):
        speed.alternate([waits, fails])
    assert waits._process.returncode == -signal.SIGKILL


def test_results_of_another_machine_are_not_mixed_in(speed: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(speed)), encoding="utf-8")
    speed.Results(path, environment())
    with pytest.raises(SystemExit, match="another machine"):
        speed.Results(path, environment(threads=1))


def test_a_peer_that_does_not_exist(speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed._arguments(["--peers", "trainee"])
    assert "no such peer: trainee" in capsys.readouterr().err
