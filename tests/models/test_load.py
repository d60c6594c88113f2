from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlab.errors import AssetError, IncompatibleError, UnknownNameError, UserError
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.models.load import (
    build_from_config,
    load_config,
    load_model,
    load_tokenizer,
    resolve_path,
)
from peftlab.models.tiny import tiny_config

CLASSIFIER = "AutoModelForSequenceClassification"
FLOAT32 = PrecisionConfig()


def named(name: str | Path, **changes: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(name), **changes)  # type: ignore[arg-type]


@pytest.fixture
def copied(bert_tiny: str, tmp_path: Path) -> Path:
    """A copy of BERT-Tiny that a test may damage."""
    return Path(shutil.copytree(bert_tiny, tmp_path / "model"))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_names_resolve_in_order(
    bert_tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bert-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_path("bert-tiny") == bert_tiny
    assert resolve_path("./bert-tiny") == "bert-tiny"
    assert resolve_path(str(tmp_path)) == str(tmp_path)
    assert resolve_path("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert-tinny", "Did you mean 'bert-tiny'"),
        ("gpt2", "owner/name"),
        ("./absent", "no folder"),
        ("/absent/model", "no folder"),
        ("a/b/c", "no folder"),
        (__file__, "is a file"),
    ],
)
def test_a_name_that_is_nothing_is_named(name: str, said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        resolve_path(name)


def test_bert_tiny_loads_silently_and_names_what_is_new(
    bert_tiny: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(
        named("bert-tiny"), FLOAT32, CLASSIFIER, {"id2label": {0: "a", 1: "b", 2: "c"}}
    )
    # Pretrained as a masked language model, it has no pooler either.
    assert model.newly_initialized == (
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    )
    assert model.config.num_labels == 3
    assert not model.training
    stored = load_file(Path(bert_tiny) / "model.safetensors")
    loaded = model.bert.embeddings.LayerNorm.weight
    assert torch.equal(loaded, stored["bert.embeddings.LayerNorm.gamma"])
    assert capfd.readouterr() == ("", "")


def test_a_masked_language_model_is_whole() -> None:
    model = load_model(named("bert-tiny"), FLOAT32, "AutoModelForMaskedLM", {})
    assert model.newly_initialized == ()
    tokenizer = load_tokenizer(named("bert-tiny"))
    batch = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    assert model(**batch).logits.shape == (1, 9, 30522)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_in_the_asked_dtype(dtype: str) -> None:
    model = load_model(named("bert-tiny"), PrecisionConfig(dtype=dtype), CLASSIFIER, {})
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_quantized_model_keeps_its_head(quantization: str, kind: str) -> None:
    precision = PrecisionConfig(quantization=quantization)
    model = load_model(named("bert-tiny"), precision, CLASSIFIER, {})
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["bert.encoder.layer.0.attention.self.query"] == kind
    assert kinds["bert.encoder.layer.1.output.dense"] == kind
    assert kinds["classifier"] == kinds["bert.pooler.dense"] == "Linear"
    batch = load_tokenizer(named("bert-tiny"))("a fine film", return_tensors="pt")
    here = batch.to(model.device)
    quantized = model(**here, output_hidden_states=True).hidden_states[-1].cpu()
    plain = load_model(named("bert-tiny"), FLOAT32, CLASSIFIER, {})
    exact = plain(**batch.to("cpu"), output_hidden_states=True).hidden_states[-1]
    assert torch.cosine_similarity(quantized, exact, dim=-1).min() > 0.9


def test_a_decoder_classifier_gets_a_pad_token(bert_tiny: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.pad_token_id = None
    build_from_config(config, "AutoModelForCausalLM", torch.float32, "sdpa").save_pretrained(
        tmp_path
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(bert_tiny) / file, tmp_path)
    model = load_model(named(tmp_path), FLOAT32, CLASSIFIER, {"num_labels": 2})
    assert model.config.pad_token_id == load_tokenizer(named(tmp_path)).pad_token_id == 0
    assert model.newly_initialized == ("score.weight",)


def test_the_end_of_text_token_pads_where_nothing_else_does(copied: Path) -> None:
    file = copied / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.update(pad_token=None, eos_token="[SEP]")
    file.write_text(json.dumps(config))
    tokenizer = load_tokenizer(named(copied))
    assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]"
    config.update(eos_token=None)
    file.write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match="cannot pad"):
        load_tokenizer(named(copied))


def test_a_head_of_another_shape_is_new(copied: Path) -> None:
    load_model(named(copied), FLOAT32, CLASSIFIER, {"num_labels": 5}).save_pretrained(copied)
    same = load_model(named(copied), FLOAT32, CLASSIFIER, {"num_labels": 5})
    assert same.newly_initialized == ()
    other = load_model(named(copied), FLOAT32, CLASSIFIER, {"num_labels": 2})
    assert other.newly_initialized == ("classifier.bias", "classifier.weight")
    assert other.classifier.out_features == 2


def test_a_checkpoint_without_a_part_of_the_backbone_is_refused(copied: Path) -> None:
    edit_config(copied, num_hidden_layers=3)
    with pytest.raises(IncompatibleError, match=r"does not hold bert\.encoder\.layer\.2"):
        load_model(named(copied), FLOAT32, CLASSIFIER, {})


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_layers_left_out_are_reported(
    prefix: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(copied / "model.safetensors")
    renamed = {
        name.removeprefix("bert.") if not prefix else name: tensor
        for name, tensor in weights.items()
        if name.startswith("bert.")
    }
    save_file(renamed, copied / "model.safetensors", metadata={"format": "pt"})
    edit_config(copied, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        model = load_model(named(copied), FLOAT32, CLASSIFIER, {})
    assert len(model.bert.encoder.layer) == 1
    assert f"no place for {prefix}encoder.layer.1." in caplog.text


def test_a_language_model_needs_its_own_head(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("bert.")}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"does not hold cls\.predictions"):
        load_model(named(copied), FLOAT32, "AutoModelForMaskedLM", {})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_no_model(copied: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(named(copied), FLOAT32, CLASSIFIER, {})
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(copied)
    with pytest.raises(IncompatibleError, match="is an adapter, not a model"):
        load_model(named(copied), FLOAT32, CLASSIFIER, {})


def test_mistakes_get_one_message_each(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(named(tmp_path / "empty"))
    with pytest.raises(UserError, match="no AutoModelForSeq2SeqLM"):
        load_model(named(copied), FLOAT32, "AutoModelForSeq2SeqLM", {})
    with pytest.raises(AssetError, match=r"owner/absent.*Check the name, the network"):
        load_config(named("owner/absent"))
    with pytest.raises(UserError, match=r"attn_implementation|attention"):
        load_model(named(copied, attn_implementation="nonsense"), FLOAT32, CLASSIFIER, {})
    (copied / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(AssetError, match="weights"):
        load_model(named(copied), FLOAT32, CLASSIFIER, {})
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"a pickle is never opened")
    with pytest.raises(AssetError, match="safetensors"):
        load_model(named(copied), FLOAT32, CLASSIFIER, {})


def test_remote_code_is_not_run_unasked(copied: Path) -> None:
    edit_config(copied, model_type="house-made", auto_map={"AutoConfig": "evil.Config"})
    (copied / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(IncompatibleError, match="trust_remote_code=true"):
        load_config(named(copied))
