"""Compute and keep only what a sequence classifier's head reads: the last block's first token.

A BERT-like classifier reads one position of the last block's output. Query, attention output,
feed-forward and norms of the others are work that nothing reads: 10 of its 12 h² products a token.
The other two make keys and values, which a single query can do without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from peftlab.anatomy import Anatomy, calls_nothing_else, inside

_BlockForward = Callable[..., Tensor]


def skip_unread_positions(base: nn.Module, anatomy: Anatomy) -> bool:
    """Make a sequence classifier compute only what its head reads, with the same logits.

    Parameters, names and states stay as they are, so saved files do too. Call it on a transformers
    model after a method was attached to it. Where the last block is not known to be read at its
    first token alone, only the pooled vector is copied, so that the whole hidden state need not be
    kept for it.

    Returns:
        Whether the last block now computes its first token only.
    """
    if not anatomy.model_class.endswith("ForSequenceClassification"):
        return False
    config: Any = base.config
    forward = _FIRST_TOKEN_FORWARDS.get(anatomy.model_type)
    if forward is not None and not getattr(config, "is_decoder", False):
        block: Any = base.get_submodule(anatomy.blocks[-1])
        block_class: Any = type(block)
        block.__class__ = _first_token_class(block_class, forward)
        return True
    above = (*anatomy.after_blocks, *anatomy.head)
    linears = [
        (name, module)
        for name, module in base.named_modules()
        if inside(name, above) and hasattr(module, "in_features")
    ]
    for name, module in linears:
        # Not in the layers that an adapter wraps: it has the copy already.
        if not any(name.startswith(f"{outer}.") for outer, _ in linears):
            module.register_forward_pre_hook(_own_storage)
    return False


def _own_storage(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A copy of an input that is a small view into a large tensor."""
    if not args or not torch.is_grad_enabled() or _fills_storage(args[0]):
        return None
    return (args[0].clone(), *args[1:])


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= tensor.nbytes


@functools.cache
def _first_token_class(block_class: Any, first_token: _BlockForward) -> type[nn.Module]:
    """A subclass, so that transformers' own checkpointing wraps its forward like any other."""
    plain: _BlockForward = block_class.forward

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        maskable = attention_mask is None or getattr(attention_mask, "ndim", 0) == 4
        if not maskable or _is_recorded(self.attention, kwargs):
            return plain(self, hidden_states, attention_mask, *args, **kwargs)
        return first_token(self, hidden_states, attention_mask, **kwargs)

    return type(block_class.__name__, (block_class,), {"forward": forward})


def _is_recorded(attention: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller wants hidden states or attentions, which must be whole."""
    config = getattr(attention, "self", attention).config
    keys = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(key, getattr(config, key, False)) for key in keys)


def _bert(
    block: Any,
    hidden_BSH: Tensor,
    mask: Tensor | None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """``BertLayer``, also of RoBERTa, XLM-R, CamemBERT, ELECTRA and data2vec: (batch, 1, width)."""
    attention = block.attention.self
    projections = attention.query, attention.key, attention.value
    first_B1H = hidden_BSH[:, :1].clone()
    attended_B1H = _attend(
        attention, projections, first_B1H, hidden_BSH, mask, past_key_values, kwargs
    )
    out: Tensor = block.feed_forward_chunk(block.attention.output(attended_B1H, first_B1H))
    return out


def _distilbert(block: Any, hidden_BSH: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """DistilBERT's ``TransformerBlock``: (batch, 1, width)."""
    attention = block.attention
    projections = attention.q_lin, attention.k_lin, attention.v_lin
    first_B1H = hidden_BSH[:, :1].clone()
    attended_B1H = _attend(attention, projections, first_B1H, hidden_BSH, mask, None, kwargs)
    middle_B1H = block.sa_layer_norm(attention.out_lin(attended_B1H) + first_B1H)
    out: Tensor = block.output_layer_norm(block.ffn.ff_chunk(middle_B1H) + middle_B1H)
    return out


def _attend(
    attention: Any,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    first_B1H: Tensor,
    hidden_BSH: Tensor,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """What the first position reads from all, before the output projection: (batch, 1, width)."""
    if cache is None and all(_is_plain_matrix(each, hidden_BSH) for each in projections):
        return _attend_without_keys(attention, projections, first_B1H, hidden_BSH, mask)
    query_BN1D, key_BNSD, value_BNSD = (
        projection(x).view(*x.shape[:2], -1, attention.attention_head_size).transpose(1, 2)
        for projection, x in zip(projections, (first_B1H, hidden_BSH, hidden_BSH), strict=True)
    )
    if cache is not None:
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        key_BNSD, value_BNSD = own.update(key_BNSD, value_BNSD, attention.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    attended, _ = attend(
        attention,
        query_BN1D,
        key_BNSD,
        value_BNSD,
        None if mask is None else mask[:, :, :1],
        dropout=attention.dropout.p if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return attended.reshape(*first_B1H.shape[:2], -1)  # type: ignore[no-any-return]


def _is_plain_matrix(module: nn.Module, x: Tensor) -> bool:
    """Whether calling it multiplies ``x`` with its weight, adds its bias, and does no more."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype is x.dtype
        # Half precision would round in other places than the model was trained with.
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
        and calls_nothing_else(module)
    )


def _attend_without_keys(
    attention: Any,
    projections: tuple[Any, ...],
    first_B1H: Tensor,
    hidden_BSH: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The same from the hidden states themselves: no position's key or value is made.

    For one query a head, q · (K x + c) = (Kᵀ q) · x + q · c, and Σ p (V x + d) = V Σ p x + d Σ p.
    """
    query, key, value = projections
    batch, _, width = hidden_BSH.shape
    heads_BND = (batch, -1, attention.attention_head_size)
    query_BND = query(first_B1H).view(heads_BND) * attention.scaling
    query_NBD, key_NDH = query_BND.transpose(0, 1), key.weight.view(*query_BND.shape[1:], width)
    asked_BNH = torch.bmm(query_NBD, key_NDH).transpose(0, 1)
    scores_BNS = torch.bmm(asked_BNH, hidden_BSH.transpose(1, 2))
    if key.bias is not None:
        # Softmax takes it out again; it is here for its gradient to be there.
        scores_BNS = scores_BNS + (query_BND * key.bias.view(query_BND.shape[1:])).sum(-1, True)
    if mask is not None:
        seen_BNS = mask[:, :, 0]  # one for all heads, as a rule
        if seen_BNS.dtype is torch.bool:
            scores_BNS = scores_BNS.masked_fill(~seen_BNS, -torch.inf)
        else:
            scores_BNS = scores_BNS + seen_BNS
    kept_BNS = attention.dropout(torch._safe_softmax(scores_BNS, -1))
    read_NBH = torch.bmm(kept_BNS, hidden_BSH).transpose(0, 1)
    value_NDH = value.weight.view(key_NDH.shape)
    attended_BND = torch.bmm(read_NBH, value_NDH.transpose(1, 2)).transpose(0, 1)
    if value.bias is not None:
        attended_BND = attended_BND + kept_BNS.sum(-1, True) * value.bias.view(query_BND.shape[1:])
    return attended_BND.reshape(*first_B1H.shape[:2], -1)


_FIRST_TOKEN_FORWARDS: dict[str, _BlockForward] = {
    "bert": _bert,
    "camembert": _bert,
    "data2vec-text": _bert,
    "distilbert": _distilbert,
    "electra": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
"""By ``config.model_type``, where the head reads position 0 alone; a test proves each one."""
