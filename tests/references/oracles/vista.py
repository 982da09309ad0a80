"""VISTA: a steering vector per image on every MLP's output, and logits of late blocks mixed in. Clean form (no PCA term)."""

import torch
from torch.nn import functional as F

from .plain import embedded, forward, greedy, is_visual


def late(l):
    """Block indices, from 0, of the published 25..30 of 32, as shares of the depth; never the last block."""
    end = min(round(30 / 32 * l), l - 2)
    return min(round(25 / 32 * l), end), end


def vectors(model, inputs):
    """[l, d]: last prompt token after each block, with the picture minus without it."""
    text = dict(inputs, input_ids=inputs["input_ids"][:, ~is_visual(model, inputs)])
    return forward(model, embedded(model, inputs))[0][:, -1] - forward(model, embedded(model, text))[0][:, -1]


def oracle(model, inputs, max_new_tokens, lam=0.1, alpha=0.3, layers=None, official_pca=False):
    with torch.no_grad():
        v = vectors(model, inputs)
        if official_pca:  # the first component of one centred sample is an arbitrary unit vector: the first axis
            v[0, 0] += 1
        first, last = late(len(v)) if layers is None else layers

        def mlp(i, x, out):
            if not lam:
                return None
            opposed = F.cosine_similarity(out, -v[i][None], dim=-1).clamp(min=0)[:, None]
            return F.normalize(
                F.normalize(out, dim=-1) + lam * (1 + opposed) * F.normalize(v[i], dim=-1), dim=-1
            ) * out.norm(dim=-1, keepdim=True)

        def logits_of(embeds, step):
            blocks, _, own = forward(model, embeds, mlp=mlp)
            early = model.lm_head(blocks[first : last + 1, -1]).mean(0)  # no final norm
            return (1 - alpha) * own + alpha * early

        return greedy(model, inputs, max_new_tokens, logits_of)
