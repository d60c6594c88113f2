"""Packed examples learn what they learn padded, and nothing of each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftlab.errors import ConfigError
from peftlab.experiment.resolve import resolve
from peftlab.planning.answer import answer
from peftlab.planning.simulate import measure, simulate
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.packing import pack, why_not_packed
from peftlab.training.config import TrainConfig
from peftlab.training.schedule import Schedule
from tests.planning.test_exact import request_of
from tests.tasks.test_lm_loss import assert_close, gradients, model_of

Kind = TASK_KINDS.get("causal-lm")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "mistral", "gemma3_text", "mixtral")


def kind_of(packing: bool) -> Any:
    return Kind(Kind.Config(train="-", prompt="p", completion="c", packing=packing))


def examples_of(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        features = {"input_ids": ids, "attention_mask": [1] * length, "labels": labels}
        examples.append(features)
    return examples


def test_examples_end_to_end() -> None:
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [9, 4], "labels": [9, 4]},
    ]
    batch = {key: value.tolist() for key, value in pack(examples).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 9, 4]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "labels": [[-100, 6, 7, -100, -100, 4]],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_padded_batch(
    architecture: str, attention: str, lm_tokenizer: Any
) -> None:
    model = model_of(architecture)
    model.set_attn_implementation(attention)
    examples = examples_of(5, 1, 9, 2, 4)
    losses, gradient = [], []
    for packing in (False, True):
        kind = kind_of(packing)
        batch = kind.collate(examples, lm_tokenizer)
        shape = kind.batch_shape([len(example["input_ids"]) for example in examples])
        assert tuple(batch["input_ids"].shape) == shape == ((1, 21) if packing else (5, 9))
        loss = kind.loss(model, batch)
        losses.append(loss)
        gradient.append(gradients(model, loss))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert_close(gradient[1], gradient[0], rtol=3e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_gradient_leaks_from_one_example_to_another(architecture: str, attention: str) -> None:
    model = model_of(architecture)
    model.set_attn_implementation(attention)
    examples = examples_of(4, 6, 5)
    batch = pack(examples)
    for number, (start, end) in enumerate(((0, 4), (4, 10), (10, 15))):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        labels = torch.full_like(batch["labels"], -100)
        labels[:, start:end] = batch["labels"][:, start:end]
        inputs = {"inputs_embeds": embedded, "position_ids": batch["position_ids"]}
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        moved = embedded.grad[0].abs().sum(-1)
        assert (moved[start : end - 1] > 0).all(), number
        assert not moved[:start].any(), number
        assert not moved[end:].any(), number


def test_logits_are_those_of_the_padded_batch(lm_tokenizer: Any) -> None:
    model, examples = model_of("llama"), examples_of(5, 1, 9)
    padded, packed = (
        kind.logits(model, kind.collate(examples, lm_tokenizer))
        for kind in (kind_of(False), kind_of(True))
    )
    assert packed.shape == (15, 60)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_that_can_be_packed(architecture: str) -> None:
    assert why_not_packed(model_of(architecture)) is None
    assert kind_of(True).check(model_of(architecture)) == []


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("bloom", {"n_layer": 2}, "it takes no positions"),
        ("jamba", {"mamba_d_state": 4}, "recurrent state"),
        ("opt", {"ffn_dim": 16, "word_embed_proj_dim": 16}, "attention reaches"),
    ],
)
def test_models_that_cannot_be_packed(
    architecture: str, settings: dict[str, Any], reason: str
) -> None:
    kept = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = _built(architecture, {**kept, **settings})
    (problem,) = kind_of(True).check(model)
    assert problem.where == "data.packing"
    assert reason in problem.message
    assert kind_of(False).check(model) == []


def _built(architecture: str, values: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **values)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_evaluation_is_not_packed(lm_tokenizer: Any, tiny_llama: Any) -> None:
    rows = [{"id": f"{n}", "prompt": "ask" * n, "completion": "yes"} for n in range(1, 5)]
    nll: list[list[Tensor]] = []
    for packing in (False, True):
        data = Kind.Config(
            train="-", prompt="prompt", completion="completion", packing=packing, max_new_tokens=0
        )
        predictions = Kind(data).predict(tiny_llama, rows, lm_tokenizer, 64, 4)
        nll.append([prediction["nll"] for prediction in predictions])
    assert nll[0] == nll[1]


def test_a_schedule_counts_packed_tokens() -> None:
    lengths = [3, 9, 1, 7, 5, 2]
    config = TrainConfig(per_device_train_batch_size=3, num_train_epochs=1, group_by_length=False)
    schedule = Schedule(lengths, config, seed=0, shape=kind_of(True).batch_shape)
    shapes = [schedule.shapes_of(step) for step in range(schedule.total_steps)]
    rows = [schedule.rows_of(step) for step in range(schedule.total_steps)]
    assert shapes == [[(1, sum(lengths[row] for row in step))] for step in rows]


def test_a_packed_batch_is_planned_byte_for_byte() -> None:
    train = TrainConfig(gradient_accumulation_steps=2)
    request = request_of("llama", "causal_lm", {"kind": "lora", "r": 4}, train=train)
    packed = replace(request, kind=Kind(Kind.Config.model_construct(packing=True)))
    planned, real = simulate(packed), measure(packed)
    assert planned.trace.events == real.trace.events
    assert planned.trace.breakdown() == real.trace.breakdown()
    assert planned.notes == real.notes
    assert planned.flops == real.flops > 0
    assert answer(packed).batch_shape == (1, sum(packed.lengths))


def test_virtual_tokens_and_packed_texts_exclude_each_other() -> None:
    overrides = ["data.packing=true"]
    with pytest.raises(ConfigError) as caught:
        resolve("movie-sentiment-sft", "ptuning-v2", overrides=overrides)
    (problem,) = caught.value.problems
    assert problem.where == "--set data.packing=true"
    assert problem.message.startswith("ptuning_v2 puts virtual tokens before a text")
    assert resolve("movie-sentiment-sft", "lora", overrides=overrides).experiment.data.packing
