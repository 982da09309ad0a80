"""What a decoder is: a dataclass of hyperparameters that overrides the hooks it needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import StackError


@dataclass(frozen=True)
class Reads:
    """What a decoder wants supplied. What nobody reads is not computed.

    Args:
        attention: layers whose attention row (newest query) is read; `()` for none, `None` for all.
        visual: whether the decoder needs to know which cache slots are visual tokens.
    """

    attention: tuple[int, ...] | None = ()
    visual: bool = False

    def layers(self, count: int) -> tuple[int, ...]:
        """The layers read of a model that has `count`, counted from 0."""
        if self.attention is None:
            return tuple(range(count))
        if any(not -count <= i < count for i in self.attention):
            raise StackError(f"attention of layers {self.attention} was asked for; the model has {count}")
        return tuple(sorted({i % count for i in self.attention}))


@dataclass
class Run:
    """One generation, as a decoder sees it in `start`.

    Attributes:
        model: the model that is decoded (the language model, for families that wrap one).
        rows: number of rows, n.
        layers: number of decoder layers, l.
        visual: bool [n, prompt], true at visual tokens.
        seeds: one integer an image, [n]; a decoder's own noise is seeded with it, whatever the batch.
        device: device of the scores.
    """

    model: Any
    rows: int
    layers: int
    visual: Tensor | None
    seeds: list[int]
    device: torch.device


@dataclass
class Step:
    """One forward and what it left behind.

    Attributes:
        number: m, counted from 1 (the prefill).
        attention: float32 [l, n, t], softmax row of the newest query, averaged over heads, for the layers that this decoder reads, in order.
        visual: bool [l or 1, n, t'], the cache slots that hold visual tokens; t' <= t, later slots are text.
        origin: long [l or 1, n, t'], index in the sequence of the token in each slot; -1 for padding.
        alive: bool [n], false for rows that have finished.
        again: true for the second run of the last prompt token (`Decoder.before_first_token`).
        input_ids: long [n, sequence], prompt and what was generated.
    """

    number: int
    attention: Tensor | None
    visual: Tensor | None
    origin: Tensor | None
    alive: Tensor
    again: bool
    input_ids: Tensor


class Decoder:
    """One decoding strategy. Subclasses are dataclasses; they hold hyperparameters, never state of a generation.

    `start` returns the state of one generation, the other hooks get it back. Its tensors are row-first: the loop
    reorders, drops and rolls back rows; a decoder never does.
    """

    def reads(self, model: Any) -> Reads:
        """Declare, once a generation, what the loop must supply."""
        return Reads()

    def start(self, run: Run) -> Any:
        """Make the state of one generation."""
        return None

    def score(self, step: Step, state: Any, scores: Tensor) -> Tensor:
        """Change the next-token scores, float32 [n, v], before the logits processors of transformers."""
        return scores

    def before_first_token(self, step: Step, state: Any) -> Tensor | None:
        """Look at the prefill before the first token is picked; say which cache slots stay, or None for all.

        Returns:
            bool [l or 1, n, t], as in `observe`. The last prompt token is then run again against what stays, so that the
            first token, too, comes from the pruned cache; the second run arrives as a step with `again`.
        """
        return None

    def observe(self, step: Step, state: Any) -> Tensor | None:
        """Look at a forward after its token was picked, before the next forward; say which cache slots stay.

        Returns:
            bool [l or 1, n, t], true for slots that stay, as many in every layer of a row; or None for all. The loop
            intersects the answers of all decoders. Not called once every row has finished.
        """
        return None

    def within(self, model: Any) -> AbstractContextManager:
        """A context around the generation, for edits inside the model; it must undo them."""
        return nullcontext()

    def record(self, state: Any) -> Any:
        """What the decoder wants to tell after the generation; it becomes `stack.record[name]`."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__.lower()
