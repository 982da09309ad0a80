"""PAI, clean form: the edit as extra weight on image columns of the queries that were newest once, and the prompt without its picture."""

import math

import torch

from .plain import embedded, forward, greedy, is_visual


def oracle(
    model, inputs, max_new_tokens, alpha=0.2, gamma=1.1, beta=0.1, start_layer=2, end_layer=None, skip_prefill=False
):
    """Token ids of the answer; parts of the edit and the contrast as in the decoder."""
    here = is_visual(model, inputs)
    text = embedded(model, dict(inputs, input_ids=inputs["input_ids"][:, ~here]))
    prompt, layers = len(here), range(len(model.model.language_model.layers))[start_layer:end_layer]
    first = prompt if skip_prefill else prompt - 1  # of the prompt the last token alone was newest in its forward

    def raised(i, scores):
        if i not in layers:
            return scores
        columns = here.nonzero()[:, 0]
        scores = scores.clone()
        for query in range(first, scores.shape[1]):  # above 0 by 1 + alpha, below by 1 - alpha
            s = scores[:, query, columns]
            scores[:, query, columns] = s.clamp(min=0) * (1 + alpha) + s.clamp(max=0) * (1 - alpha)
        return scores

    def logits_of(embeds, step):
        l = forward(model, embeds, scores=raised)[2]
        if gamma == 1:
            return l
        u = forward(model, torch.cat([text, embeds[prompt:]]))[2]
        p, q = l.softmax(-1), u.softmax(-1)
        out = gamma * p.log() - (gamma - 1) * q.log()  # p^gamma / q^(gamma - 1)
        return out.masked_fill(p < beta * p.max(), -math.inf)

    with torch.no_grad():
        return greedy(model, inputs, max_new_tokens, logits_of)
