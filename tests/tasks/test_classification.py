import pytest
import torch
from torch.nn import functional

from peftlab.errors import DataError
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.classification import sort_labels

Kind = TASK_KINDS.get("classification")
ROWS = [{"text": f"text {n} " + "x" * n, "label": "good" if n % 3 else "bad"} for n in range(30)]


def make(write_jsonl, train=ROWS, **data):
    return Kind(Kind.Config(train=write_jsonl("train.jsonl", train), **data))


def encoded(kind, splits, tokenizer, max_length=32):
    features = kind.encode(splits.train, tokenizer, max_length)
    return features, kind.collate(features, tokenizer)


def test_reads_labels_in_order_with_their_index(write_jsonl):
    splits = make(write_jsonl).read()
    assert splits.labels == ("bad", "good")
    assert all(splits.labels[row["label_id"]] == row["label"] for row in splits.train)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [24, 3, 3]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"10", "9", "-1"}, ("-1", "9", "10")),
        ({"star10", "star2", "Star2"}, ("Star2", "star2", "star10")),
        ({"b", "a", "10"}, ("10", "a", "b")),
    ],
)
def test_label_order(labels, expected):
    assert sort_labels(labels) == expected


def test_whole_numbers_and_booleans_are_labels(write_jsonl):
    rows = [{"text": f"t{n}", "label": n % 2 == 0} for n in range(20)]
    assert make(write_jsonl, rows).read().labels == ("False", "True")
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(20)]
    assert make(write_jsonl, rows).read().labels == ("0", "1")


def test_label_absent_from_training_is_named_with_its_rows(write_jsonl):
    validation = write_jsonl("validation.jsonl", [{"text": "v", "label": "odd"}])
    test = write_jsonl("test.jsonl", [{"text": "t", "label": "good"}, {"text": "u", "label": "?"}])
    with pytest.raises(DataError) as caught:
        make(write_jsonl, validation=validation, test=test).read()
    assert [problem.where for problem in caught.value.problems] == [
        "data.validation",
        "data.test",
    ]
    text = str(caught.value)
    assert "label 'odd' does not occur in training" in text
    assert "label '?' does not occur in training (1 rows, the first with id test-1)" in text
    assert "Labels in training: bad, good." in text


def test_a_single_label_is_refused(write_jsonl):
    rows = [{"text": f"t{n}", "label": "same"} for n in range(20)]
    with pytest.raises(DataError, match="all training rows have the same label, 'same'"):
        make(write_jsonl, rows).read()


def test_fractions_are_no_labels(write_jsonl):
    rows = [{"text": f"t{n}", "label": n / 2} for n in range(20)]
    with pytest.raises(DataError, match=r"train.jsonl:1: column 'label' must be text or a whole"):
        make(write_jsonl, rows).read()


def test_model_kwargs(write_jsonl):
    kind = make(write_jsonl)
    assert kind.model_kwargs(kind.read()) == {
        "num_labels": 2,
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
        "problem_type": "single_label_classification",
    }


def test_encode_truncates_and_collate_pads_to_the_longest(write_jsonl, pair_tokenizer):
    kind = make(write_jsonl)
    splits = kind.read()
    features, batch = encoded(kind, splits, pair_tokenizer, max_length=20)
    lengths = [len(row["input_ids"]) for row in features]
    assert max(lengths) == 20
    assert batch["input_ids"].shape == (len(features), 20)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].tolist() == [row["label_id"] for row in splits.train]
    assert batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_pairs_are_told_apart_by_token_types(write_jsonl, pair_tokenizer):
    rows = [{"text": "aa", "other": f"b{n}", "label": str(n % 2)} for n in range(10, 30)]
    kind = make(write_jsonl, rows, text_pair="other")
    (first, *_) = kind.encode(kind.read().train, pair_tokenizer, 32)
    assert first["token_type_ids"] == [0] * 4 + [1] * 4


def test_loss_is_the_sum_that_transformers_takes_the_mean_of(
    write_jsonl, pair_tokenizer, tiny_bert
):
    kind = make(write_jsonl)
    features, batch = encoded(kind, kind.read(), pair_tokenizer)
    model = tiny_bert(**kind.model_kwargs(kind.read()))
    items = sum(kind.num_items(row) for row in features)
    assert items == len(features)
    loss = kind.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss / items, model(**batch).loss, rtol=1e-6, atol=1e-6)


def test_loss_is_taken_in_fp32_for_half_precision_models(write_jsonl, pair_tokenizer, tiny_bert):
    kind = make(write_jsonl)
    _, batch = encoded(kind, kind.read(), pair_tokenizer)
    model = tiny_bert(num_labels=2).to(torch.bfloat16)
    expected = functional.cross_entropy(
        kind.logits(model, batch).double(), batch["labels"], reduction="sum"
    )
    torch.testing.assert_close(kind.loss(model, batch).double(), expected, rtol=1e-6, atol=1e-6)


def test_predictions_in_batches_equal_those_one_by_one(write_jsonl, pair_tokenizer, tiny_bert):
    kind = make(write_jsonl)
    splits = kind.read()
    model = tiny_bert(num_labels=2, id2label={0: "bad", 1: "good"})
    together = kind.predict(model, splits.train, pair_tokenizer, 48, batch_size=7)
    for row, prediction in zip(splits.train, together, strict=True):
        inputs = pair_tokenizer(row["text"], return_tensors="pt")
        logits = model(**inputs).logits[0]
        assert prediction["id"] == row["id"]
        assert prediction["label"] == row["label"]
        assert prediction["prediction"] == ("bad", "good")[logits.argmax()]
        torch.testing.assert_close(torch.tensor(prediction["logits"]), logits, rtol=0, atol=1e-5)
    assert len({prediction["prediction"] for prediction in together}) == 2


def test_predict_needs_no_labels_and_leaves_each_module_in_its_mode(
    write_jsonl, pair_tokenizer, tiny_bert, tmp_path
):
    kind = make(write_jsonl)
    path = tmp_path / "new.csv"
    path.write_text("text\nhello\nworld\n")
    rows = kind.read_rows(str(path))
    model = tiny_bert(num_labels=2)
    model.classifier.train()
    before = [module.training for module in model.modules()]
    predictions = kind.predict(model, rows, pair_tokenizer, 32, 2, labels=("no", "yes"))
    assert [module.training for module in model.modules()] == before
    assert {prediction["prediction"] for prediction in predictions} <= {"no", "yes"}
    assert all("label" not in prediction for prediction in predictions)


def test_rows_that_come_again_are_not_tokenised_again(
    write_jsonl, pair_tokenizer, tiny_bert, monkeypatch
):
    kind = make(write_jsonl)
    rows = kind.read().train
    model = tiny_bert(num_labels=2)
    encoded = []
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda *args: encoded.append(len(args[0])) or encode(*args))
    first = kind.predict(model, rows, pair_tokenizer, 32, 8)
    assert kind.predict(model, [dict(row) for row in rows], pair_tokenizer, 32, 8) == first
    assert encoded == [len(rows)]
    other = [{**rows[0], "text": "another"}, *rows[1:]]
    changed = kind.predict(model, other, pair_tokenizer, 32, 8)
    assert changed[0]["logits"] != first[0]["logits"]
    assert kind.predict(model, other, pair_tokenizer, 4, 8)[1] != changed[1]
    assert encoded == [len(rows)] * 3


def test_scores_and_baseline(write_jsonl):
    test = [{"text": f"u{n}", "label": "good" if n else "bad"} for n in range(4)]
    kind = make(write_jsonl, test=write_jsonl("test.jsonl", test))
    splits = kind.read()
    predictions = [{"id": row["id"], "prediction": "good"} for row in splits.test]
    scores = kind.score(splits.test, predictions)
    assert set(scores) == set(kind.traits.metrics)
    assert scores["accuracy"] == kind.baseline(splits) == 0.75
    assert kind.baseline(splits, "macro_f1") == scores["macro_f1"] == pytest.approx(3 / 7)
    with pytest.raises(ValueError, match="not those of these rows"):
        kind.score(splits.test, predictions[::-1])
