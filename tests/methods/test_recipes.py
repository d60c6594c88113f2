"""Every shipped recipe: its sections fit their schemas and it can be put on its models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from peftlab.anatomy import Anatomy
from peftlab.config import Config, load_yaml, validate_section
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.optim.config import OptimConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "methods").glob("**/*.yaml"))
SECTIONS = {"optim": OptimConfig, "precision": PrecisionConfig}
# The tiny models have three blocks; a causal language model has no task head, a Llama no biases.
REFUSED = {
    ("freeze-top4", "bert"), ("freeze-top4", "llama-lm"), ("head-only", "llama-lm"),
    ("unfreeze-top4", "bert"), ("unfreeze-top4", "llama-lm"), ("bitfit", "llama-lm"),
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fits_the_schema(path: Path) -> None:
    layer = load_yaml(path)
    assert set(layer.data) <= {"summary", "method", "optim", "precision"}
    assert layer.data["summary"]
    schemas: dict[str, type[Config]] = {
        "method": METHODS.get(layer.data["method"]["kind"]).Config, **SECTIONS
    }  # fmt: skip
    for name, schema in schemas.items():
        if name in layer.data:
            _, problems = validate_section(schema, layer.data[name], (name,), layer.origins)
            assert problems == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert header[0].startswith(f"# {path.stem}: ")
    assert any(line.startswith("# Costs: ") for line in header)
    assert header[-1].startswith(f"# Run: peftlab train movie-sentiment --recipe {path.stem}")


@pytest.mark.parametrize("name", ["bert", "llama-lm"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_attaches(path: Path, name: str, build: Callable[..., nn.Module]) -> None:
    section = load_yaml(path).data["method"]
    method_class = METHODS.get(section["kind"])
    method = method_class(method_class.Config.model_validate(section))
    model = build(name)
    problems = method.check(Anatomy.of(model))
    if (path.stem, name) in REFUSED:
        assert len(problems) == 1
        return
    assert problems == []
    attached = method.attach(model)
    assert any(parameter.requires_grad for parameter in attached.parameters())
    # What only says which layers run a faster forward is nothing to worry about.
    assert [note for note in method.notes if "are fused" not in note] == []
