"""AvisC: beside the whole picture, a run in which the visual tokens that draw no unusual attention are blanked. Clean form."""

import statistics

import torch

from .plain import contrast, embedded, forward, greedy, is_visual


def weak(model, inputs, gamma, lam):
    """Places of the weak tokens."""
    here, rows = is_visual(model, inputs).nonzero()[:, 0].tolist(), []
    forward(
        model,
        embedded(model, inputs),
        attend=lambda i, w, v, x: rows.append([float(w[:, -1, at].mean()) for at in here]),
    )
    total, so_far, taken = sum(map(sum, rows)), 0.0, []
    for row in sorted(rows, key=sum, reverse=True):
        taken.append(row)
        so_far += sum(row) / total
        if so_far >= gamma:
            break
    score = [sum(column) / len(taken) for column in zip(*taken)]
    limit = statistics.mean(score) + lam * statistics.stdev(score)
    return [at for at, value in zip(here, score) if value < limit]


def oracle(model, inputs, max_new_tokens, alpha=1.0, beta=0.1, gamma=0.5, lam=1.0, scheme="zeros", seed=0, report=None):
    """`noise`: drawn for every visual token in order, float32; `report`: a list that gets the weak places."""
    with torch.no_grad():
        places = weak(model, inputs, gamma, lam)
        if report is not None:
            report.extend(places)
        generator, new = torch.Generator().manual_seed(seed), {}
        for at in is_visual(model, inputs).nonzero()[:, 0].tolist():
            drawn = torch.randn(model.config.text_config.hidden_size, generator=generator, dtype=torch.float32)
            new[at] = drawn if scheme == "noise" else torch.full_like(drawn, float(scheme == "ones"))

        def logits_of(embeds, step):
            other = embeds.clone()
            for at in places:
                other[at] = new[at]
            return contrast(forward(model, embeds)[2], forward(model, other)[2], alpha, beta)

        return greedy(model, inputs, max_new_tokens, logits_of)
