"""DoLa (ICLR 2024): contrast the last layer with the earlier layer that differs most from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import Decoder, GenerationContext, Requirements, StackError, Step, hf, write_at
from decoders.errors import choices
from decoders.options import check_flag, check_integer, check_number, is_integer


@dataclass
class DoLa(Decoder):
    """Contrast the last layer's logits with those of the early layer that differs most from it.

    Let q_k be the distribution that the output embeddings make of hidden state k, without the final norm, and q_N the
    model's own. At each step the premature layer k* is the one of `layers` that is farthest from q_N by the
    Jensen-Shannon divergence, and the scores become

        log q_N - log q_k*,   and impossible where q_N < relative_top * max q_N.

    DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models, https://arxiv.org/abs/2309.03883.

    The layer is chosen by the model's own logits; what decoders before made of them stands on the left of the contrast.
    The paper's results are with a repetition penalty of 1.2: that is transformers' `repetition_penalty`, which acts
    after the contrast. DoLa has no neutral setting.

    Args:
        layers: premature layers as indices of hidden states, 0 the embeddings, i the output of block i - 1: an
            integer, a list, or `low` (every second of the first half; long answers), `high` (of the second half; short
            answers), of at most 20 layers, as in transformers: `low` begins at 2 where input and output embeddings are
            one. The last layer, N, is left out of a list.
        relative_top: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]. 0 lets all
            stay and contrasts raw scores, as in the official code.
        faithful: as in the official code, whose divergence is the mean of KL(M || q) where Jensen-Shannon has KL(q ||
            M), with M the mean of the two: one layer for the whole batch, by the mean over its rows. Otherwise each row
            has its own.
        mature: hidden state in place of the model's logits, without norm; what decoders before made of the scores is
            then left out, but for tokens that they made impossible. None: the model's logits.

    Raises:
        StackError: for a value out of range, or a layer that the model does not have.
    """

    layers: str | int | Sequence[int] = "low"
    relative_top: float = 0.1
    faithful: bool = False
    mature: int | None = None

    def __post_init__(self):
        if isinstance(self.layers, str):
            if self.layers not in ("low", "high"):
                raise StackError(
                    f"dola: {choices(self.layers, ('low', 'high'), 'group of layers')} An integer or a list of integers"
                    " names layers one by one."
                )
        elif not _index(self.layers) and not (
            isinstance(self.layers, Sequence) and self.layers and all(_index(i) for i in self.layers)
        ):
            raise StackError(f"dola: layers is low, high, or an integer >= 0 or a list of them, not {self.layers!r}")
        check_number(self, "relative_top", 0, 1)
        check_flag(self, "faithful")
        check_integer(self, "mature", 0, optional=True, meaning="the index of a hidden state")

    def requirements(self, model: Any) -> Requirements:
        premature, mature = self._premature(model), self._mature(model)
        return Requirements(early_logits=premature if mature is None else (*premature, mature), early_norm=False)

    def init_state(self, context: GenerationContext) -> _State:
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=context.device)
        return _State(self._premature(context.model), zeros(context.rows), zeros(context.rows, 0))

    def process_logits(self, step: Step, state: _State, scores: Tensor) -> Tensor:
        early, own = step.early_logits[: len(state.premature)], step.logits
        if len(step.early_logits) > len(early):
            own = step.early_logits[-1]
            scores = own.masked_fill(scores == -torch.inf, -torch.inf)
        p, q = own.log_softmax(-1), early.log_softmax(-1)
        choice = self._choice(p, q)
        layers = torch.tensor(state.premature, device=scores.device)[choice]
        state.chosen = write_at(state.chosen, step.num_forwards - 1, layers, step.max_num_forwards)
        state.ran = torch.where(step.unfinished, step.num_forwards, state.ran)
        rows = torch.arange(len(scores), device=scores.device)
        if self.relative_top == 0:
            return scores - early[choice, rows]
        final = p if scores is own else scores.log_softmax(-1)
        return (final - q[choice, rows]).masked_fill(
            final < final.amax(-1, keepdim=True) + math.log(self.relative_top), -torch.inf
        )

    def record(self, state: _State) -> list[list[int]]:
        """Per row the premature layer of each step that it ran."""
        return [layers[:ran] for layers, ran in zip(state.chosen.tolist(), state.ran.tolist(), strict=True)]

    def divergences(self, p: Tensor, q: Tensor) -> Tensor:
        """How far each early layer is from the model's own distribution, float [h', n]; log-probabilities [n, v] and
        [h', n, v].
        """
        own, early = p.exp(), q.exp()
        mean = (own + early).mul_(0.5)
        # where both are 0, so is the summand
        m = mean.clamp_min(torch.finfo(mean.dtype).tiny).log_()
        if self.faithful:
            return (mean * (m - 0.5 * (p + q))).mean(-1)
        return 0.5 * ((own * (p - m)).sum(-1) + early.mul_(q - m).sum(-1))

    def _choice(self, p: Tensor, q: Tensor) -> Tensor:
        """Place of the premature layer of each row, long [n], by log-probabilities."""
        if len(q) == 1:
            return torch.zeros(len(p), dtype=torch.long, device=p.device)
        far = self.divergences(p, q)
        return far.mean(-1).argmax().expand(len(p)) if self.faithful else far.argmax(0)

    def candidates(self, count: int, tied: bool = False) -> list[int]:
        """The premature layers of a model with `count` layers, `low` and `high` by the rule of transformers.

        Where input and output embeddings are one (`tied`), the embeddings only name the newest token again, so `low`
        begins later.
        """
        if self.layers == "high":
            return list(range(count // 2 if count <= 40 else count - 20, count, 2))
        if self.layers == "low":
            first = min(2, count - 1) if tied else 0
            return list(range(first, count // 2 if count <= 40 else 20, 2)) or [first]
        given = [self.layers] if isinstance(self.layers, int) else [int(i) for i in self.layers]
        if max(given) > count:
            raise StackError(
                f"dola: layers={self.layers} were asked for; the model has hidden states 0 to {count}, of which the"
                " last is the mature one"
            )
        left = [i for i in given if i not in (count, self.mature)]
        if not left:
            raise StackError(
                f"dola: layers={self.layers} leaves none to contrast with the mature one; name layers below {count}"
                + ("" if self.mature is None else f", and not {self.mature}")
            )
        return left

    def _premature(self, model: Any) -> tuple[int, ...]:
        return tuple(self.candidates(hf.num_layers(model), hf.ties_embeddings(model)))

    def _mature(self, model: Any) -> int | None:
        last = hf.num_layers(model)
        if self.mature is not None and self.mature > last:
            raise StackError(
                f"dola: mature is the index of a hidden state, 0 to {last} for this model, not {self.mature}"
            )
        return None if self.mature == last else self.mature


@dataclass
class _State:
    """premature: indices of hidden states; ran: forwards seen alive, [n]; chosen: the layer of each, [n, steps]."""

    premature: tuple[int, ...]
    ran: Tensor
    chosen: Tensor


def _index(value: object) -> bool:
    return is_integer(value) and value >= 0
