"""Layers of the key-value cache: the loop's own, and what a generation leaves of them.

Shapes as in `kv_pool.py`: s sequences, q queries a sequence, h heads of keys, d their width, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import hf
from .errors import StackError
from .tensors import left_pad

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
        slots: where the next forward's keys and values go, long [s or 1, q]; None for the slots that follow the used
            ones.
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
            # an index_put: what torch.compile makes of a scatter copies the whole pool
            slots = self.slots.to(self.keys.device)
            rows = torch.arange(len(self.keys), device=slots.device)[:, None]
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
        return self.used if self.slots is None else self.keys.shape[2]  # which is the same at every step

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


class LeftLayer(hf.GrowingLayer):
    """What a generation leaves of a layer: keys and values, [n, h, t, d], of what each row saw at its end, on the
    right.

    Attributes:
        length: tokens of the sequence, where slots may be missing from it (a stack with decoders left it): only a stack
            can continue then. None where none are: transformers can, too.
    """

    length: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.length is not None:
            raise StackError(
                "this cache was left by a stack with decoders, which may have pruned it: only a stack continues from"
                " it, Stack([...]).generate(model, ...)"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.length is None else self.length


class LeftCache(hf.Cache):
    """The cache that a generation returns. A stack continues from it, when it is given the ids of the conversation:
    pruned slots stay pruned.

    Attributes:
        ids: long [n, length], the tokens that are in it: all but the last of what was generated.
        positions: for each kind of layer, their indices, and long [L or 1, n, t], the place in the sequence of the
            token in each slot, -1 where a row sees none.
        token_inputs: those of the model for the token that follows, by name, [n, 1] or [axes, n, 1].
        unknown: why it cannot be continued, or None.
    """

    def __init__(
        self,
        layers: list,
        ids: Tensor,
        positions: list[tuple[list[int], Tensor]],
        token_inputs: dict[str, Tensor],
        unknown: str | None,
    ):
        super().__init__(layers=layers)
        self.ids, self.positions, self.token_inputs, self.unknown = ids, positions, token_inputs, unknown

    @property
    def length(self) -> int:
        """Tokens of each row, those whose slots were pruned included."""
        return self.ids.shape[1]


def make_cache(cache: hf.Cache) -> hf.Cache:
    """An empty cache whose layers do what those of the given one do, for the loop."""
    return hf.Cache(layers=[_make_layer(layer) for layer in cache.layers])


def _make_layer(layer) -> PoolLayer | StateLayer:
    if isinstance(layer, StateLayer) or hf.layer_kind(layer) == "recurrent":
        return StateLayer.like(layer)
    window = hf.layer_window(layer)
    return PoolLayer() if window is None else WindowLayer(window)
