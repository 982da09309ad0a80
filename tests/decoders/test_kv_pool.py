"""The pool of slots: layers that keep different numbers of them, and what is dropped and when."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
from references.masked_prunehal import masked_prunehal
from torch import Tensor

from decoders import Decoder, Requirements, Stack
from decoders.cache_layers import PoolLayer
from decoders.kv_pool import SavedSlots, SlotTable

FAMILIES = ("llava", "internvl", "qwen25vl", "qwen3vl")
NEW = 20


@dataclass
class Uneven(Decoder):
    """Keeps another share of the visual tokens in every layer from the prefill on: the most attended."""

    def requirements(self, model):
        return Requirements(attention=None, visual=True, reruns_last_token=True)

    def init_state(self, context):
        return _Kept(torch.zeros(context.rows, context.layers, context.prompt, dtype=torch.bool))

    def select_slots_after_prefill(self, step, state):
        layers, n, t = step.attention.shape
        visual = step.visual.expand(layers, -1, -1)
        share = (torch.arange(layers) + 1) / (layers + 1)
        count = (visual.sum(-1) * share[:, None]).long()  # [l, n]
        place = step.attention.masked_fill(~visual, -1).argsort(-1, descending=True).argsort(-1)
        kept = visual & (place < count[..., None])
        state.kept = kept.transpose(0, 1)[..., : state.kept.shape[-1]]
        return kept | ~visual

    def record(self, state):
        return [[layer.nonzero().flatten().tolist() for layer in row] for row in state.kept]


@dataclass
class _Kept:
    kept: Tensor


@dataclass
class Forced(Decoder):
    """Says these tokens and no others."""

    tokens: list[int]

    def process_logits(self, step, state, scores):
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[step.max_num_forwards - 1]] = 0
        return only


def _generate(decoders, family, inputs, **options):
    stack = Stack(decoders)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    out = stack.generate(tiny.model(family), **inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out, stack.record


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_keep_different_numbers_equal_masking_them(family):
    """An independent reference, which deletes nothing, masks the same slots in each layer."""
    inputs = tiny.inputs(family, 1, seed=6)
    out, record = _generate([Uneven()], family, inputs)
    (kept,) = record["uneven"]
    assert len({len(layer) for layer in kept}) == len(kept) == tiny.TEXT["num_hidden_layers"]

    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()

    def generate(model, inputs, loop):
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, custom_generate=loop)

    options = dict(first_token=True, forced_counts=True, t=1, timing="none", r=1.0, reference="first_step")
    options |= dict(sets="per_layer", majority="strict", forced=True, keep="top", top_k=None)
    tokens, logits, prunes = masked_prunehal(
        generate, tiny.model(family), inputs, visual, len(kept), NEW, options, replay={1: dict(enumerate(kept))}
    )
    assert [m for m, _ in prunes] == [1]
    assert out.sequences[0, -NEW:].tolist() == tokens
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_whose_layers_keep_different_numbers_equal_saying_their_words(family):
    """Each beam that is returned has the score that its words have one by one, with the same slots dropped."""
    inputs = tiny.inputs(family, 1, seed=6)
    beams, record = _generate([Uneven()], family, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
    plain, _ = _generate([], family, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
    assert not torch.equal(beams.sequences, plain.sequences)
    assert len({len(layer) for layer in record["uneven"][0]}) == tiny.TEXT["num_hidden_layers"]
    for ids, score in zip(beams.sequences, beams.sequences_scores.tolist(), strict=True):
        words = ids[-NEW:]
        alone, again = _generate([Uneven(), Forced(words.tolist())], family, inputs)
        assert again["uneven"] == record["uneven"][:1]
        said = torch.stack(alone.logits)[:, 0].log_softmax(-1).gather(1, words[:, None]).sum()
        assert float(said) / NEW == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_checkpoint_sees_the_same_tokens_when_slots_were_dropped(layers):
    """Also where there are many, some of them from before layers were pruned apart."""
    s, k, capacity, used, checkpoints = 2, 3, 256, 250, 40
    pools = [PoolLayer() for _ in range(layers)]
    for pool in pools:
        pool.begin(torch.zeros(s, 2, 1, 4), torch.zeros(s, 2, 1, 4))
        pool.keys = pool.values = torch.arange(capacity).float()[None, None, :, None].expand(s, 2, -1, 4)
        pool.used = used
    position = torch.arange(capacity).where(torch.arange(capacity) < used, -1).expand(1, s, -1).clone()

    def seen(n):
        return (torch.rand(n, s, k, capacity) < 0.003) & (position[0, 0] >= 0)

    table = SlotTable(list(range(layers)), pools, position, seen(layers))
    saved = [SavedSlots(seen(layers if i % 2 else 1), seen(1) if i % 3 else None) for i in range(checkpoints)]
    owners = [
        (one, name) for one in (table, *saved) for name in ("visible", "finished") if getattr(one, name) is not None
    ]

    def tokens(owner, name):
        """The places in the sequence that each row sees, by layer, sequence and row."""
        visible = getattr(owner, name).expand(layers, -1, -1, -1)
        places = table.position.expand(layers, -1, -1)
        return [sorted(places[i, j][visible[i, j, r]].tolist()) for i, j, r in np.ndindex(layers, s, k)]

    before = [tokens(*owner) for owner in owners]
    assert table.make_room(4, saved) is not None and table.used < used
    assert [tokens(*owner) for owner in owners] == before and any(map(any, before))
    for i, pool in enumerate(pools):  # each slot holds the keys of its token
        places = table.position[i if len(table.position) > 1 else 0]
        written = places >= 0
        assert torch.equal(pool.keys[:, 0, :, 0][written], places[written].float())
