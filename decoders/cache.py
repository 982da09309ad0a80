"""A key-value cache that is written in place, and whose slots can be dropped, reordered and brought back row by row and
layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .errors import StackError

CHUNK = 128  # slots by which a full buffer grows
NO_SECOND_TURN = (
    "continuing from it is not supported. Pass the whole conversation instead, and no cache: inputs ="
    " processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True,"
    " return_tensors='pt'), then stack.generate(model, **inputs)"
)


class SlotLayer(hf.GrowingLayer):
    """A layer whose keys and values are views of a larger buffer, [m, h, capacity, d].

    `DynamicLayer` concatenates, so each token copies the whole cache; here it writes one slot. Whatever else replaces
    `keys` (cropping, transformers' reordering) is honoured: the next `update` finds that the view is not the buffer's
    and copies once. A layer that was `sealed`, because slots may be missing from it, takes no more.
    """

    keys: Tensor
    values: Tensor
    sealed = False
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.sealed:
            raise StackError(
                f"this cache was left by a stack with decoders, which may have pruned it; {NO_SECOND_TURN}"
            )
        if not self.begun:
            self.begin(key_states, value_states)
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._fits(new):
            self.replace(self.keys, self.values, new)
        assert self._buffers is not None
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
        t = keys.shape[2]

        def buffer(x: Tensor) -> Tensor:
            room_for = x.new_empty(*x.shape[:2], max(t, room) + CHUNK, x.shape[-1])
            room_for[:, :, :t] = x
            return room_for

        self._buffers = buffer(keys), buffer(values)
        self.keys, self.values = (x[:, :, :t] for x in self._buffers)

    def keep(self, index: Tensor) -> None:
        """Keep, in each row, the slots `index`, long [m, t]; a repeated index makes a slot that must be masked."""
        index = rearrange(index, "m t -> m 1 t 1")
        keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[-1])) for x in (self.keys, self.values))
        self.replace(keys, values)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Row i becomes row `rows[i]` from slot `start` on; before it rows that change places are equal."""
        for x in (self.keys, self.values):
            x[:, :, start:] = x[:, :, start:].index_select(0, rows)

    def pick(self, rows: Tensor, slot: Tensor, count: int, start: int) -> None:
        """The newest `count` slots are alternatives: row i becomes row `rows[i]` without them, and its alternative
        `slot[i]`.
        """
        t = self.keys.shape[2] - count
        chosen = [x[rows, :, t + slot] for x in (self.keys, self.values)]
        self.keys, self.values = self.keys[:, :, :t], self.values[:, :, :t]
        self.reorder(rows, start)
        assert self._buffers is not None
        self.keys, self.values = (x[:, :, : t + 1] for x in self._buffers)
        self.keys[:, :, t], self.values[:, :, t] = chosen

    def join(self, others: Sequence[SlotLayer], slots: int) -> None:
        """Put the rows of other layers after its own; each padded on the left to `slots`."""
        every = [self, *others]
        keys, values = (
            torch.cat([left(getattr(layer, name), slots, 2) for layer in every]) for name in ("keys", "values")
        )
        self.replace(keys, values)


class WindowLayer(SlotLayer):
    """A layer whose attention reaches back `sliding_window` tokens. It keeps every slot, so that rows can be brought
    back; the mask makes the window.
    """

    is_sliding = True

    def __init__(self, sliding_window: int):
        super().__init__()
        self.sliding_window = sliding_window


class StateLayer(hf.RecurrentLayer):
    """A layer that keeps a running state in place of slots (linear attention, convolutions): its rows can be chosen,
    but nothing of it dropped or taken back.
    """

    def join(self, others: Sequence[StateLayer], slots: int) -> None:
        """Put the rows of other layers after its own."""
        for mine, *theirs in zip(self.states(), *(layer.states() for layer in others), strict=True):
            for i, state in mine.items():
                if state is not None:
                    mine[i] = torch.cat([state, *(states[i] for states in theirs)])


def like(cache: hf.Cache) -> hf.Cache:
    """An empty cache whose layers do what those of the given one do, for the loop."""
    return hf.Cache(layers=[_like(layer) for layer in cache.layers])


def _like(layer) -> SlotLayer | StateLayer:
    if isinstance(layer, StateLayer) or hf.layer_kind(layer) == "recurrent":
        return StateLayer.like(layer)
    window = hf.layer_window(layer)
    return SlotLayer() if window is None else WindowLayer(window)


def left(tensor: Tensor, length: int, dim: int = -1, fill: int = 0) -> Tensor:
    """Padded on the left of `dim` to `length`."""
    short = length - tensor.shape[dim]
    if short <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor.new_full(shape, fill), tensor], dim)


@dataclass
class Slots:
    """The books of layers that hold the same number of slots: which token each holds, and which are real. Methods
    change the fields, never the tensors.

    Attributes:
        layers: the l layers of the cache that these books are about.
        origin: long [l or 1, m, t], index of the token in the sequence, -1 for padding. Covers the slots up to the last
            change; slots written since hold text, in order.
        valid: bool [m, t], or None while no row has padding.
        lost: long [m]; rows are right-aligned, so a new slot i holds token i + lost.
        shared: leading slots that are equal in all rows of one image.
        window: how many tokens these layers reach back, or None for all.
        tape: what is kept for going back, if anything.
    """

    layers: list[SlotLayer]
    origin: Tensor
    valid: Tensor | None
    lost: Tensor
    shared: int
    window: int | None = None
    tape: Tape | None = None

    @staticmethod
    def of(layers: list[SlotLayer], rows: int, prompt: int, padding: Tensor | None, device: torch.device) -> Slots:
        """The books of a prompt, padded where `padding`, [m, prompt], is 0."""
        origin = torch.arange(prompt, device=device).expand(1, rows, prompt)
        valid = None if padding is None else padding.bool()
        lost = torch.zeros(rows, dtype=torch.long, device=device)
        window = hf.layer_window(layers[0]) if layers else None
        return Slots(layers, origin if valid is None else origin.masked_fill(~valid, -1), valid, lost, prompt, window)

    @property
    def length(self) -> int:
        """Slots that the layers hold."""
        return self.layers[0].keys.shape[-2]

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

    def reach(self) -> Tensor | None:
        """Which of the slots the next token sees, bool [m, length], or None for all."""
        length = self.length
        mask = self.mask(length)
        if self.window is None:
            return mask
        near = (length + self.lost)[:, None] - self.full_origin(length)[0] < self.window
        return near if mask is None else mask & near

    def full_origin(self, length: int) -> Tensor:
        """`origin` of all `length` slots: those written since the last change are text, in order."""
        count, m, t = self.origin.shape
        if length == t:
            return self.origin
        new = torch.arange(t, length, device=self.origin.device) + self.lost[:, None]
        return torch.cat([self.origin, new.expand(count, m, -1)], -1)

    def index(self, rows: Tensor) -> None:
        """Row i becomes row `rows[i]`."""
        self.origin, self.lost = self.origin[:, rows], self.lost[rows]
        self.valid = None if self.valid is None else self.valid[rows]

    def reorder(self, rows: Tensor, prompt: int) -> None:
        """Row i becomes row `rows[i]`, of the same image, in the layers and here."""
        for layer in self.layers:
            layer.reorder(rows.to(layer.keys.device), self.shared)
        self.moved(rows, prompt)

    def moved(self, rows: Tensor, prompt: int) -> None:
        """The layers' rows have moved; where the rows of an image differ, these books follow."""
        if self.shared < prompt or self.origin.shape[-1] > prompt:
            self.index(rows)

    def keep(self, slots: Tensor, who: str) -> None:
        """Drop from the layers what is false in `slots`, bool [l or 1, m, t]. Rows are right-aligned; padding is
        masked.
        """
        length = slots.shape[-1]
        origin, valid = self.full_origin(length), self.mask(length)
        if valid is not None:
            slots = slots & valid
        counts = slots.sum(-1)  # [l, m]
        most, fewest, uneven = torch.stack([counts.max(), counts.min(), (counts != counts[:1]).any().long()]).tolist()
        if uneven:
            raise StackError(
                f"{who}: together they keep different numbers of slots in different layers of one row, which one"
                " attention mask cannot say; let them keep the same set in all layers, or leave one out"
            )
        # a stable sort brings kept slots to the right end, in their order
        index = slots.long().argsort(dim=-1, stable=True)[..., length - most :]  # [l, m, most]
        for i, layer in enumerate(self.layers):
            layer.keep(index[i if len(index) > 1 else 0].to(layer.keys.device))
        self.valid = None if fewest == most else slots[0].gather(1, index[0])
        layers = max(len(index), len(origin))
        self.origin = origin.expand(layers, -1, -1).gather(2, index.expand(layers, -1, -1))
        if self.valid is not None:
            self.origin = self.origin.masked_fill(~self.valid, -1)
        self.lost, self.shared = self.lost + length - most, 0

    def crop(self, count: int = 1) -> None:
        """Take the newest slots away."""
        for layer in self.layers:
            layer.crop(-count)
        length = self.length
        if self.origin.shape[-1] > length:
            self.origin = self.origin[..., :length]
            self.valid = None if self.valid is None else self.valid[:, :length]

    def copy(self) -> Slots:
        return replace(self)

    def restore(self, saved: list[tuple[Slots, int]], group: Tensor, prompt: int, writers: Tensor) -> None:
        """Each row as it was in `saved[group]`, books with their length then; `group` long [m], `writers` as in
        `Tape.restore`.
        """
        whole = [slots.full_origin(length) for slots, length in saved]
        width = max(int((origin >= 0).sum(-1)[:, group == i].max()) for i, origin in enumerate(whole))
        layers = max(len(origin) for origin in whole)
        self.origin = torch.empty(layers, len(group), width, dtype=torch.long, device=group.device)
        self.lost = self.lost.clone()
        for i, (slots, length) in enumerate(saved):
            mine = group == i
            origin = whole[i][:, mine]
            origin = origin[..., -width:] if origin.shape[-1] >= width else left(origin, width, fill=-1)
            self.origin[:, mine] = origin.expand(layers, -1, -1)
            self.lost[mine] = slots.lost[mine] + length - width
        valid = self.origin[0] >= 0
        self.valid = None if bool(valid.all()) else valid
        self.shared = prompt if all(slots.shared == prompt and length == width for slots, length in saved) else 0
        assert self.tape is not None  # kept whenever a decoder may go back
        self.tape.restore(self.origin, writers)


class Tape:
    """What rows held before they were reordered or pruned, so that any earlier cache can be made again.

    A cache is a function of which tokens its slots hold and of which rows wrote them. The tape keeps the prompt's
    slots, one row an image, and every slot of text as it was written, by row; they are never reordered.
    """

    def __init__(self, slots: Slots, prompt: int, rows: Tensor):
        """`rows`, long [m]: the row of the layers (as they are now, prefilled) that each later row begins with."""
        self.prompt, self.rows, self.layers = prompt, rows, slots.layers
        origin = slots.full_origin(slots.length)
        self.before = [
            self._by_token(layer, origin[i if len(origin) > 1 else 0]) for i, layer in enumerate(self.layers)
        ]
        self.text = [tuple(x.new_empty(len(rows), x.shape[1], CHUNK, x.shape[3]) for x in pair) for pair in self.before]

    def _by_token(self, layer: SlotLayer, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [m, h, prompt, d], in the order of the prompt; nothing where slots were dropped."""
        pair = (layer.keys, layer.values)
        if origin.shape[1] == self.prompt:
            return pair
        at = origin.masked_fill(origin < 0, self.prompt).to(layer.keys.device)[
            :, None, :, None
        ]  # pads go behind, and are cut off
        keys, values = (
            x.new_zeros(*x.shape[:2], self.prompt + 1, x.shape[3]).scatter_(2, at.expand_as(x), x)[:, :, :-1]
            for x in pair
        )
        return keys, values

    def write(self, at: Tensor, longest: int) -> None:
        """Keep the newest slot of each row, text token `at`, long [m], of which the largest is `longest`."""
        rows = torch.arange(len(at), device=at.device)
        for i, (layer, pair) in enumerate(zip(self.layers, self.text, strict=True)):
            if longest >= pair[0].shape[2]:
                pair = self.text[i] = tuple(
                    torch.cat([x, torch.empty_like(x[:, :, :1]).expand(-1, -1, CHUNK, -1)], 2) for x in pair
                )
            for x, new in zip(pair, (layer.keys, layer.values), strict=True):
                x[rows.to(x.device), :, at.to(x.device)] = new[:, :, -1]

    def restore(self, origin: Tensor, writers: Tensor) -> None:
        """Make the cache whose slots hold the tokens `origin`, long [l or 1, m, t], -1 for padding; text token s of row
        i was written by row `writers[i, s]`, long [m, s].
        """
        text = torch.arange(writers.shape[1], device=writers.device)
        for i, layer in enumerate(self.layers):
            at = origin[i if len(origin) > 1 else 0].clamp(min=0).to(layer.keys.device)
            both = []
            device = layer.keys.device
            for prompt, written in zip(self.before[i], self.text[i], strict=True):
                written = rearrange(written[writers.to(device), :, text.to(device)], "m s h d -> m h s d")
                everything = torch.cat([prompt[self.rows.to(device)], written], 2)
                both.append(
                    everything.gather(2, at[:, None, :, None].expand(-1, everything.shape[1], -1, everything.shape[3]))
                )
            keys, values = both
            layer.replace(keys, values)
