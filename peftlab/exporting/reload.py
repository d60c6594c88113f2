"""Load exported folders as their users will, and repeat the calls that made the reference.

A script for a fresh process, which imports nothing of peftlab, so that nothing of ours can help:

    python -P reload.py REQUEST.json [REQUEST.json ...]

A request holds ``folder``, ``auto_class``, ``device``, ``trust_remote_code`` and ``calls``: each
the ``name`` of the model's method and its ``values`` that are no tensors. The safetensors file
``inputs`` holds the tensors of the calls as ``<number>.<argument>``; ``outputs`` is the file to
write, with the results as ``<number>.<key>``. ``base`` is null for a whole model, and for PEFT's
adapter the base model's ``path`` and the ``kwargs`` of its ``from_pretrained``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "peftlab"


def answer(request: dict[str, Any]) -> None:
    """Load the folder, make the calls, write what they return."""
    import torch
    from safetensors.torch import load_file, save_file

    model = _load(request).to(request["device"]).eval()
    inputs = load_file(request["inputs"], device=request["device"])
    outputs = {}
    with torch.no_grad():
        for number, call in enumerate(request["calls"]):
            prefix = f"{number}."
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in inputs.items()
                if name.startswith(prefix)
            }
            function = model if call["name"] == "forward" else getattr(model, call["name"])
            result = function(**tensors, **call["values"])
            named = {"sequences": result} if isinstance(result, torch.Tensor) else dict(result)
            for key, value in named.items():
                if isinstance(value, torch.Tensor):
                    # A copy: outputs that share storage are refused by safetensors.
                    outputs[prefix + key] = value.cpu().clone(memory_format=torch.contiguous_format)
    save_file(outputs, request["outputs"])


def _load(request: dict[str, Any]) -> Any:
    import transformers

    auto = getattr(transformers, request["auto_class"])
    trust: bool = request["trust_remote_code"]
    base = request["base"]
    if base is None:
        return auto.from_pretrained(request["folder"], trust_remote_code=trust)
    from peft import PeftModel

    kwargs = dict(base["kwargs"])
    if "quantization_config" in kwargs:
        quantization = transformers.BitsAndBytesConfig(**kwargs["quantization_config"])
        kwargs["quantization_config"] = quantization
    model = auto.from_pretrained(base["path"], trust_remote_code=trust, **kwargs)
    return PeftModel.from_pretrained(model, request["folder"])


def main(paths: Iterable[str]) -> None:
    """Answer requests, and see that no foreign library helped."""
    requests = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    for request in requests:
        answer(request)
    whole_models = all(request["base"] is None for request in requests)
    for module in (OURS, *(["peft"] if whole_models else [])):
        if module in sys.modules:
            raise SystemExit(f"{module} was imported: this proves nothing.")


if __name__ == "__main__":
    main(sys.argv[1:])
