"""Batches in which one prompt holds no image while others do."""

import pytest
import stacks
import tiny
import torch

from decoders import Stack, StackError

BLIND = 1  # the row without an image
STACKS = [("prunehal",), ("opera",), ("opera", "prunehal"), ("vcd", "prunehal"), ("prunehal", "dola", "vcd", "opera")]


def without_image(batch, row=BLIND):
    """The batch with the image of one row taken out; its text stays, padded on the left."""
    n = len(batch["input_ids"])
    out = dict(batch)
    pixels = batch["pixel_values"].view(n, -1, *batch["pixel_values"].shape[1:])
    out["pixel_values"] = pixels[[i for i in range(n) if i != row]].flatten(0, 1)
    if "image_grid_thw" in batch:
        out["image_grid_thw"] = batch["image_grid_thw"][[i for i in range(n) if i != row]]
    ids, width = batch["input_ids"], batch["input_ids"].shape[1]
    text = ids[row][(ids[row] != tiny.IMAGE) & (ids[row] != tiny.PAD) & (ids[row] != 9) & (ids[row] != 10)]
    out["input_ids"], out["attention_mask"] = ids.clone(), batch["attention_mask"].clone()
    out["input_ids"][row] = tiny.PAD
    out["input_ids"][row, width - len(text) :] = text
    out["attention_mask"][row] = 0
    out["attention_mask"][row, width - len(text) :] = 1
    if "mm_token_type_ids" in batch:
        out["mm_token_type_ids"] = (out["input_ids"] == tiny.IMAGE).long()
    return out


def without_the_first(mixed):
    """The batch without its first row, which holds an image."""
    n = len(mixed["input_ids"])
    return {k: v[1:] if len(v) == n else v.view(n - 1, -1, *v.shape[1:])[1:].flatten(0, 1) for k, v in mixed.items()}


@pytest.mark.parametrize(
    "family, names, search",
    [  # quick: each stack under both searches, on one family each
        pytest.param(family, names, search, marks=[] if (i + j + k) % 2 else [pytest.mark.slow])
        for i, family in enumerate(("llava", "qwen25vl"))
        for j, names in enumerate(STACKS)
        for k, search in enumerate(("greedy", "beam"))
    ],
)
def test_a_row_without_an_image_runs_beside_those_that_have_one(family, names, search):
    whole, seeds = tiny.inputs(family, 3, seed=5), [3, 4, 5]
    mixed = without_image(whole)
    options = dict(search=search, eos_token_id=None)
    out, record = stacks.run(family, names, mixed, seeds=seeds, **options)
    start = mixed["input_ids"].shape[1]

    for row in (0, 2):  # rows with an image equal their runs alone
        alone, _ = stacks.run(family, names, tiny.one(whole, row), seeds=seeds[row : row + 1], **options)
        assert torch.equal(out.sequences[row, start:], alone.sequences[0, -14:])
    # the row without one is the same beside other rows
    fewer, other = stacks.run(family, names, without_the_first(mixed), seeds=seeds[1:], **options)
    assert torch.equal(out.sequences[BLIND, start:], fewer.sequences[0, start:])

    plain, _ = stacks.run(family, (), mixed, **options)
    acted = [not torch.equal(out.sequences[i], plain.sequences[i]) for i in range(3)]
    assert acted[0] or acted[2]
    if "prunehal" in names:
        assert record["prunehal"][BLIND]["prunes"] == [] and record["prunehal"][0]["prunes"]
        assert not record["prunehal"][BLIND]["attention"].any()
    if names == ("prunehal",):  # nothing to prune: plain decoding
        alone, _ = stacks.run(family, (), {k: v[BLIND : BLIND + 1] for k, v in text_of(mixed).items()}, **options)
        assert torch.equal(out.sequences[BLIND, start:], alone.sequences[0, start:])
    if "opera" in names:
        assert record["restless"][BLIND] == other["restless"][0] != []


def text_of(mixed):
    return {k: mixed[k] for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", ["prunehal", "opera"])
def test_a_call_without_any_image_is_refused(name):
    mixed = without_image(tiny.inputs("llava", 2), 1)
    blind = {k: v[1:] for k, v in text_of(mixed).items()}
    with pytest.raises(StackError, match=r"no prompt holds visual tokens\. Put the image into the prompt"):
        Stack([stacks.make(name)]).generate(tiny.model("llava"), **blind, max_new_tokens=2)
