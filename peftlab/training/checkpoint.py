"""Checkpoints hold what trains: never the frozen base.

A folder ``checkpoints/step-00000123`` with trainable tensors, optimizer state, the best weights so
far and the loop's cursor, in safetensors and JSON, each file with its SHA-256. It is written to a
temporary folder and renamed, so one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlab.errors import RunFolderError
from peftlab.files import replace_folder, write_json

_SEPARATOR = "::"
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on to the identical result.

    Args:
        trainable: the parameters that train, by name.
        optimizer: optimizer state by parameter name and key, tensors and scalars apart.
        best: the trainable tensors with the best validation metric so far; empty if none.
        cursor: the loop's own JSON-ready state.
        rng: generator states of each process.
    """

    trainable: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    optimizer_scalars: Mapping[str, Any]
    best: Mapping[str, Tensor]
    cursor: Mapping[str, Any]
    rng: tuple[Mapping[str, str], ...]


def optimizer_state(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state keyed by parameter name: (tensors, scalars)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # Optimizers share lookup tables between parameters, safetensors does not.
                tensors[name + _SEPARATOR + key] = value.detach().to("cpu", copy=True)
            else:
                scalars[name + _SEPARATOR + key] = value
    return tensors, scalars


def load_optimizer_state(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put ``optimizer_state`` back, in the dtypes it was saved in."""
    by_name = dict(model.named_parameters())
    for full, value in (*tensors.items(), *scalars.items()):
        name, _, key = full.rpartition(_SEPARATOR)
        parameter = by_name[name]
        # A step counter that is a tensor stays where the optimizer made it: beside a fused
        # kernel's parameters, on the CPU otherwise; both are the CPU unless the weights moved.
        optimizer.state[parameter][key] = (
            value.to(parameter.device) if isinstance(value, Tensor) else value
        )


def rng_state() -> dict[str, str]:
    """torch's generators on this process, as hexadecimal text."""
    state = {"cpu": bytes(torch.get_rng_state().tolist()).hex()}
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def set_rng_state(state: Mapping[str, str]) -> None:
    """Put ``rng_state`` back."""
    torch.set_rng_state(_bytes_tensor(state["cpu"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """Write ``folder/step-NNNNNNNN`` and remove all but the newest ``keep``."""
    with replace_folder(folder / f"step-{step:08d}") as target:
        save_file(dict(checkpoint.trainable), target / "trainable.safetensors")
        save_file(dict(checkpoint.optimizer_tensors), target / "optimizer.safetensors")
        if checkpoint.best:
            save_file(dict(checkpoint.best), target / "best.safetensors")
        state = {
            "cursor": dict(checkpoint.cursor),
            "optimizer": dict(checkpoint.optimizer_scalars),
            "rng": [dict(state) for state in checkpoint.rng],
        }
        # Not write_json: an infinite scaler or metric must come back as it was.
        (target / "state.json").write_text(json.dumps(state), encoding="utf-8")
        sums = {path.name: _sha256(path) for path in sorted(target.iterdir())}
        write_json(target / _CHECKSUMS, sums)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = sorted(path for path in folder.glob("step-*") if not path.name.endswith(".old"))
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with its checksum.

    Raises:
        RunFolderError: a file is missing or differs.
    """
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        damaged = [name for name, value in sums.items() if _sha256(path / name) != value]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"checkpoint {path} cannot be read: {error}. Remove it.") from None
    if damaged:
        raise RunFolderError(
            f"checkpoint {path} is damaged: {', '.join(damaged)} differs from its checksum. "
            "Remove it; the run then goes on from an older one or starts again."
        )
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    best = path / "best.safetensors"
    return Checkpoint(
        trainable=load_file(path / "trainable.safetensors"),
        optimizer_tensors=load_file(path / "optimizer.safetensors"),
        optimizer_scalars=state["optimizer"],
        best=load_file(best) if best.name in sums else {},
        cursor=state["cursor"],
        rng=tuple(state["rng"]),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
