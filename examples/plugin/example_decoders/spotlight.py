"""A toy: attend more to the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoders.options import check_number
from prunehal import AttentionView, Decoder, Edits, Requirements


@dataclass
class Spotlight(Decoder):
    """Multiply the weights of visual tokens by e^boost, before attention is normalised, in all layers and heads.

    Args:
        boost: added to the attention scores of visual tokens; 0 for nothing.

    Raises:
        StackError: for a value that is no number.
    """

    boost: float = 1.0

    def __post_init__(self):
        check_number(self, "boost")

    def requirements(self, model: Any) -> Requirements:
        if not self.boost:
            return Requirements()
        return Requirements(visual=True, edits=Edits(attention=None), constant_forward=True)

    def edit_attention(self, scores: Tensor, view: AttentionView) -> Tensor:
        return scores + self.boost * view.visual[:, None]  # [m, h, q, t] + [m, 1, 1, t]
