"""Where a transformers model keeps its embeddings, blocks, head, norms, biases and linears.

Found from structure, on real, meta and fake tensors alike, so that a method can be checked against
a model before its weights are loaded.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftlab.errors import IncompatibleError, Problem

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, int]

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("query_key_value",),
    ("c_attn",),
    ("qkv_proj",),
    ("Wqkv",),
    ("qkv",),
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, all as dotted module or parameter names.

    Args:
        model_class: the transformers class.
        model_type: ``config.model_type``.
        task_type: PEFT's task type, None where PEFT has none for the class.
        embeddings: modules in front of the blocks.
        blocks: the transformer blocks from bottom to top; an encoder's before its decoder's.
        between_stacks: modules between the encoder's blocks and the decoder's.
        after_blocks: modules above the last block that belong to the pretrained model: final norm,
            pooler.
        head: what the task put on top, with a pooler that the checkpoint lacked, or a language
            model's output embedding.
        head_is_new: the head is a task head, not a language model's.
        head_is_tied: the output embedding is the input embedding's tensor.
        hidden_size: width of the residual stream.
        num_layers: blocks of one stack, as the config counts them.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; fewer with grouped queries.
        head_dim: width of one head.
        is_encoder_decoder: there are two stacks.
        max_positions: how many positions the model knows, where the config says.
        cache_in: which forward takes ``past_key_values``: "model", "backbone" or "".
        linears: every linear layer, name to (in, out) features.
        embedding_tables: every ``nn.Embedding``, name to (rows, columns).
        query_value: last name parts of the query and value projections; one part where they are
            fused, empty where they are not known.
        parameters: all parameter names, a tied one once.
        biases: the bias parameters.
        norms: the parameters of normalisation layers.
    """

    model_class: str
    model_type: str
    task_type: str | None
    embeddings: tuple[str, ...]
    blocks: tuple[str, ...]
    between_stacks: tuple[str, ...]
    after_blocks: tuple[str, ...]
    head: tuple[str, ...]
    head_is_new: bool
    head_is_tied: bool
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    is_encoder_decoder: bool
    max_positions: int | None
    cache_in: str
    linears: Mapping[str, Shape]
    embedding_tables: Mapping[str, Shape]
    query_value: tuple[str, ...]
    parameters: tuple[str, ...]
    biases: tuple[str, ...]
    norms: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Take a transformers model apart.

        Raises:
            IncompatibleError: the model has no single stack of blocks (one each for encoder and
                decoder), shares one block between layers, or its config lacks a size.
        """
        from torch import nn

        transformer: Any = model
        config = transformer.config
        model_class = type(model).__name__
        backbone: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
        names = {module: name for name, module in reversed(list(model.named_modules()))}
        blocks = [names[block] for stack in _stacks(model, backbone) for block in stack]
        linears = dict(_linears(model))
        head_modules = _head(model, backbone)
        head = tuple(names[module] for module in head_modules)
        before, between, above = _around(backbone, names, blocks, set(head_modules))
        after = tuple(name for name in above if not _is_new(model, name))
        head += tuple(name for name in above if name not in after)
        sizes = _sizes(config, model_class)
        _one_block_a_layer(config, sizes["num_layers"], len(blocks), model_class)
        output = transformer.get_output_embeddings()
        endings = {name.rpartition(".")[2] for name in linears if inside(name, blocks)}
        return cls(
            model_class=model_class,
            model_type=config.model_type,
            task_type=_task_type(model_class, config.is_encoder_decoder),
            embeddings=before,
            blocks=tuple(blocks),
            between_stacks=between,
            after_blocks=after,
            head=head,
            head_is_new=bool(head)
            and (output is None or not inside(names[output], head))
            and not model_class.endswith(("ForMaskedLM", "ForPreTraining")),
            head_is_tied=output is not None
            and output.weight is transformer.get_input_embeddings().weight,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            max_positions=getattr(config, "max_position_embeddings", None),
            cache_in=_cache_in(model, backbone),
            linears=linears,
            embedding_tables={
                name: (module.num_embeddings, module.embedding_dim)
                for name, module in model.named_modules()
                if isinstance(module, nn.Embedding)
            },
            query_value=next((pair for pair in _QUERY_VALUE if endings.issuperset(pair)), ()),
            parameters=tuple(name for name, _ in model.named_parameters()),
            biases=tuple(
                name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"
            ),
            norms=tuple(
                f"{name}.{parameter}"
                for name, module in model.named_modules()
                if "Norm" in type(module).__name__
                for parameter, _ in module.named_parameters(recurse=False)
            ),
            **sizes,
        )

    def block_of(self, name: str) -> int | None:
        """The index of the block that a module or parameter lies in, None outside the blocks."""
        return next((i for i, block in enumerate(self.blocks) if inside(name, (block,))), None)

    def parameters_of(self, modules: Iterable[str]) -> list[str]:
        """The parameters inside these modules, in the model's order."""
        wanted = tuple(modules)
        return [name for name in self.parameters if inside(name, wanted)]

    def near(self, pattern: str, names: Iterable[str]) -> str:
        """A sentence with the names nearest to a mistyped name or regular expression."""
        known = dict.fromkeys(names)
        plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$")
        literal = re.sub(r"[\^$*+?()\[\]{}|]|\.\*", "", plain)
        parts = {part for name in known for part in name.split(".") if not part.isdigit()}
        pool = [*known, *sorted(parts)]
        found = difflib.get_close_matches(literal, pool, n=3, cutoff=0.5)
        if not found:
            words = (word for word in re.split(r"[.\d]+", literal) if word)
            found = [near for word in words for near in difflib.get_close_matches(word, parts, n=1)]
        if found:
            return f"Nearest: {', '.join(dict.fromkeys(found))}."
        shown = list(known)
        return f"Names look like {shown[len(shown) // 2]!r}." if shown else ""


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def calls_nothing_else(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward alone: no hook, no patched forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def dead_alternatives(pattern: str, names: Iterable[str]) -> list[str]:
    """The branches of ``(a|b|c)`` groups in a pattern without which it matches just as much."""
    known = list(names)
    dead = []
    for group in re.finditer(r"\((\?:)?([^()]*\|[^()]*)\)", pattern):
        for branch in group[2].split("|"):
            one = f"{pattern[: group.start()]}(?:{branch}){pattern[group.end() :]}"
            if not any(re.search(one, name) for name in known):
                dead.append(branch)
    return dead


def parameter_roles(
    model: nn.Module, base: Mapping[str, nn.Parameter], anatomy: Anatomy
) -> dict[str, int]:
    """Count tensor elements by role, with the keys of ``results.record.ParameterCounts``.

    A trainable tensor of the base model is head or base; a trained copy that PEFT keeps of a base
    module counts like its original; everything else that trains is adapter.

    Args:
        model: what ``Method.attach`` returned.
        base: ``dict(model.named_parameters())`` as it was before ``attach``.
        anatomy: of the model before ``attach``.
    """
    head = set(anatomy.parameters_of(anatomy.head)) if anatomy.head_is_new else set()
    base_names = {id(parameter): name for name, parameter in base.items()}
    counts = dict.fromkeys(("total", "trainable", "adapter", "head", "base_trainable"), 0)
    for name, parameter in model.named_parameters():
        size = _elements(parameter)
        counts["total"] += size
        if not parameter.requires_grad:
            continue
        original = base_names.get(id(parameter)) or _original_of(name, base)
        role = "adapter" if original is None else "head" if original in head else "base_trainable"
        counts[role] += size
        counts["trainable"] += size
    return counts


def _original_of(name: str, base: Mapping[str, nn.Parameter]) -> str | None:
    """The base parameter that a trained copy in PEFT's ModulesToSaveWrapper was made from."""
    module, marker, rest = name.partition(".modules_to_save.")
    if not marker:
        return None
    original = f"{module}.{rest.partition('.')[2]}"
    while original not in base and "." in original:
        original = original.partition(".")[2]
    return original if original in base else None


def _elements(parameter: Any) -> int:
    """Elements, also of a tensor that bitsandbytes packed."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else int(parameter.numel())


def _stacks(model: Any, backbone: Any) -> list[list[nn.Module]]:
    """The blocks, a list for each stack."""
    if model.config.is_encoder_decoder:
        roots = [backbone.encoder, backbone.decoder] if hasattr(backbone, "decoder") else []
    else:
        roots = [backbone]
    stacks = []
    for root in roots:
        lists = sorted(_outer_lists(root), key=len, reverse=True)
        if len(lists) > 1 and len(lists[0]) == len(lists[1]):
            raise _unknown(model, "several equally long lists of modules, none of them the blocks")
        if lists:
            stacks.append(list(lists[0]))
    if not stacks or any(not any(True for _ in block.parameters()) for s in stacks for block in s):
        raise _unknown(model, "no list of transformer blocks")
    return stacks


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The module lists that lie in no other one."""
    from torch import nn

    for child in module.children():
        if isinstance(child, nn.ModuleList):
            if len(child):
                yield child
        else:
            yield from _outer_lists(child)


def _unknown(model: Any, what: str) -> IncompatibleError:
    return IncompatibleError(
        Problem("model", f"{type(model).__name__}: found {what}.", "peftlab cannot take it apart.")
    )


def _one_block_a_layer(config: Any, num_layers: int, found: int, model_class: str) -> None:
    if found < num_layers:
        message = f"{model_class}: {num_layers} layers share {found} set(s) of weights."
        hint = "Models that share one block between layers (ALBERT) are not supported."
        raise IncompatibleError(Problem("model", message, hint))


def _linears(model: nn.Module) -> Iterator[tuple[str, Shape]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module: Any

    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield name, (module.nx, module.nf)
        elif isinstance(module, nn.Linear):
            yield name, (module.in_features, module.out_features)


def _head(model: Any, backbone: Any) -> list[nn.Module]:
    """The modules on top of the backbone."""
    if backbone is not model:
        on_top = [child for child in model.children() if child is not backbone]
        return [child for child in on_top if any(True for _ in child.parameters())]
    output = model.get_output_embeddings()
    return [] if output is None else [output]


def _is_new(model: nn.Module, name: str) -> bool:
    """Whether the checkpoint held nothing of a module, like a masked language model's pooler.

    Then it is part of the task head: it must be trained and saved with it.
    """
    new = set(getattr(model, "newly_initialized", ()))
    return all(key in new for key, _ in model.named_parameters() if inside(key, (name,)))


def _around(
    backbone: nn.Module, names: Mapping[nn.Module, str], blocks: list[str], head: set[nn.Module]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The backbone's other modules with parameters: below, between and above the blocks."""
    from torch import nn

    places: list[tuple[int, str, nn.Module]] = []
    passed = 0

    def visit(module: nn.Module) -> None:
        nonlocal passed
        for child in module.children():
            name = names[child]
            if name in blocks:
                passed += 1
            elif any(inside(block, (name,)) for block in blocks):
                visit(child)
            elif child not in head and any(True for _ in child.parameters()):
                places.append((passed, name, child))

    visit(backbone)
    # The order of registration is the order of use, with two exceptions: T5's decoder has its own
    # embeddings, and OPT registers the final norm in front of the blocks.
    final = {name for _, name, _ in places if name.rpartition(".")[2].startswith("final")}
    below = [
        name
        for at, name, module in places
        if isinstance(module, nn.Embedding) or (at == 0 and name not in final)
    ]
    above = [n for at, n, _ in places if n not in below and (at == len(blocks) or at == 0)]
    between = [n for _, n, _ in places if n not in below and n not in above]
    return tuple(dict.fromkeys(below)), tuple(between), tuple(above)


def _sizes(config: Any, model_class: str) -> dict[str, int]:
    text = config if hasattr(config, "hidden_size") else config.get_text_config()
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in wanted if not isinstance(getattr(text, key, None), int)]:
        message = f"{model_class}: its config has no {', '.join(missing)}."
        raise IncompatibleError(Problem("model", message))
    heads: int = text.num_attention_heads
    return {
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


def _task_type(model_class: str, is_encoder_decoder: bool) -> str | None:
    if is_encoder_decoder and model_class.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((kind for end, kind in _TASK_TYPES.items() if model_class.endswith(end)), None)


def _cache_in(model: Any, backbone: Any) -> str:
    for place, module in (("model", model), ("backbone", backbone)):
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return place
    return ""
