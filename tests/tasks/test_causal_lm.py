import pytest
import torch
from pydantic import ValidationError

from peftlab.errors import DataError
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.prompts import template_columns

Kind = TASK_KINDS.get("causal-lm")
ROWS = [
    {"id": f"r{n}", "prompt": f"ask {n} " + "x" * n, "completion": " yes" if n % 2 else " no"}
    for n in range(9)
]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "bye"},
]


def plain(**data):
    data = {"train": "-", "prompt": "prompt", "completion": "completion", **data}
    return Kind(Kind.Config(**data))


def chat(**data):
    return Kind(Kind.Config(train="-", messages="messages", **data))


def one(kind, row, tokenizer, max_length=128):
    (features,) = kind.encode([row], tokenizer, max_length)
    return features


def learned(features, tokenizer):
    """The text that is learned, and the text that is only read."""
    pairs = list(zip(features["input_ids"], features["labels"], strict=True))
    assert all(label in (token, -100) for token, label in pairs)
    target = [token for token, label in pairs if label != -100]
    rest = [token for token, label in pairs if label == -100]
    return tokenizer.decode(target), tokenizer.decode(rest)


def test_reads_templates_and_columns(write_jsonl):
    path = write_jsonl("train.jsonl", [{"q": f"q{n}", "a": n, "b": "{x}"} for n in range(30)])
    data = {"train": path, "prompt": "{{Q}} {q} {b}\nA:", "completion": "a"}
    splits = Kind(Kind.Config(**data)).read()
    rows = [*splits.train, *splits.validation, *splits.test]
    row = next(row for row in rows if row["id"] == "train-0")
    assert row == {"id": "train-0", "prompt": "{Q} q0 {x}\nA:", "completion": "0"}
    assert (len(splits.train), len(splits.test)) == (24, 3)


def test_a_column_of_a_template_that_is_missing_is_named(write_jsonl):
    path = write_jsonl("train.jsonl", [{"text": "t", "label": "l"}] * 30)
    data = {"train": path, "prompt": "{texts}:", "completion": "{lable}"}
    with pytest.raises(DataError) as caught:
        Kind(Kind.Config(**data)).read()
    first, second = map(str, caught.value.problems)
    assert "has no column 'texts' (data.prompt). Did you mean 'text'?" in first
    assert "has no column 'lable' (data.completion). Did you mean 'label'?" in second


@pytest.mark.parametrize("source", ["{", "{}", "{a!r}", "{a:>5}", "{{a}}", "a}"])
def test_templates_that_are_none(source):
    with pytest.raises(ValueError, match=r"write \{column\}, and \{\{ for a brace"):
        template_columns(source)
    with pytest.raises(ValidationError, match="for a brace"):
        plain(prompt=source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needs 'prompt' and 'completion', or 'messages'"),
        ({"prompt": "p"}, "needs 'prompt' and 'completion', or 'messages'"),
        ({"prompt": "p", "messages": "m"}, "'messages' excludes"),
    ],
)
def test_one_form_of_data(data, message):
    with pytest.raises(ValidationError, match=message):
        Kind.Config(train="-", **data)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of messages, got str"),
        ([], "is empty"),
        ([{"role": "user"}], "must hold messages with 'role' and 'content' as text"),
        (["hello"], "must hold messages with 'role' and 'content' as text"),
        (CHAT[:1], "must end with the assistant's message"),
        (CHAT[1:2], "must hold a message before the assistant's"),
    ],
)
def test_chats_that_are_none(write_jsonl, messages, message):
    path = write_jsonl("train.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=f"train.jsonl:1: column 'messages' {message}"):
        Kind(Kind.Config(train=path, messages="messages")).read()


def test_chats_to_answer_may_end_with_the_user(write_jsonl):
    path = write_jsonl("new.jsonl", [{"messages": CHAT[:1]}, {"messages": CHAT[:2]}])
    assert [row["messages"] for row in chat().read_rows(path)] == [CHAT[:1], CHAT[:2]]


def test_only_the_completion_and_the_end_are_learned(lm_tokenizer):
    features = one(plain(), ROWS[1], lm_tokenizer)
    assert learned(features, lm_tokenizer) == (" yes</s>", "ask 1 x")
    assert plain().num_items(features) == 5


def test_a_tokenizer_that_begins_texts_with_a_token_keeps_it(bos_tokenizer):
    features = one(plain(), ROWS[1], bos_tokenizer)
    assert learned(features, bos_tokenizer) == (" yes</s>", "<s>ask 1 x")


def test_a_merge_across_the_boundary_leaves_the_prompt_as_prediction_sees_it(lm_tokenizer):
    row = {"id": "0", "prompt": "is it o", "completion": "k?"}
    assert lm_tokenizer.tokenize("is it ok?")[-2:] == ["ok", "?"]
    features = one(plain(), row, lm_tokenizer)
    assert learned(features, lm_tokenizer) == ("k?</s>", "is it o")
    row = {"id": "0", "prompt": "is it ", "completion": "ok?"}
    features = one(plain(), row, lm_tokenizer)
    assert features["input_ids"][:-1] == lm_tokenizer("is it ok?")["input_ids"]


def test_prompts_are_cut_on_the_left_and_completions_kept(lm_tokenizer, bos_tokenizer):
    row = {"id": "0", "prompt": "0123456789", "completion": "abc"}
    features = one(plain(), row, lm_tokenizer, max_length=8)
    assert learned(features, lm_tokenizer) == ("abc</s>", "6789")
    features = one(plain(), row, bos_tokenizer, max_length=8)
    assert learned(features, bos_tokenizer) == ("abc</s>", "<s>789")
    features = one(plain(), row, bos_tokenizer, max_length=5)
    assert learned(features, bos_tokenizer) == ("abc</s>", "<s>")


def test_every_completion_too_long_is_named(lm_tokenizer):
    rows = [{"id": str(n), "prompt": "p", "completion": "c" * n} for n in (3, 4, 5)]
    with pytest.raises(DataError) as caught:
        plain().encode(rows, lm_tokenizer, 5)
    assert [str(problem) for problem in caught.value.problems] == [
        "row 4: the completion has 5 tokens of 5. Raise train.max_length.",
        "row 5: the completion has 6 tokens of 5. Raise train.max_length.",
    ]


def test_a_tokenizer_without_an_end_is_refused(lm_tokenizer):
    lm_tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no end-of-text token"):
        one(plain(), ROWS[0], lm_tokenizer)


def test_every_answer_of_a_chat_is_learned(lm_tokenizer):
    features = one(chat(), {"id": "0", "messages": CHAT}, lm_tokenizer)
    text = lm_tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert lm_tokenizer.decode(features["input_ids"]) == text.removesuffix("\n")
    assert learned(features, lm_tokenizer) == (
        "hello</s>\nbye</s>",
        "<s>user\nhi</s>\n<s>assistant\n<s>user\nmore</s>\n<s>assistant\n",
    )


def test_earlier_answers_that_the_template_writes_otherwise_are_only_read(lm_tokenizer):
    lm_tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n"
        "{{ m['content'] if m['role'] == 'user' or loop.last else '...' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    features = one(chat(), {"id": "0", "messages": CHAT}, lm_tokenizer)
    assert learned(features, lm_tokenizer)[0] == "bye</s>"


def test_templates_that_cannot_be_used(lm_tokenizer):
    row = {"id": "7", "messages": CHAT}
    lm_tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(DataError, match="row 7: the chat template writes the last"):
        one(chat(), row, lm_tokenizer)
    lm_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 7: .* refuses it: roles must alternate"):
        one(chat(), row, lm_tokenizer)
    lm_tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        one(chat(), row, lm_tokenizer)


def test_collate_pads_on_the_right(lm_tokenizer):
    kind = plain()
    features = kind.encode(ROWS, lm_tokenizer, 128)
    batch = kind.collate(features, lm_tokenizer)
    lengths = [len(row["input_ids"]) for row in features]
    assert all(tensor.shape == (len(ROWS), max(lengths)) for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("kind", [plain(), chat()], ids=["plain", "chat"])
def test_loss_is_the_sum_that_transformers_takes_the_mean_of(kind, lm_tokenizer, tiny_llama):
    rows = ROWS
    if kind.data.messages:
        rows = [{"id": "0", "messages": CHAT}, {"id": "1", "messages": CHAT[:2]}]
    features = kind.encode(rows, lm_tokenizer, 128)
    batch = kind.collate(features, lm_tokenizer)
    items = sum(kind.num_items(row) for row in features)
    loss = kind.loss(tiny_llama, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss / items, tiny_llama(**batch).loss, rtol=1e-6, atol=1e-6)


def test_a_text_that_is_learned_from_its_first_token_counts_what_is_predicted(
    lm_tokenizer, tiny_llama
):
    kind = plain()
    features = {"input_ids": [5, 6, 2], "attention_mask": [1, 1, 1], "labels": [5, 6, 2]}
    batch = kind.collate([features], lm_tokenizer)
    assert kind.num_items(features) == 2
    expected = tiny_llama(**batch).loss
    torch.testing.assert_close(kind.loss(tiny_llama, batch) / 2, expected, rtol=1e-6, atol=1e-6)


def test_only_positions_before_a_target_go_through_the_head(lm_tokenizer, tiny_llama):
    kind = plain()
    batch = kind.collate(kind.encode(ROWS, lm_tokenizer, 128), lm_tokenizer)
    kept = {}

    def keep(module, args):
        if torch.is_grad_enabled():
            kept["hidden"] = args[0]
            args[0].retain_grad()

    handle = tiny_llama.lm_head.register_forward_pre_hook(keep)
    kind.loss(tiny_llama, batch).backward()
    handle.remove()
    learning = kept["hidden"].grad.abs().sum(-1) > 0
    predicts_target = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(learning, predicts_target)


def test_logits_are_those_of_real_tokens(lm_tokenizer, tiny_llama):
    kind = plain()
    features = kind.encode(ROWS[:3], lm_tokenizer, 128)
    logits = kind.logits(tiny_llama, kind.collate(features, lm_tokenizer))
    alone = [tiny_llama(torch.tensor([row["input_ids"]])).logits[0] for row in features]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


def greedy_ids(model, tokenizer, prompt, count):
    """Greedy search by hand, one prompt, no cache and no padding."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


def generate_alone(model, tokenizer, prompt, count):
    ids = greedy_ids(model, tokenizer, prompt, count)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_padded_batches_generate_what_each_prompt_alone_does(lm_tokenizer, tiny_llama):
    kind = plain(max_new_tokens=6)
    tiny_llama.generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=5.0)
    predictions = kind.predict(tiny_llama, ROWS, lm_tokenizer, 128, batch_size=4)
    alone = [generate_alone(tiny_llama, lm_tokenizer, row["prompt"], 6) for row in ROWS]
    assert [prediction["prediction"] for prediction in predictions] == alone
    assert [prediction["id"] for prediction in predictions] == [row["id"] for row in ROWS]
    assert len(set(alone)) > 1


@pytest.mark.parametrize("own", ["tokenizer", "model"])
def test_generation_stops_at_the_end_token_of_tokenizer_and_model(lm_tokenizer, tiny_llama, own):
    kind = plain(max_new_tokens=6)
    ids = greedy_ids(tiny_llama, lm_tokenizer, ROWS[0]["prompt"], 6)
    stop = next(token for token in ids if token != ids[0])
    if own == "tokenizer":
        lm_tokenizer.eos_token_id = stop
    else:
        tiny_llama.generation_config.eos_token_id = [2, stop]
    # The longest prompt of the batch goes on, so that this one is padded after its end.
    predictions = kind.predict(tiny_llama, ROWS[:2], lm_tokenizer, 128, 2)
    expected = lm_tokenizer.decode(ids[: ids.index(stop)], skip_special_tokens=True).strip()
    assert predictions[0]["prediction"] == expected


def test_losses_of_the_references_make_target_nll(lm_tokenizer, tiny_llama):
    kind = plain(max_new_tokens=0)
    predictions = kind.predict(tiny_llama, ROWS, lm_tokenizer, 128, batch_size=4)
    features = kind.encode(ROWS, lm_tokenizer, 128)
    loss = kind.loss(tiny_llama, kind.collate(features, lm_tokenizer)).item()
    items = sum(kind.num_items(row) for row in features)
    scores = kind.score(ROWS, predictions)
    assert scores["exact_match"] is None
    assert scores["target_nll"] == pytest.approx(loss / items, rel=1e-5)
    assert predictions[1]["num_tokens"] == kind.num_items(features[1])


def test_a_reference_too_long_to_score_leaves_no_target_nll(lm_tokenizer, tiny_llama):
    kind = plain(max_new_tokens=1)
    rows = [*ROWS, {"id": "long", "prompt": "p", "completion": "c" * 20}]
    predictions = kind.predict(tiny_llama, rows, lm_tokenizer, 20, batch_size=4)
    assert predictions[-1]["nll"] is None
    scores = kind.score(rows, predictions)
    assert scores["target_nll"] is None
    assert scores["exact_match"] is not None


def test_rows_without_reference_are_predicted(lm_tokenizer, tiny_llama):
    rows = [{"id": "0", "prompt": "p"}]
    (prediction,) = plain(max_new_tokens=2).predict(tiny_llama, rows, lm_tokenizer, 128, 1)
    assert set(prediction) == {"id", "prediction"}


def test_chats_are_answered_after_the_templates_header(lm_tokenizer, tiny_llama):
    kind = chat(max_new_tokens=4)
    rows = [{"id": "0", "messages": CHAT}, {"id": "1", "messages": CHAT[:1]}]
    predictions = kind.predict(tiny_llama, rows, lm_tokenizer, 128, 2)
    asked = [
        lm_tokenizer.apply_chat_template(context, tokenize=False, add_generation_prompt=True)
        for context in (CHAT[:3], CHAT[:1])
    ]
    alone = [generate_alone(tiny_llama, lm_tokenizer, text, 4) for text in asked]
    assert [prediction["prediction"] for prediction in predictions] == alone
    assert predictions[0]["label"] == "bye"
    assert "label" not in predictions[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_peft_models_learn_and_generate(name, lm_tokenizer, tiny_llama):
    import peft

    config = {
        "lora": peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
        ),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[name]
    base = plain(max_new_tokens=5).predict(tiny_llama, ROWS, lm_tokenizer, 128, 9)
    model = peft.get_peft_model(tiny_llama, config)
    kind = plain(max_new_tokens=5)
    batch = kind.collate(kind.encode(ROWS, lm_tokenizer, 128), lm_tokenizer)
    kind.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    together = kind.predict(model, ROWS, lm_tokenizer, 128, batch_size=9)
    with torch.no_grad():
        by_hand = [generate_alone(model, lm_tokenizer, row["prompt"], 5) for row in ROWS]
    assert [row["prediction"] for row in together] == by_hand
    assert [row["prediction"] for row in together] != [row["prediction"] for row in base]
    alone = kind.predict(model, ROWS, lm_tokenizer, 128, batch_size=1)
    for first, second in zip(together, alone, strict=True):
        assert first["nll"] == pytest.approx(second["nll"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
def test_virtual_tokens_before_the_input_are_no_part_of_the_loss(lm_tokenizer, tiny_llama):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_llama, config)
    kind = plain()
    features = kind.encode(ROWS, lm_tokenizer, 128)
    batch = kind.collate(features, lm_tokenizer)
    items = sum(kind.num_items(row) for row in features)
    loss = kind.loss(model, batch)
    torch.testing.assert_close(loss / items, model(**batch).loss, rtol=1e-6, atol=1e-6)


def test_scores_and_baseline(write_jsonl):
    rows = [{"p": f"p{n}", "c": "yes" if n % 3 else " no"} for n in range(9)]
    test = [{"p": f"t{n}", "c": "yes" if n else "no"} for n in range(4)]
    kind = Kind(
        Kind.Config(
            train=write_jsonl("train.jsonl", rows),
            test=write_jsonl("test.jsonl", test),
            prompt="p",
            completion="c",
        )
    )
    splits = kind.read()
    assert kind.baseline(splits) == 0.75
    assert kind.baseline(splits, "target_nll") is None
    answers = [{"id": row["id"], "prediction": "no"} for row in splits.test]
    assert kind.score(splits.test, answers) == {"exact_match": 0.25, "target_nll": None}
