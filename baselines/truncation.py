"""A control: answers that simply end sooner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoders import Decoder, GenerationContext, StackError, Step
from decoders.options import check_integer


@dataclass
class Truncation(Decoder):
    """End every answer after `tokens` tokens, by leaving only the end-of-sequence token possible.

    Shorter captions hold fewer objects, so fewer that are not there. A method that shortens captions must do better
    than this control, set to the length of the method's own captions.

    Args:
        tokens: tokens of an answer before its end, >= 1; answers that end before are left as they are.

    Raises:
        StackError: for a value out of range, or a generation without end-of-sequence token.
    """

    tokens: int

    def __post_init__(self):
        check_integer(self, "tokens", 1)

    def init_state(self, context: GenerationContext) -> tuple[int, ...]:
        if not context.eos:
            raise StackError(
                "truncation ends answers with the end-of-sequence token, and this generation has none; set"
                " eos_token_id, or use max_new_tokens alone"
            )
        return context.eos

    def process_logits(self, step: Step, state: tuple[int, ...], scores: Tensor) -> Tensor:
        end = torch.full_like(scores, -torch.inf)
        end[:, list(state)] = 0.0
        return torch.where((step.num_forwards > self.tokens)[:, None], end, scores)
