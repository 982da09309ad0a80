"""Attention rows: what the newest queries of each row look at, read where attention is computed.

`sdpa` and flash attention return no weights, so attention functions of ours stand in for the model's own while a stack
that reads attention, or brings masks of its own, generates. They compute what those compute and, besides, the softmax
rows that the stack reads.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """What is read of the attention, and where it is put.

    Attributes:
        wanted: ways to join heads, by layer.
        queries: how many queries, the newest, are read.
        rows: float32 [m, q, t] by (layer, way).
        bias: by layer what is added to the scores of all queries, [m, 1, 1, t] or [1, 1, 1, t]; keys that come later
            get none.
    """

    wanted: dict[int, set[str]]
    queries: int = 1
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    bias: dict[int, Tensor] = field(default_factory=dict)


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
                " itself; load it with attn_implementation='sdpa' and a stack that reads no attention"
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


def _note(module, weights: Tensor) -> None:
    """Put the rows of the newest queries, heads joined, where the loop finds them."""
    if (tap := _reader(module)) is not None:
        for heads in tap.wanted[module.layer_idx]:
            tap.rows[module.layer_idx, heads] = _JOIN[heads](weights[:, :, -tap.queries :])


def _reader(module) -> Tap | None:
    """The tap, where it wants rows of this module's layer."""
    tap = _tap.get()
    return tap if tap is not None and getattr(module, "layer_idx", None) in tap.wanted else None


def _biased(module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask with the tap's bias of this layer added to it."""
    tap = _tap.get()
    bias = None if tap is None else tap.bias.get(getattr(module, "layer_idx", -1))
    if bias is None:
        return mask
    bias = (
        F.pad(bias, (0, key.shape[2] - bias.shape[-1]))
        .to(query.device, query.dtype)
        .clamp(min=torch.finfo(query.dtype).min)
    )
    if mask is None:
        return bias
    if mask.ndim == 2:
        mask = mask[:, None, None].bool()
    mask = mask[..., -key.shape[2] :]
    return bias.masked_fill(~mask, torch.finfo(query.dtype).min) if mask.dtype == torch.bool else mask + bias


def _sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    attention_mask = _biased(module, query, key, attention_mask)
    tap = _reader(module)
    if tap is None:
        return hf.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    queries = tap.queries
    if query.shape[2] <= queries:  # decoding: the rows are the attention, so compute it once
        weights = _weights(query, key, attention_mask, scaling, **kwargs)
        _note(module, weights)
        return _mix(weights, value), None
    mask = None if attention_mask is None else attention_mask[:, :, -queries:]
    _note(module, _weights(query[:, :, -queries:], key, mask, scaling, **kwargs))
    return hf.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    attention_mask = _biased(module, query, key, attention_mask)
    weights = _weights(query, key, attention_mask, scaling, **kwargs)
    _note(module, weights)
    return _mix(weights, value), weights


def _flash(name: str):
    """The flash attention `name`; rows that are read, and masks that it cannot take, are computed apart."""

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        flat = attention_mask is not None and attention_mask.ndim == 2
        tap, reader = _tap.get(), _reader(module)
        biased = tap is not None and module.layer_idx in tap.bias
        mask = attention_mask[:, None, None, -key.shape[2] :].bool() if flat else attention_mask
        if (
            biased or (mask is not None and not flat) or (reader is not None and query.shape[2] <= reader.queries)
        ):  # what a decoder adds; masks of candidates and windows; rows of which all are read
            known = all(
                kwargs.get(name) is None for name in ("softcap", "s_aux")
            )  # to sdpa, which refuses the one and ignores the other
            return (_sdpa if known else _eager)(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if reader is not None:
            _note(module, _weights(query[:, :, -reader.queries :], key, mask, scaling, **kwargs))
        named = hf.as_attention(module, name)
        return hf.attention_function(name)(
            named, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    return attend


_FUNCTIONS = {"sdpa": _sdpa, "eager": _eager}


def unreadable(model) -> str | None:
    """Why the attention of this language model cannot be read, or None if it can."""
    name = hf.attention_name(model)
    if name in _FUNCTIONS or "flash" in name:
        return None
    return (
        f"its attention cannot be read with attn_implementation='{name}'; load the model with one of"
        f" {', '.join(_FUNCTIONS)}, flash_attention_2"
    )


@contextmanager
def reading(model, wanted: dict[int, set[str]], masks: bool) -> Iterator[Tap]:
    """Within, forwards of this language model leave the rows `wanted` in the tap yielded.

    With nothing wanted and no `masks` of the loop's own (boolean ones, of candidates and of windows) the model is left
    alone.
    """
    tap = Tap(wanted)
    if not wanted and not masks:
        yield tap
        return
    name = hf.attention_name(model)
    hf.register_attention(_PREFIX + name, _FUNCTIONS.get(name) or _flash(name), like=name)
    token = _tap.set(tap)
    try:
        with hf.attention_replaced(model, _PREFIX + name):
            yield tap
    finally:
        _tap.reset(token)
