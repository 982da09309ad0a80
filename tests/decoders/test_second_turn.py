"""A second turn goes on from the cache that a stack left: what was pruned stays pruned, positions stay right."""

import copy

import pytest
import tiny
import torch
from tiny import families
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from baselines import OPERA, VCD
from decoders import Stack, StackError, hf
from prunehal import PruneHal

FAMILIES = ("llava", "internvl", "qwen25vl", "qwen3vl")
NEW = 9
OPTIONS = dict(
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
)
MORE = torch.tensor([[30, 131, 32, 77]])

_visible: dict[int, torch.Tensor] = {}  # bool [queries, keys] by layer


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = scores.masked_fill(~_visible[module.layer_idx], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), weights


AttentionInterface.register("test_turns", _attention)
AttentionMaskInterface.register("test_turns", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _logits(family, inputs, ids, prunes):
    """One forward of transformers over a whole conversation, [tokens, v], in which queries do not see what had been
    pruned when they ran.

    Args:
        ids: long [1, tokens].
        prunes: (place of the first query that does not see them, visual tokens kept by layer) of each.
    """
    model = tiny.model(family)
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    n = ids.shape[1]
    for layer in range(tiny.TEXT["num_hidden_layers"]):
        _visible[layer] = torch.ones(n, n, dtype=torch.bool).tril()
        for first, kept in prunes:
            dropped = sorted(set(visual) - set(kept[layer]))
            _visible[layer][first:, dropped] = False
    given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = (ids == tiny.IMAGE).long()
    with torch.no_grad(), hf.attention_replaced(model, "test_turns"):
        return model(**given).logits[0]


def _conversation(inputs, first):
    """The inputs of the second turn: all ids, as a processor makes them, and the pictures."""
    ids = torch.cat([first.sequences, MORE.expand(len(first.sequences), -1)], 1)
    out = {**inputs, "input_ids": ids}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)[:, : ids.shape[1]]
    if "mm_token_type_ids" in inputs:
        out["mm_token_type_ids"] = (ids == tiny.IMAGE).long()
    return out


def _second(family, decoders, inputs, first, **options):
    stack = Stack(decoders)
    cache = copy.deepcopy(hf.cache_of(first))
    given = hf.with_cache(_conversation(inputs, first), cache)
    return stack.generate(tiny.model(family), **given, **OPTIONS | options), stack.record


def _placed(record, prompt):
    """The prunes of a row by the place of the first query that does not see what they dropped."""
    return [(prompt + prune["step"] - 2, prune["kept"]) for prune in record["prunes"]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_one_run_over_the_whole_conversation_with_the_same_slots_masked(family, beams):
    inputs = tiny.inputs(family, 1, seed=6)
    prompt = inputs["input_ids"].shape[1]
    stack = Stack([PruneHal(r=0.6, t=3)])
    first = stack.generate(tiny.model(family), **inputs, **OPTIONS | dict(num_beams=beams))
    prunes = _placed(stack.record["prunehal"][0], prompt)
    assert prunes and first.sequences.shape == (1, prompt + NEW)
    # another generation in between leaves nothing behind
    Stack([]).generate(tiny.model(family), **tiny.inputs(family, 1, seed=8), max_new_tokens=2, do_sample=False)
    second, _ = _second(family, [], inputs, first)
    expected = _logits(family, inputs, second.sequences[:, :-1], prunes)
    torch.testing.assert_close(torch.stack(second.logits)[:, 0], expected[-NEW:], atol=2e-3, rtol=1e-4)
    unpruned = _logits(family, inputs, second.sequences[:, :-1], [])
    assert not torch.allclose(unpruned[-NEW:], expected[-NEW:], atol=1e-2)


def test_decoders_go_on_pruning_and_looking_ahead():
    inputs = tiny.inputs("llava", 1, seed=6)
    first = Stack([PruneHal(r=0.6, t=1)]).generate(tiny.model("llava"), **inputs, **OPTIONS)
    left = hf.cache_of(first).layers[0].keys.shape[2]
    for decoders in ([PruneHal(r=0.5, t=2)], [OPERA(threshold=None), PruneHal(r=0.5, t=2)]):
        for beams in (1, 3):
            second, record = _second("llava", decoders, inputs, first, num_beams=beams)
            (row,) = record["prunehal"]
            assert row["prunes"] and len(row["prunes"][0]["kept"][0]) < (inputs["input_ids"] == tiny.IMAGE).sum()
            assert hf.cache_of(second).layers[0].keys.shape[2] < left + MORE.shape[1] + NEW
            assert hf.cache_of(second).get_seq_length() == second.sequences.shape[1] - 1


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_one_by_one(beams):
    inputs = tiny.inputs("llava", 3, seed=3)
    options = dict(num_beams=beams)
    first = Stack([PruneHal()]).generate(tiny.model("llava"), **inputs, **OPTIONS | options)
    second, _ = _second("llava", [PruneHal(t=2)], inputs, first)
    for i in range(3):
        mine = tiny.one(inputs, i)
        alone = Stack([PruneHal()]).generate(tiny.model("llava"), **mine, **OPTIONS | options)
        again, _ = _second("llava", [PruneHal(t=2)], mine, alone)
        assert torch.equal(second.sequences[i, -NEW:], again.sequences[0, -NEW:])
        torch.testing.assert_close(
            torch.stack(second.logits)[:, i], torch.stack(again.logits)[:, 0], atol=2e-3, rtol=1e-3
        )


def _of_mixed_layers(name):
    """A model whose layers are of several kinds, inputs of one prompt, and the cache and the inputs of its second turn,
    after one with a decoder that drops nothing.
    """
    model = families.model(name)
    inputs = families.inputs(name, *zip(families.prompt(1, 4, (48, 32)), strict=False))
    first = Stack([PruneHal(r=1)]).generate(model, **inputs, **OPTIONS)
    more = torch.cat([first.sequences[:, -NEW:], MORE], 1)
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    given = {
        key: torch.cat([value, fill.get(key, torch.zeros_like(more))], 1)
        if value.shape == inputs["input_ids"].shape
        else value
        for key, value in inputs.items()
    }
    return model, given, hf.cache_of(first)


@pytest.mark.parametrize("name", ["gemma3", "aya_vision"])
def test_an_empty_stack_goes_on_from_the_cache_of_a_model_with_windows(name):
    """As one run of transformers over the whole conversation, since nothing was dropped."""
    model, given, cache = _of_mixed_layers(name)
    expected = model.generate(**given, **OPTIONS)
    second = Stack([]).generate(model, **hf.with_cache(given, cache), **OPTIONS)
    assert torch.equal(second.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(expected.logits), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("decoders", [[], [PruneHal(r=1)]], ids=["empty", "prunehal"])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_cache_with_running_states_is_refused_by_what_it_keeps(name, decoders):
    model, given, cache = _of_mixed_layers(name)
    with pytest.raises(StackError, match="this cache cannot be continued: layers keep running states"):
        Stack(decoders).generate(model, **hf.with_cache(given, cache), **OPTIONS)


def test_what_cannot_be_continued_is_refused_by_name():
    inputs = tiny.inputs("llava", 2, seed=3)
    model = tiny.model("llava")
    first = Stack([PruneHal()]).generate(model, **inputs, **OPTIONS)
    given = _conversation(inputs, first)

    def turn(decoders=(), cache=None, **changes):
        cache = copy.deepcopy(hf.cache_of(first)) if cache is None else cache
        return Stack(list(decoders)).generate(model, **hf.with_cache({**given, **changes}, cache), **OPTIONS)

    other = given["input_ids"].clone()
    other[1, -MORE.shape[1] - 3] += 1
    picture = given["input_ids"].clone()
    picture[0, -1] = tiny.IMAGE
    for words, call in {
        "do not begin with the tokens": lambda: turn(input_ids=other),
        "new pictures": lambda: turn(input_ids=picture),
        "holds 2 rows of 35 tokens, and input_ids are 2 of 35": lambda: turn(
            input_ids=given["input_ids"][:, : first.sequences.shape[1] - 1],
            attention_mask=given["attention_mask"][:, : first.sequences.shape[1] - 1],
        ),
        "on other inputs as well": lambda: turn([VCD()]),
    }.items():
        with pytest.raises(StackError, match=f"{words}.*apply_chat_template"):
            call()
