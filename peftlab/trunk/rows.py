"""A batch's rows: what names them, and their vectors in the form that the model wants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab.trunk.replay import Form, Inputs
from peftlab.trunk.store import DIGEST_BYTES, Array, Store

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}
"""How values are stored; numpy has no bfloat16, so its bits are."""
Row = tuple[bytes, int]
"""The digest of a row's tokens and their number."""


def row_keys(inputs: Inputs) -> list[Row] | None:
    """Digest and length of each row's real tokens; None where rows are not padded on the right."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
    ids = arrays["input_ids"].astype("<i4")
    count, tokens = ids.shape
    lengths = np.full(count, tokens)
    if (mask := arrays.get("attention_mask")) is not None:
        lengths = (mask != 0).sum(axis=1)
        if not lengths.all() or not (mask == (np.arange(tokens) < lengths[:, None])).all():
            return None
    types = arrays.get("token_type_ids")
    types = None if types is None else types.astype("<i4")
    rows = []
    for position, length in enumerate(lengths.tolist()):
        digest = hashlib.blake2b(ids[position, :length].tobytes(), digest_size=DIGEST_BYTES)
        if types is not None:
            digest.update(b"types" + types[position, :length].tobytes())
        rows.append((digest.digest(), length))
    return rows


def gathered(
    store: Store, rows: Sequence[Row], form: Form, tokens: int, device: torch.device
) -> Tensor:
    """The values of rows that are known, zero where they are padded to so many tokens."""
    shape = form.shape(len(rows), tokens)
    if device.type == "cpu":
        out = torch.zeros(shape, dtype=form.dtype)
        target = as_numpy(out)
    else:
        # numpy's own memory: on the accelerator there shall be one allocation, and no other.
        target = np.zeros(shape, _NUMPY[form.dtype])
        out = torch.from_numpy(target).view(form.dtype)
    for position, (digest, length) in enumerate(rows):
        if form.per_token:
            target[position, :length] = store[digest]
        else:
            target[position] = store[digest].reshape(shape[1:])
    return out.to(device)


def storage_of(form: Form, half: bool) -> np.dtype[Any]:
    """How values of a form are stored; ``half`` rounds float32 to float16."""
    return np.dtype(np.float16 if half and form.dtype is torch.float32 else _NUMPY[form.dtype])


def as_numpy(tensor: Tensor) -> Array:
    """The tensor's own memory, bfloat16 as its bits."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: Array = tensor.numpy()
    return array
