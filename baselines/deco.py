"""DeCo (ICLR 2025): add the logits of an earlier layer that is sure of one of the likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import Decoder, Requirements, StackError, Step, hf
from decoders.options import check_integer, check_number, is_integer


@dataclass
class DeCo(Decoder):
    """Add the logits of the early layer that is most confident in one of the likely tokens.

    With z the scores and z_k the logits that the final norm and the output embeddings make of hidden state k, let Y be
    the likeliest tokens (the shortest prefix of the `top_k` best whose probabilities sum to `top_p`), and a the layer
    of `layers` in which a token of Y has the largest probability of all, pm. The scores become

        z + alpha * pm * z_a,   and impossible outside Y.

    MLLM can see? Dynamic Correction Decoding for Hallucination Mitigation, https://arxiv.org/abs/2410.11779.
    With `alpha` 0 the truncation to Y acts alone: the control. With `alpha` 0, `top_p` 1 and `top_k` None nothing
    changes.

    Args:
        alpha: weight of the earlier layer, >= 0; 0.6 in the paper's runs of LLaVA-1.5.
        top_p: the probability that the candidates Y have together, in (0, 1]; at least one token. 1 keeps all of the
            `top_k`.
        top_k: most candidates, >= 1; None for all tokens.
        layers: the earlier layers, as indices of hidden states; None: those from 0.625 to 0.875 of the depth, 20 to 28
            of 32, as published.

    Raises:
        StackError: for a value out of range, a layer that the model does not have, or a model without final norm.
    """

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int | None = 20
    layers: Sequence[int] | None = None

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "top_p", 0, 1, above=True)
        check_integer(self, "top_k", 1, optional=True, meaning="a count of tokens")
        if self.layers is not None and (
            isinstance(self.layers, str)
            or not isinstance(self.layers, Sequence)
            or not self.layers
            or not all(is_integer(i) for i in self.layers)
        ):
            raise StackError(
                f"deco: layers is a list of integers, or none for the published share of the depth, not {self.layers!r}"
            )

    def requirements(self, model: Any) -> Requirements:
        return Requirements(early_logits=self._read(model)) if self.alpha else Requirements()

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        tokens, kept = self._candidates(scores)
        best = scores.gather(1, tokens)  # [n, c]
        if self.alpha:
            index = tokens.expand(len(step.early_logits), -1, -1)
            sure = step.early_logits.softmax(-1).gather(2, index).masked_fill(~kept, 0.0).amax(-1)
            most, layer = sure.max(0)  # [n]
            early = step.early_logits.gather(2, index)[layer, torch.arange(len(scores), device=scores.device)]
            best = best + self.alpha * most[:, None] * early
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, best.masked_fill(~kept, -torch.inf))

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best tokens, long [n, c], best first, and which of them are candidates, bool [n, c]."""
        v = scores.shape[-1]
        likely, tokens = scores.softmax(-1).topk(v if self.top_k is None else min(self.top_k, v))
        before = likely.cumsum(-1).roll(1, -1)
        before[:, 0] = -torch.inf  # one always stays
        kept = torch.ones_like(tokens, dtype=torch.bool) if self.top_p == 1 else before < self.top_p
        return tokens, kept & (scores.gather(1, tokens) > -torch.inf)

    def _read(self, model: Any) -> tuple[int, ...]:
        last = hf.num_layers(model)
        if self.layers is None:
            end = min(round(0.875 * last), last - 1)
            early = tuple(range(min(round(0.625 * last), end), end + 1))
        else:
            early = tuple(self.layers)
        if not early or any(not 0 <= i < last for i in early):
            raise StackError(
                f"deco: layers={self.layers} were asked for; the model has hidden states 0 to {last}, of which the last"
                f" is the model's own: name some below {last}"
            )
        return early
