"""The model's forwards: main rows and branches together, on one cache, and the books about its slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from . import hf
from .attention import Tap
from .cache import SlotLayer, Slots, StateLayer, Tape, WindowLayer, left, like
from .errors import StackError
from .prepare import Prepared
from .state import fit


@dataclass
class Seen:
    """What a forward showed at the newest tokens. [m, ...] for one token a row, [m, q, ...] for a tree of q candidates.

    Attributes:
        logits: [m, v].
        attention: float32 [m, t] by (layer, way to join heads); layers are counted among those that attend to the whole
            sequence.
        hidden: [m, d] by index of the hidden state.
        output: what the model returned.
    """

    logits: Tensor
    attention: dict[tuple[int, str], Tensor]
    hidden: dict[int, Tensor]
    output: Any = None

    def map(self, change) -> Seen:
        return Seen(
            change(self.logits),
            {k: change(v) for k, v in self.attention.items()},
            {k: change(v) for k, v in self.hidden.items()},
            self.output,
        )


_HEAD = -1  # where the output embeddings' own result stands among hidden states


@contextmanager
def watching(model, indices: set[int], tap: Tap) -> Iterator[dict[int, Tensor]]:
    """Within, forwards of this thread leave the hidden states `indices` of the newest tokens, [m, q, d], in the dict
    yielded.
    """
    seen: dict[int, Tensor] = {}
    hooks, mine = [], get_ident()
    if indices:
        blocks, head = hf.blocks(model), hf.output_embeddings(model)
        if min(indices) < 0 or max(indices) > len(blocks):
            raise StackError(f"hidden states {sorted(indices)} were asked for; the model has 0 to {len(blocks)}")

    def hook(i: int):
        def note(module, args, kwargs):
            if get_ident() == mine:
                seen[i] = hf.input_of(args, kwargs)[:, -tap.queries :]

        return note

    def made(module, args, output):
        if get_ident() == mine:
            seen[_HEAD] = output[:, -tap.queries :]

    try:
        for i in indices:
            module = blocks[i] if i < len(blocks) else head
            hooks.append(module.register_forward_pre_hook(hook(i), with_kwargs=True))
        if indices:
            hooks.append(head.register_forward_hook(made))
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _masked(decoder, masks: dict[str, Tensor | None]) -> Iterator[None]:
    """Within, the text model `decoder` gets these masks in forwards of this thread; not every wrapper hands on more
    than one.
    """
    mine = get_ident()

    def put(module, args, kwargs):
        return (args, {**kwargs, "attention_mask": masks}) if get_ident() == mine else None

    handle = decoder.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _head(model, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes float32 logits of hidden states as the model does of its last: the output embeddings, and the scale or
    cap that it puts on their result.

    Args:
        raw: what the output embeddings made of some hidden states; `logits`: what the model made of that.
    """
    embeddings, raw, logits = hf.output_embeddings(model), raw.float(), logits.float()

    def same(ours: Tensor) -> bool:
        return bool((ours - logits).abs().max() <= 0.01 * logits.abs().max())

    scale = (raw * logits).sum() / (raw * raw).sum()
    cap = hf.logit_softcap(model)
    if cap and same(cap * (raw / cap).tanh()):  # before the others, which small logits fit as well
        return lambda hidden: cap * (embeddings(hidden).float() / cap).tanh()
    if same(raw):
        return lambda hidden: embeddings(hidden).float()
    if same(scale * raw):
        return lambda hidden: embeddings(hidden).float() * scale
    raise StackError(
        f"{type(model).__name__} makes its logits of its output embeddings in a way that is not known here (neither as"
        " they are, nor by a scale or final_logit_softcapping), so those of early layers cannot be made alike"
    )


class Forwards:
    """Rows of the model: n main rows, then n of each branch; m in all.

    Args:
        given: what is prefilled, a row an image.
        branches: the same for each branch.
        tap: where attention rows arrive.
        hidden: where hidden states arrive.
        ours: whether the loop's own cache stands in for the one that transformers prepared.
        layers: indices of the layers that attend to the whole sequence.
    """

    def __init__(
        self,
        given: Prepared,
        branches: list[Prepared],
        tap: Tap,
        hidden: dict[int, Tensor],
        ours: bool,
        layers: tuple[int, ...],
    ):
        self.model, self.tap, self.hidden = given.model, tap, hidden
        self.given, self.branches, self.ours, self.layers = given, branches, ours, layers
        self.rows = len(given.input_ids)
        self.head: Callable[[Tensor], Tensor] | None = None  # logits of hidden states, where somebody reads these
        self.prompt = max(p.prompt for p in (given, *branches))
        cache: Any = hf.cache_of(given.kwargs)  # None where the model keeps one by another name (Mamba, RWKV)
        self.cache: hf.Cache = like(cache) if ours else cache
        self.books: list[Slots] = []
        self.recurrent: list[StateLayer] = []

    def prefill(self) -> Seen:
        """Run the prompts."""
        seen, caches, ends = [], [], []
        for i, one in enumerate((self.given, *self.branches)):
            cache = self.cache if i == 0 else like(self.cache)
            out, end = hf.prefill(self.model, one.input_ids, one.config, hf.with_cache(one.kwargs, cache))
            seen.append(self._seen(out, 1).map(lambda x: x[:, -1]))
            caches.append(cache)
            ends.append(end)
        self.kwargs = hf.constant_inputs(ends[0])
        newest = [hf.token_inputs(end) for end in ends]
        # of the first answer token; [m, 1] or [axes, m, 1]
        self.newest = {k: torch.cat([one[k] for one in newest], -2) for k in newest[0]}
        if self.ours and "position_ids" not in self.newest:
            raise StackError(
                f"{type(self.model).__name__} takes no position_ids, without which a changed cache would shift its"
                " positions"
            )
        self._books(caches)
        return Seen(
            torch.cat([s.logits for s in seen]),
            {k: torch.cat([left(s.attention[k], self.prompt) for s in seen]) for k in seen[0].attention},
            {k: torch.cat([s.hidden[k] for s in seen]) for k in seen[0].hidden},
            seen[0].output,
        )

    def _books(self, caches: list[hf.Cache]) -> None:
        masks = []
        for one in (self.given, *self.branches):
            mask = one.kwargs.get("attention_mask")
            mask = torch.ones(self.rows, one.prompt, device=one.input_ids.device) if mask is None else mask
            masks.append(left(mask, self.prompt))
        device = self.given.input_ids.device
        padding = None if self.ours and all(bool(mask.all()) for mask in masks) else torch.cat(masks).to(device)
        if not self.ours:
            self.slots = Slots.of([], len(self.given.input_ids), self.prompt, padding, device)
            return
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, SlotLayer) and (not layer.begun or layer.keys.shape[-2] != self.given.prompt):
                held = layer.keys.shape[-2] if layer.begun else "no"
                raise StackError(
                    f"{type(self.model).__name__}: layer {i} caches {held} slots for a prompt of {self.given.prompt}"
                    " tokens (cross-attention, or keys and values of another layer), which a stack with decoders does"
                    " not support"
                )
            if len(caches) > 1 and isinstance(layer, (SlotLayer, StateLayer)):
                others: list = [cache.layers[i] for cache in caches[1:]]
                layer.join(others, self.prompt)
        m = self.rows * len(caches)
        windows: list[SlotLayer] = [layer for layer in self.cache.layers if isinstance(layer, WindowLayer)]
        whole = [layer for i in self.layers if isinstance(layer := self.cache.layers[i], SlotLayer)]
        self.slots = Slots.of(whole, m, self.prompt, padding, device)
        self.books = [
            self.slots,
            *(
                [Slots.of(windows, m, self.prompt, padding, device)]
                if windows and len(self.layers) < len(self.cache.layers)
                else []
            ),
        ]
        self.recurrent = [layer for layer in self.cache.layers if isinstance(layer, StateLayer)]

    def again(self, tokens: Tensor, at: Tensor) -> Seen:
        """Take the newest slots away and run their tokens, [n] or [m], again, which are the answer's token `at`, [n],
        -1 for the prompt's last.
        """
        if self.recurrent:  # a decoder that prunes before the first token and does not say so
            raise StackError(
                f"{type(self.model).__name__} keeps running states, which cannot be taken back; a decoder that prunes"
                " before the first token declares Reads(again=True)"
            )
        for books in self.books:
            books.crop()
        return self.next(tokens, at)

    def last_prompt_tokens(self) -> Tensor:
        """[m]"""
        return torch.cat(
            [
                one.input_ids[:, -1] if one.input_ids.shape[1] else one.input_ids.new_zeros(len(one.input_ids))
                for one in (self.given, *self.branches)
            ]
        )

    def expand(self, rows: Tensor, tape: bool) -> None:
        """Row i becomes row `rows[i]`, long [n]: several beams, or answers, of one image."""
        count, self.rows = self.rows, len(rows)
        every = self.every(rows, count)
        for books in self.books if tape else ():
            books.tape = Tape(books, self.prompt, every)
        if self.ours and len(rows) != count:
            for books in self.books:
                for layer in books.layers:
                    there = every.to(layer.keys.device)
                    layer.replace(layer.keys[there], layer.values[there])
                books.index(every)
            for state in self.recurrent:
                hf.reorder(state, every)
            self.newest = {k: v.index_select(-2, every) for k, v in self.newest.items()}
        self.writers = torch.zeros(self.rows, 0, dtype=torch.long, device=rows.device)

    def every(self, rows: Tensor, count: int) -> Tensor:
        """The same choice among the rows of every branch: [m] from [n]."""
        return torch.cat([rows + i * count for i in range(len(self.branches) + 1)])

    def attend(self, parts: list[Tensor | None]) -> None:
        """Add to the attention scores of forwards from now on: a float [l or 1, n, t] for the main rows and each
        branch, None for nothing.
        """
        self.tap.bias.clear()
        known = [p for p in parts if p is not None]
        if not known:
            return
        count = max(len(p) for p in known)
        none = known[0].new_zeros(known[0].shape)
        bias = torch.cat([(none if p is None else p).expand(count, -1, -1) for p in parts], 1)
        for i, layer in enumerate(self.layers):
            self.tap.bias[layer] = bias[i if count > 1 else 0][:, None, None]

    def next(self, tokens: Tensor, at: Tensor) -> Seen:
        """Run one token a row, long [n] or [m], which is token `at` of the answer, long [n]."""
        tokens = tokens if len(tokens) == len(self.slots.lost) else tokens.repeat(len(self.branches) + 1)
        mask: Tensor | dict[str, Tensor | None] | None
        if not self.ours:
            mask = self.slots.mask(self.cache.get_seq_length() + 1)
        elif len(self.books) > 1:
            mask = self._by_kind([self._one(books.reach(), 4) for books in self.books])
        else:
            mask = self._one(self.slots.reach(), 2)
        return self._seen(self._run(tokens[:, None], at, mask), 1).map(lambda x: x[:, -1])

    @staticmethod
    def _one(reach: Tensor | None, dims: int) -> Tensor | None:
        """The mask of one more token a row: [m, t], or bool [m, 1, 1, t] with 4 `dims`."""
        if reach is None:
            return None
        mask = torch.cat([reach, reach.new_ones(len(reach), 1)], -1)
        return mask.long() if dims == 2 else mask[:, None, None]

    def _by_kind(self, masks: list[Tensor | None]) -> dict[str, Tensor | None]:
        """Masks of the books as models with layers of several kinds take them."""
        places = {kind: i for i, kind in enumerate(hf.layer_types(self.model))}
        return {
            kind: masks[0] if i in self.layers else masks[-1] if isinstance(self.cache.layers[i], WindowLayer) else None
            for kind, i in places.items()
        }

    def tree(self, tokens: Tensor, at: Tensor) -> Seen:
        """Run the candidates `tokens`, long [n, c], of each row, each alone after the row's cache, all as token `at`,
        long [n].
        """
        n, c = tokens.shape
        length = self.slots.length
        m = n * (len(self.branches) + 1)
        alone = torch.eye(c, dtype=torch.bool, device=tokens.device).expand(m, 1, c, c)
        masks: list[Tensor | None] = []
        for books in self.books:
            reach = books.reach()
            before = alone.new_ones(m, 1, 1, books.length) if reach is None else reach[:, None, None]
            masks.append(torch.cat([before.expand(-1, -1, c, -1), alone], -1))
        self.tap.queries = c
        try:
            out = self._run(
                tokens.repeat(len(self.branches) + 1, 1), at, self._by_kind(masks) if len(masks) > 1 else masks[0]
            )
            seen = self._seen(out, c)
        finally:
            self.tap.queries = 1
        for k, rows in seen.attention.items():  # each candidate's row: the cache and itself
            itself = rows[..., length:].diagonal(dim1=1, dim2=2)[..., None]
            seen.attention[k] = torch.cat([rows[..., :length], itself], -1)
        return seen

    def pick(self, tree: Seen, parents: Tensor, choice: Tensor) -> Seen:
        """Row i becomes row `parents[i]` and its candidate `choice[i]`, long [n]."""
        rows, slot = self.every(parents, self.rows), choice.repeat(len(self.branches) + 1)
        for books in self.books:
            for layer in books.layers:
                layer.pick(rows.to(layer.keys.device), slot.to(layer.keys.device), tree.logits.shape[1], books.shared)
            books.moved(rows, self.prompt)
        self.writers = self.writers[parents]
        return replace(tree.map(lambda x: x[rows, slot]), output=None)

    def unpick(self, count: int) -> None:
        """Forget the newest `count` slots, of candidates."""
        for books in self.books:
            books.crop(count)

    def reorder(self, parents: Tensor) -> None:
        """Row i becomes row `parents[i]`, long [n], of the same image."""
        rows = self.every(parents, self.rows)
        if self.ours:
            for books in self.books:
                books.reorder(rows, self.prompt)
            for layer in self.recurrent:
                hf.reorder(layer, rows)
        else:
            hf.reorder(self.cache, rows)
            self.slots.moved(rows, self.prompt)
        self.writers = self.writers[parents]

    def write(self, at: Tensor, longest: int) -> None:
        """Keep the newest slots, of answer token `at`, long [n], at most `longest`, for a return."""
        for books in self.books:
            assert books.tape is not None  # only decoders that may go back have their slots written
            books.tape.write(at.repeat(len(self.branches) + 1), longest)
        wide = fit(self.writers, [self.rows, max(longest + 1, self.writers.shape[1])])
        self.writers = wide.scatter(1, at[:, None], torch.arange(self.rows, device=at.device)[:, None])

    def keep(self, slots: Tensor, who: str) -> None:
        """Drop what is false in `slots`, bool [l or 1, m, t], of the layers that attend to the whole sequence."""
        if slots.shape[-1] != self.slots.length:
            raise StackError(
                f"{who}: says what stays of {slots.shape[-1]} slots, the cache has {self.slots.length}; `Step.visual`"
                " and `Step.origin` may be shorter, as later slots hold text"
            )
        self.slots.keep(slots, who)

    def seal(self) -> None:
        """Nothing can be added to the cache any more: who went on from it would count its slots as tokens."""
        for books in self.books:
            for layer in books.layers:
                layer.sealed = True

    def save(self) -> tuple[list[Slots], list[int], Tensor]:
        return [books.copy() for books in self.books], [books.length for books in self.books], self.writers

    def restore(self, saved: list[tuple], size: int) -> None:
        """Each group of `size` rows as it was in `saved[i]`."""
        group = torch.arange(len(self.slots.lost), device=self.writers.device) % self.rows // size  # of each row
        steps = max(one[2].shape[1] for one in saved)
        self.writers = fit(self.writers, [self.rows, max(steps, self.writers.shape[1])]).clone()
        for i, (_, _, ancestors) in enumerate(saved):
            own = group[: self.rows] == i
            self.writers[own] = fit(ancestors, [self.rows, self.writers.shape[1]])[own]
        writers = torch.cat([self.writers + i * self.rows for i in range(len(self.branches) + 1)])
        for k, books in enumerate(self.books):
            books.restore([(one[0][k], one[1][k]) for one in saved], group, self.prompt, writers)

    def _run(self, tokens: Tensor, at: Tensor, mask: Tensor | dict | None):
        kwargs = dict(self.kwargs)
        for name, value in self.newest.items():
            if name == "position_ids":
                value = value + at.repeat(len(self.branches) + 1)[:, None]
            kwargs[name] = value.expand(*value.shape[:-1], tokens.shape[1])
        by_kind = mask if isinstance(mask, dict) else None
        one = None if isinstance(mask, dict) else mask
        inputs = hf.decode_inputs(self.model, tokens, self.cache, one, kwargs)
        with nullcontext() if by_kind is None else _masked(hf.text_model(self.model), by_kind):
            return self.model(**inputs, return_dict=True)

    def _seen(self, out, queries: int) -> Seen:
        rows, self.tap.rows = (
            {(self.layers.index(layer), heads): row for (layer, heads), row in self.tap.rows.items()},
            {},
        )
        hidden = dict(self.hidden)
        self.hidden.clear()
        raw = hidden.pop(_HEAD, None)
        if raw is not None and self.head is None:
            self.head = _head(self.model, raw, out.logits[:, -queries:])
        device = self.given.input_ids.device
        seen = Seen(out.logits[:, -queries:], rows, hidden).map(lambda x: x.to(device))
        return replace(seen, output=out)
