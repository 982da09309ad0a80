"""The model's forwards: main rows and branches together, on one cache, and the books about its slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attention import Tap
from .cache import SlotLayer, Slots, Tape
from .errors import StackError
from .prepare import Prepared
from .state import fit


@dataclass
class Seen:
    """What a forward showed at the newest tokens. [m, ...] for one token a row, [m, q, ...] for a tree of q candidates.

    Attributes:
        logits: [m, v].
        attention: float32 [m, t] by (layer, way to join heads).
        hidden: [m, d] by index of the hidden state.
        output: what the model returned.
    """

    logits: Tensor
    attention: dict[tuple[int, str], Tensor]
    hidden: dict[int, Tensor]
    output: Any = None

    def map(self, change) -> Seen:
        return Seen(change(self.logits), {k: change(v) for k, v in self.attention.items()}, {k: change(v) for k, v in self.hidden.items()}, self.output)


@contextmanager
def watching(model, indices: set[int], tap: Tap) -> Iterator[dict[int, Tensor]]:
    """Within, forwards leave the hidden states `indices` of the newest tokens, [m, q, d], in the dict yielded."""
    seen: dict[int, Tensor] = {}
    hooks = []
    if indices:
        blocks = getattr(model.get_decoder(), "layers", None)
        if blocks is None or model.get_output_embeddings() is None:
            raise StackError(f"{type(model).__name__} has no decoder blocks or output embeddings where transformers puts them, so its hidden states cannot be read")
        if min(indices) < 0 or max(indices) > len(blocks):
            raise StackError(f"hidden states {sorted(indices)} were asked for; the model has 0 to {len(blocks)}")

    def hook(i: int):
        def note(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[i] = hidden[:, -tap.queries :]

        return note

    try:
        for i in indices:
            module = blocks[i] if i < len(blocks) else model.get_output_embeddings()
            hooks.append(module.register_forward_pre_hook(hook(i), with_kwargs=True))
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


class Forwards:
    """Rows of the model: n main rows, then n of each branch; m in all.

    Args:
        given: what is prefilled, a row an image.
        branches: the same for each branch.
        tap: where attention rows arrive.
        hidden: where hidden states arrive.
        decoders: whether a stack has any; transformers' own caches serve the empty one only.
    """

    def __init__(self, given: Prepared, branches: list[Prepared], tap: Tap, hidden: dict[int, Tensor], decoders: bool):
        self.model, self.tap, self.hidden = given.model, tap, hidden
        self.given, self.branches = given, branches
        self.rows = len(given.input_ids)
        self.prompt = max(p.prompt for p in (given, *branches))
        self.ours = Forwards.takes(given, decoders)
        self.cache: Cache = Cache(layer_class_to_replicate=SlotLayer) if self.ours else given.kwargs["past_key_values"]
        self.tape: Tape | None = None

    @staticmethod
    def takes(given: Prepared, decoders: bool) -> bool:
        """Whether the loop's own cache can stand in for the one that transformers prepared; else an error, unless the stack is empty."""
        return _ours(given.kwargs.get("past_key_values"), decoders, given.model)

    def prefill(self) -> Seen:
        """Run the prompts."""
        seen, caches, ends = [], [], []
        for i, one in enumerate((self.given, *self.branches)):
            cache = self.cache if i == 0 else Cache(layer_class_to_replicate=SlotLayer)
            kwargs = {**one.kwargs, "past_key_values": cache}
            out = self.model._prefill(one.input_ids, one.config, kwargs)
            seen.append(self._seen(out, 1).map(lambda x: x[:, -1]))
            caches.append(cache)
            ends.append(self.model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False))
        self.kwargs = {k: v for k, v in ends[0].items() if not isinstance(v, Tensor) and k not in ("mm_encoder_outputs", "past_key_values")}
        newest = [{k: v[..., -1:] for k, v in end.items() if k in ("position_ids", "mm_token_type_ids", "token_type_ids") and isinstance(v, Tensor)} for end in ends]
        self.newest = {k: torch.cat([one[k] for one in newest], -2) for k in newest[0]}  # of the first answer token; [m, 1] or [axes, m, 1]
        if self.ours and "position_ids" not in self.newest:
            raise StackError(f"{type(self.model).__name__} takes no position_ids, without which a changed cache would shift its positions")
        self._books(caches)
        return Seen(
            torch.cat([s.logits for s in seen]),
            {k: torch.cat([_left(s.attention[k], self.prompt) for s in seen]) for k in seen[0].attention},
            {k: torch.cat([s.hidden[k] for s in seen]) for k in seen[0].hidden},
            seen[0].output,
        )

    def _books(self, caches: list[Cache]) -> None:
        padding = []
        for one in (self.given, *self.branches):
            mask = one.kwargs.get("attention_mask")
            mask = torch.ones(self.rows, one.prompt, device=one.input_ids.device) if mask is None else mask
            padding.append(_left(mask, self.prompt))
        padding = torch.cat(padding)
        device = self.given.input_ids.device
        self.slots = Slots.of(len(padding), self.prompt, None if self.ours and bool(padding.all()) else padding, device)
        self.slots.valid = None if self.slots.valid is None else self.slots.valid.to(device)
        for i, layer in enumerate(self.cache.layers if len(caches) > 1 else ()):
            pair = [[getattr(c.layers[i], name) for c in caches] for name in ("keys", "values")]
            layer.replace(*(torch.cat([_left(x, self.prompt, 2) for x in xs]) for xs in pair))

    def again(self, tokens: Tensor, at: Tensor) -> Seen:
        """Take the newest slots away and run their tokens, [n] or [m], again, which are the answer's token `at`, [n], -1 for the prompt's last."""
        self.slots.crop(self.cache)
        return self.next(tokens, at)

    def last_prompt_tokens(self) -> Tensor:
        """[m]"""
        return torch.cat([one.input_ids[:, -1] if one.input_ids.shape[1] else one.input_ids.new_zeros(len(one.input_ids)) for one in (self.given, *self.branches)])

    def expand(self, rows: Tensor, tape: bool) -> None:
        """Row i becomes row `rows[i]`, long [n]: several beams, or answers, of one image."""
        count, self.rows = self.rows, len(rows)
        every = self.every(rows, count)
        if tape:
            self.tape = Tape(self.cache, self.slots, self.prompt, every)
        if self.ours and len(rows) != count:
            for layer in self.cache.layers:
                there = every.to(layer.keys.device)
                layer.replace(layer.keys[there], layer.values[there])
            self.slots.index(every)
            self.newest = {k: v.index_select(-2, every) for k, v in self.newest.items()}
        self.writers = torch.zeros(self.rows, 0, dtype=torch.long, device=rows.device)

    def every(self, rows: Tensor, count: int) -> Tensor:
        """The same choice among the rows of every branch: [m] from [n]."""
        return torch.cat([rows + i * count for i in range(len(self.branches) + 1)])

    def next(self, tokens: Tensor, at: Tensor) -> Seen:
        """Run one token a row, long [n] or [m], which is token `at` of the answer, long [n]."""
        length = self.cache.get_seq_length() + 1
        mask = self.slots.mask(length)
        tokens = tokens if len(tokens) == len(self.slots.lost) else tokens.repeat(len(self.branches) + 1)
        out = self._run(tokens[:, None], at, None if mask is None else mask.long())
        return self._seen(out, 1).map(lambda x: x[:, -1])

    def tree(self, tokens: Tensor, at: Tensor) -> Seen:
        """Run the candidates `tokens`, long [n, c], of each row, each alone after the row's cache, all as token `at`, long [n]."""
        n, c = tokens.shape
        length = self.cache.get_seq_length()
        valid = self.slots.mask(length)
        m = n * (len(self.branches) + 1)
        before = torch.ones(m, 1, 1, length, dtype=torch.bool, device=tokens.device) if valid is None else valid[:, None, None]
        alone = torch.eye(c, dtype=torch.bool, device=tokens.device).expand(m, 1, c, c)
        self.tap.queries = c
        try:
            out = self._run(tokens.repeat(len(self.branches) + 1, 1), at, torch.cat([before.expand(-1, -1, c, -1), alone], -1))
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
        for layer in self.cache.layers:
            layer.pick(rows.to(layer.keys.device), slot.to(layer.keys.device), tree.logits.shape[1], self.slots.shared)
        self._moved(rows, parents)
        return replace(tree.map(lambda x: x[rows, slot]), output=None)

    def unpick(self, count: int) -> None:
        """Forget the newest `count` slots, of candidates."""
        self.cache.crop(-count)

    def reorder(self, parents: Tensor) -> None:
        """Row i becomes row `parents[i]`, long [n], of the same image."""
        rows = self.every(parents, self.rows)
        if self.ours:
            for layer in self.cache.layers:
                layer.reorder(rows.to(layer.keys.device), self.slots.shared)
        else:
            self.cache.reorder_cache(rows)
        self._moved(rows, parents)

    def _moved(self, rows: Tensor, parents: Tensor) -> None:
        if self.slots.shared < self.prompt or self.slots.origin.shape[-1] > self.prompt:
            self.slots.index(rows)
        self.writers = self.writers[parents]

    def write(self, at: Tensor, longest: int) -> None:
        """Keep the newest slots, of answer token `at`, long [n], at most `longest`, for a return."""
        self.tape.write(self.cache, at.repeat(len(self.branches) + 1), longest)
        wide = fit(self.writers, [self.rows, max(longest + 1, self.writers.shape[1])])
        self.writers = wide.scatter(1, at[:, None], torch.arange(self.rows, device=at.device)[:, None])

    def keep(self, slots: Tensor, who: str) -> None:
        """Drop what is false in `slots`, bool [l or 1, m, t]."""
        self.slots.keep(self.cache, slots, who)

    def save(self) -> tuple[Slots, Tensor, int]:
        return self.slots.copy(), self.writers, self.cache.get_seq_length()

    def restore(self, saved: list[tuple], size: int) -> None:
        """Each group of `size` rows as it was in `saved[i]`."""
        m = len(self.slots.lost)
        steps = max(one[1].shape[1] for one in saved)
        group = torch.arange(m, device=self.writers.device) % self.rows // size  # of each row
        whole = {id(one): one[0].full_origin(one[2]) for one in saved}
        width = max(int((origin >= 0).sum(-1)[:, group == i].max()) for i, origin in enumerate(whole[id(one)] for one in saved))
        layers = max(len(origin) for origin in whole.values())
        self.slots.origin = torch.empty(layers, m, width, dtype=torch.long, device=group.device)
        self.writers = fit(self.writers, [self.rows, max(steps, self.writers.shape[1])]).clone()
        self.slots.lost = self.slots.lost.clone()
        for i, (slots, ancestors, length) in enumerate(saved):
            mine = group == i
            origin = whole[id(saved[i])][:, mine]
            origin = origin[..., -width:] if origin.shape[-1] >= width else _left(origin, width, fill=-1)
            self.slots.origin[:, mine] = origin.expand(layers, -1, -1)
            own = mine[: self.rows]
            self.writers[own] = fit(ancestors, [self.rows, self.writers.shape[1]])[own]
            self.slots.lost[mine] = slots.lost[mine] + length - width
        valid = self.slots.origin[0] >= 0
        self.slots.valid = None if bool(valid.all()) else valid
        alike = all(one[0].shared == self.prompt and one[2] == width for one in saved)
        self.slots.shared = self.prompt if alike else 0
        writers = torch.cat([self.writers + i * self.rows for i in range(len(self.branches) + 1)])
        self.tape.restore(self.cache, self.slots.origin, writers)

    def _run(self, tokens: Tensor, at: Tensor, mask: Tensor | None):
        m, q = tokens.shape
        kwargs = {**self.kwargs, "past_key_values": self.cache, "attention_mask": mask}
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = q
        for name, value in self.newest.items():
            if name == "position_ids":
                value = value + at.repeat(len(self.branches) + 1)[:, None]
            kwargs[name] = value.expand(*value.shape[:-1], q)
        inputs = self.model.prepare_inputs_for_generation(tokens, next_sequence_length=q, **kwargs)
        return self.model(**inputs, return_dict=True)

    def _seen(self, out, queries: int) -> Seen:
        rows, self.tap.rows = self.tap.rows, {}
        hidden = dict(self.hidden)
        self.hidden.clear()
        device = self.given.input_ids.device
        seen = Seen(out.logits[:, -queries:], rows, hidden).map(lambda x: x.to(device))
        return replace(seen, output=out)


def _ours(cache, decoders: bool, model) -> bool:
    """Whether the loop's own cache can stand in for the one that transformers prepared."""
    if cache is not None and cache.get_seq_length():
        raise StackError("continuing from a filled cache is not supported: pass the whole conversation, without past_key_values")
    offloaded = getattr(cache, "offloading", False)
    ordinary = isinstance(cache, DynamicCache) and cache.layers and not offloaded and not getattr(cache, "_is_user_defined", False)
    if ordinary and all(type(layer) is DynamicLayer for layer in cache.layers):
        return True
    if decoders:
        kinds = ["no cache"] if cache is None else ["an offloaded cache"] if offloaded else sorted({type(layer).__name__ for layer in cache.layers}) or ["a cache of the caller's own"]
        raise StackError(
            f"a stack with decoders needs a full-attention cache in every layer; {type(model).__name__} here has {', '.join(kinds)} "
            "(sliding-window, linear-attention, static, offloaded and user-made caches are refused)"
        )
    return False


def _left(tensor: Tensor, length: int, dim: int = -1, fill: int = 0) -> Tensor:
    """Padded on the left of `dim` to `length`."""
    short = length - tensor.shape[dim]
    if short <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor.new_full(shape, fill), tensor], dim)
