"""Runs and exports of every recipe on three tiny models, each made once when first asked for."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peftlab.exporting import ExportResult, export, proof, reload
from peftlab.run import Request, Run, train

WORDS = ("a", "film", "is", "was", "the", "plot", "very", "not", "good", "bad", "great", "dull")
SIZES = {
    "hidden_size": 64,  # bitsandbytes packs blocks of 64
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    # Ten times the usual one: what the model says shall depend on every weight.
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAST = (
    "train.max_steps=3",
    "train.per_device_train_batch_size=8",
    "train.max_length=32",
    "train.eval_strategy=no",
    "optim.learning_rate=0.02",
)


def make_tokenizer(encoder: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *"01:"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_models(folder: Path) -> dict[str, Path]:
    """A BERT without a pooler, as masked language models are kept, and a Llama with tied ends."""
    import torch
    import transformers

    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=24))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, vocab_size=24, num_key_value_heads=2, tie_word_embeddings=True,
            bos_token_id=2, eos_token_id=3,
        )
    )  # fmt: skip
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        make_tokenizer(encoder=name == "bert").save_pretrained(folder / name)
    return {"bert": folder / "bert", "llama": folder / "llama", "llama-lm": folder / "llama"}


def make_tasks(folder: Path) -> dict[str, Path]:
    rows = [
        (f"{WORDS[i % 12]} {WORDS[i * 7 % 11]} {WORDS[i * 5 % 12]} {i % 2}" + " film" * (i % 5), i)
        for i in range(60)
    ]
    for name, part in (("train", rows[:32]), ("validation", rows[32:44]), ("test", rows[44:])):
        lines = [f"{text},{'bad' if i % 3 else 'good'}" for text, i in part]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    files = "train: train.csv, validation: validation.csv, test: test.csv"
    bodies = {
        "sentiment": f"kind: classification\nmodel: bert-tiny\ndata: {{{files}}}\n",
        "sft": (
            f"kind: causal-lm\nmodel: smollm2-135m\ndata: {{{files}, prompt: '{{text}} :', "
            "completion: ' {label}', max_new_tokens: 3}\n"
        ),
    }
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(body)
    sentiment, sft = folder / "sentiment.yaml", folder / "sft.yaml"
    return {"bert": sentiment, "llama": sentiment, "llama-lm": sft}


@dataclass
class Lab:
    """Where everything lies, and how to get more of it."""

    root: Path
    models: dict[str, Path]
    tasks: dict[str, Path]
    requests: dict[str, list[Path]] = field(default_factory=lambda: {"merged": [], "adapter": []})

    def __post_init__(self) -> None:
        self.run = functools.cache(self._run)
        self.export = functools.cache(self._export)

    def _run(self, shape: str, recipe: str, *overrides: str) -> Run:
        request = Request(root=self.root / "runs", progress=False, command="peftlab train …")
        return train(
            str(self.tasks[shape]),
            recipe,
            model=str(self.models[shape]),
            overrides=[*FAST, *overrides],
            request=request,
        )

    def _export(self, shape: str, recipe: str, form: str) -> ExportResult:
        """An export that is reloaded in this process; ``fresh`` does it once for all of them."""
        to = self.root / "exports" / f"{shape}-{recipe}-{form}"

        def here(requests: list[Path]) -> None:
            for path in requests:
                request = json.loads(path.read_text())
                reload.answer(request)
                kept = self.root / "requests" / to.name
                shutil.copytree(path.parent, kept)
                moved = {
                    "folder": str(to),
                    "inputs": str(kept / "inputs.safetensors"),
                    "outputs": str(kept / "fresh.safetensors"),
                }
                (kept / "request.json").write_text(json.dumps(request | moved))
                self.requests[form].append(kept)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof, "run_reload", here)
            return export(self.run(shape, recipe).folder, to, format=form)


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    return Lab(folder, make_models(folder), make_tasks(folder))


@pytest.fixture
def in_process(monkeypatch) -> Callable[[], None]:
    """Reload in this process: seconds less for tests of something else."""

    def here(requests: list[Path]) -> None:
        for path in requests:
            reload.answer(json.loads(path.read_text()))

    monkeypatch.setattr(proof, "run_reload", here)
