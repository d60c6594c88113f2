"""Prompts, completions and chats as text and as tokens.

The model sees exactly the tokens in training that it sees in prediction: the prompt is tokenized by
itself, and the completion is what the tokens of the whole text add to it. Where the tokenizer would
merge across the boundary, so that the prompt's tokens do not begin the whole text's, the completion
is tokenized by itself too.
"""

from __future__ import annotations

from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from peftlab.errors import DataError, Problem
from peftlab.tasks.base import Row
from peftlab.tasks.data import Field, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is read, not learned."""


class Example(NamedTuple):
    """Token ids of a row: the prompt, its labels (earlier answers of a chat), the completion."""

    prompt: list[int]
    prompt_labels: list[int]
    completion: list[int]


def template_columns(source: str) -> tuple[str, ...]:
    """The columns of a template, or the one column that ``source`` names.

    Raises:
        ValueError: the braces are not ``{column}``.
    """
    if "{" not in source and "}" not in source:
        return (source,)
    advice = f"in {source!r}: write {{column}}, and {{{{ for a brace"
    try:
        parsed = list(Formatter().parse(source))
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from None
    columns = [name for _, name, _, _ in parsed if name is not None]
    if not columns or not all(columns) or any(spec or how for _, _, spec, how in parsed):
        raise ValueError(f"no plain column {advice}")
    return tuple(dict.fromkeys(columns))


def template_field(key: str, source: str, target: bool = False) -> Field:
    """The field that a column or a template of columns fills."""
    columns = template_columns(source)
    if columns == (source,):
        return Field(key, columns, as_text, target)

    def fill(*values: Any) -> str:
        texts = dict(zip(columns, map(as_text, values), strict=True))
        parsed = Formatter().parse(source)
        return "".join(text + (texts[name] if name else "") for text, name, _, _ in parsed)

    return Field(key, columns, fill, target)


def as_messages(value: Any, answered: bool) -> list[dict[str, Any]]:
    """A chat, checked; ``answered`` wants the assistant's message at its end.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(value, list):
        raise ValueError(f"must be a list of messages, got {type(value).__name__}")
    messages = []
    for message in value:
        named = message if isinstance(message, dict) else {}
        if not all(isinstance(named.get(key), str) for key in ("role", "content")):
            raise ValueError("must hold messages with 'role' and 'content' as text")
        messages.append({key: part for key, part in named.items() if part is not None})
    is_answered = messages[-1]["role"] == "assistant"
    if answered and not is_answered:
        raise ValueError("must end with the assistant's message, which is what is learned")
    if is_answered and len(messages) == 1:
        raise ValueError("must hold a message before the assistant's")
    return messages


def reference(row: Row) -> str | None:
    """The right answer of a row, if it has one."""
    if "messages" not in row:
        return row.get("completion")
    last = row["messages"][-1]
    return str(last["content"]) if last["role"] == "assistant" else None


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model is given, with the first token that the tokenizer puts before any text."""
    if "messages" in row:
        return _ids(_render(row, len(_context(row)), tokenizer, ask=True), tokenizer)
    start = tokenizer("")["input_ids"][:1]
    bos = [tokenizer.bos_token_id] if start == [tokenizer.bos_token_id] else []
    return bos + _ids(row["prompt"], tokenizer)


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A row with its answer as token ids, ended by the end-of-text token.

    Raises:
        DataError: no chat template or end-of-text token, or a template that cannot be used.
    """
    prompt = prompt_ids(row, tokenizer)
    eos = eos_id(tokenizer)
    labels = [IGNORE] * len(prompt)
    if "messages" not in row:
        text = row["prompt"]
        begin = _ids(text, tokenizer)
        completion = _added(text, begin, text + row["completion"], tokenizer)
    else:
        context = _context(row)
        asked = _render(row, len(context), tokenizer, ask=True)
        full = _render(row, len(context) + 1, tokenizer, ask=False)
        if not full.startswith(asked):
            wrong = "the chat template writes the last answer elsewhere than it asks for it."
            raise DataError(Problem(f"row {row['id']}", wrong, "Use prompt and completion."))
        completion = _added(asked, prompt, full, tokenizer)
        for turn, message in enumerate(context):
            if message["role"] == "assistant" and turn > 0:
                before = _ids(_render(row, turn, tokenizer, ask=True), tokenizer)
                after = _ids(_render(row, turn + 1, tokenizer, ask=False), tokenizer)
                # A template may write earlier answers otherwise; those are read, not learned.
                if prompt[: len(before)] == before and prompt[: len(after)] == after:
                    labels[len(before) : len(after)] = prompt[len(before) : len(after)]
    # Generation stops at the end-of-text token, so that nothing after it can be learned.
    end = completion.index(eos) if eos in completion else len(completion)
    return Example(prompt, labels, completion[:end] + [eos])


def _added(
    begin: str, begin_ids: list[int], full: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens that the rest of ``full`` adds to the tokens of its beginning."""
    full_ids = _ids(full, tokenizer)
    if full_ids[: len(begin_ids)] == begin_ids:
        return full_ids[len(begin_ids) :]
    return _ids(full[len(begin) :], tokenizer)


def _context(row: Row) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _render(row: Row, count: int, tokenizer: PreTrainedTokenizerBase, ask: bool) -> str:
    """The first ``count`` messages of a chat as text; ``ask`` adds the header of an answer."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        hint = "Use prompt and completion, or an instruction-tuned model."
        raise DataError(Problem("data.messages", "the tokenizer has no chat template.", hint))
    try:
        text = tokenizer.apply_chat_template(
            row["messages"][:count], tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        message = f"the chat template refuses it: {error}."
        raise DataError(Problem(f"row {row['id']}", message)) from None
    return str(text)


def cut_left(ids: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last ``room`` ids; a first token that begins every text stays first."""
    if len(ids) <= room:
        return ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return first + ids[len(ids) - room + len(first) :]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        message = "the tokenizer has no end-of-text token, so a completion could not end."
        raise DataError(Problem("model", message, "Set eos_token in its configuration."))
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with."""
    # Padding is masked and never learned: any id does where there is none for it.
    return int(eos_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
