"""Small random shapes of common architectures, for tests and for checking estimates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftlab.registry import unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 128
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "llama": _DECODER,
    "qwen2": {**_DECODER, "tie_word_embeddings": True},
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "classifier_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
}

TINY_ARCHITECTURES = tuple(_SHAPES)


def tiny_config(architecture: str) -> PretrainedConfig:
    """A config of 2 or 3 layers, width 32, 128 tokens and no dropout.

    GPT-2, Qwen2 and T5 tie their embeddings, Llama does not. Inputs up to 64 tokens fit.

    Args:
        architecture: a transformers ``model_type`` of ``TINY_ARCHITECTURES``.

    Raises:
        UnknownNameError: no such shape.
    """
    from transformers import AutoConfig

    if architecture not in _SHAPES:
        raise unknown("tiny architecture", architecture, _SHAPES)
    return AutoConfig.for_model(architecture, **_SHAPES[architecture])
