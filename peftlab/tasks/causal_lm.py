"""Supervised fine-tuning of causal language models: a prompt and its completion, or a chat.

The loss is on the completion alone; ``prompts`` tells how the two become tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field as Option
from pydantic import model_validator

from peftlab.errors import DataError, Problem
from peftlab.tasks.base import (
    DataConfig,
    Features,
    Prediction,
    Row,
    Splits,
    TaskKind,
    TaskTraits,
)
from peftlab.tasks.batches import by_length, check_aligned, eval_mode, score_all
from peftlab.tasks.data import Field, read_rows, read_splits
from peftlab.tasks.files import few
from peftlab.tasks.packing import pack, why_not_packed
from peftlab.tasks.prompts import (
    IGNORE,
    as_messages,
    cut_left,
    encode_row,
    eos_id,
    pad_id,
    prompt_ids,
    reference,
    template_columns,
    template_field,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class CausalLMData(DataConfig):
    """The data section of a causal-lm task.

    ``prompt`` and ``completion`` are a column each, or a template with ``{column}`` in braces;
    ``messages`` is instead a column of chats, lists of ``{role, content}``. ``max_new_tokens`` is
    the length of what is generated for a prediction: a longer reference never matches, and 0
    generates nothing and scores the reference's tokens only. ``packing`` puts the examples of a
    training batch into one row, end to end, instead of padding them: nothing is wasted on padding,
    but attention is computed over the whole row before it is masked.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    max_new_tokens: int = Option(default=64, ge=0)
    packing: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> CausalLMData:
        if self.messages is not None:
            if self.prompt is not None or self.completion is not None:
                raise ValueError("'messages' excludes 'prompt' and 'completion'")
        elif self.prompt is None or self.completion is None:
            raise ValueError("needs 'prompt' and 'completion', or 'messages'")
        for source in (self.prompt, self.completion):
            if source is not None:
                template_columns(source)
        return self


class CausalLM(TaskKind[CausalLMData]):
    """Rows carry ``prompt`` and ``completion`` as text, or ``messages``."""

    Config = CausalLMData
    traits = TaskTraits(
        summary="a completion for a prompt, or the assistant's turn of a chat",
        auto_class="AutoModelForCausalLM",
        metrics=("exact_match", "target_nll"),
        unit="tokens",
        generates=True,
    )

    def _fields(self, answered: bool) -> list[Field]:
        if self.data.messages is not None:
            check = partial(as_messages, answered=answered)
            return [Field("messages", (self.data.messages,), check)]
        return [
            template_field("prompt", str(self.data.prompt)),
            template_field("completion", str(self.data.completion), target=True),
        ]

    def read(self) -> Splits:
        return read_splits(self.data, self.folder, self._fields(answered=True))

    def read_rows(self, path: str) -> list[Row]:
        return read_rows(path, self._fields(answered=False))

    def baseline(self, splits: Splits, metric: str | None = None) -> float | None:
        answers = Counter(str(reference(row)).strip() for row in splits.train)
        most_frequent = max(sorted(answers), key=answers.__getitem__)
        predictions = [{"id": row["id"], "prediction": most_frequent} for row in splits.test]
        return self.score(splits.test, predictions)[metric or self.traits.metrics[0]]

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {}

    @property
    def packs(self) -> bool:
        return self.data.packing

    def check(self, model: nn.Module) -> list[Problem]:
        reason = why_not_packed(model) if self.packs else None
        if reason is None:
            return []
        message = f"{type(model).__name__} cannot learn packed texts: {reason}."
        return [Problem("data.packing", message, "Leave it off.")]

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Features]:
        """Completions are kept whole, with the end-of-text token; prompts are cut on the left.

        Raises:
            DataError: a completion that leaves no room for a token of its prompt.
        """
        features, problems = [], []
        for row in rows:
            example = encode_row(row, tokenizer)
            room = max_length - len(example.completion)
            if room < 1:
                message = f"the completion has {len(example.completion)} tokens of {max_length}."
                problems.append(Problem(f"row {row['id']}", message, "Raise train.max_length."))
                continue
            prompt = cut_left(example.prompt, room, tokenizer)
            labels = example.prompt_labels[len(example.prompt) - len(prompt) :]
            features.append(
                {
                    "input_ids": prompt + example.completion,
                    "attention_mask": [1] * (len(prompt) + len(example.completion)),
                    "labels": labels + example.completion,
                }
            )
        if problems:
            raise DataError(few(problems, "data"))
        return features

    def collate(
        self, features: Sequence[Features], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """Padded on the right, or packed; labels are -100 where nothing is to be learned."""
        return pack(features) if self.packs else self._padded(features, tokenizer)

    def _padded(
        self, features: Sequence[Features], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        fill = {"input_ids": pad_id(tokenizer), "attention_mask": 0, "labels": IGNORE}
        return {
            key: _pad([example[key] for example in features], value) for key, value in fill.items()
        }

    def num_items(self, features: Features) -> int:
        """The tokens that are really predicted: nothing predicts the first of a text."""
        return sum(label != IGNORE for label in features["labels"][1:])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        from peftlab.tasks.lm_loss import loss_sum

        return loss_sum(model, _inputs(batch), batch["labels"])

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(real tokens of the batch, vocabulary) in fp32."""
        from peftlab.tasks.lm_loss import model_logits

        logits = model_logits(model, _inputs(batch))
        mask = batch.get("attention_mask")
        return logits.flatten(0, 1) if mask is None else logits[mask.bool()]

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        labels: Sequence[str] = (),
    ) -> list[Prediction]:
        """Greedy completions, whatever the model's generation settings.

        Where the reference is known a prediction also has ``label``, and ``nll``, the sum of its
        ``num_tokens`` tokens' losses; both None where it does not fit into ``max_length``.
        """
        predictions: list[Prediction] = []
        for row in rows:
            known = reference(row)
            label = {} if known is None else {"label": known}
            predictions.append({"id": row["id"], **label, "prediction": None})
        with eval_mode(model):
            if self.data.max_new_tokens:
                prompts = [prompt_ids(row, tokenizer) for row in rows]
                for number, text in enumerate(
                    self._generate(model, prompts, tokenizer, max_length, batch_size)
                ):
                    predictions[number]["prediction"] = text
            self._add_losses(model, rows, tokenizer, max_length, batch_size, predictions)
        return predictions

    def _generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
    ) -> list[str]:
        device = next(model.parameters()).device
        new_tokens = self.data.max_new_tokens
        positions = getattr(model.config, "max_position_embeddings", None) or float("inf")
        room = int(max(1, min(max_length, positions - new_tokens)))
        cut = [cut_left(prompt, room, tokenizer) for prompt in prompts]
        own_stops = model.generation_config.eos_token_id
        stops = {eos_id(tokenizer), *(own_stops if isinstance(own_stops, list) else [own_stops])}
        stops.discard(None)
        texts = [""] * len(prompts)
        for numbers in by_length([len(prompt) for prompt in cut], batch_size):
            batch = [cut[number] for number in numbers]
            ids = _pad(batch, pad_id(tokenizer), left=True).to(device)
            generated = model.generate(
                input_ids=ids,
                attention_mask=_pad([[1] * len(prompt) for prompt in batch], 0, True).to(device),
                max_new_tokens=new_tokens,
                eos_token_id=sorted(stops),
                pad_token_id=pad_id(tokenizer),
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_p=1.0,
                top_k=50,
                repetition_penalty=1.0,
            )
            for number, tokens in zip(numbers, generated[:, ids.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                texts[number] = str(text).strip()
        return texts

    def _add_losses(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        predictions: list[Prediction],
    ) -> None:
        from peftlab.tasks.lm_loss import losses_by_row

        device = next(model.parameters()).device
        numbers, features = [], []
        for number, row in enumerate(rows):
            if reference(row) is None:
                continue
            predictions[number] |= {"nll": None, "num_tokens": None}
            try:
                features += self.encode([row], tokenizer, max_length)
            except DataError:
                continue  # Too long to be scored: its nll stays None.
            numbers.append(number)
        for chosen in by_length([len(example["input_ids"]) for example in features], batch_size):
            collated = self._padded([features[index] for index in chosen], tokenizer)
            batch = {key: value.to(device) for key, value in collated.items()}
            losses = losses_by_row(model, _inputs(batch), batch["labels"])
            for index, loss in zip(chosen, losses.tolist(), strict=True):
                count = self.num_items(features[index])
                predictions[numbers[index]] |= {"nll": loss, "num_tokens": count}

    def score(
        self, rows: Sequence[Row], predictions: Sequence[Prediction]
    ) -> dict[str, float | None]:
        check_aligned(rows, predictions)
        references = [reference(row) for row in rows]
        generated = [prediction["prediction"] for prediction in predictions]
        tokens = [prediction.get("num_tokens") for prediction in predictions]
        losses = [prediction.get("nll") for prediction in predictions]
        return score_all(("exact_match",), references, generated) | score_all(
            ("target_nll",), tokens, losses
        )


def _pad(sequences: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    """(batch, longest) of int64."""
    import torch

    width = max(map(len, sequences))
    padded = []
    for sequence in sequences:
        filling = [value] * (width - len(sequence))
        padded.append(filling + sequence if left else sequence + filling)
    return torch.tensor(padded)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with."""
    return {key: value for key, value in batch.items() if key != "labels"}


TASK_KIND = CausalLM
