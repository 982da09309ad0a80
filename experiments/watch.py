"""A decoder that changes nothing and notes how much attention each token pays to the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoders import Decoder, Reads, Run, Step


@dataclass
class Noted:
    """by_step: the attention of each forward to the visual tokens, summed over them, a tensor [n, l] each."""

    by_step: list[Tensor]


@dataclass
class Watch(Decoder):
    """Notes A_l(m), the share of the newest token's attention (mean over heads) that goes to visual tokens, in every layer at every forward.

    `record` gives a dict a row, whose `row` is kept with the caption: `attention_by_layer`, [m, l], forward by forward; the m-th made the m-th token.
    """

    def reads(self, model) -> Reads:
        return Reads(attention=None, visual=True)

    def start(self, run: Run) -> Noted:
        return Noted([])

    def observe(self, step: Step, state: Noted) -> None:
        attention = step.attention[..., : step.visual.shape[-1]]
        state.by_step = [*state.by_step, (attention * step.visual).sum(-1).T]

    def record(self, state: Noted) -> list[dict]:
        rows = torch.stack(state.by_step, 1).double().round(decimals=5).tolist() if state.by_step else []
        return [{"row": {"attention_by_layer": row}} for row in rows]
