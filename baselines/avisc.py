"""AvisC (ACL 2025): contrast with a run that sees, of the picture, only what draws unusually much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import AttentionView, Branch, Decoder, Edits, ForwardView, Requirements, Step
from decoders.options import check_choice, check_number

from .contrast import contrast, plausible
from .selection import rank

_SCHEMES = ("zeros", "ones", "noise")


@dataclass
class AvisC(Decoder):
    """Contrast with a branch that sees only the image's blind tokens, which draw attention whatever is asked.

    A_i [N] is the attention of the prompt's last token to the N visual tokens in layer i, mean over heads. Layers are
    taken in the order of their share of all that attention, up to the first with which the shares add up to at least
    `gamma`. With s [N] the mean of A_i over these layers, weak tokens are those with

        s < mean(s) + lam * std(s).

    A branch runs on the same prompt with the embeddings of weak tokens replaced. With scores l, and logits d of the
    branch,

        (1 + alpha) * l - alpha * d,   and impossible where l < log(beta) + max l.

    Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models,
    https://arxiv.org/abs/2405.17820. Published: alpha 1 (POPE, MME) and 2.5 (AMBER, LLaVA-Bench), beta 0.1, gamma 0.5,
    lam 1, for LLaVA-1.5 and InstructBLIP alike.

    Otherwise than the official code: visual tokens are found where they are, and each row chooses for itself; the
    layers taken are never more than there are; noise is drawn from a generator seeded with the image's seed; logits
    that are no numbers are not passed over; any search, in place of sampling alone. What a model adds to visual tokens
    in later layers (Qwen3-VL) is left out for weak ones. Costs a branch with the picture: the rows, the prompt and the
    picture's encoding twice; nothing is read after the prompt.

    Args:
        alpha: weight of the contrast, >= 0; 0 for no branch.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        gamma: share of the attention that the layers must have together, in [0, 1]; 0 takes one layer.
        lam: standard deviations above the mean up to which a token is weak.
        scheme: what replaces an embedding: `zeros`, `ones` or `noise`, standard normal.

    Raises:
        StackError: for a value out of range.
    """

    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.5
    lam: float = 1.0
    scheme: str = "zeros"

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "beta", 0, 1)
        check_number(self, "gamma", 0, 1)
        check_number(self, "lam")
        check_choice(self, "scheme", _SCHEMES)

    def requirements(self, model: Any) -> Requirements:
        if not self.alpha:
            return Requirements()
        edits = Edits(attention=None, hidden=(0,), prompt_only=True)
        return Requirements(visual=True, edits=edits, branch=Branch(inputs=lambda given: {}))

    def edit_attention(self, scores: Tensor, view: AttentionView) -> None:
        if view.branch == 0:
            attention = view.softmax(scores).mean(1) * view.visual  # [m, 1, t]
            known = view.image("attention")
            view.keep("attention", attention if known is None else torch.cat([known, attention.to(known)], 1))

    def edit_hidden_states(self, hidden: Tensor, view: ForwardView) -> Tensor | None:
        attention = view.image("attention")
        if not view.own or attention is None:
            return None
        weak = weak_tokens(attention, view.visual_tokens, self.gamma, self.lam)
        if self.scheme == "noise":
            changed = _noise(hidden, view.visual_tokens, view.seeds)
        else:
            changed = torch.full_like(hidden, float(self.scheme == "ones"))
        return torch.where(weak[..., None], changed, hidden)

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        changed = contrast(scores, step.branch, self.alpha) if self.alpha else scores
        return plausible(scores, changed, self.beta)


def weak_tokens(attention: Tensor, visual: Tensor, gamma: float, lam: float) -> Tensor:
    """bool [m, t]: the visual tokens that are not blind.

    Args:
        attention: [m, l, t], to visual tokens, 0 elsewhere.
        visual: bool [m, t].
    """
    share = attention.sum(-1)
    share = share / share.sum(-1, keepdim=True)  # [m, l]
    before = share.sort(-1, descending=True).values.cumsum(-1) < gamma
    count = (before.sum(-1, keepdim=True) + 1).clamp(max=share.shape[1])  # [m, 1]
    taken = rank(share, torch.ones_like(before), descending=True) < count
    score = (attention * taken[..., None]).sum(1) / count
    n = visual.sum(-1, keepdim=True)
    mean = score.sum(-1, keepdim=True) / n
    variance = ((score - mean).square() * visual).sum(-1, keepdim=True) / (n - 1).clamp(min=1)
    return visual & (score < mean + lam * variance.sqrt())


def _noise(like: Tensor, visual: Tensor, seeds: list[int]) -> Tensor:
    """Standard normal noise, [m, t, d], drawn token by token from the first visual one on: the same however long the
    prompts of a batch are.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.stack([torch.randn(like.shape[2], generator=generator) for _ in range(like.shape[1])]))
    place = (visual.cumsum(-1) - 1).clamp(min=0)  # of a visual token among them
    drawn = torch.stack(rows).to(like)
    return drawn.gather(1, place[..., None].expand_as(drawn))
