"""OPERA's clean form, written plainly: one image, no cache, every candidate of every beam in a forward of its own,
eager attention.

It shares no code with the packages under test; numbers are Python's and numpy-like tensors of one row.
"""

from __future__ import annotations

import math
from statistics import mode

import torch

FORBIDDEN = [7, 8, 9, 10]  # placeholders of images, which a forward without a cache would want to fill


@torch.no_grad()
def penalised_beams(model, inputs, image: int, beams: int, new: int, o: dict):
    """(tokens of the best answer, [(length, anchor, kept)] of the returns) for greedy decoding (beams 1) or beam search
    without EOS.
    """
    prompt = inputs["input_ids"]
    start, visual = prompt.shape[1], (prompt[0] == image)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return _search(model, inputs, start, visual, beams, new, o)
    finally:
        model.set_attn_implementation(before)


def _run(model, inputs, answer: list[int]):
    """Logits after the answer, and the last layer's attention of every position, maximum over heads, [t, t]."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = torch.cat(
            [inputs["mm_token_type_ids"], torch.zeros(1, len(answer), dtype=torch.long)], 1
        )
    out = model(**{**inputs, **more}, output_attentions=True)
    return out.logits[0, -1], out.attentions[-1][0].amax(0)


def _columns(attention: torch.Tensor, start: int, scale: float) -> list[float]:
    """Logarithm of each answer column's product, all rows from the diagonal on."""
    rows = attention[start:] / attention[start:].sum(-1, keepdim=True)
    w = (scale * rows[:, start:]).tolist()
    out = []
    for j in range(len(w)):
        total = 0.0
        for q in range(j, len(w)):
            total += math.log(w[q][j]) if w[q][j] > 0 else -math.inf
        out.append(total + math.log(1e-7))
    return out


def _search(model, inputs, start, visual, beams, new, o):
    c, state, snapshots, choices = o["num_candidates"], None, {}, {}
    tried, rejected, returns = {}, {}, []
    state = [([], 0.0 if i == 0 else -1e9, []) for i in range(beams)]  # answer, score, votes
    while len(state[0][0]) < new:
        length = len(state[0][0])
        snapshots[length] = [(list(a), s, list(v)) for a, s, v in state]
        options, votes = [], []
        for i, (answer, score, _) in enumerate(state):
            logits, _ = _run(model, inputs, answer)
            logits[FORBIDDEN] = -math.inf
            for beam, token in rejected.get(length, []):
                if beam == i:
                    logits[token] = -math.inf
            best = logits.topk(c)[1].tolist()
            logp = logits.log_softmax(-1) if beams > 1 else logits
            named = []
            for token in best:
                _, attention = _run(model, inputs, answer + [token])
                columns = _columns(attention, start, o["scale"])
                named.append(max(range(len(columns)), key=lambda j: (columns[j], -j)))
                row = attention[-1] / attention[-1].sum()
                cost = (
                    -float(row[: len(visual)][visual].sum())
                    if length < 10
                    else min(100.0, math.exp(min(max(columns), 50.0)))
                )
                options.append((score + float(logp[token]) - o["penalty"] * cost, i, token))
            votes.append(min(j for j in set(named) if named.count(j) == max(map(named.count, named))))
        for (_, _, cast), vote in zip(state, votes, strict=False):
            cast.append(vote)
        anchor = min(j for j in set(votes) if votes.count(j) == max(map(votes.count, votes)))
        if anchor >= 10 and all(cast.count(anchor) > o["threshold"] for _, _, cast in state):
            place = anchor + 1 if tried.get(anchor + 1, 0) < c else anchor
            if tried.get(place, 0) < c and place < length:
                returns.append((length, anchor, place))
                tried[place] = tried.get(place, 0) + 1
                rejected = {p: pairs for p, pairs in rejected.items() if p <= place}
                rejected.setdefault(place, []).extend(choices[place])
                state = [(list(a), s, list(v)) for a, s, v in snapshots[place]]
                continue
        options.sort(key=lambda x: -x[0])
        chosen = options[:beams]
        choices[length] = [(i, token) for _, i, token in chosen]
        state = [(state[i][0] + [token], score if beams > 1 else 0.0, list(state[i][2])) for score, i, token in chosen]
    assert mode([len(a) for a, _, _ in state]) == new
    return state[0][0], returns
