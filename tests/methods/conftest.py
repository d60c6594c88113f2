"""Tiny random models of every architecture that a method claims, and a padded batch for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROBERTA_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CONFIGS: dict[str, tuple[type, transformers.PreTrainedConfig]] = {
    "bert": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**SIZES, **NO_DROPOUT, num_labels=3),
    ),
    "roberta": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**SIZES, **NO_DROPOUT, **ROBERTA_SPECIAL, num_labels=3),
    ),
    "camembert": (
        transformers.CamembertForSequenceClassification,
        transformers.CamembertConfig(**SIZES, **NO_DROPOUT, **ROBERTA_SPECIAL, num_labels=3),
    ),
    "xlm-roberta": (
        transformers.XLMRobertaForSequenceClassification,
        transformers.XLMRobertaConfig(**SIZES, **NO_DROPOUT, **ROBERTA_SPECIAL, num_labels=3),
    ),
    "electra": (
        transformers.ElectraForSequenceClassification,
        transformers.ElectraConfig(**SIZES, **NO_DROPOUT, embedding_size=32, num_labels=3),
    ),
    "distilbert": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(
            vocab_size=61, dim=32, n_layers=3, n_heads=4, hidden_dim=48, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
        ),
    ),
    "gpt2": (
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2Config(
            **GPT2_SIZES, **SPECIAL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=3
        ),
    ),
    "llama": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=2, num_labels=3),
    ),
    "gpt2-lm": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            **GPT2_SIZES, **SPECIAL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
    ),
    "llama-lm": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **SIZES, **SPECIAL, num_key_value_heads=2, tie_word_embeddings=True
        ),
    ),
    "llama-lm-untied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=2),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Build the tiny model of a name; the same seed gives the same weights."""

    def make(name: str, seed: int = 0) -> nn.Module:
        model_class, config = CONFIGS[name]
        torch.manual_seed(seed)
        model: nn.Module = model_class(type(config)(**config.to_dict()))
        # Untrained biases and norms are zeros and ones, which hides mistakes.
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
        return model.train()

    return make


@pytest.fixture
def batch() -> Callable[[str], dict[str, Tensor]]:
    """A right-padded batch of two rows for the model of a name."""

    def make(name: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        input_ids = torch.randint(3, 61, (2, 7))
        attention_mask = torch.ones_like(input_ids)
        # RoBERTa tells positions from the padding token.
        input_ids[0, 5:] = getattr(CONFIGS[name][1], "pad_token_id", None) or 0
        attention_mask[0, 5:] = 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if name == "t5":
            inputs["decoder_input_ids"] = torch.randint(3, 61, (2, 4))
        return inputs

    return make
