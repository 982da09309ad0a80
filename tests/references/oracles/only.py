"""ONLY: one layer's attention, without outliers and without some heads, goes straight to the last block's MLP; its logits are added or contrasted. Clean form."""

import math
import statistics

import torch

from .plain import forward, greedy, is_visual


def _kept(row, places):
    """The group's weights by place, without outliers, and the entropy of what is left."""
    values = [row[at] for at in places]
    limit = statistics.mean(values) + statistics.stdev(values) if len(values) > 1 else math.inf
    left = {at: 0.0 if row[at] > limit else row[at] for at in places}
    total = sum(left.values())
    if total == 0:
        return left, None
    return left, -sum(w / total * math.log(w / total + 1e-6) for w in left.values())


def heads_kept(rows, visual):
    """For each head the weights of the newest query as they become, a list or None for a head that goes; a token's place is its slot."""
    text = [at for at in range(1 if not visual[0] else 0, len(rows[0])) if at >= len(visual) or not visual[at]]
    image = [at for at, there in enumerate(visual) if there]
    new, ratios = [], []
    for row in rows:
        (words, of_text), (patches, of_image) = _kept(row, text), _kept(row, image)
        changed = {**words, **patches}
        new.append([changed.get(at, w) for at, w in enumerate(row)])
        ratios.append(0.0 if of_image is None else (of_text or 0.0) / of_image)
    mean = sum(ratios) / len(ratios)
    return [row if ratio >= mean else None for row, ratio in zip(new, ratios)]


def oracle(
    model,
    inputs,
    max_new_tokens,
    alpha_pos=3.0,
    alpha_neg=1.0,
    beta=0.1,
    gamma=0.2,
    layer=0,
    input_norm=True,
    report=None,
):
    """`report`: a list that gets, by token, whether the two agreed and the number of heads that went."""
    lm, visual = model.model.language_model, is_visual(model, inputs).tolist()
    last = lm.layers[-1]

    def logits_of(embeds, step):
        side = {}

        def attend(i, w, v, x):
            if i == layer:
                kept = heads_kept(w[:, -1].tolist(), visual)
                parts = [
                    torch.zeros(v.shape[-1], dtype=v.dtype) if row is None else torch.tensor(row, dtype=v.dtype) @ v[h]
                    for h, row in enumerate(kept)
                ]
                side["a"], side["gone"] = lm.layers[i].self_attn.o_proj(torch.cat(parts)), kept.count(None)

        blocks, normed, own = forward(model, embeds, attend=attend)
        a = last.input_layernorm(side["a"]) if input_norm else side["a"]
        u = a + blocks[-2, -1] / 5
        u = u + last.mlp(last.post_attention_layernorm(u))
        other = model.lm_head(lm.norm(u) + normed[-1] / 2)
        p, q = own.softmax(-1), other.softmax(-1)
        agree = float((p - q).abs().sum()) < gamma
        if report is not None:
            report.append((agree, side["gone"]))
        z = own + alpha_pos * other if agree else own + alpha_neg * (own - other)
        return z.masked_fill(p < beta * p.max(), -math.inf)

    with torch.no_grad():
        return greedy(model, inputs, max_new_tokens, logits_of)
