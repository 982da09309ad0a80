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
    rule = _Rule(visual, layers, o, replay)
    tokens, logits = [], []
    initial = dict(kwargs)
    out = model._prefill(input_ids, config, kwargs)
    if o["first_token"] and (rule.may_force() or replay is not None):
        if replay is None or 1 in replay:
            rule.prune(1, o["forced_counts"])
        initial[CACHE] = type(initial[CACHE])()
        kwargs = initial
        out = model._prefill(input_ids, config, kwargs)
    for m in range(1, steps + 1):
        if m > 1:
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            out = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(out, kwargs)
        newest = rule.attention()
        if m == 1:
            rule.first = newest
        logits.append(out.logits[0, -1].clone())
        token = out.logits[:, -1].argmax(-1)
        tokens.append(int(token))
        input_ids = torch.cat([input_ids, token[:, None]], -1)
        if m == steps:
            break
        if o["timing"] == "before":
            rule.consider(m + 1, newest)
        elif m >= 2:
            rule.consider(m, newest)
        else:
            rule.history.append(newest)
    return {"tokens": tokens, "logits": logits, "prunes": rule.prunes}


class _Rule:
    """The votes and prunes of one generation. `first` is the attention of the first forward, {layer: mean}."""

    def __init__(self, visual: list[int], layers: list[int], o: dict, replay: dict | None):
        self.visual, self.layers, self.o, self.replay = visual, layers, o, replay
        self.kept = {layer: list(visual) for layer in layers}
        self.first: dict[int, float] = {}
        self.history: list[dict[int, float]] = []
        self.prunes, self.used = [], 0

    def attention(self) -> dict[int, float]:
        """Mean attention of the newest query to the visual tokens left, by layer."""
        return {
            layer: sum(float(_rows[layer][v]) for v in kept) / len(kept)
            for layer in self.layers
            for kept in [self.kept[layer]]
        }

    def may_force(self) -> bool:
        """Whether the unconditional prune is within the number of prunes."""
        return self.used < self.o["t"] or not self.o["forced_counts"]

    def prune(self, m: int, counts: bool) -> bool:
        """Drop the least attended at step m; False where nothing is to drop."""
        if self.replay is not None:
            new = self.replay[m]
        else:
            new = self._choice()
            if new is None:
                return False
        self.kept = {layer: list(new[layer]) for layer in self.layers}
        for layer in self.layers:
            _dropped[layer] = sorted(set(self.visual) - set(self.kept[layer]))
        self.used += counts
        self.prunes.append((m, self.kept))
        return True

    def _choice(self) -> dict[int, list[int]] | None:
        """What a prune keeps, by layer; None where that is everything."""
        o, n = self.o, len(self.kept[self.layers[0]])
        goal = o["top_k"] if o["top_k"] is not None else max(1, math.floor(o["r"] * n + 1e-6))
        if goal >= n:
            return None
        shared = sum(_rows[layer] for layer in self.layers)
        sign = -1 if o["keep"] == "top" else 1
        new = {}
        for layer in self.layers:
            row = shared if o["sets"] == "shared" else _rows[layer]
            best = sorted(self.kept[layer], key=lambda v, row=row: (sign * float(row[v]), v))
            new[layer] = sorted(best[:goal])
        return new

    def consider(self, m: int, newest: dict[int, float]) -> None:
        """The start of step m (timing before) or its end (after): vote, then prune."""
        o = self.o
        if self.replay is not None:
            if m in self.replay:
                self.prune(m, True)
            return
        fired = False
        if m == 2 and o["forced"] and not o["first_token"]:
            if self.may_force():
                fired = self.prune(m, o["forced_counts"])
        elif o["top_k"] is None and self.history:
            if self._most_vote(newest) and self.used < o["t"]:
                fired = self.prune(m, True)
        self.history.append(newest)
        if fired and o["reference"] == "reset_on_prune":
            self.history.clear()

    def _most_vote(self, newest: dict[int, float]) -> bool:
        """Whether most layers find the newest attention below sqrt(r) of their reference."""
        o, votes = self.o, 0
        for layer in self.layers:
            past = [p[layer] for p in self.history]
            reference = self.first[layer] if o["reference"] == "first_step" else sum(past) / len(past)
            votes += newest[layer] < math.sqrt(o["r"]) * reference
        return votes > len(self.layers) / 2 if o["majority"] == "strict" else votes >= len(self.layers) / 2
