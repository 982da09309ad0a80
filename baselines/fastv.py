"""FastV (ECCV 2024): deeper layers see only the visual tokens that an early one attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from decoders import AttentionView, Decoder, Edits, Requirements
from decoders.options import check_flag, check_integer, check_number

from .selection import rank


@dataclass
class FastV(Decoder):
    """Drop the visual tokens that the prompt's last token attends to least, from the layers after the first few.

    A [N] is the attention of the prompt's last token to the N visual tokens in layer `layer` - 1, mean over heads. The
    layers from `layer` on keep the round(N * (1 - ratio)) tokens with the largest A (half to even), and all of the
    text; positions stay. Text after the picture is computed without the others there already.
    An Image is Worth 1/2 Tokens After Layer 2, https://arxiv.org/abs/2403.06764. Published: layer 2 with ratio 0.5;
    also 3 with 0.75; of LLaVA-1.5's 576 visual tokens 72, 144, 288 or 432 kept.

    This is the official form with a cache. Otherwise than there, visual tokens are found where they are, and each row
    chooses for itself; scores come from the forward that runs anyway. Costs no forward and no branch. Right after the
    prompt these layers see the slots no more; but the pool has as many slots for every layer as the layer with the most
    needs, and the first layers keep all, so that neither memory nor time is saved.

    Branches that mirror the main rows lose the same tokens (the k-th visual one where the k-th goes), independent ones
    choose for themselves, others keep all.

    Args:
        layer: the first layer that sees less, >= 1, counted from 0 among those that attend to the whole sequence.
        ratio: share of the visual tokens that is dropped, in [0, 1]; 0 changes nothing, 1 leaves none.
        renew: choose anew at every token, by its own attention, and drop nothing from the cache; the official form
            without a cache does so, but also runs the whole text again under each choice.

    Raises:
        StackError: for a value out of range, or a model without that layer.
    """

    layer: int = 2
    ratio: float = 0.5
    renew: bool = False

    def __post_init__(self):
        check_integer(self, "layer", 1)
        check_number(self, "ratio", 0, 1)
        check_flag(self, "renew")

    def requirements(self, model: Any) -> Requirements:
        if not self.ratio:
            return Requirements()
        once = not self.renew
        edits = Edits(attention=(self.layer - 1,), prompt_only=once, hides=True, drops=once)
        return Requirements(visual=True, edits=edits, constant_forward=True)

    def edit_attention(self, scores: Tensor, view: AttentionView) -> None:
        if view.pruning == "none":
            return
        visual = view.visual & view.visible  # [m, q, t]
        if view.pruning == "mirror":
            chosen = view.image("chosen") if view.in_prompt else view.main_scratch["chosen"]
        else:
            chosen = self._choose(view.softmax(scores).mean(1), visual, view.visual)
            view.scratch["chosen"] = chosen
            if view.in_prompt:
                view.keep("chosen", chosen)
        assert chosen is not None
        view.hide(visual & ~_at(chosen, view.visual), drop=not self.renew)

    def _choose(self, attention: Tensor, seen: Tensor, visual: Tensor) -> Tensor:
        """bool [m, q, t]: of the k-th visual token, at k, whether it is kept.

        Args:
            attention: [m, q, t]; `seen`: bool [m, q, t], the visual slots seen; `visual`: bool [m, 1, t], all of them.
        """
        count = (seen.sum(-1, keepdim=True) * (1 - self.ratio)).round()
        kept = seen & (rank(attention, seen, descending=True) < count)
        found = kept.new_zeros(*kept.shape[:2], kept.shape[2] + 1)
        return found.scatter(2, _ordinal(visual).expand_as(kept), kept)[..., :-1]


def _ordinal(visual: Tensor) -> Tensor:
    """long [..., t]: of a visual token, how many come before it; t for other tokens."""
    return (visual.cumsum(-1) - 1).masked_fill(~visual, visual.shape[-1])


def _at(chosen: Tensor, visual: Tensor) -> Tensor:
    """bool [m, q, t]: what `chosen`, [m, q, t'], says of each visual token, bool [m, 1, t]; false for other tokens."""
    place = _ordinal(visual).clamp(max=chosen.shape[2]).expand(-1, chosen.shape[1], -1)
    return F.pad(chosen, (0, 1)).gather(2, place) & visual
