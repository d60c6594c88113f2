"""A model that is read once and drawn anew is the one that would have been loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.models.load import load_model
from peftlab.models.shared import SharedModel


def load() -> PreTrainedModel:
    return load_model(
        ModelConfig(model_name_or_path="bert-tiny"),
        PrecisionConfig(),
        "AutoModelForSequenceClassification",
        {"num_labels": 3},
    )


def test_what_is_new_is_drawn_as_loading_draws_it(bert_tiny: str) -> None:
    kept = SharedModel()
    first = kept.get(load)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = load()
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = kept.get(lambda: (_ for _ in ()).throw(AssertionError("it is loaded already")))
        assert torch.equal(torch.get_rng_state(), state)
        assert model.newly_initialized == expected.newly_initialized
        assert not model.training
        for (name, ours), theirs in zip(
            model.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
            same_storage = ours.data_ptr() == first.state_dict()[name].data_ptr()
            assert same_storage == (name not in model.newly_initialized), name
        # A run's changes stay its own.
        torch.nn.init.ones_(model.get_parameter(model.newly_initialized[0]))
        model.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in kept.get(load).parameters())
    query = model.bert.encoder.layer[0].attention.self.query
    query.bias.requires_grad_(True)
    kept.copy_trained(model)
    with torch.no_grad():
        query.bias += 1
    again = kept.get(load).bert.encoder.layer[0].attention.self.query
    assert torch.equal(again.bias + 1, query.bias)
    assert again.weight.data_ptr() == query.weight.data_ptr()
    assert kept.nbytes > 0
    kept.drop()
    assert kept.nbytes == 0


def test_what_cannot_be_drawn_again_is_loaded_again(bert_tiny: str) -> None:
    def load_and_draw() -> PreTrainedModel:
        model = load()
        torch.nn.init.normal_(model.get_parameter("classifier.weight"))
        return model

    kept = SharedModel()
    one, two = kept.get(load_and_draw), kept.get(load_and_draw)
    assert kept.nbytes == 0
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
