from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode

from peftlab.anatomy import Anatomy, dead_alternatives, inside
from peftlab.errors import IncompatibleError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, **SPECIAL)
LLAMA = transformers.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=2)
LLAMA_TIED = transformers.LlamaConfig(**SIZES, **SPECIAL, tie_word_embeddings=True)
T5 = transformers.T5Config(vocab_size=61, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4)
OPT = transformers.OPTConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
    word_embed_proj_dim=32, **SPECIAL,
)  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    image_size=8, patch_size=4,
)  # fmt: skip
DISTILBERT = transformers.DistilBertConfig(
    vocab_size=61, dim=32, n_layers=3, n_heads=4, hidden_dim=48
)


def build(auto: Any, config: Any, device: str = "meta") -> Any:
    with torch.device(device):
        return auto.from_config(config)


SEQ_CLS = transformers.AutoModelForSequenceClassification
LM = transformers.AutoModelForCausalLM


@pytest.mark.parametrize(
    ("auto", "config", "expected"),
    [
        (
            SEQ_CLS,
            transformers.BertConfig(**SIZES),
            {
                "task_type": "SEQ_CLS", "embeddings": ("bert.embeddings",),
                "blocks": tuple(f"bert.encoder.layer.{i}" for i in range(3)),
                "after_blocks": ("bert.pooler",), "head": ("classifier",), "head_is_new": True,
                "head_is_tied": False, "query_value": ("query", "value"), "cache_in": "backbone",
            },
        ),
        (
            SEQ_CLS,
            transformers.RobertaConfig(**SIZES),
            {"after_blocks": (), "head": ("classifier",), "query_value": ("query", "value")},
        ),
        (
            SEQ_CLS,
            DISTILBERT,
            {
                "blocks": tuple(f"distilbert.transformer.layer.{i}" for i in range(3)),
                "head": ("pre_classifier", "classifier"), "head_is_new": True,
                "query_value": ("q_lin", "v_lin"), "cache_in": "",
            },
        ),
        (
            LM,
            GPT2,
            {
                "task_type": "CAUSAL_LM", "embeddings": ("transformer.wte", "transformer.wpe"),
                "blocks": tuple(f"transformer.h.{i}" for i in range(3)),
                "after_blocks": ("transformer.ln_f",), "head": ("lm_head",), "head_is_new": False,
                "head_is_tied": True, "query_value": ("c_attn",), "cache_in": "model",
            },
        ),
        (
            LM,
            LLAMA,
            {
                "embeddings": ("model.embed_tokens",), "after_blocks": ("model.norm",),
                "head": ("lm_head",), "head_is_new": False, "head_is_tied": False,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "biases": (),
            },
        ),
        (LM, LLAMA_TIED, {"head_is_tied": True, "num_key_value_heads": 4}),
        (SEQ_CLS, LLAMA, {"head": ("score",), "head_is_new": True, "task_type": "SEQ_CLS"}),
        (
            transformers.AutoModelForSeq2SeqLM,
            T5,
            {
                "task_type": "SEQ_2_SEQ_LM", "is_encoder_decoder": True,
                "embeddings": ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
                "blocks": (
                    *(f"encoder.block.{i}" for i in range(3)),
                    *(f"decoder.block.{i}" for i in range(3)),
                ),
                "between_stacks": ("encoder.final_layer_norm",),
                "after_blocks": ("decoder.final_layer_norm",), "head": ("lm_head",),
                "head_is_tied": True, "head_dim": 16, "num_layers": 3, "query_value": ("q", "v"),
            },
        ),
        (
            LM,
            OPT,
            {
                "after_blocks": ("model.decoder.final_layer_norm",),
                "embeddings": ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            },
        ),
        (
            transformers.AutoModelForImageClassification,
            VIT,
            {"task_type": None, "head": ("classifier",), "after_blocks": ("vit.layernorm",)},
        ),
        (
            transformers.AutoModelForMaskedLM,
            transformers.BertConfig(**SIZES),
            {"task_type": None, "head": ("cls",), "head_is_new": False, "head_is_tied": True},
        ),
        (
            transformers.AutoModel,
            transformers.BertConfig(**SIZES),
            {"head": (), "head_is_new": False, "after_blocks": ("pooler",)},
        ),
    ],
)  # fmt: skip
def test_parts(auto: Any, config: Any, expected: dict[str, Any]) -> None:
    model = build(auto, config)
    anatomy = Anatomy.of(model)
    assert {key: getattr(anatomy, key) for key in expected} == expected
    assert (anatomy.hidden_size, anatomy.num_layers) == (32, 3)
    # Every parameter lies in exactly one part.
    parts = (
        *anatomy.embeddings, *anatomy.blocks, *anatomy.between_stacks, *anatomy.after_blocks,
        *(anatomy.head if not anatomy.head_is_tied else ()),
    )  # fmt: skip
    for name in anatomy.parameters:
        owners = [part for part in parts if inside(name, (part,))]
        assert len(owners) == 1 or inside(name, anatomy.head), name


def test_same_on_meta_fake_and_real_tensors() -> None:
    meta = Anatomy.of(build(SEQ_CLS, LLAMA))
    assert Anatomy.of(build(SEQ_CLS, LLAMA, "cpu")) == meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert Anatomy.of(build(SEQ_CLS, LLAMA, "cpu")) == meta


def test_shapes_are_in_and_out_whatever_the_layer() -> None:
    gpt2 = Anatomy.of(build(LM, GPT2))
    assert gpt2.linears["transformer.h.0.attn.c_attn"] == (32, 96)
    assert gpt2.embedding_tables["transformer.wte"] == (61, 32)
    llama = Anatomy.of(build(LM, LLAMA))
    assert llama.linears["model.layers.2.self_attn.k_proj"] == (32, 16)


def test_block_of() -> None:
    anatomy = Anatomy.of(build(LM, transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 11})))
    assert anatomy.block_of("model.layers.1.mlp.up_proj.weight") == 1
    assert anatomy.block_of("model.layers.10.mlp.up_proj.weight") == 10
    assert anatomy.block_of("model.norm.weight") is None


def test_norms_and_biases() -> None:
    anatomy = Anatomy.of(build(SEQ_CLS, transformers.BertConfig(**SIZES)))
    assert len(anatomy.norms) == 2 * (1 + 2 * 3)
    assert all("LayerNorm" in name for name in anatomy.norms)
    assert "bert.encoder.layer.0.attention.self.query.bias" in anatomy.biases


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.AlbertConfig(**SIZES, embedding_size=8), "3 layers share 1 set"),
        (
            transformers.XLMConfig(vocab_size=61, emb_dim=32, n_layers=3, n_heads=4),
            "XLMForSequenceClassification: found several equally long lists",
        ),
    ],
)
def test_unknown_architecture(config: Any, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        Anatomy.of(build(SEQ_CLS, config))


@pytest.mark.parametrize(
    ("pattern", "dead"),
    [
        ("(query|key)", []),
        ("(query|kye)", ["kye"]),
        (r"layer\.0.*(?:kye|query|valu3)", ["kye", "valu3"]),
        ("query", []),
    ],
)
def test_dead_alternatives(pattern: str, dead: list[str]) -> None:
    assert dead_alternatives(pattern, ["layer.0.query", "layer.0.key", "layer.1.value"]) == dead


@pytest.mark.parametrize(
    ("typed", "near"),
    [("qery", "query"), (r"encodr\.layer\.0", "encoder"), ("clasifier", "classifier")],
)
def test_near_names(typed: str, near: str) -> None:
    anatomy = Anatomy.of(build(SEQ_CLS, transformers.BertConfig(**SIZES)))
    assert near in anatomy.near(typed, anatomy.parameters)


def test_near_names_of_nonsense_shows_what_names_look_like() -> None:
    anatomy = Anatomy.of(build(SEQ_CLS, transformers.BertConfig(**SIZES)))
    assert anatomy.near("zzzz", anatomy.parameters).startswith("Names look like 'bert.encoder")
