"""Attention rows: what the newest queries of each row look at, read where attention is computed.

`sdpa` and flash attention return no weights, so attention functions of ours stand in for the model's own while a stack
that reads attention, or brings masks of its own, generates. They compute what those compute and, besides, the softmax
rows that the stack reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from . import hf
from .errors import StackError

_PREFIX = "decoders_"
_JOIN = {"mean": lambda weights: weights.mean(1), "max": lambda weights: weights.amax(1)}


@dataclass
class Tap:
    """What attention reads while the loop runs the model, and what is read of it.

    Attributes:
        wanted: ways to join heads, by layer.
        rows: float32 [s, q, t] by (layer, way).
        masks: while queries attend to a pool: by layer float [s, 1, q, capacity], added to the scores. Empty while the
            prompt runs, which attends as the model does, and of which the newest query is read.
    """

    wanted: dict[int, set[str]]
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)


# arguments by which families change attention, and that torch's sdpa does not take
_NOT_IN_SDPA = ("softcap", "s_aux", "position_bias", "sinks")
_tap: ContextVar[Tap | None] = ContextVar("attention rows", default=None)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """softmax(q k' / sqrt(d)) with grouped key heads; float32 [n, h, q, t].

    Args:
        softcap: bounds the scores, as in Gemma 2; `s_aux`: a sink's score by head, [h], which takes its share, as in
            gpt-oss. Both by transformers' names.
    """
    for name in ("position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise StackError(
                f"this model's attention uses '{name}', which this loop does not reproduce where it computes attention"
                " itself, as it does for every token after the prompt"
            )
    groups = query.shape[1] // key.shape[1]
    query = query * (
        scaling if scaling is not None else query.shape[-1] ** -0.5
    )  # before the product, which float16 may not hold
    query = rearrange(query, "n (kv g) q d -> n kv (g q) d", g=groups)
    scores = query @ key.transpose(-1, -2)
    scores = rearrange(scores, "n kv (g q) t -> n (kv g) q t", g=groups)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if s_aux is None:
        return scores.softmax(-1, dtype=torch.float32)
    sinks = s_aux.to(scores).view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ values with grouped value heads; [n, q, h, d]."""
    q, groups = weights.shape[2], weights.shape[1] // value.shape[1]
    weights = rearrange(weights.to(value.dtype), "n (kv g) q t -> n kv (g q) t", g=groups)
    return rearrange(weights @ value, "n kv (g q) d -> n q (kv g) d", q=q).contiguous()


def _note(tap: Tap, layer: int, weights: Tensor) -> None:
    """Put rows, heads joined, where the loop finds them."""
    for heads in tap.wanted.get(layer, ()):
        tap.rows[layer, heads] = _JOIN[heads](weights)


def _to_pool(
    tap: Tap, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Queries of beams and candidates, [s, h, q, d], attend to their sequence's pool, each to what its mask shows.

    Heads that share a key are folded into the queries, so that keys are never repeated.
    """
    mask = tap.masks[layer].to(query.device, query.dtype)
    if layer in tap.wanted or any(kwargs.get(name) is not None for name in _NOT_IN_SDPA):
        weights = _weights(query, key, mask, scaling, **kwargs)
        _note(tap, layer, weights)
        return _mix(weights, value), weights
    groups = query.shape[1] // key.shape[1]
    folded = rearrange(query, "s (kv g) q d -> s kv (g q) d", g=groups)
    mask = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return rearrange(out, "s kv (g q) d -> s q (kv g) d", g=groups).contiguous(), None


def _attention(name: str) -> Callable:
    """The attention function `name` for the prompt; whatever follows attends to the pool."""

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        tap, layer = _tap.get(), getattr(module, "layer_idx", -1)
        if tap is not None and layer in tap.masks:
            return _to_pool(tap, layer, query, key, value, scaling, **kwargs)
        if name == "eager":  # which each family defines for itself, under no common name
            weights = _weights(query, key, attention_mask, scaling, **kwargs)
            if tap is not None:
                _note(tap, layer, weights[:, :, -1:])
            return _mix(weights, value), weights
        if tap is not None and layer in tap.wanted:
            mask = attention_mask
            if mask is not None:  # flash attention's has two dimensions
                mask = mask[:, None, None, -key.shape[2] :].bool() if mask.ndim == 2 else mask[:, :, -1:]
            _note(tap, layer, _weights(query[:, :, -1:], key, mask, scaling, **kwargs))
        named = hf.as_attention(module, name) if "flash" in name else module
        return hf.attention_function(name)(
            named, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    return attend


_READABLE = ("sdpa", "eager")


def unreadable(model) -> str | None:
    """Why the attention of this language model cannot be read, or None if it can."""
    name = hf.attention_name(model)
    if name in _READABLE or "flash" in name:
        return None
    return (
        f"its attention cannot be read with attn_implementation='{name}'; load the model with one of"
        f" {', '.join(_READABLE)}, flash_attention_2"
    )


@contextmanager
def reading(model, wanted: dict[int, set[str]]) -> Iterator[Tap]:
    """Within, the language model attends to the pool by the masks of the tap yielded, and leaves there the rows
    `wanted`.
    """
    tap, name = Tap(wanted), hf.attention_name(model)
    hf.register_attention(_PREFIX + name, _attention(name), like=name)
    token = _tap.set(tap)
    try:
        with hf.attention_replaced(model, _PREFIX + name):
            yield tap
    finally:
        _tap.reset(token)
