"""Attention: by masks of the loop's own after the prompt, and its rows, what the newest queries look at.

Attention functions of ours stand in for the model's own while a stack with decoders generates. For the prompt they call
it; afterwards the queries of all beams and candidates of an image attend to its pool of slots, each to what its mask
shows. The queries of layers that decoders read are kept, and their softmax rows computed where a decoder asks for them:
of the rows that were picked, not of all candidates, and for all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from . import hf
from .errors import StackError

if TYPE_CHECKING:
    from .early import EarlyLogits
    from .inside import Inside

_PREFIX = "decoders_"


@dataclass
class Tap:
    """What attention is given, and what is kept of it, while the loop runs the model.

    Attributes:
        wanted: layers whose rows are read.
        queries: [s, h, q, d] by layer, of the newest token alone while the prompt runs.
        options: by layer, how it makes scores of queries and keys: `scaling`, and what its family adds.
        masks: while queries attend to a pool: by layer float [s, 1, q, capacity], added to the scores. Empty while the
            prompt runs, which attends as the model does.
        hidden: hidden states that are read, [s, q, d] by index, of the newest token alone while the prompt runs; and
            what decoders exported, [s, q, ...] by decoder and name.
        inside: the decoders' hooks inside the forward, or None where none has any.
        reductions: how decoders have heads joined.
        rows: in place of queries where decoders change attention: by layer and reduction, float32 [s, q, t].
        early: the early layers whose logits this forward makes with the model's own, or None.
    """

    wanted: frozenset[int]
    inside: Inside | None = None
    reductions: frozenset[str] = frozenset()
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    options: dict[int, dict] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[Any, Tensor] = field(default_factory=dict)
    early: EarlyLogits | None = None

    def keep(self, layer: int, query: Tensor, scaling: float | None, kwargs: dict) -> None:
        """Keep the queries of a layer that is read, and how it makes scores."""
        if layer not in self.wanted:
            return
        _check_options(kwargs)
        self.queries[layer] = query if self.masks else query[:, :, -1:].clone()  # a view would hold the whole prompt's
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.options[layer] = {"scaling": scaling, **{name: kwargs.get(name) for name in ("softcap", "s_aux")}}

    def clear(self) -> None:
        """Before a forward: forget what the one before left, lest a compiled step be made anew for it."""
        self.queries, self.options, self.hidden, self.rows = {}, {}, {}, {}
        if self.inside is not None:
            self.inside.clear()

    def collect(self) -> None:
        """After a forward: what hooks inside it exported stands beside the hidden states."""
        if self.inside is not None:
            self.hidden |= self.inside.exports()
            self.inside.clear()

    def keep_rows(self, layer: int, weights: Tensor) -> None:
        """Keep the weights [s, h, q, t] of a layer that is read, which cannot be had of queries and keys alone."""
        if layer in self.wanted:
            self.rows[layer] = {heads: reduce(weights, "s h q t -> s q t", heads) for heads in self.reductions}


# arguments by which families change attention, and that torch's sdpa does not take
_NOT_IN_SDPA = ("softcap", "s_aux", "position_bias", "sinks")
_tap: ContextVar[Tap | None] = ContextVar("attention rows", default=None)
_traced: Tap | None = None  # while torch.compile traces a step: it cannot follow a ContextVar


def current_tap() -> Tap | None:
    """The tap of this thread's generation, or of the step that is traced."""
    return _traced if torch.compiler.is_compiling() else _tap.get()


def set_traced(tap: Tap | None) -> None:
    """At the beginning and end of a step that is traced, and only there."""
    global _traced
    _traced = tap


def _scores(query: Tensor, key: Tensor, scaling: float | None, softcap: float | None = None) -> Tensor:
    """q k' / sqrt(d) with grouped key heads, [n, h, q, t]; `softcap` bounds them, as in Gemma 2."""
    groups = query.shape[1] // key.shape[1]
    query = query * (
        scaling if scaling is not None else query.shape[-1] ** -0.5
    )  # before the product, which float16 may not hold
    query = rearrange(query, "n (kv g) q d -> n kv (g q) d", g=groups)
    scores = rearrange(query @ key.transpose(-1, -2), "n kv (g q) t -> n (kv g) q t", g=groups)
    return scores if softcap is None else softcap * (scores / softcap).tanh()


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
    _check_options(kwargs)
    scores = _scores(query, key, scaling, softcap)
    mask = None if mask is None else mask[..., : key.shape[-2]]
    return _softmax(scores, None, mask, None if s_aux is None else s_aux.to(scores).view(1, -1, 1, 1))


def _edited(
    tap: Tap,
    layer: int,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest queries, [s, h, q, d], whose scores decoders see and change.

    Args:
        mask: float [s, 1, q, t], added to the scores.

    Returns:
        [s, q, h, d], and the weights, float32 [s, h, q, t].
    """
    assert tap.inside is not None
    _check_options(kwargs)
    scores = _scores(query, key, scaling, softcap)
    sinks = None if s_aux is None else s_aux.to(scores).view(1, -1, 1, 1)

    def softmax(scores: Tensor, mask: Tensor) -> Tensor:
        return _softmax(scores, None, mask, sinks)

    weights = softmax(tap.inside.edit_attention(layer, scores, mask, value, module, softmax), mask)
    tap.keep_rows(layer, weights)
    return _mix(weights, value), weights


def _softmax(scores: Tensor, softcap: float | None, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """float32 weights of scores [..., t], which `softcap` bounds, of which `mask` hides or adds to some, and of which
    the scores `sinks`, [..., 1], take a share.
    """
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    sinks = sinks.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ values with grouped value heads; [n, q, h, d]."""
    q, groups = weights.shape[2], weights.shape[1] // value.shape[1]
    weights = rearrange(weights.to(value.dtype), "n (kv g) q t -> n kv (g q) t", g=groups)
    return rearrange(weights @ value, "n kv (g q) d -> n q (kv g) d", q=q).contiguous()


def _check_options(kwargs: dict) -> None:
    """Refuse what changes attention in a way that is not known here."""
    for name in ("position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise StackError(
                f"this model's attention uses '{name}', which this loop does not reproduce where it computes attention"
                " itself, as it does for every token after the prompt"
            )


def rows(queries: Tensor, keys: Sequence[Tensor], mask: Tensor, options: Sequence[dict], heads: str) -> Tensor:
    """Softmax rows of queries over their sequence's pool, heads joined, float32 [L, s, q, t].

    Args:
        queries: [L, s, q, h, d].
        keys: [s, h', t, d] by layer, with h' heads of keys for h of queries.
        mask: float [L or 1, s, q, t], added to the scores.
        options: by layer, as `Tap` keeps them.
        heads: `mean` or `max`.
    """
    s, q = queries.shape[1:3]
    kv, t = keys[0].shape[1:3]
    queries = rearrange(queries, "L s q (kv g) d -> L (s kv) (g q) d", kv=kv)
    scores = queries.new_empty(*queries.shape[:3], t)
    for each, query, key, option in zip(scores, queries, keys, options, strict=True):
        key = key.flatten(0, 1).transpose(1, 2)
        if key.device == each.device:  # the scale is applied in the product, whose raw sums float16 may not hold
            each.baddbmm_(query, key, beta=0, alpha=option["scaling"])
        else:
            each.copy_(torch.bmm(query.to(key.device) * option["scaling"], key))
    scores = rearrange(scores, "L (s kv) (g q) t -> L s kv g q t", s=s, q=q)
    sinks = None
    if options[0]["s_aux"] is not None:
        sinks = torch.stack([option["s_aux"].to(scores) for option in options])
        sinks = rearrange(sinks, "L (kv g) -> L 1 kv g 1 1", kv=kv)
    weights = _softmax(scores, options[0]["softcap"], rearrange(mask, "L s q t -> L s 1 1 q t"), sinks)
    return reduce(weights, "L s kv g q t -> L s q t", heads)


def _to_pool(
    tap: Tap, layer: int, name: str, module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Queries of beams and candidates, [s, h, q, d], attend to their sequence's pool, each to what its mask shows.

    Heads that share a key are folded into the queries, so that keys are never repeated.
    """
    mask = tap.masks[layer].to(query.device, query.dtype)
    hidden = None if tap.inside is None else tap.inside.hidden_slots(layer, query)
    if hidden is not None:
        mask = mask.masked_fill(hidden.to(mask.device), -torch.inf)
    edited = tap.inside is not None and tap.inside.edits_attention(layer)
    edited |= hidden is not None and layer in tap.wanted  # what is read is without the hidden slots
    newest = query.shape[2] if tap.inside is None or not tap.inside.in_prompt else 1
    if newest == query.shape[2] and edited:
        return _edited(tap, layer, module, query, key, value, mask, scaling, **kwargs)
    if not edited:
        tap.keep(layer, query, scaling, kwargs)
    if name == "eager" or any(kwargs.get(option) is not None for option in _NOT_IN_SDPA):
        weights = _weights(query, key, mask, scaling, **kwargs)
        out = _mix(weights, value)
    else:
        weights = None
        groups = query.shape[1] // key.shape[1]
        folded = rearrange(query, "s (kv g) q d -> s kv (g q) d", g=groups)
        grouped = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=grouped, scale=scaling)
        out = rearrange(out, "s kv (g q) d -> s q (kv g) d", g=groups).contiguous()
    if edited:
        return _newest_edited(tap, layer, module, query, key, value, mask, scaling, out, kwargs), weights
    return out, weights


def _newest_edited(tap: Tap, layer: int, module, query, key, value, mask, scaling, out: Tensor, kwargs: dict) -> Tensor:
    """`out`, [s, q, h, d], with what the last query, whose scores decoders change, attends to in its place."""
    newest, _ = _edited(tap, layer, module, query[:, :, -1:], key, value, mask[:, :, -1:], scaling, **kwargs)
    return torch.cat([out[:, :-1], newest.to(out.dtype)], 1)


def _newest_mask(mask: Tensor | None, query: Tensor) -> Tensor:
    """Of the mask of a prompt, as transformers hands it to an attention function, the row of the newest token: a float
    [s, 1, 1, t] that is added to the scores.

    Args:
        mask: None for a causal one, bool [s, t] of real tokens (flash attention), bool or float [s, 1, q, t].
    """
    s, length = len(query), query.shape[2]
    if mask is None:
        return query.new_zeros(s, 1, 1, length)
    row = mask[:, None, None, :].bool() if mask.ndim == 2 else mask[:, :, -1:, :length]
    if row.dtype == torch.bool:
        row = query.new_zeros(row.shape).masked_fill(~row, torch.finfo(query.dtype).min)
    return row.expand(s, -1, -1, -1)


def _hiding(mask: Tensor | None, query: Tensor, hidden: Tensor) -> Tensor:
    """The mask of a prompt, [s, 1, q, t], that hides the slots `hidden`, bool [s, 1, 1, t], too; a token sees itself.

    Args:
        mask: as `_newest_mask` takes it.
    """
    length = query.shape[2]
    itself = torch.eye(length, dtype=torch.bool, device=query.device)
    hidden = hidden.to(query.device) & ~itself
    if mask is None or mask.ndim == 2:
        causal = torch.ones_like(itself).tril()
        mask = causal[None, None] if mask is None else causal & mask[:, None, None, :].bool()
    mask = mask[..., :length]
    if mask.dtype == torch.bool:
        return mask & ~hidden | itself  # a padding token, whose rows nobody reads, would else see nothing
    return mask.masked_fill(hidden, torch.finfo(query.dtype).min)


def _attention(name: str) -> Callable:
    """The attention function `name` for the prompt; whatever follows attends to the pool."""

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        tap, layer = current_tap(), getattr(module, "layer_idx", -1)
        if tap is not None and layer in tap.masks:
            return _to_pool(tap, layer, name, module, query, key, value, scaling, **kwargs)
        hidden, edited = None, False
        if tap is not None and tap.inside is not None:
            hidden = tap.inside.hidden_slots(layer, query)
            # read alike in the main rows and in branches, of which only some may have slots hidden
            edited = tap.inside.edits_attention(layer) or (bool(tap.inside.branches) and layer in tap.wanted)
        if tap is not None and not edited:
            tap.keep(layer, query, scaling, kwargs)
        if hidden is not None:
            attention_mask = _hiding(attention_mask, query, hidden)
        if name == "eager":  # which each family defines for itself, under no common name
            weights = _weights(query, key, attention_mask, scaling, **kwargs)
            out = _mix(weights, value)
        else:
            known = "sdpa" if hidden is not None and "flash" in name else name  # which takes no such mask
            named = hf.as_attention(module, known) if "flash" in known else module
            out, weights = hf.attention_function(known)(
                named, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if tap is not None and edited:
            mask = _newest_mask(attention_mask, query)
            out = _newest_edited(tap, layer, module, query, key, value, mask, scaling, out, kwargs)
        return out, weights

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
def reading(model, tap: Tap) -> Iterator[None]:
    """Within, the language model attends to the pool by the masks of the tap, and leaves there what is read."""
    name = hf.attention_name(model)
    hf.register_attention(_PREFIX + name, _attention(name), like=name)
    token = _tap.set(tap)
    try:
        with hf.attention_replaced(model, _PREFIX + name):
            yield
    finally:
        _tap.reset(token)
