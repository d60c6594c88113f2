"""A replayed trunk changes nothing: not a bit of a gradient, nor what is no plain forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftlab.config import load_yaml
from peftlab.experiment.library import names
from peftlab.trunk.boundary import Boundary, NoBoundary
from peftlab.trunk.cache import FILL_TOKENS, TrunkCache, fill_batches
from peftlab.trunk.store import find
from tests.trunk.conftest import LENGTHS, Case, make

HEAD = {"kind": "freeze", "top": 0}
TOP = {"kind": "freeze", "top": 1}
LORA = {"kind": "lora", "r": 4, "lora_dropout": 0.1, "layers_to_transform": [2]}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
CASES = [
    ("bert", HEAD, "classification", {}),
    ("bert", {**HEAD, "after_blocks": True}, "classification", {}),
    ("bert", TOP, "classification", DROPOUT),
    ("bert", LORA, "classification", DROPOUT),
    ("bert", {"kind": "freeze", "top": 2}, "regression", {"num_labels": 1}),
    ("roberta", TOP, "classification", {}),
    ("distilbert", HEAD, "classification", {}),
    ("distilbert", TOP, "classification", {"attention_dropout": 0.2}),
    ("gpt2", HEAD, "classification", {}),
    ("gpt2", TOP, "causal_lm", {"embd_pdrop": 0.2, "resid_pdrop": 0.2}),
    ("llama", HEAD, "classification", {}),
    ("llama", {**HEAD, "head": True}, "causal_lm", {}),
    ("llama", TOP, "causal_lm", {}),
    ("llama", LORA, "causal_lm", {}),
    ("qwen2", LORA, "classification", {}),
]
SHIPPED = list(names("methods"))


def of_batch(case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs alone."""
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize(("architecture", "method", "kind", "values"), CASES)
def test_losses_and_gradients_to_the_bit(
    architecture: str, method: dict[str, Any], kind: str, values: dict[str, Any]
) -> None:
    case = make(architecture, method, kind, **values)
    batches = [case.batch(seed) for seed in range(3)]
    plain = [case.gradients(batch) for batch in batches]
    cache = case.cache()
    with case.opened(cache):
        assert cache.note == ""
        known = cache.computed_rows
        for computed in (12, 12):
            for batch, (loss, gradients) in zip(batches, plain, strict=True):
                again, found = case.gradients(batch)
                assert torch.equal(again, loss)
                assert found.keys() == gradients.keys()
                for name, gradient in gradients.items():
                    assert torch.equal(found[name], gradient), name
            assert cache.computed_rows - known == computed
    for module in case.model.modules():
        assert "forward" not in vars(module)


def test_rows_are_known_in_whatever_batch_they_come() -> None:
    case = make("bert", TOP)
    batch = case.batch()
    cache = case.cache()
    with case.opened(cache), torch.no_grad():
        case.loss(batch)
        known = cache.computed_rows
        part = {key: value[[2, 0]] for key, value in batch.items()}
        loss = case.loss(part)
        assert cache.computed_rows == known
    torch.testing.assert_close(case.loss(part).detach(), loss)


def test_the_batch_that_was_learned_from_is_let_go() -> None:
    case = make("bert", TOP)
    cache = case.cache()
    batches = [case.batch()]
    learned = weakref.ref(batches[0]["input_ids"])
    with cache.opened(lambda: case.loss(batches[0]), LENGTHS, 0):
        assert cache.on
        batches.clear()
        assert learned() is None


def test_a_run_finds_what_another_kept() -> None:
    for computed in (2 + len(LENGTHS), 0):
        case = make("llama", TOP, "causal_lm")
        cache = case.cache()
        with case.opened(cache):
            cache.fill([case.batch()])
        assert cache.computed_rows == computed
        assert cache.usage()["rows"] == 2 + len(LENGTHS)
    assert len(find()) == 1


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("bert", "classification"), ("gpt2", "classification"), ("llama", "causal_lm")],
)
@pytest.mark.parametrize("above", [HEAD, TOP])
def test_a_trunk_is_computed_from_what_is_kept_below(
    architecture: str,
    kind: str,
    above: dict[str, Any],
    trunk_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "causal_lm" and above is HEAD:
        above = {**HEAD, "head": True}
    batch = make(architecture, TOP, kind).batch()

    def filled(method: dict[str, Any], folder: Path) -> tuple[TrunkCache, int, list[Tensor]]:
        """The cache, the blocks that ran while it was filled, loss and gradients of a replay."""
        monkeypatch.setenv("PEFTLAB_TRUNK_CACHE", str(folder))
        case, ran = make(architecture, method, kind), 0
        cache = case.cache()

        def count(*_: object) -> None:
            nonlocal ran
            ran += 1

        with case.opened(cache):
            for block in case.prepared.boundary.blocks:  # type: ignore[union-attr]
                # A stand-in for a block's forward may hand through; its parts are not called then.
                next(block.children()).register_forward_hook(count)
            cache.fill([batch])
            computed = ran
            loss, gradients = case.gradients(batch)
        return cache, computed, [loss, *gradients.values()]

    lower, _, _ = filled({"kind": "freeze", "top": 2}, trunk_folder)
    chained, few, found = filled(above, trunk_folder)
    alone, all_, expected = filled(above, trunk_folder / "alone")
    assert (lower.usage()["filled_from"], alone.usage()["filled_from"]) == ("", "")
    assert chained.usage()["filled_from"] == lower.usage()["boundary"] == "block 1 of 3"
    assert (few, all_) == (1, 2) if above is TOP else (2, 3)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    again, none, _ = filled(above, trunk_folder)
    assert (again.usage()["filled_from"], none) == ("", 0)


@pytest.mark.parametrize(
    ("known", "starts"), [(len(LENGTHS), "block 2 of 3"), (1, "block 2 of 3, block 1 of 3")]
)
def test_the_highest_start_that_knows_all_rows(known: int, starts: str) -> None:
    for top, rows in ((2, len(LENGTHS)), (1, known)):
        case = make("bert", {"kind": "freeze", "top": top})
        cache = case.cache()
        with case.opened(cache):
            cache.fill([{name: tensor[:rows] for name, tensor in case.batch().items()}])
    case = make("bert", HEAD)
    cache = case.cache()
    with case.opened(cache):
        cache.fill([case.batch()])
        loss, _ = case.gradients(case.batch())
    plain = make("bert", HEAD)
    assert torch.equal(loss, plain.gradients(plain.batch())[0])
    # The rows that a trunk is verified with are the same for all of them.
    assert cache.usage()["filled_from"] == starts


def test_what_was_rounded_is_no_start_for_others() -> None:
    lower, upper = make("bert", {"kind": "freeze", "top": 2}), make("bert", TOP)
    for case in (lower, upper):
        cache = case.cache(half=True)
        with case.opened(cache):
            cache.fill([case.batch()])
        assert cache.usage()["filled_from"] == ""


@pytest.mark.parametrize("method", [HEAD, TOP])
def test_one_changed_weight_below_makes_a_miss(method: dict[str, Any]) -> None:
    def key(change: Callable[[Any], None]) -> str:
        case = make("bert", method)
        with torch.no_grad():
            change(case.prepared.model)
        cache = case.cache()
        with case.opened(cache):
            return cache.key

    def nudge(tensor: Tensor) -> None:
        tensor.view(-1)[0] += 1e-6

    same = key(lambda model: None)
    assert key(lambda model: nudge(model.bert.encoder.layer[0].output.dense.bias)) != same
    assert key(lambda model: nudge(model.bert.embeddings.LayerNorm.weight)) != same
    assert key(lambda model: nudge(model.classifier.weight)) == same
    assert (key(lambda model: nudge(model.bert.pooler.dense.bias)) == same) == (method is TOP)


def test_half_precision_is_half_as_large_and_nearly_the_same() -> None:
    sizes = []
    for half in (False, True):
        case = make("bert", TOP)
        plain, gradients = case.gradients(case.batch())
        cache = case.cache(half=half)
        with case.opened(cache):
            case.gradients(case.batch())
            loss, found = case.gradients(case.batch())
        torch.testing.assert_close(loss, plain, rtol=1e-3 if half else 0, atol=0)
        exact, rounded = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients, found))
        error = float((rounded - exact).norm() / exact.norm())
        assert 0 < error < 1e-3 if half else error == 0
        (entry,) = [e for e in find() if e.key == cache.key]
        sizes.append(entry.stored_bytes)
    assert sizes[1] < 0.7 * sizes[0]


def left_padded(case: Case) -> dict[str, Any]:
    inputs = of_batch(case, case.batch())
    return {key: value.flip(1) for key, value in inputs.items()}


def with_positions(case: Case) -> dict[str, Any]:
    inputs = of_batch(case, case.batch())
    return {**inputs, "position_ids": torch.arange(9)[None].expand(4, -1) + 1}


def with_a_hole(case: Case) -> dict[str, Any]:
    inputs = of_batch(case, case.batch())
    inputs["attention_mask"][0, 2] = 0
    return inputs


def with_hidden_states(case: Case) -> dict[str, Any]:
    return {**of_batch(case, case.batch()), "output_hidden_states": True}


def as_embeddings(case: Case) -> dict[str, Any]:
    inputs = of_batch(case, case.batch())
    inputs["inputs_embeds"] = case.model.get_input_embeddings()(inputs.pop("input_ids"))
    return inputs


def with_a_cache(case: Case) -> dict[str, Any]:
    return {**of_batch(case, case.batch()), "use_cache": True}


@pytest.mark.parametrize(
    "make_inputs",
    [left_padded, with_positions, with_a_hole, with_hidden_states, as_embeddings, with_a_cache],
)
def test_what_is_not_plain_is_computed(make_inputs: Callable[[Case], dict[str, Any]]) -> None:
    case = make("llama", TOP, "causal_lm")
    inputs = make_inputs(case)
    case.model.eval()
    with torch.no_grad():
        plain = case.model(**inputs)
        cache = case.cache()
        with case.opened(cache):
            before = cache.usage()
            found = case.model(**inputs)
            after = cache.usage()
    assert torch.equal(found.logits, plain.logits)
    assert (after["replayed_rows"], after["computed_rows"]) == (
        before["replayed_rows"],
        before["computed_rows"],
    )
    assert (plain.hidden_states is None) == (found.hidden_states is None)
    assert (plain.past_key_values is None) == (found.past_key_values is None)


def test_generation_is_left_alone() -> None:
    case = make("llama", TOP, "causal_lm")
    case.model.eval()
    inputs = left_padded(case)
    plain = case.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with case.opened(case.cache()):
        assert torch.equal(case.model.generate(**inputs, max_new_tokens=5, do_sample=False), plain)


def test_a_trunk_that_drops_out_or_trains_is_computed() -> None:
    case = make("bert", TOP, **DROPOUT)
    batch, cache = case.batch(), case.cache()
    with case.opened(cache):
        case.gradients(batch)
        replayed = cache.replayed_rows
        case.model.train()
        first, second = case.loss(batch), case.loss(batch)
        assert not torch.equal(first, second)
        case.model.eval()
        weight = case.model.bert.encoder.layer[0].output.dense.weight.requires_grad_()
        case.loss(batch).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
        assert cache.replayed_rows == replayed


@pytest.mark.parametrize(
    ("architecture", "method", "values", "reason"),
    [
        ("bert", {"kind": "full"}, {}, "no block is frozen"),
        ("bert", {"kind": "lora", "r": 4}, {}, "no block is frozen"),
        ("bert", {"kind": "ptuning_v2", "num_virtual_tokens": 2}, {}, "no block is frozen"),
        ("bert", {"kind": "freeze", "freeze_embeddings": True}, {}, "no block is frozen"),
        ("t5", {"kind": "freeze", "top": 1}, {}, "has no single stack"),
    ],
)
def test_where_there_is_no_boundary(
    architecture: str, method: dict[str, Any], values: dict[str, Any], reason: str
) -> None:
    case = make(architecture, method, **values)
    assert isinstance(case.prepared.boundary, NoBoundary)
    cache = case.cache()
    if architecture != "t5":  # It wants other tokens.
        with case.opened(cache):
            case.gradients(case.batch())
    assert reason in cache.note
    assert not find()


def test_a_trained_copy_of_the_embeddings_is_noticed() -> None:
    method = {**LORA, "modules_to_save": ["embed_tokens"]}
    case = make("llama", method, "causal_lm")
    assert isinstance(case.prepared.boundary, Boundary)
    cache = case.cache()
    with case.opened(cache):
        _, gradients = case.gradients(case.batch())
    assert "what trains feeds the frozen blocks" in cache.note
    assert any("embed_tokens" in name for name in gradients)


def test_switched_off() -> None:
    case = make("bert", TOP)
    cache = case.cache("off")
    with case.opened(cache):
        case.gradients(case.batch())
    assert cache.note == "switched off"
    assert not find()


def test_a_budget_too_small() -> None:
    case = make("bert", TOP)
    plain = case.gradients(case.batch())[0]
    cache = case.cache("1KiB")
    with case.opened(cache):
        assert torch.equal(case.gradients(case.batch())[0], plain)
    assert "train.trunk_cache=1KiB allows 1 KiB" in cache.note
    assert not find()


def test_a_budget_that_fills_up() -> None:
    case = make("bert", TOP)
    cache = case.cache("5000b")
    with case.opened(cache):
        for seed in range(4):
            plain = case.gradients(case.batch(seed))[0]
            assert torch.isfinite(plain)
    assert "as much as is allowed" in cache.note
    assert 0 < cache.usage()["rows"] < 4 * len(LENGTHS)


@pytest.mark.parametrize("when", ["mkdir", "fsync"])
def test_a_cache_that_cannot_be_written(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    case = make("bert", TOP)
    plain = case.gradients(case.batch())[0]
    monkeypatch.setattr(*((Path, "mkdir") if when == "mkdir" else ("os.fsync",)), refuse)
    cache = case.cache()
    with case.opened(cache):
        cache.fill([case.batch()])
        assert torch.equal(case.gradients(case.batch())[0], plain)
    assert "Read-only file system" in cache.note


def test_a_damaged_file_is_computed_again(trunk_folder: Path) -> None:
    def run() -> TrunkCache:
        case = make("bert", TOP)
        cache = case.cache()
        with case.opened(cache):
            cache.fill([case.batch()])
        return cache

    run()
    (path,) = trunk_folder.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    cache = run()
    assert cache.computed_rows == 2 + len(LENGTHS)
    assert "is computed again" in cache.usage()["note"]
    assert run().computed_rows == 0


def test_fill_batches_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILL_TOKENS, "cpu", 40)
    lengths = dict(enumerate([3, 50, 7, 7, 20, 20, 1]))
    batches = [batch for part in (0, 1) for batch in fill_batches(lengths, "cpu", part, 2)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 40


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_recipe_predicts_the_same(recipe: str, trunk_folder: Path) -> None:
    """Whether it leaves a trunk or not."""
    method = load_yaml(Path(names("methods")[recipe])).data["method"]
    small = {"r": 4} if method["kind"] == "lora" else {}
    if method.get("top", 0) > 2:
        small = {"top": 2}
    case = make("bert", {**method, **small})
    batch = case.batch()
    case.model.eval()
    with torch.no_grad():
        plain = case.kind.logits(case.model, batch)
        cache = case.cache()
        with case.opened(cache):
            for _ in range(2):
                found = case.kind.logits(case.model, batch)
                torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    assert cache.on == isinstance(case.prepared.boundary, Boundary)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_embeddings_do_not_run_for_what_is_known(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(architecture, TOP)
    batch = case.batch()
    calls: list[int] = []
    lookup = torch.nn.functional.embedding

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return lookup(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)
    with case.opened(case.cache()):
        case.gradients(batch)
        assert calls
        calls.clear()
        case.gradients(batch)
        assert not calls


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_embeddings_run_where_a_block_above_reads_them_too(share: float) -> None:
    """Also where it does so with a weight that is zero when training starts."""
    case = make("bert", TOP)
    read: list[Tensor] = []
    weight = torch.nn.Parameter(torch.tensor(share))
    case.model.bert.encoder.layer[-1].register_parameter("share", weight)
    backbone = case.model.bert
    backbone.embeddings.register_forward_hook(lambda _, __, output: read.append(output))
    backbone.encoder.layer[-1].register_forward_pre_hook(
        lambda _, args: (args[0] + weight * read[-1], *args[1:])
    )
    batch = case.batch()
    loss, gradients = case.gradients(batch)
    assert gradients["bert.encoder.layer.2.share"] != 0
    cache = case.cache()
    with case.opened(cache):
        for _ in range(2):
            again, found = case.gradients(batch)
            assert torch.equal(again, loss)
            for name, gradient in gradients.items():
                assert torch.equal(found[name], gradient), name
    assert cache.note == ""
    assert cache.replayed_rows
