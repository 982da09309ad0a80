"""SID (ICLR 2025): contrast with a run that sees, of the picture, only what is least attended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoders import AttentionView, Branch, Decoder, Edits, Requirements, Step
from decoders.options import check_integer, check_number

from .contrast import contrast, plausible
from .selection import rank


@dataclass
class SID(Decoder):
    """Contrast with a branch that sees only the least attended visual tokens.

    A branch runs on the same prompt and the same picture. In its layer `layer` - 1, a [t] is the attention of the
    newest token, mean over heads; in the layers from `layer` on it sees only the `keep` visual tokens with the smallest
    a, and all of the text. The choice is made anew at every token. While the prompt runs, its last token chooses for
    all of it. With scores l, and logits d of the branch,

        (1 + alpha) * l - alpha * d,   and impossible where l < log(beta) + max l.

    Self-Introspective Decoding, https://arxiv.org/abs/2408.02032. Published: alpha 0.5, beta 0.1; of LLaVA-1.5's 576
    visual tokens `keep` 100 (POPE) and 50 (CHAIR) from layer 2 on, 16 from layer 10 on (SHR).

    Otherwise than the official code: each row chooses for itself, among the visual tokens where they are; each token
    sees itself; the constraint acts in greedy search, too; any search, in place of sampling alone. Keys and values that
    were written under an earlier choice stay as they were, as there. Costs a branch with the whole picture: the rows,
    the prompt and the picture's encoding twice. Where `keep` is no less than the visual tokens, the branch says what
    the main rows say, and the contrast vanishes.

    Args:
        alpha: weight of the contrast, >= 0; 0 for no branch.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        layer: the first layer that sees less, >= 1, counted from 0 among those that attend to the whole sequence.
        keep: visual tokens that the branch sees there, >= 0.

    Raises:
        StackError: for a value out of range, or a model without that layer.
    """

    alpha: float = 0.5
    beta: float = 0.1
    layer: int = 2
    keep: int = 100

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "beta", 0, 1)
        check_integer(self, "layer", 1)
        check_integer(self, "keep", 0)

    def requirements(self, model: Any) -> Requirements:
        if not self.alpha:
            return Requirements()
        edits, branch = Edits(attention=(self.layer - 1,), hides=True), Branch(inputs=lambda given: {})
        return Requirements(visual=True, edits=edits, branch=branch, constant_forward=True)

    def edit_attention(self, scores: Tensor, view: AttentionView) -> None:
        if view.own:
            visual = view.visual & view.visible  # [m, q, t]
            attention = view.softmax(scores).mean(1)
            view.hide(visual & (rank(attention, visual, descending=False) >= self.keep))

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        changed = contrast(scores, step.branch, self.alpha) if self.alpha else scores
        return plausible(scores, changed, self.beta)
