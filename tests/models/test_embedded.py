from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftlab.errors import UnknownNameError
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.models.embedded import embedded_models, embedded_path
from peftlab.models.load import load_model, load_tokenizer


def test_the_table_is_listed_without_torch() -> None:
    code = (
        "import sys; from peftlab.models.embedded import embedded_models; "
        "from peftlab.tasks.embedded import EMBEDDED_DATASETS; "
        "print(*embedded_models()); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["minilm bert-tiny smollm2-135m", "set()"]
    assert all(model.licence == "Apache-2.0" for model in embedded_models().values())


def test_bert_tiny_is_safetensors_config_and_tokenizer(bert_tiny: str) -> None:
    assert sorted(path.name for path in Path(bert_tiny).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'minilm'"):
        embedded_path("mini-lm")


@pytest.mark.slow
def test_smollm2_is_what_its_gguf_file_holds() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftlab.assets import RELEASES, fetch

    model_config = ModelConfig(model_name_or_path="smollm2-135m")
    model = load_model(model_config, PrecisionConfig(), "AutoModelForCausalLM", {})
    tokenizer = load_tokenizer(model_config)
    source, (gguf,) = fetch("smollm2-135m"), RELEASES["smollm2-135m"].members
    reference = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    reference_tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == reference_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    batch = tokenizer(prompt, return_tensors="pt")
    assert batch.input_ids[0].tolist() == reference_tokenizer(prompt).input_ids
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
        output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, batch.input_ids.shape[1] :])

    assert model.newly_initialized == ()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192
    assert sorted(path.suffix for path in embedded_path("smollm2-135m").iterdir()) == [
        ".jinja",
        ".json",
        ".json",
        ".json",
        ".json",
        ".safetensors",
    ]
