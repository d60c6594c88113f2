"""What a checkpoint lacks, told from its header as loading it tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlab.models.checkpoint import checkpoint_keys, lacking
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.models.load import build_from_config, load_model


@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModel"])
def test_as_loading_says(auto_class: str) -> None:
    model = ModelConfig(model_name_or_path="bert-tiny")
    loaded = load_model(model, PrecisionConfig(), auto_class, {})
    with torch.device("meta"):
        shell = build_from_config(loaded.config, auto_class, torch.float32, "sdpa")
    keys = checkpoint_keys("bert-tiny")
    assert keys is not None
    assert lacking(shell, keys) == loaded.newly_initialized
    assert any(".pooler." in f".{name}" for name in loaded.newly_initialized)


def test_a_checkpoint_of_the_backbone_lacks_the_head_alone(bert_tiny: str, tmp_path: Path) -> None:
    held = load_file(Path(bert_tiny) / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in held.items()}
    pooler = {"pooler.dense.weight": torch.zeros(128, 128), "pooler.dense.bias": torch.zeros(128)}
    save_file(bare | pooler, tmp_path / "model.safetensors")
    config = json.loads((Path(bert_tiny) / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = ModelConfig(model_name_or_path=str(tmp_path))
    auto_class = "AutoModelForSequenceClassification"
    loaded = load_model(model, PrecisionConfig(), auto_class, {})
    keys = checkpoint_keys(str(tmp_path))
    assert keys is not None
    assert (
        lacking(loaded, keys)
        == loaded.newly_initialized
        == ("classifier.bias", "classifier.weight")
    )


def test_shards_are_listed_in_an_index(tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "one", "b.weight": "two"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert checkpoint_keys(str(tmp_path)) == {"a.weight", "b.weight"}


def test_nothing_is_known_of_what_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert checkpoint_keys(str(tmp_path / "config.json")) is None
    assert checkpoint_keys(str(tmp_path)) is None
    assert checkpoint_keys("nobody/nothing") is None
