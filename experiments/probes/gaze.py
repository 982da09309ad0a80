"""A decoder that changes nothing and notes where on the picture every forward looks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from decoders import Decoder, GenerationContext, Requirements, Step, write_at


@dataclass
class Noted:
    """at: for each forward of a row, its place among all that `seen` holds, counted from 1, long [n, steps]; tokens:
    the newest token of each forward, long [n, steps];
    visual: bool [n, prompt]; start: ids of the prompt; sizes: layers in each group; seen: of every forward, (attention
    [rows, g, prompt], share of layers in which the slot was left [rows, g, prompt]).

    What was seen lies outside the tensors of the state, and is only added to: beams and rollbacks move places, not
    maps. A deque, as the loop copies lists.
    """

    at: Tensor
    tokens: Tensor
    visual: Tensor
    start: int
    sizes: tuple[int, ...]
    seen: deque


@dataclass
class Gaze(Decoder):
    """Notes the newest token's attention (mean over heads) to each visual token, and which of them were left, at every
    forward; the m-th made the m-th token.

    `record` gives a dict a row: `gaze`, float16 [m, g, p] over the p visual tokens of the prompt in order; `left`,
    float16 [m, g, p], the share of layers that had the token; `tokens`, the m tokens that were the newest, of which the
    first belongs to the prompt; `layers`, how many layers each of the g groups joins.

    Args:
        layers: most groups g; layers that follow one another are joined by their mean.
    """

    layers: int = 8

    def requirements(self, model) -> Requirements:
        return Requirements(attention=None, visual=True)

    def init_state(self, context: GenerationContext) -> Noted:
        none = torch.zeros(context.rows, 0, dtype=torch.long, device=context.device)
        sizes = [len(part) for part in torch.arange(context.layers).tensor_split(min(self.layers, context.layers))]
        return Noted(none, none, context.visual, context.input_ids.shape[1], tuple(sizes), deque())

    def process_logits(self, step: Step, state: Noted, scores: Tensor) -> Tensor:
        layers, n, _ = step.attention.shape
        prompt = state.visual.shape[1]
        where = step.slot_positions.expand(layers, -1, -1).masked_fill(~step.visual, prompt)
        empty = step.attention.new_zeros(layers, n, prompt + 1)
        over = empty.scatter(2, where, step.attention)
        left = empty.scatter(2, where, torch.ones_like(empty[:, :, :1]).expand_as(where))
        groups = min(self.layers, layers)
        joined = [
            torch.stack([part.mean(0) for part in of.tensor_split(groups)], 1)[..., :prompt].half()
            for of in (over, left)
        ]
        before = sum(len(rows) for rows, _ in state.seen)
        state.seen.append(tuple(joined))
        newest = step.input_ids.gather(1, (state.start + step.num_forwards - 2)[:, None])[:, 0]
        state.at = write_at(
            state.at, step.num_forwards - 1, before + 1 + torch.arange(n, device=state.at.device), step.max_num_forwards
        )
        state.tokens = write_at(state.tokens, step.num_forwards - 1, newest, step.max_num_forwards)
        return scores

    def record(self, state: Noted) -> list[dict]:
        over, left = (torch.cat(parts).cpu() for parts in zip(*state.seen, strict=False))
        ran = (state.at > 0).sum(1).tolist()
        out = []
        for m, at, tokens, visual in zip(
            ran, state.at.cpu() - 1, state.tokens.tolist(), state.visual.cpu(), strict=False
        ):
            out.append(
                {
                    "gaze": over[at[:m]][..., visual],
                    "left": left[at[:m]][..., visual],
                    "tokens": tokens[:m],
                    "layers": list(state.sizes),
                }
            )
        return out
