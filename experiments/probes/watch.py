"""A decoder that changes nothing and notes how much attention each token pays to the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoders import Decoder, GenerationContext, Requirements, Step, write_at


@dataclass
class Noted:
    """by_step: the attention of each forward to the visual tokens, summed over them, [n, steps, l]."""

    by_step: Tensor


@dataclass
class Watch(Decoder):
    """Notes A_l(m), the share of the newest token's attention (mean over heads) that goes to visual tokens, in every
    layer at every forward.

    `record` gives a dict a row, whose `row` is kept with the caption: `attention_by_layer`, [m, l], forward by forward;
    the m-th made the m-th token.
    """

    def requirements(self, model) -> Requirements:
        return Requirements(attention=None, visual=True)

    def init_state(self, context: GenerationContext) -> Noted:
        return Noted(torch.zeros(context.rows, 0, context.layers, device=context.device))

    def select_slots(self, step: Step, state: Noted) -> None:
        state.by_step = write_at(
            state.by_step, step.num_forwards - 1, (step.attention * step.visual).sum(-1).T, step.max_num_forwards
        )

    def record(self, state: Noted) -> list[dict]:
        return [{"row": {"attention_by_layer": row}} for row in state.by_step.double().round(decimals=5).tolist()]
