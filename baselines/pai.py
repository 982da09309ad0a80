"""PAI (ECCV 2024): raise the attention to the picture, and contrast with the prompt without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import AttentionView, Branch, Decoder, Edits, RawInputs, Requirements, Step
from decoders.options import check_flag, check_integer, check_number

from .contrast import plausible


@dataclass
class PAI(Decoder):
    """Raise the attention to visual tokens, and contrast with a branch without the image.

    In the layers `start_layer` <= i < `end_layer`, in all heads, scores s of the newest token on visual tokens become

        s + alpha * |s|

    before the softmax, in the main rows alone. A branch u runs on the same prompt without its pictures, and with what
    marks their beginning and end; with log-probabilities c,

        u + gamma * (c - u),   and impossible where c < log(beta) + max c.

    Paying More Attention to Image, https://arxiv.org/abs/2407.21771. Published: alpha 0.5 for LLaVA-1.5, 0.2 for
    MiniGPT-4, 0.6 for Shikra; gamma 1.1 (2 in the official arguments' defaults).

    The published settings are as its repository's documentation gives them, and were not verified.

    Otherwise than the official code: the contrast comes before transformers' processors and warpers, not after them;
    places of visual tokens are found, not given; the edit acts at the prompt, too (`skip_prefill` leaves it out, as the
    official code does by mistake when both parts are on); the branch follows beams. Costs a branch of text (rows twice,
    without the picture's slots); none with `gamma` 1.

    Args:
        alpha: strength of the edit, >= 0; 0 for none.
        gamma: weight of the contrast, >= 0; 1 for none, and no constraint then.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        start_layer: the first layer that is edited, counted from 0 among those that attend to the whole sequence.
        end_layer: the layer before which the edit ends, none for all that follow.
        skip_prefill: whether the prompt runs unedited.

    Raises:
        StackError: for a value out of range, or a model without any of these layers.
    """

    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1
    start_layer: int = 2
    end_layer: int | None = None
    skip_prefill: bool = False

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "gamma", 0)
        check_number(self, "beta", 0, 1)
        check_integer(self, "start_layer", 0)
        check_integer(self, "end_layer", 0, optional=True)
        check_flag(self, "skip_prefill")

    def requirements(self, model: Any) -> Requirements:
        edits = Edits(attention=slice(self.start_layer, self.end_layer)) if self.alpha else Edits()
        branch = None if self.gamma == 1 else Branch(inputs=RawInputs.without_images, pruning="none", images=False)
        return Requirements(visual=bool(self.alpha), edits=edits, branch=branch, constant_forward=bool(edits))

    def edit_attention(self, scores: Tensor, view: AttentionView) -> Tensor | None:
        if view.branch or (self.skip_prefill and (view.in_prompt or view.is_rerun)):
            return None
        return torch.where(view.visual[:, None], scores + self.alpha * scores.abs(), scores)

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        if self.gamma == 1:
            return scores
        own, text = scores.log_softmax(-1), step.branch.log_softmax(-1)
        contrast = (text + self.gamma * (own - text)).masked_fill(scores == -torch.inf, -torch.inf)
        return plausible(own, contrast, self.beta)
