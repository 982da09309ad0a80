"""The key-value cache: one pool of slots an image, which its beams and candidates share.

A sequence of the batch is an image, or a branch of one. Its tokens form a tree: the prompt is the trunk, each generated
token a node, a beam the path from the root to its newest token. All lie in one pool of slots, written once; a row (a
beam) is a query of its sequence, and `visible` says which slots it sees. To reorder beams, to prune, to pick a
candidate and to go back is to change `visible`; keys and values move only when slots that nobody sees are dropped.

Shapes: s sequences, k rows each (n = s * k rows in all, in that order), q queries a sequence, c candidates a row, L
layers (or 1, where all layers see the same), h heads of keys, d their width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .cache_layers import BUCKET, LeftCache, LeftLayer, PoolLayer, in_buckets
from .tensors import left_pad, pad_slots


@dataclass
class SlotTable:
    """What the slots of layers of one kind hold, and who sees them. `visible` is replaced, never written into, where a
    checkpoint may share it.

    Attributes:
        indices: which layers of the model they are about.
        layers: the L layers.
        position: long [L or 1, s, capacity], place in the sequence of the token in each slot; -1 for padding and what
            is not written.
        visible: bool [L or 1, s, k, capacity], the slots that each row sees.
        visual: bool [L or 1, s, capacity], the slots of visual tokens; None where nobody asks.
        window: how many tokens back these layers reach, or None for all.
        wasteful: whether many slots are seen by no row, so that it pays to drop them.
        dropped: whether rows were made to see less since `most_seen` was last asked for.
        held: slots that only checkpoints and finished beams saw when that was last looked at.
        free: long [s, f], written slots that nobody sees, nor a checkpoint: those of candidates that were not picked.
            None where none are known.
        finished: like `visible`, of the finished beams, where they leave a cache; None before there are any.
    """

    indices: list[int]
    layers: list[PoolLayer]
    position: Tensor
    visible: Tensor
    visual: Tensor | None = None
    window: int | None = None
    wasteful: bool = False
    held: int = 0
    dropped: bool = False
    free: Tensor | None = None
    finished: Tensor | None = None

    @classmethod
    def of(
        cls, indices: list[int], layers: list[PoolLayer], padding: Tensor, visual: Tensor | None, window: int | None
    ) -> SlotTable:
        """After the prefill; `padding`, [s, prompt], is 0 where a slot holds none of the prompt's tokens; `visual`,
        bool [s, prompt], is true at visual tokens.
        """
        real = padding.bool()
        position = torch.arange(real.shape[1], device=real.device).masked_fill(~real, -1)
        visual = None if visual is None else (visual & real)[None]
        table = cls(indices, layers, position[None], real[None, :, None], visual, window)
        table.resize(in_buckets(table.used))
        for layer in layers:
            layer.pooled = True
        return table

    @classmethod
    def resume(
        cls,
        indices: list[int],
        layers: list[PoolLayer],
        left: tuple[LeftCache, Tensor],
        prompt: tuple[Tensor, Tensor | None],
        window: int | None,
    ) -> SlotTable:
        """From a cache that was left.

        Args:
            left: the cache, and the `positions` of these layers.
            prompt: bool [s, prompt], whether a token is there, of the whole conversation; and whether it is visual.
        """
        (cache, position), (real, visual) = left, prompt
        at = position.clamp(min=0)
        seen = (position >= 0) & real[None].expand(len(at), -1, -1).gather(-1, at)
        if visual is not None:
            visual = seen & visual[None].expand(len(at), -1, -1).gather(-1, at)
        for index, layer in zip(indices, layers, strict=True):
            one: Any = cache.layers[index]
            layer.begin(one.keys, one.values)
            layer.keys, layer.values, layer.used, layer.pooled = one.keys, one.values, one.keys.shape[2], True
        table = cls(indices, layers, position.masked_fill(~seen, -1), seen[:, :, None], visual, window)
        table.resize(in_buckets(table.used + real.shape[1] - cache.length))
        return table

    @property
    def used(self) -> int:
        """Slots that are written, in every layer."""
        return self.layers[0].used

    @property
    def capacity(self) -> int:
        return self.position.shape[-1]

    def resize(self, capacity: int) -> None:
        """Add slots."""
        new = capacity - self.capacity
        self.position = torch.cat([self.position, self.position.new_full((*self.position.shape[:-1], new), -1)], -1)
        self.visible = pad_slots(self.visible, capacity)
        self.visual = None if self.visual is None else pad_slots(self.visual, capacity)
        self.finished = None if self.finished is None else pad_slots(self.finished, capacity)
        for layer in self.layers:
            layer.resize(capacity)

    def expand(self, k: int) -> None:
        """Make k rows of each sequence's one."""
        self.visible = self.visible.expand(-1, -1, k, -1).clone()

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes sequence `sequences[i]`, keys and values as well."""
        self.position, self.visible = self.position[:, sequences], self.visible[:, sequences]
        self.visual = None if self.visual is None else self.visual[:, sequences]
        self.free = None
        for layer in self.layers:
            layer.select(sequences)

    def reorder(self, parents: Tensor) -> None:
        """Row i of a sequence sees what its row `parents[i]`, long [s, k], saw."""
        s = torch.arange(len(parents), device=parents.device)[:, None]
        self.visible = self.visible[:, s, parents]

    def write(self, position: Tensor, by_index: bool = False) -> Tensor:
        """Before a forward: the next q slots are of the tokens at `position`, long [s, q].

        Args:
            by_index: whether layers are given the slots as a tensor, which a compiled step needs. `release` must come
                after.

        Returns:
            bool [q, capacity]: the slot of each query.
        """
        q, used = position.shape[1], self.used
        self.position[:, :, used : used + q] = position
        if by_index:
            index = self.slot_numbers()[used : used + q].clone()[None]  # whose strides do not hang on the capacity
            for layer in self.layers:
                layer.slots, layer.used = index, used + q
        return self._slots_from(used, q)

    def _slots_from(self, first: int, q: int) -> Tensor:
        """bool [q, capacity], true for query i at slot `first + i`: a view of a diagonal made once, so that no kernel
        is launched.
        """
        if self._diagonal.shape != (q, 2 * self.capacity):
            self._diagonal = torch.zeros(q, 2 * self.capacity, dtype=torch.bool, device=self.position.device)
            self._diagonal.diagonal(self.capacity).fill_(True)
        return self._diagonal.narrow(1, self.capacity - first, self.capacity)

    _diagonal: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)

    def slot_numbers(self) -> Tensor:
        """long [capacity]: 0, 1, ..."""
        if len(self._numbers) != self.capacity:
            self._numbers = torch.arange(self.capacity, device=self.position.device)
        return self._numbers

    _numbers: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)

    def write_candidates(self, position: Tensor) -> Tensor:
        """The same for candidates at `position`, long [s, k * c], of which k may stay: they take the slots of those of
        the step before that were not picked, and k slots that follow the used ones. `release` must come after.

        Returns:
            long [s, k * c], the slot of each.
        """
        s, fresh = len(position), self.fresh(position.shape[1])
        slots = self.slot_numbers()[self.used : self.used + fresh].expand(s, -1)
        # laid out alike in every step, or a compiled one would be made anew
        slots = slots.contiguous() if self.free is None else torch.cat([self.free, slots], 1)
        self.position.scatter_(2, slots.expand(len(self.position), -1, -1), position.expand(len(self.position), -1, -1))
        self.free = slots
        for layer in self.layers:
            layer.slots = slots
            layer.used += fresh
        return slots

    def fresh(self, candidates: int) -> int:
        """How many slots that were never written so many candidates need."""
        return candidates - (0 if self.free is None else self.free.shape[1])

    def release(self, picked: Tensor | None) -> None:
        """After the forward of candidates: those of `picked`, long [s, k], stay, the others' slots are free; with None,
        all are.
        """
        for layer in self.layers:
            layer.slots = None
        if picked is not None and self.free is not None:
            stays = torch.zeros_like(self.free).scatter_(1, picked, 1)
            order = stays.argsort(dim=1, stable=True)
            self.free = self.free.gather(1, order)[:, : order.shape[1] - picked.shape[1]]

    def in_window(self, visible: Tensor, position: Tensor) -> Tensor:
        """Of what queries at `position`, long [s, q], may see, bool [L or 1, s, q, capacity], what these layers
        reach.
        """
        if self.window is None:
            return visible
        return visible & (position[None, :, :, None] - self.position[:, :, None] < self.window)

    def slot_positions(self) -> Tensor:
        """long [L or 1, n, capacity]: `position` of the slots that each row sees, -1 for the others."""
        return self._made("positions", lambda: torch.where(self.visible, self.position[:, :, None], self._none()))

    def visual_slots(self) -> Tensor | None:
        """bool [L or 1, n, capacity], the slots with visual tokens that each row sees; None where nobody asked."""
        visual = self.visual
        return None if visual is None else self._made("visual", lambda: self.visible & visual[:, :, None])

    def _made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is made of `visible`, rows first, once for as long as that stays: it is replaced, never written into."""
        if self._of is not self.visible:
            self._of, self._cache = self.visible, {}
        if name not in self._cache:
            self._cache[name] = rearrange(make(), "l s k t -> l (s k) t")
        return self._cache[name]

    def _none(self) -> Tensor:
        """long [], -1, made once: a number given to `where` would be copied to the device in every step."""
        if self._minus_one is None:
            self._minus_one = self.position.new_full((), -1)
        return self._minus_one

    _minus_one: Tensor | None = field(default=None, init=False, repr=False)
    _of: Tensor | None = field(default=None, init=False, repr=False)
    _cache: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def most_seen(self) -> Tensor:
        """long [], the most slots of a sequence and layer that some row sees."""
        return self.visible.any(2).sum(-1).max()

    def note_most_seen(self, most: int) -> None:
        """Take note of `most_seen`: where many slots are seen by nobody, it pays to drop them."""
        self.wasteful, self.dropped = self._pays(self.used - most - self.held), False

    def _pays(self, unseen: int) -> bool:
        """Whether it pays to drop so many slots, which costs a copy of the others."""
        return unseen > max(BUCKET, self.used // 8)

    def keep(self, slots: Tensor) -> None:
        """Rows see no more what is false in `slots`, bool [L or 1, n, capacity]."""
        self.visible = self.visible & rearrange(slots, "l (s k) t -> l s k t", s=self.visible.shape[1])
        self.dropped = True

    def finish(self, sources: Tensor, before: Tensor) -> None:
        """Remember what finished beams saw.

        Args:
            sources: long [s, k], for each finished beam the row that it ended, or k + its place among those there were.
            before: `visible` as it was for those rows.
        """
        old = before if self.finished is None else self.finished
        layers = max(len(before), len(old))
        both = torch.cat([x.expand(layers, -1, -1, -1) for x in (before, pad_slots(old, before.shape[-1]))], 2)
        self.finished = both[:, torch.arange(len(sources), device=sources.device)[:, None], sources]

    def leave(
        self, sequences: int, rows: int, length: int, offset: int, whole: bool
    ) -> tuple[dict[int, LeftLayer], Tensor]:
        """What the first `rows` rows of the first `sequences` saw, of the first `length` tokens.

        Args:
            offset: place of the first token.
            whole: whether nothing was dropped, so that there is a slot for each token.

        Returns:
            Layers by number; and long [L or 1, n, t], the place of the token in each slot, -1 for none.
        """
        position = self.position[:, :sequences, None]
        visible = self.visible if self.finished is None else self.finished
        visible = visible[:, :sequences, :rows] & (position < length + offset)  # [L or 1, b, k, capacity]
        most = min(length, self.capacity) if whole else int(visible.sum(-1).max())
        index = visible.long().argsort(dim=-1, stable=True)[..., self.capacity - most :]
        left = {}
        for i, (number, layer) in enumerate(zip(self.indices, self.layers, strict=True)):
            at = rearrange(index[i if len(index) > 1 else 0].to(layer.keys.device), "b k t -> b k 1 t 1")
            kept = []
            for x in (layer.keys[:sequences], layer.values[:sequences]):
                wide = x[:, None].expand(-1, at.shape[1], -1, -1, -1)
                one = wide.gather(3, at.expand(-1, -1, x.shape[1], -1, x.shape[3])).flatten(0, 1)
                kept.append(left_pad(one, length, 2) if whole else one)
            left[number] = LeftLayer()
            left[number].begin(*kept)
            left[number].keys, left[number].values = kept
            left[number].length = None if whole else length
        found = (position - offset).where(visible, -1).gather(-1, index)
        found = rearrange(found, "l b k t -> l (b k) t")
        return left, left_pad(found, length, -1, -1) if whole else found

    def make_room(self, room: int, saved: Sequence[SavedSlots] = ()) -> SlotMove | None:
        """See that `room` more slots can be written: drop those that neither a row nor anything `saved` sees, and add
        what is missing then. What was saved moves with the slots.

        Returns:
            Where slots are now, or None while the old places hold.
        """
        owners = [
            (one, name) for one in (self, *saved) for name in ("visible", "finished") if getattr(one, name) is not None
        ]
        # from before layers were pruned apart, there is one entry for all layers
        layers = max(len(getattr(*owner)) for owner in owners)
        before = self.capacity

        def seen(some: list) -> Tensor:
            """bool [., L or 1, s, k, capacity]"""
            return torch.stack([pad_slots(getattr(*owner), before).expand(layers, -1, -1, -1) for owner in some])

        # a few at a time: there is one for every step that rows may go back to
        groups = [owners[i : i + 16] for i in range(0, len(owners), 16)]
        alive = functools.reduce(torch.logical_or, (seen(group).any(3).any(0) for group in groups))
        alive = alive[..., : self.used]
        # asks the device, once in a bucket
        most, by_rows = torch.stack([alive.sum(-1).max(), self.most_seen()]).tolist()
        self.held = most - by_rows
        if self.used + room <= self.capacity and not self._pays(self.used - most):
            return None
        capacity = in_buckets(most + room, self.visible.shape[2])
        self.free = None
        if most == self.used:
            self.resize(max(capacity, self.capacity))
            for one, name in owners:
                setattr(one, name, pad_slots(getattr(one, name), self.capacity))
            return None
        index = (~alive).long().argsort(dim=-1, stable=True)[..., :most]  # [L or 1, s, most], in their order
        there = alive.gather(-1, index)
        move = SlotMove(index, before, capacity)
        self.position = move(self.position[:, :, None], -1)[:, :, 0]
        self.position[..., :most].masked_fill_(~there, -1)
        self.visual = None if self.visual is None else move(self.visual[:, :, None])[:, :, 0]
        for group in groups:
            for (owner, name), moved in zip(group, move(seen(group)), strict=True):
                setattr(owner, name, moved)
        for i, layer in enumerate(self.layers):
            layer.resize(capacity, index[i if len(index) > 1 else 0])
            layer.used = most
        return move


@dataclass
class SavedSlots:
    """`visible` and `finished` of a table as they were."""

    visible: Tensor
    finished: Tensor | None


@dataclass
class SlotMove:
    """Where slots went when others were dropped.

    Attributes:
        index: long [L or 1, s, t], the slots that stay, by their new places.
        before, after: slots of the tensors of then and of now.
    """

    index: Tensor
    before: int
    after: int

    def __call__(self, x: Tensor, fill: float = 0) -> Tensor:
        """`x`, [..., L or 1, s, k, capacity of then or less], in the new places."""
        layers = max(x.shape[-4], len(self.index))
        shape = (*x.shape[:-4], layers, *x.shape[-3:-1], -1)
        at = self.index[:, :, None].expand(*shape[:-1], self.index.shape[-1])
        return pad_slots(pad_slots(x, self.before, fill).expand(shape).gather(-1, at), self.after, fill)

    def rows_first(self, x: Tensor, fill: float) -> Tensor:
        """`x`, [s * k, L or 1, capacity of then], in the new places."""
        moved = self(rearrange(x, "(s k) l t -> l s k t", s=self.index.shape[1]), fill)
        return rearrange(moved, "l s k t -> (s k) l t")
