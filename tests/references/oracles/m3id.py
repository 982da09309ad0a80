"""M3ID, clean form: greedy, whole sequence again at every step, no cache, batch 1."""

import math

import torch

from .common import embedded, logits


@torch.no_grad()
def oracle(model, inputs, max_new_tokens, lam=0.02, beta=0.1, first=1, eos_token_id=None):
    """Token ids of the answer.

    lam: of gamma_t = exp(-lam t); beta: plausibility (0: none); first: t of the first answer token (AvisC 1, ONLY 0).
    """
    ids = inputs["input_ids"]
    full = embedded(model, ids, inputs["pixel_values"])
    text = model.get_input_embeddings()(
        ids[ids != model.config.image_token_id][None]
    )  # the same tokens without the image's, places counted anew from 0
    out = []
    for step in range(max_new_tokens):
        l, u = logits(model, full, out), logits(model, text, out)
        lc, lu = l.log_softmax(-1), u.log_softmax(-1)
        weight = math.exp(lam * (step + first)) - 1  # (1 - gamma) / gamma
        s = lc + weight * (lc - lu)
        if beta:
            s[l < math.log(beta) + l.max()] = -math.inf
        out.append(int(s.argmax()))
        if out[-1] == eos_token_id:
            break
    return out
