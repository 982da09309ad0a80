"""What a decoder is: a dataclass of hyperparameters that overrides the hooks it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import StackError, choices
from .views import CacheView, Candidates, OnRequest, Rollback, Step

if TYPE_CHECKING:
    from .beams import Hypotheses
    from .inside import AttentionView, ForwardView
    from .raw_inputs import RawInputs


@dataclass(frozen=True)
class Branch:
    """The same rows under other conditions, run beside them in the same forwards, with cache rows of their own.

    Args:
        inputs: from what `generate` was given to those entries that differ in the branch; None for an entry that it
            does not have. Its prompt may be longer or shorter than the main one.
        pruning: what happens to the branch's cache when a decoder drops slots of the main rows. `mirror`: the same
            slots are dropped, so that the two differ in their conditions alone; where the prompts have other tokens,
            the k-th visual token goes where the k-th of the main prompt goes. `independent`: the stack's decoders
            watch the branch, too, with a state of its own, and drop what its own attention says. `none`: it keeps all.
        images: whether its prompt has pictures; models that cannot run without are refused before anything runs.
    """

    inputs: Callable[[RawInputs], dict]
    pruning: str = "mirror"
    images: bool = True

    def __post_init__(self):
        if self.pruning not in PRUNING:
            raise StackError(choices(self.pruning, PRUNING, "pruning of a branch"))


PRUNING = ("mirror", "independent", "none")


@dataclass(frozen=True)
class Edits:
    """Where a decoder acts inside the model's forward.

    Args:
        attention: layers in which `edit_attention` is called, counted as in `Requirements.attention`; `()` for none,
            `None` for all, a slice for some of all.
        mlp: blocks after whose MLP `edit_mlp` is called, counted from 0 or backwards from -1; `None` and slices as
            above.
        hidden: hidden states that `edit_hidden_states` is called with: 0 the embeddings, pictures in their places; i
            the output of block i - 1, before any final norm.
        prompt_only: whether only while the prompt runs.
        hides: whether `AttentionView.hide` is called, which acts on the layers after the one that calls it; a model
            that has none after the first of `attention` is refused.
        drops: whether `AttentionView.hide(..., drop=True)` may be called.
    """

    attention: tuple[int, ...] | slice | None = ()
    mlp: tuple[int, ...] | slice | None = ()
    hidden: tuple[int, ...] = ()
    prompt_only: bool = False
    hides: bool = False
    drops: bool = False

    def __bool__(self) -> bool:
        return (self.attention, self.mlp, self.hidden) != ((), (), ())

    @property
    def reads_prompt(self) -> bool:
        """Whether the whole prompt must run, with its pictures."""
        return bool(self) and (self.prompt_only or 0 in self.hidden)


@dataclass(frozen=True)
class Requirements:
    """What a decoder wants supplied. What nobody reads is not computed.

    Args:
        attention: layers whose attention row (newest query) is read; `()` for none, `None` for all. Counted, from 0 or
            backwards from -1, are the layers that attend to the whole sequence: all in most models. Layers that attend
            within a window or keep a running state are neither read nor pruned.
        head_reduction: how the heads of a row are joined, `mean` or `max`.
        hidden: indices of hidden states read at the newest token, as in transformers: 0 the embeddings, i the output of
            block i - 1, l (the number of layers) the input of the output embeddings, after the final norm.
        early_logits: indices of hidden states, as in `hidden`, of which the model's logits are read.
        early_norm: whether these pass the final norm first; l has passed it.
        visual: whether the decoder needs to know which cache slots are visual tokens.
        branch: other conditions under which the rows are to run as well.
        lookahead: C, the number of candidates a row that are run before one is picked; 0 for none.
        rollback: whether `rescore_candidates` may ask to go back.
        reruns_last_token: whether `select_slots_after_prefill` may drop slots, so that the last prompt token runs
            again.
        edits: where the decoder acts inside the forward.
        constant_forward: whether what the decoder does inside the forward, by `model_context` and `edits`, is the same
            in every step after the prompt, so that the step may be recorded as a CUDA graph: it reads tensors that stay
            where they are, and no Python value that changes.
    """

    attention: tuple[int, ...] | None = ()
    head_reduction: str = "mean"
    hidden: tuple[int, ...] = ()
    early_logits: tuple[int, ...] = ()
    early_norm: bool = True
    visual: bool = False
    branch: Branch | None = None
    lookahead: int = 0
    rollback: bool = False
    reruns_last_token: bool = False
    edits: Edits = Edits()
    constant_forward: bool = False

    @property
    def hidden_states(self) -> set[int]:
        """Indices of the hidden states that must be kept."""
        return {*self.hidden, *self.early_logits}

    def resolve_layers(self, count: int) -> tuple[int, ...]:
        """The layers read of a model that has `count`, counted from 0."""
        if self.head_reduction not in ("mean", "max"):
            raise StackError(choices(self.head_reduction, ("mean", "max"), "head reduction"))
        return resolve(self.attention, count, "attention of layers")


def resolve(indices: tuple[int, ...] | slice | None, count: int, what: str) -> tuple[int, ...]:
    """Indices among `count`, counted from 0 and in order; None for all, a slice for those of all."""
    if indices is None or isinstance(indices, slice):
        return tuple(range(count))[slice(None) if indices is None else indices]
    if any(not -count <= i < count for i in indices):
        raise StackError(f"{what} {indices} was asked for; the model has {count}")
    return tuple(sorted({i % count for i in indices}))


@dataclass(eq=False, repr=False)
class GenerationContext(OnRequest):
    """One generation, as a decoder sees it in `init_state`.

    Attributes:
        model: the model that is decoded (the language model, for families that wrap one).
        rows: number of rows at the prefill, one an image; the loop makes k of each later.
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
        images: what `before_prefill` returned (of the main rows) and what hooks inside the forward kept while the
            prompt ran, by name; of these rows.
        offset: positions before the prompt's first token. A branch with a longer prompt has the others begin later, so
            that the prompt's token i has position offset + i.
    """

    _asked_by = {"visual": "Requirements(visual=True)", "to_logits": "Requirements(hidden=...)"}

    model: Any
    rows: int
    layers: int
    visual: Tensor
    seeds: list[int]
    device: torch.device
    prompt: int
    offset: int
    input_ids: Tensor
    config: Any
    eos: tuple[int, ...]
    to_logits: Callable[[Tensor], Tensor]
    images: dict[str, Tensor]


def persistent(**options) -> Any:
    """A field of a state that a rollback leaves as it is; `on_rollback` may change it."""
    return field(metadata={"persistent": True}, **options)


class Decoder:
    """One decoding strategy. Subclasses are dataclasses; they hold hyperparameters, never state of a generation.

    `init_state` returns the state of one generation, the other hooks get it back: a dataclass (or list, tuple, dict) of
    row-first tensors. The loop reorders, multiplies, drops and rolls back rows; a decoder never does. Hooks replace the
    tensors of their state, they never write into them: older ones are what a rollback returns to.
    """

    def check_model(self, model: Any) -> None:
        """Before anything runs: refuse a model that the decoder cannot act on.

        Args:
            model: the one that the caller named. `requirements` gets the one that is decoded, which may be a part of
                it (the language model of InstructBLIP).

        Raises:
            StackError: says why, and what to do.
        """

    def requirements(self, model: Any) -> Requirements:
        """Declare, once a generation, what the loop must supply."""
        return Requirements()

    def before_prefill(self, given: RawInputs) -> dict[str, Tensor]:
        """Before the prompts run: what is to be known of each image, by name; `given` can run the model on prompts.

        Called where the decoder acts inside the forward (`Requirements.edits`).

        Returns:
            Tensors [b, ...], one an image, which hooks inside the forward find in `ForwardView.image`.
        """
        return {}

    def init_state(self, context: GenerationContext) -> Any:
        """Make the state of one generation, once the prompts have run."""
        return None

    def edit_hidden_states(self, hidden: Tensor, view: ForwardView) -> Tensor | None:
        """Inside the forward: see or change the hidden states that `Edits.hidden` names.

        The hooks inside the forward see rows as sequences of the model's batch, m of them: one for an image (all beams
        and candidates of which are queries of one sequence), or for a beam. They are called for the main rows, and
        once more for those of each branch; they are given no state, since rows of all beams stand side by side. They
        must not ask the device, and shapes must not depend on values, so that a step can be compiled and captured.

        Args:
            hidden: [m, q, d], of all tokens that run; `view.newest` picks the newest.

        Returns:
            What takes their place, or None to leave them.
        """
        return None

    def edit_mlp(self, inputs: Tensor, output: Tensor, view: ForwardView) -> Tensor | None:
        """Inside the forward: change what an MLP that `Edits.mlp` names returns, before it is added to the residual.

        Args:
            inputs: [m, q, d], what the MLP was given; `output`: the same shape.

        Returns:
            What takes the place of `output`, or None to leave it.
        """
        return None

    def edit_attention(self, scores: Tensor, view: AttentionView) -> Tensor | None:
        """Inside attention, in layers that `Edits.attention` names: see or change the scores of the newest queries.

        Args:
            scores: [m, h, q, t], scaled, before the mask and the softmax: of the prompt's last token, later of all
                queries, which are a beam or a candidate each.

        Returns:
            What takes their place, or None to leave them. Slots that a query does not see stay hidden.
        """
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
        """Before `select_slots`, with the same step, once a step: say in which rows that may drop something; what it
        drops in others stays. Without lookahead `select_slots` is left out in steps in which no row wants to: the loop
        asks the device for that together with what else it must know. May replace tensors of the state.

        Returns:
            bool [n]; or None for all rows.
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

    def encoding_context(self, model: Any) -> AbstractContextManager:
        """A context around all that `stack.generate` does with the model that it was given, the encoding of pictures
        included; it must undo what it edits.
        """
        return nullcontext()

    def record(self, state: Any) -> Any:
        """What the decoder wants to tell after the generation; it becomes `stack.record[name]`."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__.lower()
