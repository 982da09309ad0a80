"""Branches that are pruned as the main rows are: which slot of a branch stands for which of the main rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_pool import SlotTable


@dataclass
class Mirror:
    """The prompts of the main rows and of the branches, side by side.

    Attributes:
        padding: [s, prompt], 0 where no token is; the main sequences first, then those of each branch.
        visual: bool [s, prompt], true at visual tokens, or None.
        images: main sequences, b.
    """

    padding: Tensor
    visual: Tensor | None
    images: int
    _same: dict[int, bool] = field(default_factory=dict)

    def same_layout(self, branch: int) -> bool:
        """Whether the prompts of a branch have tokens in the same places as the main ones, and as many visual ones."""
        if branch not in self._same:
            b = self.images
            self._same[branch] = all(
                torch.equal(x[:b], x[branch * b : (branch + 1) * b])
                for x in (self.padding, self.visual)
                if x is not None
            )
        return self._same[branch]

    def map_slots(self, main: Tensor, branch: int, slots: SlotTable, fill: float) -> Tensor:
        """What holds for the slots of the main rows, [L or 1, n, t], for those of a branch: of the same slot; where the
        prompts differ, of the main prompt's k-th visual token for the k-th, and `fill` for the prompt's other tokens.
        """
        if self.same_layout(branch):
            return main
        positions, n = slots.slot_positions(), main.shape[1]
        own, other = (positions[:, i * n : (i + 1) * n] for i in (0, branch))
        length = int(slots.position.max()) + 1
        layers = max(len(main), len(own))
        main, own = main.expand(layers, -1, -1), own.expand(layers, -1, -1)
        # by place in the sequence; what has no slot in the main rows was dropped there
        gone = main.new_zeros(()) if main.dtype == torch.bool else main.new_full((), -torch.inf)
        places = torch.full((*main.shape[:2], length + 1), gone.item(), dtype=main.dtype, device=main.device)
        places.scatter_(2, own.masked_fill(own < 0, length), main)
        counterpart = self._counterparts(branch, length).repeat_interleave(n // self.images, 0)
        at = counterpart[None].expand(len(other), -1, -1).gather(2, other.masked_fill(other < 0, length))
        at = at.expand(layers, -1, -1)
        return torch.where(at < length, places.gather(2, at), torch.full((), fill, dtype=main.dtype, device=at.device))

    def _counterparts(self, branch: int, length: int) -> Tensor:
        """long [b, length + 1]: for each place of a branch's sequences that of the main rows that stands for it;
        `length` for none.
        """
        b, prompt = self.images, self.padding.shape[1]
        out = torch.arange(length + 1, device=self.padding.device).repeat(b, 1)
        out[:, :prompt] = length
        if self.visual is not None:
            for i in range(b):
                there, here = (self.visual[j * b + i].nonzero()[:, 0] for j in (0, branch))
                count = min(len(there), len(here))
                out[i, here[:count]] = there[:count]
        return out
