import pytest
import torch

from peftlab.errors import DataError
from peftlab.tasks import TASK_KINDS

Kind = TASK_KINDS.get("regression")
ROWS = [{"text": f"text {n} " + "x" * n, "rating": n / 4 - 2} for n in range(30)]


def make(write_jsonl, train=ROWS, **data):
    return Kind(Kind.Config(train=write_jsonl("train.jsonl", train), label="rating", **data))


def test_reads_numbers_from_text_too(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,rating\n" + "".join(f"t{n},{n / 2}\n" for n in range(20)))
    splits = Kind(Kind.Config(train=str(path), label="rating")).read()
    assert {row["label"] for row in splits.train} <= {n / 2 for n in range(20)}
    assert splits.labels == ()


def test_every_rating_that_is_no_number_is_named_with_its_line(write_jsonl):
    rows = [*ROWS, {"text": "a", "rating": "high"}, {"text": "b", "rating": True}]
    rows += [{"text": "c", "rating": float("inf")}, {"text": "d", "rating": float("nan")}]
    with pytest.raises(DataError) as caught:
        make(write_jsonl, rows).read()
    lines = [str(problem).split("train.jsonl:")[1] for problem in caught.value.problems]
    assert lines == [
        "31: column 'rating' must be a number, got 'high'.",
        "32: column 'rating' must be a number, got True.",
        "33: column 'rating' must be a finite number, got inf.",
        "34: column 'rating' is empty.",
    ]


def test_loss_is_the_sum_that_transformers_takes_the_mean_of(
    write_jsonl, pair_tokenizer, tiny_bert
):
    kind = make(write_jsonl)
    splits = kind.read()
    features = kind.encode(splits.train, pair_tokenizer, 32)
    batch = kind.collate(features, pair_tokenizer)
    assert batch["labels"].dtype == torch.float32
    model = tiny_bert(**kind.model_kwargs(splits))
    items = sum(kind.num_items(row) for row in features)
    loss = kind.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss / items, model(**batch).loss, rtol=1e-6, atol=1e-6)


def test_predicts_numbers_in_the_rows_order(write_jsonl, pair_tokenizer, tiny_bert):
    kind = make(write_jsonl)
    splits = kind.read()
    model = tiny_bert(**kind.model_kwargs(splits))
    together = kind.predict(model, splits.train, pair_tokenizer, 48, batch_size=7)
    for row, prediction in zip(splits.train, together, strict=True):
        logits = model(**pair_tokenizer(row["text"], return_tensors="pt")).logits
        assert (prediction["id"], prediction["label"]) == (row["id"], row["label"])
        assert prediction["prediction"] == pytest.approx(logits.item(), abs=1e-5)
    scores = kind.score(splits.train, together)
    assert set(scores) == {"pearson", "spearman", "mse", "mae"}
    assert None not in scores.values()


def test_baseline_predicts_the_training_mean(write_jsonl):
    train = [{"text": f"a{n}", "rating": n % 3} for n in range(6)]
    test = write_jsonl("test.jsonl", [{"text": f"t{n}", "rating": n} for n in range(4)])
    kind = make(write_jsonl, train, validation=test, test=test)
    splits = kind.read()
    assert kind.baseline(splits) is None
    assert kind.baseline(splits, "mse") == pytest.approx((1 + 0 + 1 + 4) / 4)
    assert kind.baseline(splits, "mae") == pytest.approx(1.0)
