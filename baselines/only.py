"""ONLY (ICCV 2025): logits of a side path through one attention layer, added where they agree, else contrasted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from decoders import AttentionView, Decoder, Edits, GenerationContext, Requirements, StackError, Step, hf
from decoders.options import check_flag, check_integer, check_number

from .contrast import contrast, plausible


@dataclass
class ONLY(Decoder):
    """Add or contrast the logits of a side path: one attention layer whose heads lean on the text.

    In layer `layer`, w [h, t] is the attention of the newest token, after the softmax. Its slots with text are T,
    without the very first one that it sees, whose weight stays; those with visual tokens are V. Head by head, weights
    of T above the mean + standard deviation over T become 0, and those of V likewise. With p what is left in a group,
    as a share of its sum, H = -sum p log(p + 1e-6), and heads whose H_T / H_V is below the mean of these over heads
    become 0 entirely. Then, with W_o of that layer and norms and MLP of the last block, x its input and x' its output
    on the usual path,

        a = W_o concat_h(w_h values_h),    u = norm(a) + 0.2 x,    u = u + MLP(norm(u)),
        g = norm(u) + 0.5 norm(x'),        l' = output embeddings of g    (the last two norms are the final one)

    and the scores l become, where |softmax(l) - softmax(l')|, summed, is below `gamma`,

        l + alpha_pos * l',    else    (1 + alpha_neg) * l - alpha_neg * l',

    and impossible where l < log(beta) + max l.

    One-Layer Intervention Sufficiently Mitigates Hallucinations in Large Vision-Language Models,
    https://arxiv.org/abs/2507.00898. Published: 3 and 1, beta 0.1 (0.4 on MME), layer 0; gamma 0.2 (POPE), 0.25 (CHAIR,
    MME), for LLaVA-1.5, InstructBLIP (without the first norm: `input_norm`) and Qwen-VL.

    Otherwise than the official code: visual tokens are found where they are, and each row chooses for itself, among the
    slots that it sees; the last block is the last whatever the depth; Qwen-VL's port, which has 0.2 times the last
    attention's output in the place of 0.2 x, is not offered; any search, in place of sampling alone. A row that sees no
    visual token keeps all heads. Blocks that have a norm after the MLP (Gemma, GLM-4V) put the MLP's output through it;
    a gate on what heads say (Qwen3.5) is left out. l' and the distance from it are of the model's own logits, and other
    decoders' scores stand for l in the sums; what they do to the MLP of the last block is not done to that of the side
    path. Models whose blocks run attention and MLP side by side (Cohere), or that keep the final norm elsewhere (LFM2),
    are refused.

    Costs no forward and no branch: one more last MLP and one more product with the output embeddings a token.

    Args:
        alpha_pos: weight of the side path where it agrees, >= 0.
        alpha_neg: weight of the contrast where it does not, >= 0; with both 0 nothing of this runs.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        gamma: distance below which the two agree, in [0, 2].
        layer: the layer whose attention is taken, counted from 0 among those that attend to the whole sequence; not the
            last block's.
        input_norm: whether a goes through the last block's first norm.

    Raises:
        StackError: for a value out of range, or a model without that layer or these norms.
    """

    alpha_pos: float = 3.0
    alpha_neg: float = 1.0
    beta: float = 0.1
    gamma: float = 0.2
    layer: int = 0
    input_norm: bool = True

    def __post_init__(self):
        check_number(self, "alpha_pos", 0)
        check_number(self, "alpha_neg", 0)
        check_number(self, "beta", 0, 1)
        check_number(self, "gamma", 0, 2)
        check_integer(self, "layer", 0)
        check_flag(self, "input_norm")

    @property
    def _acts(self) -> bool:
        return bool(self.alpha_pos or self.alpha_neg)

    def requirements(self, model: Any) -> Requirements:
        if not self._acts:
            return Requirements()
        last, blocks = hf.num_layers(model), hf.blocks(model)
        if self.layer > last - 2:
            raise StackError(f"only: layer is one of 0 to {last - 2}, before this model's last block, not {self.layer}")
        if blocks is None or hf.norms_of(blocks[-1]) is None or hf.mlp_of(blocks[-1]) is None:
            raise StackError(
                f"only: the last block of {type(model).__name__} is not a norm, attention, a norm and an MLP, one after"
                " the other"
            )
        if hf.final_norm(model) is None:
            raise StackError(f"only: {type(model).__name__} has no final norm where transformers puts it")
        return Requirements(
            hidden=(last - 1, last), visual=True, edits=Edits(attention=(self.layer,)), constant_forward=True
        )

    def edit_attention(self, scores: Tensor, view: AttentionView) -> None:
        if view.branch:
            return
        project = hf.output_projection(view.module)
        if project is None:
            raise StackError(f"only: {type(view.module).__name__} has no output projection of a known name")
        weights = kept_weights(view.softmax(scores), view.visible, view.visual)
        weights = rearrange(weights.to(view.values), "m (kv g) q t -> m kv (g q) t", kv=view.values.shape[1])
        heads = rearrange(weights @ view.values, "m kv (g q) d -> m q (kv g d)", q=scores.shape[2])
        view.export("side", project(heads))

    def init_state(self, context: GenerationContext) -> GenerationContext | None:
        return context if self._acts else None

    def process_logits(self, step: Step, state: GenerationContext | None, scores: Tensor) -> Tensor:
        if state is None:
            return plausible(scores, scores, self.beta)
        g = self._side_path(state.model, step.exported["side"], *step.hidden)
        side = state.to_logits(g).to(scores.device)
        far = (step.logits.softmax(-1) - side.softmax(-1)).abs().sum(-1, keepdim=True)
        added = (scores + self.alpha_pos * side).masked_fill(scores == -torch.inf, -torch.inf)
        return plausible(
            scores, torch.where(far < self.gamma, added, contrast(scores, side, self.alpha_neg)), self.beta
        )

    def _side_path(self, model: Any, a: Tensor, x: Tensor, normed: Tensor) -> Tensor:
        """g [n, d]; all of that shape: `x` the last block's input, `normed` the final norm of its output.

        Where the model is spread over devices, the block is on another one than what the loop keeps.
        """
        block = hf.blocks(model)[-1]
        before, between, after = hf.norms_of(block)
        given = (before(a).to(x.device) if self.input_norm else a) + 0.2 * x
        more = hf.first_of(hf.mlp_of(block)(between(given)[:, None]))[:, 0]
        more = more if after is None else after(more)
        return hf.final_norm(model)(given + more.to(x.device)).to(x.device) + 0.5 * normed


def kept_weights(weights: Tensor, visible: Tensor, visual: Tensor) -> Tensor:
    """float32 [m, h, q, t]: attention weights without outliers and without the heads that look at text alone.

    Args:
        weights: after the softmax, float32 [m, h, q, t].
        visible: bool [m, q, t], the slots that each query sees.
        visual: bool [m, 1, t], those with visual tokens.
    """
    first = visible & (visible.cumsum(-1) == 1)
    groups = visible & ~visual & ~first, visible & visual
    entropies = []
    for group, absent in zip(groups, (0.0, torch.inf), strict=True):
        group = group[:, None]
        weights = weights.masked_fill(group & (weights > _limit(weights, group)), 0)
        left = weights * group
        share = left / left.sum(-1, keepdim=True)
        entropy = -(share * (share + 1e-6).log()).sum(-1, keepdim=True)
        entropies.append(entropy.masked_fill(entropy.isnan(), absent))
    ratio = entropies[0] / entropies[1]  # [m, h, q, 1]
    return weights.masked_fill(ratio < ratio.mean(1, keepdim=True), 0)


def _limit(weights: Tensor, group: Tensor) -> Tensor:
    """[m, h, q, 1]: mean + standard deviation of the weights in a group, bool [m, 1, q, t]; no number for one alone."""
    n = group.sum(-1, keepdim=True)
    mean = (weights * group).sum(-1, keepdim=True) / n
    square = ((weights - mean).square() * group).sum(-1, keepdim=True)
    return mean + (square / (n - 1)).sqrt()
