"""OPERA the way its official code runs it: every candidate in a forward of its own, which is then thrown away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from baselines import OPERA
from baselines.opera import CEILING, EARLY, TINY
from decoders import hf


@torch.no_grad()
def opera(
    model,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor,
    max_new_tokens: int,
    num_beams: int,
    settings: OPERA | None = None,
    **_,
) -> Tensor:
    """Beam search with OPERA's penalties by C + 1 forwards a token; a yardstick for the benchmark, for LLaVA on Llama.

    It makes the choices of `Stack([OPERA(threshold=None)])`: it never goes back, and no token ends an answer. Prompts
    have one length, without padding. Everything else is transformers' own: sdpa attention, `DynamicCache`, reordered by
    its beams. The official code also has eager attention return every layer's weights; here the row of the last layer
    is computed beside sdpa, which costs less.

    Returns:
        long [b, prompt + max_new_tokens]: the best beam of each image.
    """
    settings = settings or OPERA()
    (b, prompt), k, device = input_ids.shape, num_beams, input_ids.device
    ids, mask, pixels = (x.repeat_interleave(k, 0) for x in (input_ids, attention_mask, pixel_values))
    image = ids == hf.placeholder_ids(model.config)["image"]
    total = torch.zeros(b, k, device=device)
    total[:, 1:] = -1e9  # the beams of an image start equal: only the first may go on
    logs = torch.zeros(b * k, 0, device=device)  # logarithms of the column products, [n, answer]
    cache = hf.empty_cache(model)
    with _last_row(model) as seen:
        logits = model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, **hf.with_cache({}, cache), logits_to_keep=1
        ).logits
        while True:
            scores = logits[:, -1].float().log_softmax(-1)
            tokens = scores.topk(settings.num_candidates)[1]
            rows = []
            for candidate in tokens.split(1, 1):
                model(input_ids=candidate, **hf.with_cache({}, cache))
                cache.crop(-1)
                rows.append(seen.row)
            rows = torch.stack(rows, 1)  # [n, c, t]
            if ids.shape[1] - prompt < EARLY:
                cost = -(rows[..., :prompt] * image[:, None]).sum(-1)
            else:
                columns = pad(logs, (0, 1))[:, None] + (settings.scale * rows[..., prompt:]).log()
                cost = (columns.amax(-1) + math.log(TINY)).exp().clamp(max=CEILING)
            judged = scores.gather(1, tokens) - settings.penalty * cost
            total, best = (total[..., None] + judged.view(b, k, -1)).flatten(1).topk(k)
            parents = (best // tokens.shape[1] + k * torch.arange(b, device=device)[:, None]).flatten()
            picked = tokens.view(b, -1).gather(1, best).view(-1, 1)
            ids = torch.cat([ids[parents], picked], 1)
            if ids.shape[1] == prompt + max_new_tokens:
                return ids.view(b, k, -1)[:, 0]
            hf.reorder(cache, parents)
            logits = model(input_ids=picked, **hf.with_cache({}, cache)).logits
            logs = pad(logs[parents], (0, 1)) + (settings.scale * seen.row[:, prompt:]).log()


@contextmanager
def _last_row(model) -> Iterator[SimpleNamespace]:
    """After every forward `row`: the newest token's attention in the last layer, maximum over heads, renormalised,
    float32 [n, t].
    """
    seen = SimpleNamespace(row=None)

    def look(module, args, kwargs, output):
        hidden, (cos, sin) = kwargs["hidden_states"][:, -1:], kwargs["position_embeddings"]
        query = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
        keys = hf.cache_of(kwargs).layers[module.layer_idx].keys.repeat_interleave(module.num_key_value_groups, 1)
        row = (query @ keys.transpose(2, 3) * module.scaling).float().softmax(-1)[:, :, 0].amax(1)
        seen.row = row / row.sum(-1, keepdim=True)

    handle = hf.blocks(model)[-1].self_attn.register_forward_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
