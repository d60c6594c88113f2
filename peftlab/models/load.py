"""Configs, tokenizers and models, by embedded name, local folder or hub id."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.errors import AssetError, IncompatibleError, Problem, UnknownNameError
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.models.embedded import embedded_models, embedded_path
from peftlab.models.quantized import (
    backbone_prefix,
    is_pooler,
    quantization_config,
    settle_quantized,
)
from peftlab.models.quiet import quiet_transformers
from peftlab.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WHERE = "model.model_name_or_path"
# A checkpoint without these heads has no pretrained head to adapt: a random one would learn little.
_PRETRAINED_HEADS = {"AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"}


def resolve_path(name_or_path: str) -> str:
    """What ``from_pretrained`` takes: an embedded model's folder, a local folder, or a hub id.

    An embedded name wins over a folder of the same name; write ``./minilm`` for the folder.

    Raises:
        UnknownNameError: neither embedded, nor a folder, nor of the form ``owner/name``.
        AssetError: an embedded model cannot be had.
    """
    if name_or_path in embedded_models():
        return str(embedded_path(name_or_path))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise UnknownNameError(Problem(_WHERE, f"{name_or_path!r} is a file, not a model folder."))
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UnknownNameError(Problem(_WHERE, f"there is no folder {name_or_path!r}."))
    if "/" not in name_or_path:
        hint = did_you_mean(name_or_path, embedded_models())
        message = f"no embedded model and no folder {name_or_path!r}."
        forms = "A model on the hub is written owner/name."
        raise UnknownNameError(Problem(_WHERE, message, f"{hint} {forms}"))
    return name_or_path


def load_config(model: ModelConfig, **kwargs: Any) -> PretrainedConfig:
    """The model's config, with ``kwargs`` (``num_labels``, ``id2label``, …) set on it.

    Raises:
        UnknownNameError, AssetError: there is no such model, or it cannot be reached or read.
    """
    from transformers import AutoConfig

    path = resolve_path(model.model_name_or_path)
    with quiet_transformers(), _had(model, "config"):
        return AutoConfig.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code, **kwargs
        )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; the end-of-text token pads where there is no padding token.

    Raises:
        UnknownNameError, AssetError: there is no such model, or it cannot be reached or read.
        IncompatibleError: the tokenizer has neither a padding nor an end-of-text token.
    """
    from transformers import AutoTokenizer

    path = resolve_path(model.model_name_or_path)
    with quiet_transformers(), _had(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            message = f"the tokenizer of {model.model_name_or_path!r} cannot pad: it has neither a"
            message += " padding nor an end-of-text token."
            hint = "Set pad_token in its tokenizer_config.json."
            raise IncompatibleError(Problem(_WHERE, message, hint))
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: ModelConfig,
    precision: PrecisionConfig,
    auto_class: str,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The pretrained model in eval mode, as ``auto_class`` (``AutoModelFor…``) builds it.

    Weights are in ``precision.dtype``. With ``quantization`` the linear layers of the backbone are
    kept in 4 or 8 bits and the head is not; the model is then on the current accelerator if there
    is one. Parameters that the checkpoint did not hold (a new task head, a pooler) are drawn from
    the global random state; ``model.newly_initialized`` is the sorted tuple of their names, for all
    who must train or save them.

    Args:
        model_kwargs: config values of the task.

    Raises:
        UnknownNameError, AssetError: there is no such model, or it cannot be reached or read.
        IncompatibleError: the architecture has no such head or attention, or the checkpoint lacks
            weights other than a new task head's.
    """
    import torch
    import transformers

    config = load_config(model, **model_kwargs)
    if "Image" not in auto_class and config.get_text_config().pad_token_id is None:
        # A decoder's classifier reads the last token that is no padding.
        config.get_text_config().pad_token_id = load_tokenizer(model).pad_token_id
    with quiet_transformers(), _had(model, "weights"):
        loaded, info = getattr(transformers, auto_class).from_pretrained(
            resolve_path(model.model_name_or_path),
            config=config,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=getattr(torch, precision.dtype),
            attn_implementation=model.attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            quantization_config=_quantization(model, config, precision, auto_class),
        )
    new = sorted(info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]})
    _check_weights(model, loaded, auto_class, new, sorted(info["unexpected_keys"]))
    loaded.newly_initialized = tuple(new)
    settle_quantized(loaded)
    generation = getattr(loaded, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = config.get_text_config().pad_token_id
    return loaded


def build_from_config(
    config: PretrainedConfig, auto_class: str, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The architecture without its weights, on the current default device (such as ``meta``).

    Raises:
        IncompatibleError: the architecture has no such head or no such attention.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attn_implementation
        )
    except ValueError as error:
        message = f"a {config.model_type} model cannot be built: {_first(error)}"
        raise IncompatibleError(Problem(_WHERE, message, _hint(error))) from error


@contextmanager
def _had(model: ModelConfig, what: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be had into one clear error."""
    from safetensors import SafetensorError

    name = model.model_name_or_path
    try:
        yield
    except (OSError, SafetensorError) as error:
        hint = "Check the name, the network and, for a gated model, 'hf auth login'."
        if Path(name).is_dir():
            hint = "A model folder holds config.json, model.safetensors and the tokenizer's files."
        message = f"the {what} of {name!r} cannot be had: {_first(error)}"
        raise AssetError(Problem(_WHERE, message, hint)) from error
    except (ValueError, ImportError) as error:
        message = f"the {what} of {name!r} cannot be loaded: {_first(error)}"
        raise IncompatibleError(Problem(_WHERE, message, _hint(error))) from error


def _first(error: Exception) -> str:
    """What transformers says, in one line."""
    if no_such_form := re.search(r"for this kind of AutoModel: (\w+)", str(error)):
        return f"its architecture has no {no_such_form[1]}."
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:") + "."


def _hint(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "If you trust its authors, set model.trust_remote_code=true."
    if "attn_implementation" in str(error):
        return "Set model.attn_implementation=eager."
    return ""


def _quantization(
    model: ModelConfig, config: PretrainedConfig, precision: PrecisionConfig, auto_class: str
) -> Any:
    import torch

    if precision.quantization is None:
        return None
    with torch.device("meta"):
        shell = build_from_config(config, auto_class, torch.float32, model.attn_implementation)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return quantization_config(shell, precision.quantization, has_bf16)


def _check_weights(
    model: ModelConfig,
    loaded: PreTrainedModel,
    auto_class: str,
    new: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Refuse a checkpoint that leaves backbone weights random; report what it holds beyond."""
    prefix = backbone_prefix(loaded)
    pretrained_head = auto_class in _PRETRAINED_HEADS
    # A checkpoint of the bare backbone names its tensors without the prefix.
    parts = {part for part, _ in loaded.base_model.named_children()}

    def in_backbone(name: str) -> bool:
        inside = name.startswith(prefix) or name.partition(".")[0] in parts
        return inside and not is_pooler(name)

    name = model.model_name_or_path
    problems = []
    if lacking := [key for key in new if pretrained_head or in_backbone(key)]:
        message = f"the checkpoint of {name!r} does not hold {_some(lacking)} in the shape that "
        message += f"{type(loaded).__name__} needs."
        hint = "Is it a checkpoint of this architecture, made for this kind of task?"
        problems.append(Problem(_WHERE, message, hint))
    if getattr(loaded, "_hf_peft_config_loaded", False):
        message = f"{name!r} is an adapter, not a model."
        problems.append(Problem(_WHERE, message, "Merge it first, or name its base model."))
    if problems:
        raise IncompatibleError(problems)
    if left := [key for key in unexpected if in_backbone(key)]:
        message = "%r: %s has no place for %s; they are left out"
        logger.warning(message, name, type(loaded).__name__, _some(left))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
