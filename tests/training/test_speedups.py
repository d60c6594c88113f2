"""Settings that change how a step is computed train to the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.assemble import Assembly
from peftlab.errors import IncompatibleError
from peftlab.training import compilation
from peftlab.training.compilation import compile_blocks
from peftlab.training.stages import Stage
from tests.training.conftest import Losses

Assembled = Callable[..., Assembly]
Loops = Callable[..., tuple[Any, Losses]]
CPU = torch.device("cpu")
# torch 2.13's own compiler does what torch warns of.
imports_the_compiler = pytest.mark.filterwarnings("ignore")
EARLY = ("optim.optimizer_in_backward=true", "optim.max_grad_norm=null")
SAVES = ("train.save_strategy=steps", "train.save_steps=5")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_updates_in_backward(optim: str, assembled: Assembled, loop_of: Loops) -> None:
    """The weights of the plain way, with schedule, guard, checkpoint and resume."""
    settings = ("train.max_steps=8", "train.eval_strategy=no", EARLY[1], f"optim.optim={optim}")
    plain, expected = loop_of(assembled("full", *settings))
    plain.fit()
    whole, heard = loop_of(assembled("full", *settings, EARLY[0]))
    whole.fit()
    assert heard.losses == expected.losses
    weights = whole.job.method.training_state(whole.model)
    for name, tensor in plain.job.method.training_state(plain.model).items():
        assert torch.equal(tensor, weights[name]), name
    assert whole.measured[0].measurement.breakdown.gradients_bytes == 0

    stopped, _ = loop_of(assembled("full", *settings, EARLY[0], *SAVES))
    stopped.total_steps, stopped.stages = 5, [Stage(0, 0, 5)]
    stopped.fit()
    resumed, rest = loop_of(assembled("full", *settings, EARLY[0], *SAVES))
    resumed.fit(resume=True)
    assert rest.losses == heard.losses[5:]
    for name, tensor in resumed.job.method.training_state(resumed.model).items():
        assert torch.equal(tensor, weights[name]), name


@imports_the_compiler
def test_compiled_blocks_compute_the_same(assembled: Assembled, loop_of: Loops) -> None:
    """With torch's eager backend: whether a compiler is there is another question."""
    settings = ("train.max_steps=6", "train.eval_strategy=epoch")
    plain, expected = loop_of(assembled("lora", *settings))
    plain.fit()
    assembly = assembled("lora", *settings, "train.torch_compile=true")
    compiled, heard = loop_of(assembly)
    blocks = [
        module
        for name, module in compiled.model.named_modules()
        if name.endswith(assembly.prepared.anatomy.blocks)
    ]
    assert len(blocks) == 2
    calls: list[int] = []
    for block in blocks:
        assert block._compiled_call_impl is not None
        block.compile(backend=_counting(calls), dynamic=True)
    compiled.fit()
    torch.testing.assert_close(heard.losses, expected.losses, rtol=0, atol=1e-5)
    assert calls
    assert not compiled.measured


def _counting(calls: list[int]) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    return backend


@imports_the_compiler
def test_the_frozen_trunk_is_not_compiled(assembled: Assembled) -> None:
    assembly = assembled("freeze-top1", "train.torch_compile=true")
    compile_blocks(assembly.model, assembly.prepared.anatomy, assembly.prepared.trunk, CPU)
    compiled = [
        name for name, module in assembly.model.named_modules() if module._compiled_call_impl
    ]
    assert compiled == [assembly.prepared.anatomy.blocks[-1]]


@imports_the_compiler
def test_without_a_compiler(
    assembled: Assembled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor.config

    assembly = assembled("full")
    missing = str(tmp_path / "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (missing,))
    with pytest.raises(IncompatibleError, match=r"needs a C\+\+ compiler"):
        compile_blocks(assembly.model, assembly.prepared.anatomy, assembly.prepared.trunk, CPU)
    assert not any(module._compiled_call_impl for module in assembly.model.modules())


@imports_the_compiler
def test_time_spent_on_compiling_is_known() -> None:
    before = compilation.compile_seconds()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert compilation.compile_seconds() > before >= 0
