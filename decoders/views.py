"""What decoders are shown: a forward and what it left behind, the cache before it, candidates, and what went back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

from .errors import StackError


class OnRequest:
    """A dataclass of which some fields are filled only where a decoder asks for them in `requirements`.

    The loop gives None where nobody asked; to read such a field is then an error that says what to ask for.
    """

    _asked_by: ClassVar[dict[str, str]]  # field: what `requirements` returns to have it

    def __post_init__(self) -> None:
        for name in self._asked_by:
            if vars(self)[name] is None:
                delattr(self, name)

    if not TYPE_CHECKING:  # which takes the fields to be there, as they are where they were asked for

        def __getattr__(self, name: str) -> Any:
            if name in self._asked_by:
                raise not_requested(type(self), name, self._asked_by[name])
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'", name=name, obj=self)

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """One in which None stands for what nobody asked for."""
        return cls(**fields)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in some fields; fields that nobody asked for stay so."""
        return type(self)(**{**dict.fromkeys(self._asked_by), **vars(self), **changes})


def not_requested(owner: type, name: str, ask: str) -> StackError:
    return StackError(
        f"{name} of a {owner.__name__} was not requested in requirements(), so it was not computed; return {ask} there"
    )


@dataclass(eq=False, repr=False)
class Step(OnRequest):
    """One forward and what it left behind.

    To read `attention`, `hidden`, `early_logits`, `branch` or `visual` without asking for it in `Decoder.requirements`
    is an error.

    Attributes:
        num_forwards: m, long [n], the forwards that made each row, counted from 1 (the prefill); m - 1 tokens have been
            generated.
        max_num_forwards: the largest m of the rows.
        logits: float32 [n, v], the model's own, whatever decoders before made of them.
        attention: float32 [l', n, t], softmax row of the newest query, heads joined, for the layers that this decoder
            reads, in order.
        hidden: [h', n, d], the hidden states that this decoder reads, in the order of its indices.
        early_logits: float32 [h', n, v], logits of the hidden states in `Requirements.early_logits`, in their order, as
            the model makes its own.
        branch: float32 [n, v], logits of this decoder's branch; not there in the steps of a branch.
        visual: bool [l or 1, n, t], the slots that the row sees and that hold visual tokens.
        slot_positions: long [l or 1, n, t], index in the sequence of the token in each slot that the row sees; -1 for
            other slots.
        unfinished: bool [n], false for rows that have finished.
        is_rerun: true for the second run of the last prompt token (`Decoder.select_slots_after_prefill`).
        input_ids: long [n, sequence], prompt and what was generated; in a batch in which images went back, shorter rows
            are padded on the right.
        beams: rows an image.
        exported: what this decoder's hooks inside the forward exported (`ForwardView.export`), by name, [n, ...].
    """

    _asked_by = {
        "attention": "Requirements(attention=...)",
        "hidden": "Requirements(hidden=...)",
        "early_logits": "Requirements(early_logits=...)",
        "branch": "Requirements(branch=Branch(...))",
        "visual": "Requirements(visual=True)",
    }

    num_forwards: Tensor
    max_num_forwards: int
    logits: Tensor
    attention: Tensor
    hidden: Tensor
    early_logits: Tensor
    branch: Tensor
    visual: Tensor
    slot_positions: Tensor
    unfinished: Tensor
    is_rerun: bool
    input_ids: Tensor
    beams: int
    exported: dict[str, Tensor] = field(default_factory=dict)

    def attention_by_position(self, layer: int, prompt: int) -> Tensor:
        """Attention of the layer read at place `layer` in the order of the sequence, float [n, prompt +
        max_num_forwards - 1]; 0 where no slot is left.

        `prompt` is `GenerationContext.prompt`.
        """
        slot_positions = self.slot_positions[layer if len(self.slot_positions) > 1 else 0]
        rows = self.attention[layer][:, None]
        return _scatter_to_positions(rows, slot_positions, prompt + self.max_num_forwards - 1)[:, 0]


@dataclass(eq=False, repr=False)
class CacheView(OnRequest):
    """What the slots of the cache hold before a forward.

    Attributes:
        visual: bool [l or 1, n, t], the slots that hold visual tokens; an error unless some decoder reads it.
        slot_positions: long [l or 1, n, t], index in the sequence of the token in each slot that the row sees; -1 for
            other slots.
    """

    _asked_by = {"visual": "Requirements(visual=True)"}

    visual: Tensor
    slot_positions: Tensor


@dataclass
class Candidates:
    """The c next tokens of each row that were run, each alone after the row's cache.

    Attributes:
        tokens: long [n, c], best first.
        scores: float32 [n, c], as the `process_logits` hooks left them; -inf marks what is no candidate.
        attention: float32 [l', n, c, t], row of each candidate over the cache and itself (the last place), as in
            `Step`; None unless the decoder reads it.
        visual: bool [l or 1, n, t], as in `Step`, for all slots; None unless some decoder reads it.
        slot_positions: long [l or 1, n, t], as in `Step`, for all slots.
    """

    tokens: Tensor
    scores: Tensor
    attention: Tensor | None
    visual: Tensor | None
    slot_positions: Tensor

    def requested(self, name: Literal["attention", "visual"]) -> Tensor:
        """The field, for a decoder that asks for it in `requirements`; StackError for one that does not."""
        value = getattr(self, name)
        if value is None:
            raise not_requested(type(self), name, Step._asked_by[name])
        return value

    def attention_by_position(self, layer: int, length: int) -> Tensor:
        """Attention of the layer read at place `layer` in the order of the sequence, float [n, c, length]; 0 where no
        slot is left.
        """
        slot_positions = self.slot_positions[layer if len(self.slot_positions) > 1 else 0]
        return _scatter_to_positions(self.requested("attention")[layer], slot_positions, length)


def _scatter_to_positions(rows: Tensor, slot_positions: Tensor, length: int) -> Tensor:
    """Rows over slots, [n, c, t], as rows over tokens, [n, c, length], by the slots' tokens, long [n, t]."""
    at = slot_positions.masked_fill(slot_positions < 0, length)[:, None].expand_as(
        rows
    )  # pads go to a place that is cut off again
    return rows.new_zeros(*rows.shape[:2], length + 1).scatter_(2, at, rows)[..., :length]


@dataclass
class Rollback:
    """What went back.

    Attributes:
        rows: bool [n], the rows that went back.
        num_kept_tokens: long [n], generated tokens that they keep; -1 for rows that stay.
        parents: long [n], of the picks last made there and now abandoned: the row that was continued; -1 for rows that
            stay, and where none was made ...
        tokens: long [n], ... and the token.
    """

    rows: Tensor
    num_kept_tokens: Tensor
    parents: Tensor
    tokens: Tensor
