"""FastV: layers from K on see only the visual tokens that layer K - 1 attends to most. Clean form: chosen once, at the prefill."""

import torch

from .plain import each_its_own, forward, greedy, is_visual


def oracle(model, inputs, max_new_tokens, k=2, r=0.5, renew=False):
    """`renew`: every answer token chooses for its own query, the prompt's last for all queries of the prompt."""
    depth = len(model.model.language_model.layers)
    assert 0 < k < depth
    visual = is_visual(model, inputs)
    here = visual.nonzero()[:, 0]
    count, chosen = round(len(here) * (1 - r)), {}

    def logits_of(embeds, step):
        if renew:
            most = lambda row: sorted(row, key=lambda one: -one[1])[:count]
            return forward(model, embeds, **each_its_own(visual, k, most))[2]

        def attend(i, w, v, x):
            if i == k - 1 and not chosen:
                chosen["kept"] = here[w.mean(0)[-1][here].topk(count).indices]

        def mask(i):
            if i < k:
                return None
            visible = torch.ones(len(embeds), dtype=torch.bool)
            visible[here] = False
            visible[chosen["kept"]] = True
            return visible

        return forward(model, embeds, attend=attend, mask=mask)[2]

    with torch.no_grad():
        return greedy(model, inputs, max_new_tokens, logits_of)
