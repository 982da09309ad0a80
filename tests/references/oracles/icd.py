"""ICD, clean form: greedy, whole sequence again at every step, no cache, batch 1."""

import math

import torch

from .common import embedded, logits


def disturbed(prompt, image, insert_ids):
    """The prompt with `insert_ids` right after its last image token."""
    at = int((prompt[0] == image).nonzero()[-1]) + 1
    return torch.cat([prompt[:, :at], torch.tensor([insert_ids], dtype=prompt.dtype), prompt[:, at:]], 1)


@torch.no_grad()
def oracle(
    model,
    inputs,
    max_new_tokens,
    alpha=1.0,
    beta=0.1,
    branch_input_ids=None,
    insert_ids=(20, 21, 22, 23),
    eos_token_id=None,
):
    """Token ids of the answer.

    branch_input_ids: [1, other length], the disturbed prompt with the same image tokens; else the prompt with `insert_ids` after the image.
    """
    prompt = inputs["input_ids"]
    other = (
        branch_input_ids
        if branch_input_ids is not None
        else disturbed(prompt, model.config.image_token_id, list(insert_ids))
    )
    full, wrong = (embedded(model, ids, inputs["pixel_values"]) for ids in (prompt, other))
    out = []
    for _ in range(max_new_tokens):
        l, d = logits(model, full, out), logits(model, wrong, out)
        s = (1 + alpha) * l - alpha * d
        if beta:
            s[l < math.log(beta) + l.max()] = -math.inf
        out.append(int(s.argmax()))
        if out[-1] == eos_token_id:
            break
    return out
