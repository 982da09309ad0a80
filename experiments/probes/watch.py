"""A decoder that changes nothing and notes how much each forward attends to the picture, and where on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from decoders import Decoder, GenerationContext, Requirements, Step, write_at


@dataclass
class _Sums:
    """by_step: the attention of each forward to the visual tokens, summed over them, [n, steps, l]."""

    by_step: Tensor

    def note(self, step: Step) -> None:
        shares = (step.attention * step.visual).sum(-1).T  # [n, l]
        self.by_step = write_at(self.by_step, step.num_forwards - 1, shares, step.max_num_forwards)

    def told(self) -> list[dict]:
        # the forward that every row ended with is left out, as it was when a run of the store began
        return [{"row": {"attention_by_layer": row[:-1]}} for row in self.by_step.double().round(decimals=5).tolist()]


@dataclass
class _Maps:
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

    def note(self, step: Step) -> None:
        layers, n, _ = step.attention.shape
        prompt = self.visual.shape[1]
        where = step.slot_positions.expand(layers, -1, -1).masked_fill(~step.visual, prompt)
        empty = step.attention.new_zeros(layers, n, prompt + 1)
        over = empty.scatter(2, where, step.attention)
        left = empty.scatter(2, where, torch.ones_like(empty[:, :, :1]).expand_as(where))
        joined = [
            torch.stack([part.mean(0) for part in of.split(self.sizes)], 1)[..., :prompt].half() for of in (over, left)
        ]
        before = sum(len(rows) for rows, _ in self.seen)
        self.seen.append(tuple(joined))
        newest = step.input_ids.gather(1, (self.start + step.num_forwards - 2)[:, None])[:, 0]
        places = before + 1 + torch.arange(n, device=self.at.device)
        self.at = write_at(self.at, step.num_forwards - 1, places, step.max_num_forwards)
        self.tokens = write_at(self.tokens, step.num_forwards - 1, newest, step.max_num_forwards)

    def told(self) -> list[dict]:
        over, left = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
        ran = (self.at > 0).sum(1).tolist()
        rows = zip(ran, self.at.cpu() - 1, self.tokens.tolist(), self.visual.cpu(), strict=True)
        return [
            {
                "maps": over[at[:m]][..., visual],
                "left": left[at[:m]][..., visual],
                "tokens": tokens[:m],
                "layers": list(self.sizes),
            }
            for m, at, tokens, visual in rows
        ]


@dataclass
class Watch(Decoder):
    """Notes the attention of the newest token (mean over heads) to the visual tokens at every forward; the m-th made
    the m-th token.

    `record` gives a dict a row. Without maps its `row` is kept with the caption: `attention_by_layer`, [m - 1, l], the
    share A_l(m) of the attention that goes to visual tokens, in every layer at every forward but the last. With maps:
    `maps`, float16 [m, g, p], over the p visual tokens of the prompt in order; `left`, float16 [m, g, p], the share of
    layers that had the token; `tokens`, the m tokens that were the newest, of which the first belongs to the prompt;
    `layers`, how many layers each of the g groups joins.

    Args:
        maps: None for sums over the visual tokens; or the most groups g: layers that follow one another are joined by
            their mean.
    """

    maps: int | None = None

    def requirements(self, model) -> Requirements:
        return Requirements(attention=None, visual=True)

    def init_state(self, context: GenerationContext) -> _Sums | _Maps:
        if self.maps is None:
            return _Sums(torch.zeros(context.rows, 0, context.layers, device=context.device))
        none = torch.zeros(context.rows, 0, dtype=torch.long, device=context.device)
        sizes = [len(part) for part in torch.arange(context.layers).tensor_split(min(self.maps, context.layers))]
        return _Maps(none, none, context.visual, context.input_ids.shape[1], tuple(sizes), deque())

    def process_logits(self, step: Step, state: _Sums | _Maps, scores: Tensor) -> Tensor:
        state.note(step)
        return scores

    def record(self, state: _Sums | _Maps) -> list[dict]:
        return state.told()
