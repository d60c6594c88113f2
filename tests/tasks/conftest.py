"""Tiny tokenizers and models, made here: no download."""

from __future__ import annotations

import json

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _byte_level(merges):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += ["".join(pair) for pair in merges]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrapped(tokenizer, **kwargs):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        **kwargs,
    )


@pytest.fixture
def pair_tokenizer():
    """One token a byte, ``<s> a </s> b </s>`` with token type ids, as BERT has them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = _byte_level([])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return _wrapped(tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"])


@pytest.fixture
def lm_tokenizer():
    """One token a byte, but "ok" is one token; no special tokens added; a chat template."""
    tokenizer = _wrapped(_byte_level([("o", "k")]))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def bos_tokenizer():
    """As ``lm_tokenizer``, but ``<s>`` goes before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = _byte_level([("o", "k")])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return _wrapped(tokenizer)


@pytest.fixture
def tiny_bert():
    """A function from ``num_labels`` and the like to a random BERT classifier in eval mode."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def make(**kwargs):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.5,
            **kwargs,
        )
        return BertForSequenceClassification(config).eval()

    return make


@pytest.fixture
def tiny_llama():
    """A random Llama in eval mode, untied and varied enough that its answers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows under a name and returns the path as text."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
