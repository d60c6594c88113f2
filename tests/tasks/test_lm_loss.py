"""The loss without logits against the one with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peftlab.memory.meter import TimelineMeter
from peftlab.tasks import lm_loss
from peftlab.tasks.lm_loss import loss_sum, losses_by_row

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.4}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_of(architecture: str, **overrides: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = GPT2 if architecture == "gpt2" else SMALL
    config = AutoConfig.for_model(architecture, **{**values, **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def batch_of(rows: int = 3, length: int = 9) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of different lengths, of which some tokens are targets: the first among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, -100)
    labels[:, 0] = ids[:, 0]
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def plain_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """(batch, seq - 1), from the logits."""
    width = labels.shape[1]
    logits = model(**inputs, use_cache=False).logits[:, -width:].float()
    return functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")


def plain(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return plain_losses(model, inputs, labels).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (loss / 7).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def without_logits(model: nn.Module) -> bool:
    return lm_loss._replaceable_head(model, torch.tensor([[5]])) is not None


@pytest.fixture(autouse=True)
def _chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_loss, "CHUNK_ROWS", 4)


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias", "all"])
def test_gradients_by_finite_differences(trains: str) -> None:
    torch.manual_seed(0)
    tensors = {"hidden": (7, 5), "weight": (6, 5), "bias": (6,)}
    values = [
        torch.randn(shape, dtype=torch.float64, requires_grad=trains in (name, "all"))
        for name, shape in tensors.items()
    ]
    rows, targets = torch.tensor([0, 1, 3, 4, 6]), torch.tensor([5, 0, 2, 2, 1])

    def loss(*values: Tensor) -> Tensor:
        # Recomputed for each backward, of which a graph allows one.
        def run(*v: Tensor) -> Tensor:
            return lm_loss._LossSum.apply(*v, rows, targets, torch.float64)

        return checkpoint(run, *values, use_reentrant=False) * 3

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("phi", {"tie_word_embeddings": False}),
    ],
)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_loss_and_gradients_are_those_of_the_logits(
    architecture: str, overrides: dict[str, Any], frozen_head: bool
) -> None:
    model = model_of(architecture, **overrides)
    head = model.get_output_embeddings()
    if architecture == "phi":
        torch.nn.init.normal_(head.bias)
    head.requires_grad_(not frozen_head)
    batch = batch_of()
    expected = plain(model, *batch)
    expected_gradients = gradients(model, expected)
    found = loss_sum(model, *batch)
    assert without_logits(model)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_close(gradients(model, found), expected_gradients, rtol=2e-6)
    by_row = losses_by_row(model, *batch)
    torch.testing.assert_close(by_row, plain_losses(model, *batch).sum(1), rtol=1e-6, atol=0)
    assert not by_row.requires_grad


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_as_the_head_does(frozen_head: bool, autocast: bool) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    exact = gradients(model, plain(model, *batch_of()))
    if not autocast:
        model.to(torch.bfloat16)
    model.lm_head.requires_grad_(not frozen_head)
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with context:
        expected = plain(model, *batch_of())
    rounded = gradients(model, expected)
    with context:
        found = loss_sum(model, *batch_of())
    assert without_logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients(model, found).items():
        assert gradient.dtype == rounded[name].dtype
        off, allowed = (gradient - exact[name]).norm(), (rounded[name] - exact[name]).norm()
        assert off <= 1.1 * allowed + 1e-3 * exact[name].norm(), name


def test_float16_keeps_small_probabilities() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 16) / 4
    weight = torch.randn(200_000, 16) / 4
    targets = torch.arange(4)
    found, expected = [], []
    for dtype, gradient in ((torch.float16, found), (torch.float64, expected)):
        inputs = hidden.to(dtype).requires_grad_()
        loss = lm_loss._LossSum.apply(inputs, weight.to(dtype), None, targets, targets, dtype)
        loss.backward()
        # The part that comes from all other words.
        gradient.append(inputs.grad.double() + weight[targets].double())
    assert (found[0] - expected[0]).norm() < 5e-3 * expected[0].norm() + 2e-3


def test_a_float16_head_that_trains_is_left_to_the_loss_scale() -> None:
    model = model_of("llama", tie_word_embeddings=False).to(torch.float16)
    assert not without_logits(model)
    model.lm_head.requires_grad_(False)
    assert without_logits(model)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_logits_that_are_changed_after_the_head_are_computed(architecture: str) -> None:
    changes = {"final_logit_softcapping": 3.0, "logit_scale": 0.3, "logits_scaling": 3.0}
    name = dict(zip(("gemma2", "cohere", "granite"), changes, strict=True))[architecture]
    model = model_of(architecture, **{name: changes[name]})
    inputs, labels = batch_of()
    assert not without_logits(model)
    count = (labels[:, 1:] != -100).sum()
    expected = model(**inputs, labels=labels).loss * count
    torch.testing.assert_close(loss_sum(model, inputs, labels), expected, rtol=1e-6, atol=0)
    by_row = losses_by_row(model, inputs, labels)
    torch.testing.assert_close(by_row.sum(), expected, rtol=1e-6, atol=0)


def llama_that(change: Any) -> Any:
    """A Llama whose forward passes its logits through ``change``."""
    from transformers import LlamaForCausalLM

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = change(self, output.logits)
            return output

    return Changed(model_of("llama").config).train()


def test_logits_that_are_changed_in_place_are_computed() -> None:
    model = llama_that(lambda self, logits: logits.mul_(0.5))
    assert not without_logits(model)
    torch.testing.assert_close(loss_sum(model, *batch_of()), plain(model, *batch_of()))


def test_logits_that_are_changed_in_training_only_are_noticed() -> None:
    model = llama_that(lambda self, logits: logits * 0.5 if self.training else logits)
    with pytest.raises(RuntimeError, match="Changed changes what its output head returns"):
        loss_sum(model, *batch_of())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.parametrize("on_head", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_head_is_asked_for_logits(on_head: str) -> None:
    import peft

    on = {"target_modules": ["q_proj"], on_head: ["lm_head"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **on)
    model = peft.get_peft_model(model_of("llama"), config)
    assert not without_logits(model)
    expected = plain(model, *batch_of())
    torch.testing.assert_close(loss_sum(model, *batch_of()), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.parametrize("method", ["LoraConfig", "PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_elsewhere_need_no_logits(method: str) -> None:
    import peft

    arguments: dict[str, Any] = {"num_virtual_tokens": 3}
    if method == "LoraConfig":
        arguments = {"target_modules": ["q_proj"], "init_lora_weights": False}
    config = getattr(peft, method)(task_type="CAUSAL_LM", **arguments)
    model = peft.get_peft_model(model_of("llama"), config)
    assert without_logits(model)
    batch = batch_of()
    expected = plain(model, *batch)
    expected_gradients = gradients(model, expected)
    found = loss_sum(model, *batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_close(gradients(model, found), expected_gradients, rtol=2e-6)
    by_row = losses_by_row(model, *batch)
    torch.testing.assert_close(by_row, plain_losses(model, *batch).sum(1), rtol=1e-6, atol=0)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_models_reduce_every_gradient(one_process: None) -> None:
    model = model_of("qwen2", tie_word_embeddings=True)
    expected = gradients(model, plain(model, *batch_of()))
    parallel = nn.parallel.DistributedDataParallel(model)
    reduced = []
    parallel.register_comm_hook(None, lambda _, bucket: _allreduced(bucket, reduced))
    found = gradients(model, loss_sum(parallel, *batch_of()))
    assert_close(found, expected, rtol=2e-6)
    assert sum(reduced) == sum(p.numel() for p in model.parameters())


def _allreduced(bucket: Any, reduced: list[int]) -> Any:
    reduced.append(bucket.buffer().numel())
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_under_mixed_precision_as_accelerate_prepares_it() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare_model(model_of("llama"))
        with accelerator.autocast():
            assert without_logits(model)
            found, expected = loss_sum(model, *batch_of()), plain(model, *batch_of())
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # A first look at the model must not leave weights behind that have no gradient.
    assert len(gradients(model, found)) == len(list(model.parameters()))


def test_without_a_target_there_is_no_loss() -> None:
    model = model_of("llama")
    inputs, labels = batch_of()
    labels[:, 1:] = -100
    loss = loss_sum(model, inputs, labels)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())
    assert losses_by_row(model, inputs, labels).tolist() == [0, 0, 0]


def test_a_second_backward_is_refused() -> None:
    loss = loss_sum(model_of("llama"), *batch_of())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_head_is_itself_again() -> None:
    model = model_of("llama")
    loss_sum(model, *batch_of())
    assert "forward" not in vars(model.lm_head)
    inputs, labels = batch_of()
    with pytest.raises(IndexError):
        loss_sum(model, {"input_ids": inputs["input_ids"] + 60}, labels)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_tenth_of_the_memory(frozen_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_loss, "CHUNK_ROWS", 32)
    model = model_of("llama", vocab_size=2000)
    model.lm_head.requires_grad_(not frozen_head)
    ids = torch.randint(3, 60, (16, 32))
    inputs, labels = {"input_ids": ids}, ids
    loss_sum(model, inputs, labels)
    measured = []
    for loss_function in (plain, loss_sum):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        meter = TimelineMeter()
        with meter.step(model, optimizer, inputs):
            with meter.phase("forward"):
                loss = loss_function(model, inputs, labels)
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
            del loss
        model.zero_grad()
        phases = [meter.trace.breakdown(phase) for phase in ("forward", "backward")]
        measured.append(max(parts.logits_bytes for parts in phases))
    logits = 4 * 16 * 31 * 2000
    assert measured[0] >= 2 * logits
    assert measured[1] < measured[0] / 10
