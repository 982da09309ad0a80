"""An independent PruneHal: transformers' own cache, nothing deleted; what is pruned is masked in each layer's
attention.

It follows the written rule with plain Python numbers, one row at a time, and shares no code with the packages under
test.
"""

from __future__ import annotations

import inspect
import math

import torch
from transformers import AttentionInterface
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

# what the cache is called: `cache` from transformers 5.24 on
_NAMES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"

_dropped: dict[int, list[int]] = {}
_rows: dict[int, torch.Tensor] = {}


def _masked_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    scores[:, :, -1, _dropped.get(module.layer_idx, [])] = -torch.inf  # the newest query only
    weights = scores.softmax(-1)
    _rows[module.layer_idx] = weights[0, :, -1].mean(0)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), weights


AttentionInterface.register("test_masked", _masked_attention)
AttentionMaskInterface.register("test_masked", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def masked_prunehal(
    stack_generate, model, inputs, visual: list[int], layers: int | list[int], steps: int, o: dict, replay=None
):
    """Greedy decoding of one image by the written rule; (tokens, logits [steps, v], prunes [(m, kept per layer)]).

    `layers` are how many the model has, or those that vote and are pruned. `o` are PruneHal's options. With `replay`,
    {m: kept per layer}, the prunes are those, whatever the rule says.
    """
    found, layers = {}, list(range(layers)) if isinstance(layers, int) else layers

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        config = model.config.get_text_config(decoder=True)
        before, config._attn_implementation = config._attn_implementation, "test_masked"
        try:
            found.update(_decode(model, input_ids, generation_config, kwargs, visual, layers, steps, o, replay))
        finally:
            config._attn_implementation = before
            _dropped.clear()
        return input_ids

    stack_generate(model, inputs, loop)
    return found["tokens"], torch.stack(found["logits"]), found["prunes"]


def _decode(model, input_ids, config, kwargs, visual, layers, steps, o, replay):
    _dropped.clear()
    kept = {l: list(visual) for l in layers}
    history: list[dict[int, float]] = []
    tokens, logits, prunes, used = [], [], [], 0

    def attention(l):
        return sum(float(_rows[l][v]) for v in kept[l]) / len(kept[l])

    def prune(m, counts):
        nonlocal used, kept
        n = len(kept[layers[0]])
        goal = o["top_k"] if o["top_k"] is not None else max(1, math.floor(o["r"] * n + 1e-6))
        if replay is not None:
            new = replay[m]
        else:
            if goal >= n:
                return False
            shared = sum(_rows[l] for l in layers)
            sign = -1 if o["keep"] == "top" else 1
            new = {}
            for l in layers:
                row = shared if o["sets"] == "shared" else _rows[l]
                new[l] = sorted(sorted(kept[l], key=lambda v: (sign * float(row[v]), v))[:goal])
        kept = {l: list(new[l]) for l in layers}
        for l in layers:
            _dropped[l] = sorted(set(visual) - set(kept[l]))
        used += counts
        prunes.append((m, kept))
        return True

    def consider(m, newest):
        """The start of step m (timing before) or its end (after): vote, then prune."""
        past = history
        if replay is not None:
            if m in replay:
                prune(m, True)
            return
        fired = False
        if m == 2 and o["forced"] and not o["first_token"]:
            if used < o["t"] or not o["forced_counts"]:
                fired = prune(m, o["forced_counts"])
        elif o["top_k"] is None and past:
            votes = 0
            for l in layers:
                reference = first[l] if o["reference"] == "first_step" else sum(p[l] for p in past) / len(past)
                votes += newest[l] < math.sqrt(o["r"]) * reference
            won = votes > len(layers) / 2 if o["majority"] == "strict" else votes >= len(layers) / 2
            if won and used < o["t"]:
                fired = prune(m, True)
        history.append(newest)
        if fired and o["reference"] == "reset_on_prune":
            history.clear()

    initial = dict(kwargs)
    out = model._prefill(input_ids, config, kwargs)
    if o["first_token"] and (used < o["t"] or not o["forced_counts"] or replay is not None):
        if replay is None or 1 in replay:
            prune(1, o["forced_counts"])
        initial[CACHE] = type(initial[CACHE])()
        kwargs = initial
        out = model._prefill(input_ids, config, kwargs)
    for m in range(1, steps + 1):
        if m > 1:
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            out = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(out, kwargs)
        newest = {l: attention(l) for l in layers}
        if m == 1:
            first = newest
        logits.append(out.logits[0, -1].clone())
        token = out.logits[:, -1].argmax(-1)
        tokens.append(int(token))
        input_ids = torch.cat([input_ids, token[:, None]], -1)
        if m == steps:
            break
        if o["timing"] == "before":
            consider(m + 1, newest)
        elif m >= 2:
            consider(m, newest)
        else:
            history.append(newest)
    return {"tokens": tokens, "logits": logits, "prunes": prunes}
