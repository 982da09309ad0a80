"""A key-value cache that is written in place, and whose slots can be dropped, reordered and brought back row by row and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .errors import StackError

CHUNK = 128  # slots by which a full buffer grows


class SlotLayer(DynamicLayer):
    """A layer whose keys and values are views of a larger buffer, [m, h, capacity, d].

    `DynamicLayer` concatenates, so each token copies the whole cache; here it writes one slot. Whatever else replaces
    `keys` (cropping, transformers' reordering) is honoured: the next `update` finds that the view is not the buffer's and copies once.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._buffers = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._fits(new):
            self.replace(self.keys, self.values, new)
        keys, values = self._buffers
        keys[:, :, old:new], values[:, :, old:new] = key_states, value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    def _fits(self, slots: int) -> bool:
        if self._buffers is None:
            return False
        buffer = self._buffers[0]
        return self.keys.data_ptr() == buffer.data_ptr() and len(self.keys) == len(buffer) and slots <= buffer.shape[-2]

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    def replace(self, keys: Tensor, values: Tensor, room: int = 0) -> None:
        """Hold these instead, [m, h, t, d], in a buffer with room for growth."""
        buffers, t = [], keys.shape[2]
        for x in (keys, values):
            buffers.append(x.new_empty(*x.shape[:2], max(t, room) + CHUNK, x.shape[-1]))
            buffers[-1][:, :, :t] = x
        self._buffers = tuple(buffers)
        self.keys, self.values = (x[:, :, :t] for x in buffers)

    def keep(self, index: Tensor) -> None:
        """Keep, in each row, the slots `index`, long [m, t]; a repeated index makes a slot that must be masked."""
        index = rearrange(index, "m t -> m 1 t 1")
        self.replace(*(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[-1])) for x in (self.keys, self.values)))

    def reorder(self, rows: Tensor, start: int) -> None:
        """Row i becomes row `rows[i]` from slot `start` on; before it rows that change places are equal."""
        for x in (self.keys, self.values):
            x[:, :, start:] = x[:, :, start:].index_select(0, rows)

    def pick(self, rows: Tensor, slot: Tensor, count: int, start: int) -> None:
        """The newest `count` slots are alternatives: row i becomes row `rows[i]` without them, and its alternative `slot[i]`."""
        t = self.keys.shape[2] - count
        chosen = [x[rows, :, t + slot] for x in (self.keys, self.values)]
        self.keys, self.values = self.keys[:, :, :t], self.values[:, :, :t]
        self.reorder(rows, start)
        self.keys, self.values = (x[:, :, : t + 1] for x in self._buffers)
        self.keys[:, :, t], self.values[:, :, t] = chosen


@dataclass
class Slots:
    """Which token each cache slot holds, and which slots are real. Methods change the fields, never the tensors.

    Attributes:
        origin: long [l or 1, m, t], index of the token in the sequence, -1 for padding. Covers the slots up to the last
            change; slots written since hold text, in order.
        valid: bool [m, t], or None while no row has padding.
        lost: long [m]; rows are right-aligned, so a new slot i holds token i + lost.
        shared: leading slots that are equal in all rows of one image.
    """

    origin: Tensor
    valid: Tensor | None
    lost: Tensor
    shared: int

    @staticmethod
    def of(rows: int, prompt: int, padding: Tensor | None, device: torch.device) -> Slots:
        """The books of a prompt, padded where `padding`, [m, prompt], is 0."""
        origin = torch.arange(prompt, device=device).expand(1, rows, prompt)
        valid = None if padding is None else padding.bool()
        return Slots(origin if valid is None else origin.masked_fill(~valid, -1), valid, torch.zeros(rows, dtype=torch.long, device=device), prompt)

    def visual(self, prompt_mask: Tensor) -> Tensor:
        """bool [l or 1, m, t]: the slots that hold visual tokens, from the prompt's mask [m, prompt]."""
        at = self.origin.clamp(0, prompt_mask.shape[1] - 1)
        inside = (self.origin >= 0) & (self.origin < prompt_mask.shape[1])
        return prompt_mask.expand(at.shape[0], -1, -1).gather(2, at) & inside

    def mask(self, length: int) -> Tensor | None:
        """The attention mask of a cache of `length` slots, bool [m, length], or None while no row has padding."""
        if self.valid is None:
            return None
        m, t = self.valid.shape
        return torch.cat([self.valid, self.valid.new_ones(m, length - t)], -1)

    def full_origin(self, length: int) -> Tensor:
        """`origin` of all `length` slots: those written since the last change are text, in order."""
        l, m, t = self.origin.shape
        if length == t:
            return self.origin
        new = torch.arange(t, length, device=self.origin.device) + self.lost[:, None]
        return torch.cat([self.origin, new.expand(l, m, -1)], -1)

    def index(self, rows: Tensor) -> None:
        """Row i becomes row `rows[i]`."""
        self.origin, self.lost = self.origin[:, rows], self.lost[rows]
        self.valid = None if self.valid is None else self.valid[rows]

    def keep(self, cache: Cache, slots: Tensor, who: str) -> None:
        """Drop from `cache` what is false in `slots`, bool [l or 1, m, t]. Rows are right-aligned; padding is masked."""
        length = slots.shape[-1]
        origin, valid = self.full_origin(length), self.mask(length)
        if valid is not None:
            slots = slots & valid
        counts = slots.sum(-1)  # [l, m]
        most, fewest, uneven = torch.stack([counts.max(), counts.min(), (counts != counts[:1]).any().long()]).tolist()
        if uneven:
            raise StackError(
                f"{who}: together they keep different numbers of slots in different layers of one row, which one attention mask cannot say; "
                "let them keep the same set in all layers, or leave one out"
            )
        # a stable sort brings kept slots to the right end, in their order
        index = slots.long().argsort(dim=-1, stable=True)[..., length - most :]  # [l, m, most]
        for i, layer in enumerate(cache.layers):
            layer.keep(index[i if len(index) > 1 else 0].to(layer.keys.device))
        self.valid = None if fewest == most else slots[0].gather(1, index[0])
        layers = max(len(index), len(origin))
        self.origin = origin.expand(layers, -1, -1).gather(2, index.expand(layers, -1, -1))
        if self.valid is not None:
            self.origin = self.origin.masked_fill(~self.valid, -1)
        self.lost, self.shared = self.lost + length - most, 0

    def crop(self, cache: Cache) -> None:
        """Take the newest slot away."""
        cache.crop(-1)
        length = cache.get_seq_length()
        if self.origin.shape[-1] > length:
            self.origin = self.origin[..., :length]
            self.valid = None if self.valid is None else self.valid[:, :length]

    def copy(self) -> Slots:
        return replace(self)


class Tape:
    """What rows held before they were reordered or pruned, so that any earlier cache can be made again.

    A cache is a function of which tokens its slots hold and of which rows wrote them. The tape keeps the prompt's slots, one row an
    image, and every slot of text as it was written, by row; they are never reordered.
    """

    def __init__(self, cache: Cache, slots: Slots, prompt: int, rows: Tensor):
        """`rows`, long [m]: the row of `cache` (as it is now, prefilled) that each later row begins with."""
        self.prompt, self.rows = prompt, rows
        origin = slots.full_origin(cache.get_seq_length())
        self.before = [self._by_token(layer, origin[i if len(origin) > 1 else 0]) for i, layer in enumerate(cache.layers)]
        self.text = [tuple(x.new_empty(len(rows), x.shape[1], CHUNK, x.shape[3]) for x in pair) for pair in self.before]

    def _by_token(self, layer: SlotLayer, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [m, h, prompt, d], in the order of the prompt; nothing where slots were dropped."""
        pair = (layer.keys, layer.values)
        if origin.shape[1] == self.prompt:
            return pair
        at = origin.masked_fill(origin < 0, self.prompt).to(layer.keys.device)[:, None, :, None]  # pads go behind, and are cut off
        return tuple(x.new_zeros(*x.shape[:2], self.prompt + 1, x.shape[3]).scatter_(2, at.expand_as(x), x)[:, :, :-1] for x in pair)

    def write(self, cache: Cache, at: Tensor, longest: int) -> None:
        """Keep the newest slot of each row, text token `at`, long [m], of which the largest is `longest`."""
        rows = torch.arange(len(at), device=at.device)
        for i, (layer, pair) in enumerate(zip(cache.layers, self.text)):
            if longest >= pair[0].shape[2]:
                pair = self.text[i] = tuple(torch.cat([x, torch.empty_like(x[:, :, :1]).expand(-1, -1, CHUNK, -1)], 2) for x in pair)
            for x, new in zip(pair, (layer.keys, layer.values)):
                x[rows.to(x.device), :, at.to(x.device)] = new[:, :, -1]

    def restore(self, cache: Cache, origin: Tensor, writers: Tensor) -> None:
        """Make the cache whose slots hold the tokens `origin`, long [l or 1, m, t], -1 for padding; text token s of row i was written by row `writers[i, s]`, long [m, s]."""
        text = torch.arange(writers.shape[1], device=writers.device)
        for i, layer in enumerate(cache.layers):
            at = origin[i if len(origin) > 1 else 0].clamp(min=0).to(layer.keys.device)
            both = []
            device = layer.keys.device
            for prompt, written in zip(self.before[i], self.text[i]):
                written = rearrange(written[writers.to(device), :, text.to(device)], "m s h d -> m h s d")
                everything = torch.cat([prompt[self.rows.to(device)], written], 2)
                both.append(everything.gather(2, at[:, None, :, None].expand(-1, everything.shape[1], -1, everything.shape[3])))
            layer.replace(*both)
