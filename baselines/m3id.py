"""M3ID (CVPR 2024): contrast with the prompt without its picture, the more the longer the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import Branch, Decoder, RawInputs, Requirements, Step
from decoders.options import check_integer, check_number

from .contrast import plausible

_LARGEST = 60.0  # lam * t from which weights grow no more: e^60 leaves nothing but the difference, and fits in float32


@dataclass
class M3ID(Decoder):
    """Contrast with a branch without the image, with a weight that grows along the answer.

    A branch u runs on the same prompt without its pictures; what marks their beginning and end stays. With
    log-probabilities c and token t of the answer,

        c + (e^(lam t) - 1) (c - u),   and impossible where c < log(beta) + max c.

    The weight is 0.02 for the first token, 1 for the 35th, 2.6 for the 64th, 12 for the 128th; it has no bound, so that
    long answers are chosen, among what is plausible, by the difference alone.
    Multi-Modal Hallucination Control by Visual Information Grounding, https://arxiv.org/abs/2403.14003.

    There is no official code. This is the form in which others compare with it (lam 0.02 and beta 0.1 for LLaVA-1.5,
    InstructBLIP and Qwen-VL alike); the paper is said to have a condition on how sure the model must be, too, which was
    not verified and is left out. They run it under sampling only, one image at a time. Here the search is free, t is
    each row's own, and weights stop growing at e^60. Costs a branch of text (rows twice, without the picture's slots);
    none with `lam` 0, the constraint alone.

    Args:
        lam: how fast the weight grows, >= 0; 0 for no contrast.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        first: t of the first token of an answer, >= 0; with 0 it is chosen without contrast, so that one-word answers
            are plain.

    Raises:
        StackError: for a value out of range, and for a model that cannot run on text alone.
    """

    lam: float = 0.02
    beta: float = 0.1
    first: int = 1

    def __post_init__(self):
        check_number(self, "lam", 0)
        check_number(self, "beta", 0, 1)
        check_integer(self, "first", 0)

    def requirements(self, model: Any) -> Requirements:
        if not self.lam:
            return Requirements()
        return Requirements(branch=Branch(inputs=RawInputs.without_images, pruning="none", images=False))

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        if not self.lam:
            return plausible(scores, scores, self.beta)
        own, text = scores.log_softmax(-1), step.branch.log_softmax(-1)
        t = step.num_forwards - 1 + self.first
        weight = torch.expm1((self.lam * t.float()).clamp(max=_LARGEST))[:, None]
        contrast = (own + weight * (own - text)).masked_fill(scores == -torch.inf, -torch.inf)
        return plausible(own, contrast, self.beta)
