"""SID: beside the whole picture, a run whose layers from L on see only the visual tokens that layer L - 1 attends to least. Clean form."""

import torch

from .plain import contrast, each_its_own, forward, greedy, is_visual


def oracle(model, inputs, max_new_tokens, alpha=0.5, beta=0.1, layer=2, keep=100):
    """Every answer token chooses for its own query, the prompt's last for all queries of the prompt: as one mask over the sequence, equal to the cached form."""
    here = is_visual(model, inputs)

    def logits_of(embeds, step):
        own = forward(model, embeds)[2]
        other = forward(
            model,
            embeds,
            **each_its_own(here, layer, lambda row: sorted(row, key=lambda one: (one[1], one[0]))[:keep]),
        )[2]
        return contrast(own, other, alpha, beta)

    with torch.no_grad():
        return greedy(model, inputs, max_new_tokens, logits_of)
