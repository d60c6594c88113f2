"""The model and precision sections of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from peftlab.config import Config


class ModelConfig(Config):
    """Which pretrained model: an embedded name, a local folder or a hub id.

    ``trust_remote_code`` runs code from the model's repository: off unless the user turns it on.
    """

    model_name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"


class PrecisionConfig(Config):
    """In which numbers: weights in ``dtype``, arithmetic in ``bf16``/``fp16`` autocast.

    ``quantization`` keeps the frozen base in 4 or 8 bits through bitsandbytes.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bf16: bool = False
    fp16: bool = False
    quantization: Literal["nf4", "int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_autocast(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("bf16") and data.get("fp16"):
            raise ValueError("bf16 and fp16 exclude each other")
        return data

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """As Accelerate spells it."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
