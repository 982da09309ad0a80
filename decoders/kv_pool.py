"""The key-value cache: one pool of slots an image, which its beams and candidates share.

A sequence of the batch is an image, or a branch of one. Its tokens form a tree: the prompt is the trunk, each generated
token a node, a beam the path from the root to its newest token. All lie in one pool of slots, written once; a row (a
beam) is a query of its sequence, and `visible` says which slots it sees. To reorder beams, to prune, to pick a
candidate and to go back is to change `visible`; keys and values move only when slots that nobody sees are dropped.

Shapes: s sequences, k rows each (n = s * k rows in all, in that order), q queries a sequence, c candidates a row, L
layers (or 1, where all layers see the same), h heads of keys, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .errors import StackError
from .tensors import left_pad, pad_slots

BUCKET = 64  # a pool grows and shrinks by multiples of so many slots, so that shapes change seldom


def in_buckets(slots: int, rows: int = 1) -> int:
    """A capacity that holds so many slots, of a sequence with so many rows.

    To change the capacity copies the pool, 2 `slots` read and written once in bucket / rows steps; a larger one leaves
    more idle slots, half a bucket on average, over which attention runs in every step. Together they are least where
    bucket ** 2 = 4 slots rows.
    """
    size = BUCKET * max(1, round((4 * slots * rows) ** 0.5 / BUCKET))
    return -(-slots // size) * size


class PoolLayer(hf.GrowingLayer):
    """Keys and values of a layer, [s, h, capacity, d], of which the first `used` slots are written.

    While the prompt runs, attention gets the written slots; once `pooled`, it gets all of them and masks the rest.

    Attributes:
        slots: where the next forward's keys and values go, long [s, q]; None for the slots that follow the used ones.
    """

    keys: Tensor
    values: Tensor
    used = 0
    pooled = False
    slots: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.begun:
            self.begin(key_states, value_states)
        if self.slots is not None:
            slots = self.slots.to(self.keys.device)
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
            return self.keys, self.values
        end = self.used + key_states.shape[-2]
        if end > self.keys.shape[2]:
            self.resize(in_buckets(end))
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return (self.keys, self.values) if self.pooled else (self.keys[:, :, :end], self.values[:, :, :end])

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.keys.shape[2] if self.pooled else self.used + query_length), 0

    def resize(self, capacity: int, index: Tensor | None = None) -> None:
        """Give the buffers `capacity` slots; with `index`, long [s, t], those are the slots of before that stay."""
        self.keys, self.values = (self._resized(x, capacity, index) for x in (self.keys, self.values))

    def _resized(self, x: Tensor, capacity: int, index: Tensor | None) -> Tensor:
        out = x.new_empty(*x.shape[:2], capacity, x.shape[3])
        written = self.used if index is None else index.shape[1]
        out[:, :, written:] = 0  # what is not written is masked, and must be finite
        if index is None:
            out[:, :, :written] = x[:, :, :written]
        else:  # by sequence: a gather of single numbers takes several times as long
            for each, new, slots in zip(x, out, index.to(x.device), strict=True):
                new[:, :written] = each.index_select(1, slots)
        return out

    def join(self, others: Sequence[PoolLayer], slots: int) -> None:
        """Put the sequences of other layers after its own, each padded on the left to `slots`."""
        every = [self, *others]
        self.keys, self.values = (
            torch.cat([left_pad(getattr(layer, name)[:, :, : layer.used], slots, 2) for layer in every])
            for name in ("keys", "values")
        )
        self.used = slots

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes sequence `sequences[i]`."""
        index = sequences.to(self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]


class WindowLayer(PoolLayer):
    """A layer whose attention reaches back `sliding_window` tokens; the mask makes the window."""

    is_sliding = True

    def __init__(self, sliding_window: int):
        super().__init__()
        self.sliding_window = sliding_window


class StateLayer(hf.RecurrentLayer):
    """A layer that keeps a running state in place of slots (linear attention, convolutions): its sequences can be
    chosen, but nothing of it dropped or taken back.
    """

    def join(self, others: Sequence[StateLayer], slots: int) -> None:
        """Put the sequences of other layers after its own."""
        for mine, *theirs in zip(self.states(), *(layer.states() for layer in others), strict=True):
            for i, state in mine.items():
                if state is not None:
                    mine[i] = torch.cat([state, *(states[i] for states in theirs)])


NO_SECOND_TURN = (
    "continuing from it is not supported. Pass the whole conversation instead, and no cache: inputs ="
    " processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True,"
    " return_tensors='pt'), then stack.generate(model, **inputs)"
)


class LeftLayer(hf.GrowingLayer):
    """What a generation leaves of a layer: keys and values, [n, h, t, d], of what each row saw at its end, on the
    right. One that was `sealed`, because slots may be missing from it, takes no more.
    """

    sealed = False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.sealed:
            raise StackError(
                f"this cache was left by a stack with decoders, which may have pruned it; {NO_SECOND_TURN}"
            )
        return super().update(key_states, value_states, *args, **kwargs)


def make_cache(cache: hf.Cache) -> hf.Cache:
    """An empty cache whose layers do what those of the given one do, for the loop."""
    return hf.Cache(layers=[_make_layer(layer) for layer in cache.layers])


def _make_layer(layer) -> PoolLayer | StateLayer:
    if isinstance(layer, StateLayer) or hf.layer_kind(layer) == "recurrent":
        return StateLayer.like(layer)
    window = hf.layer_window(layer)
    return PoolLayer() if window is None else WindowLayer(window)


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
        wasteful: whether many slots are seen by nobody, so that it pays to drop them.
        free: long [s, f], written slots that nobody sees, nor a checkpoint: those of candidates that were not picked.
            None where none are known.
    """

    indices: list[int]
    layers: list[PoolLayer]
    position: Tensor
    visible: Tensor
    visual: Tensor | None = None
    window: int | None = None
    wasteful: bool = False
    free: Tensor | None = None

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

    def write(self, position: Tensor) -> Tensor:
        """Before a forward: the next q slots are of the tokens at `position`, long [s, q].

        Returns:
            bool [q, capacity]: the slot of each query.
        """
        q = position.shape[1]
        self.position[:, :, self.used : self.used + q] = position
        slots = torch.arange(self.capacity, device=position.device)
        return slots == slots[self.used : self.used + q, None]

    def write_candidates(self, position: Tensor) -> Tensor:
        """The same for candidates at `position`, long [s, k * c], of which k may stay: they take the slots of those of
        the step before that were not picked, and k slots that follow the used ones. `release` must come after.

        Returns:
            long [s, k * c], the slot of each.
        """
        s, fresh = len(position), self.fresh(position.shape[1])
        slots = torch.arange(self.used, self.used + fresh, device=position.device).expand(s, -1)
        if self.free is not None:
            slots = torch.cat([self.free, slots], 1)
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
        return self._made("positions", lambda: self.position[:, :, None].where(self.visible, -1))

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

    _of: Tensor | None = field(default=None, init=False, repr=False)
    _cache: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def most_seen(self) -> Tensor:
        """long [], the most slots of a sequence and layer that some row sees."""
        return self.visible.any(2).sum(-1).max()

    def note_most_seen(self, most: int) -> None:
        """Take note of `most_seen`: where many slots are seen by nobody, it pays to drop them."""
        self.wasteful = self.used - most > max(BUCKET, self.used // 8)

    def keep(self, slots: Tensor) -> None:
        """Rows see no more what is false in `slots`, bool [L or 1, n, capacity]."""
        self.visible = self.visible & rearrange(slots, "l (s k) t -> l s k t", s=self.visible.shape[1])

    def leave(self, sequences: int, sealed: bool) -> dict[int, LeftLayer]:
        """Layers by number with what each row of the first `sequences` saw."""
        visible = self.visible[:, :sequences]  # [L or 1, b, k, capacity]
        most = int(visible.sum(-1).max())
        index = visible.long().argsort(dim=-1, stable=True)[..., self.capacity - most :]
        left = {}
        for i, (number, layer) in enumerate(zip(self.indices, self.layers, strict=True)):
            at = rearrange(index[i if len(index) > 1 else 0].to(layer.keys.device), "b k t -> b k 1 t 1")
            rows = []
            for x in (layer.keys[:sequences], layer.values[:sequences]):
                wide = x[:, None].expand(-1, at.shape[1], -1, -1, -1)
                rows.append(wide.gather(3, at.expand(-1, -1, x.shape[1], -1, x.shape[3])).flatten(0, 1))
            left[number] = LeftLayer()
            left[number].begin(*rows)
            left[number].keys, left[number].values = rows
            left[number].sealed = sealed
        return left

    def make_room(self, room: int, seen: Tensor | None = None) -> SlotMove | None:
        """See that `room` more slots can be written: drop those that neither a row nor any of `seen`, stacked tensors
        like `visible`, sees, and add what is missing then.

        Returns:
            Where slots are now, or None while the old places hold.
        """
        alive = self.visible.any(2)
        if seen is not None:
            alive = alive | seen.any(3).any(0)
        alive = alive[..., : self.used]
        most = int(alive.sum(-1).max())  # asks the device, once in a bucket
        capacity = in_buckets(most + room, self.visible.shape[2])
        self.free = None
        if most == self.used:
            self.resize(max(capacity, self.capacity))
            return None
        index = (~alive).long().argsort(dim=-1, stable=True)[..., :most]  # [L or 1, s, most], in their order
        there = alive.gather(-1, index)
        move = SlotMove(index, self.capacity, capacity)
        self.position = move(self.position[:, :, None], -1)[:, :, 0]
        self.position[..., :most].masked_fill_(~there, -1)
        self.visual = None if self.visual is None else move(self.visual[:, :, None])[:, :, 0]
        self.visible = move(self.visible)
        for i, layer in enumerate(self.layers):
            layer.resize(capacity, index[i if len(index) > 1 else 0])
            layer.used = most
        return move


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
