"""What a decoder is: a dataclass of hyperparameters that overrides the hooks it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from .errors import StackError, choices

if TYPE_CHECKING:
    from .beams import Hypotheses


@dataclass(frozen=True)
class Branch:
    """The same rows under other conditions, run beside them in the same forwards, with cache rows of their own.

    Args:
        inputs: from the inputs given to `generate` (a dict) and the images' seeds to those entries that differ in the
            branch.
        pruning: what happens to the branch's cache when a decoder drops slots of the main rows. `mirror`: the same
            slots are dropped, so that the two differ in their conditions alone; `independent`: the stack's decoders
            watch the branch, too, with a state of its own, and drop what its own attention says.
    """

    inputs: Callable[[dict, list[int]], dict]
    pruning: str = "mirror"

    def __post_init__(self):
        if self.pruning not in ("mirror", "independent"):
            raise StackError(choices(self.pruning, ("mirror", "independent"), "pruning of a branch"))


@dataclass(frozen=True)
class Requirements:
    """What a decoder wants supplied. What nobody reads is not computed.

    Args:
        attention: layers whose attention row (newest query) is read; `()` for none, `None` for all. Counted, from 0 or
            backwards from -1, are the layers that attend to the whole sequence: all in most models. Layers that attend
            within a window or keep a running state are neither read nor pruned.
        head_reduction: how the heads of a row are joined, `mean` or `max`.
        hidden: indices of hidden states read at the newest token, as in transformers: 0 the embeddings, i the output of
            block i, l (the number of layers) the input of the output embeddings, after the final norm.
        visual: whether the decoder needs to know which cache slots are visual tokens.
        branch: other conditions under which the rows are to run as well.
        lookahead: C, the number of candidates a row that are run before one is picked; 0 for none.
        rollback: whether `rescore_candidates` may ask to go back.
        reruns_last_token: whether `select_slots_after_prefill` may drop slots, so that the last prompt token runs
            again.
    """

    attention: tuple[int, ...] | None = ()
    head_reduction: str = "mean"
    hidden: tuple[int, ...] = ()
    visual: bool = False
    branch: Branch | None = None
    lookahead: int = 0
    rollback: bool = False
    reruns_last_token: bool = False

    def resolve_layers(self, count: int) -> tuple[int, ...]:
        """The layers read of a model that has `count`, counted from 0."""
        if self.head_reduction not in ("mean", "max"):
            raise StackError(choices(self.head_reduction, ("mean", "max"), "head reduction"))
        if self.attention is None:
            return tuple(range(count))
        if any(not -count <= i < count for i in self.attention):
            raise StackError(f"attention of layers {self.attention} was asked for; the model has {count}")
        return tuple(sorted({i % count for i in self.attention}))


class _OnRequest:
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
                raise _not_requested(type(self), name, self._asked_by[name])
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'", name=name, obj=self)

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """One in which None stands for what nobody asked for."""
        return cls(**fields)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in some fields; fields that nobody asked for stay so."""
        return type(self)(**{**dict.fromkeys(self._asked_by), **vars(self), **changes})


def _not_requested(owner: type, name: str, ask: str) -> StackError:
    return StackError(
        f"{name} of a {owner.__name__} was not requested in requirements(), so it was not computed; return {ask} there"
    )


@dataclass(eq=False, repr=False)
class GenerationContext(_OnRequest):
    """One generation, as a decoder sees it in `init_state`.

    Attributes:
        model: the model that is decoded (the language model, for families that wrap one).
        rows: number of rows at the prefill, one an image (and returned sequence, without beams); the loop makes k of
            each later.
        layers: l, the number of layers that attend to the whole sequence; in most models, all.
        visual: bool [n, prompt], true at visual tokens; an error unless some decoder reads it.
        seeds: one integer a row, [n]; a decoder's own noise is seeded with it, whatever the batch.
        device: device of the scores.
        prompt: length of the prompt, padding included; token i of the answer has index prompt + i in the sequence.
        input_ids: prompt ids that the caller passed, long [n, ids]; [n, 0] with `inputs_embeds`.
        config: the generation config (beams, penalties, ...).
        eos: ids that end a sequence.
        to_logits: makes float32 logits, [..., v], of hidden states, [..., d], as the model does of its last (after the
            final norm); an error unless some decoder reads hidden states.
    """

    _asked_by = {"visual": "Requirements(visual=True)", "to_logits": "Requirements(hidden=...)"}

    model: Any
    rows: int
    layers: int
    visual: Tensor
    seeds: list[int]
    device: torch.device
    prompt: int
    input_ids: Tensor
    config: Any
    eos: tuple[int, ...]
    to_logits: Callable[[Tensor], Tensor]


@dataclass(eq=False, repr=False)
class Step(_OnRequest):
    """One forward and what it left behind.

    To read `attention`, `hidden`, `branch` or `visual` without asking for it in `Decoder.requirements` is an error.

    Attributes:
        num_forwards: m, long [n], the forwards that made each row, counted from 1 (the prefill); m - 1 tokens have been
            generated.
        max_num_forwards: the largest m of the rows.
        logits: float32 [n, v], the model's own, whatever decoders before made of them.
        attention: float32 [l', n, t], softmax row of the newest query, heads joined, for the layers that this decoder
            reads, in order.
        hidden: [h', n, d], the hidden states that this decoder reads, in the order of its indices.
        branch: float32 [n, v], logits of this decoder's branch; not there in the steps of a branch.
        visual: bool [l or 1, n, t], the slots that the row sees and that hold visual tokens.
        slot_positions: long [l or 1, n, t], index in the sequence of the token in each slot that the row sees; -1 for
            other slots.
        unfinished: bool [n], false for rows that have finished.
        is_rerun: true for the second run of the last prompt token (`Decoder.select_slots_after_prefill`).
        input_ids: long [n, sequence], prompt and what was generated; in a batch in which images went back, shorter rows
            are padded on the right.
        beams: rows an image.
    """

    _asked_by = {
        "attention": "Requirements(attention=...)",
        "hidden": "Requirements(hidden=...)",
        "branch": "Requirements(branch=Branch(...))",
        "visual": "Requirements(visual=True)",
    }

    num_forwards: Tensor
    max_num_forwards: int
    logits: Tensor
    attention: Tensor
    hidden: Tensor
    branch: Tensor
    visual: Tensor
    slot_positions: Tensor
    unfinished: Tensor
    is_rerun: bool
    input_ids: Tensor
    beams: int

    def attention_by_position(self, layer: int, prompt: int) -> Tensor:
        """Attention of the layer read at place `layer` in the order of the sequence, float [n, prompt +
        max_num_forwards - 1]; 0 where no slot is left.

        `prompt` is `GenerationContext.prompt`.
        """
        slot_positions = self.slot_positions[layer if len(self.slot_positions) > 1 else 0]
        rows = self.attention[layer][:, None]
        return _scatter_to_positions(rows, slot_positions, prompt + self.max_num_forwards - 1)[:, 0]


@dataclass(eq=False, repr=False)
class CacheView(_OnRequest):
    """What the slots of the cache hold before a forward.

    Attributes:
        visual: bool [l or 1, n, t], the slots that hold visual tokens; an error unless some decoder reads it.
        slot_positions: long [l or 1, n, t], index in the sequence of the token in each slot; -1 for padding. Later
            slots hold later text.
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
            raise _not_requested(type(self), name, Step._asked_by[name])
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
        num_kept_tokens: long [n], generated tokens that they keep.
        parents: long [n], of the picks first made there and now abandoned: the row that was continued ...
        tokens: long [n], ... and the token.
    """

    rows: Tensor
    num_kept_tokens: Tensor
    parents: Tensor
    tokens: Tensor


def persistent(**options) -> Any:
    """A field of a state that a rollback leaves as it is; `on_rollback` may change it."""
    return field(metadata={"persistent": True}, **options)


class Decoder:
    """One decoding strategy. Subclasses are dataclasses; they hold hyperparameters, never state of a generation.

    `init_state` returns the state of one generation, the other hooks get it back: a dataclass (or list, tuple, dict) of
    row-first tensors. The loop reorders, multiplies, drops and rolls back rows; a decoder never does. Hooks replace the
    tensors of their state, they never write into them: older ones are what a rollback returns to.
    """

    def requirements(self, model: Any) -> Requirements:
        """Declare, once a generation, what the loop must supply."""
        return Requirements()

    def init_state(self, context: GenerationContext) -> Any:
        """Make the state of one generation."""
        return None

    def attention_bias(self, cache: CacheView, state: Any) -> Tensor | None:
        """Before every forward after the prefill: change what its queries attend to.

        Returns:
            float [l or 1, n, t], added to the attention scores before the softmax, in the layers that attend to the
            whole sequence: the log of a factor on a slot's weight, -inf to hide it. Or None for nothing. The loop adds
            up the answers of all decoders.
        """
        return None

    def process_logits(self, step: Step, state: Any, scores: Tensor) -> Tensor:
        """Change the next-token scores, float32 [n, v], before the logits processors of transformers."""
        return scores

    def rescore_candidates(
        self, step: Step, candidates: Candidates, state: Any, scores: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """With lookahead: judge the candidates before one is picked.

        Args:
            scores: float32 [n, v]; under beam search log-probabilities, else what the `process_logits` hooks left.

        Returns:
            The new scores, float32 [n, v], and None, or long [n]: the number of generated tokens to go back to, -1 for
            rows that stay. Rows of one image (under beam search) go back together, to the least that one of them asks
            for.
        """
        return scores, None

    def on_rollback(self, state: Any, rollback: Rollback) -> None:
        """After rows went back and their state with them; what must outlast that is kept in `persistent` fields."""

    def select_slots_after_prefill(self, step: Step, state: Any) -> Tensor | None:
        """Look at the prefill before the first token is picked; say which cache slots stay, or None for all.

        Returns:
            bool [l or 1, n, t], as in `select_slots`. The last prompt token is then run again against what stays, so
            that the first token, too, comes from the pruned cache; the second run arrives as a step with `is_rerun`.
        """
        return None

    def wants_to_prune(self, step: Step, state: Any) -> Tensor | None:
        """Before `select_slots`, with the same step: say where that may drop something, so that it is left out in steps
        in which no row does. The loop asks the device together with what else it must know.

        Returns:
            bool [n]; or None for `select_slots` in every step.
        """
        return None

    def select_slots(self, step: Step, state: Any) -> Tensor | None:
        """Look at a forward before the next one runs; say which cache slots stay.

        Called after the token was picked, or, with lookahead, before (candidates run against what stays). Not called
        once every row has finished.

        Returns:
            bool [l or 1, n, t], true for slots that stay; or None for all. The loop intersects the answers of all
            decoders.
        """
        return None

    def make_beam_hypotheses(self, context: GenerationContext) -> Hypotheses | None:
        """With beams: other bookkeeping of finished beams than transformers'."""
        return None

    def model_context(self, model: Any) -> AbstractContextManager:
        """A context around the generation, for edits inside the model; it must undo them."""
        return nullcontext()

    def record(self, state: Any) -> Any:
        """What the decoder wants to tell after the generation; it becomes `stack.record[name]`."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__.lower()
