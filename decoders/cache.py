"""A key-value cache that is written in place, and whose slots can be dropped row by row and layer by layer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

CHUNK = 128  # slots by which a full buffer grows


class SlotLayer(DynamicLayer):
    """A layer whose keys and values are views of a larger buffer, [n, h, capacity, d].

    `DynamicLayer` concatenates, so each token copies the whole cache; here it writes one slot. Whatever else replaces
    `keys` (reordering, cropping) is honoured: the next `update` finds that the view is not the buffer's and copies once.
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
            self._buffers = tuple(x.new_empty(*x.shape[:-2], new + CHUNK, x.shape[-1]) for x in (self.keys, self.values))
            self._buffers[0][:, :, :old], self._buffers[1][:, :, :old] = self.keys, self.values
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

    def keep(self, index: Tensor) -> None:
        """Keep, in each row, the slots `index`, long [n, t]; a repeated index makes a slot that must be masked."""
        index, t = rearrange(index, "n t -> n 1 t 1"), index.shape[1]
        buffers = []
        for old in (self.keys, self.values):
            buffers.append(old.new_empty(*old.shape[:2], t + CHUNK, old.shape[-1]))
            buffers[-1][:, :, :t] = old.gather(2, index.expand(-1, old.shape[1], -1, old.shape[-1]))
        self._buffers = tuple(buffers)
        self.keys, self.values = (x[:, :, :t] for x in buffers)


class Slots:
    """Which token each cache slot holds, and which slots are real.

    Attributes:
        origin: long [l or 1, n, t], index of the token in the sequence, -1 for padding. Covers the slots up to the last
            change; slots written since hold text, in order.
        valid: bool [n, t], or None while no row has padding.
    """

    def __init__(self, rows: int, prompt: int, padding: Tensor | None, device: torch.device):
        origin = torch.arange(prompt, device=device).expand(1, rows, prompt)
        self.valid = None if padding is None else padding.bool()
        self.origin = origin if padding is None else origin.masked_fill(~self.valid, -1)
        self.lost = 0  # rows are right-aligned, so a new slot i holds token i + lost in every row

    def visual(self, prompt_mask: Tensor) -> Tensor:
        """bool [l or 1, n, t]: the slots that hold visual tokens, from the prompt's mask [n, prompt]."""
        at = self.origin.clamp(0, prompt_mask.shape[1] - 1)
        inside = (self.origin >= 0) & (self.origin < prompt_mask.shape[1])
        return prompt_mask.expand(at.shape[0], -1, -1).gather(2, at) & inside

    def mask(self, length: int) -> Tensor | None:
        """The attention mask of a cache of `length` slots, long [n, length], or None while no row has padding."""
        if self.valid is None:
            return None
        n, t = self.valid.shape
        return torch.cat([self.valid, self.valid.new_ones(n, length - t)], -1).long()

    def extend(self, length: int) -> None:
        """Bring the books up to a cache of `length` slots: those written since the last change are text, in order."""
        l, n, t = self.origin.shape
        if length > t:
            new = torch.arange(t, length, device=self.origin.device) + self.lost
            self.origin = torch.cat([self.origin, new.expand(l, n, -1)], -1)
            if self.valid is not None:
                self.valid = torch.cat([self.valid, self.valid.new_ones(n, length - t)], -1)

    def keep(self, cache: Cache, slots: Tensor) -> None:
        """Drop from `cache` what is false in `slots`, bool [l or 1, n, t]. Rows are right-aligned; padding is masked."""
        length = slots.shape[-1]
        self.extend(length)
        if self.valid is not None:
            slots = slots & self.valid
        counts = slots.sum(-1)  # [l, n]
        most, fewest, uneven = torch.stack([counts.max(), counts.min(), (counts != counts[:1]).any().long()]).tolist()
        if uneven:
            raise RuntimeError("a decoder keeps different numbers of slots in different layers of one row")
        # a stable sort brings kept slots to the right end, in their order
        index = slots.long().argsort(dim=-1, stable=True)[..., length - most :]  # [l, n, most]
        for i, layer in enumerate(cache.layers):
            layer.keep(index[i if len(index) > 1 else 0].to(layer.keys.device))
        self.valid = None if fewest == most else slots[0].gather(1, index[0])
        layers = max(len(index), len(self.origin))
        origin = self.origin.expand(layers, -1, -1).gather(2, index.expand(layers, -1, -1))
        self.origin = origin if self.valid is None else origin.masked_fill(~self.valid, -1)
        self.lost += length - most

    def crop(self, cache: Cache) -> None:
        """Take the newest slot away."""
        cache.crop(-1)
        self.origin = self.origin[..., :-1]
        self.valid = None if self.valid is None else self.valid[:, :-1]
