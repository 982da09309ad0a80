"""Prompts that decoders change: without pictures, and with other text, in every family; what is dropped of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from references.oracles import plain
from tiny import families
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from decoders import Branch, Decoder, RawInputs, Requirements, Stack, StackError

NEW = 6
OPTIONS = dict(
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
)
CLOSE = dict(atol=5e-3, rtol=1e-3)
TEXT_TOO = [name for name in families.NAMES if name != "instructblip"]
SIZES = [(48, 32), (24, 64), (64, 32)]
INSERTED = [30, 31, 32, 33]


@dataclass
class Beside(Decoder):
    """Runs a branch, or none, and notes its logits; after the second forward drops visual tokens `drops` of the main
    rows, counted from the first, and in the i-th layer the i-th after each.
    """

    inputs: Any
    drops: tuple[int, ...] = ()
    pruning: str = "mirror"
    seen: dict[int, Tensor] = field(default_factory=dict)

    def requirements(self, model):
        branch = None if self.inputs is None else Branch(self.inputs, self.pruning)
        return Requirements(visual=bool(self.drops), branch=branch)

    def init_state(self, context):
        self.layers = context.layers

    def process_logits(self, step, state, scores):
        self.seen[step.max_num_forwards] = step.logits if self.inputs is None else step.branch
        return scores

    def select_slots(self, step, state):
        if not self.drops or step.max_num_forwards != 2:
            return None
        order = (step.visual.long().cumsum(-1) - 1)[0]
        gone = [torch.isin(order, torch.tensor(self.drops) + i) for i in range(self.layers)]
        return ~(torch.stack(gone) & step.visual)


class Say(LogitsProcessor):
    """Makes a generation say these tokens, long [n, new]."""

    def __init__(self, tokens):
        self.tokens, self.at = tokens, 0

    def __call__(self, input_ids, scores):
        self.at += 1
        forced = self.tokens[:, self.at - 1 : self.at]
        return torch.full_like(scores, -torch.inf).scatter_(1, forced, 0.0)


def prompts(name, count):
    written = [families.prompt(i + 1, (4, 7, 5)[i], SIZES[i]) for i in range(count)]
    return families.inputs(name, [text for text, _ in written], [pictures for _, pictures in written])


def padded(rows):
    """Ids and mask of lists of ids, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(inputs):
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def close(mine, expected):
    torch.testing.assert_close(torch.stack(list(mine)), torch.stack(list(expected)), **CLOSE)


@pytest.mark.parametrize("name", TEXT_TOO)
def test_a_branch_without_pictures_is_the_models_own_generate_on_text_alone(name):
    inputs, model = prompts(name, 2), families.model(name)
    beside = Beside(RawInputs.without_images)
    out = Stack([beside]).generate(model, **inputs, **OPTIONS)
    tokens = out.sequences[:, -NEW:]
    text = padded([[i for i in row if i != 4] for row in rows_of(inputs)])
    assert text["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    own = model.generate(**text, **OPTIONS, logits_processor=LogitsProcessorList([Say(tokens)]))
    close(beside.seen.values(), own.logits)
    assert (torch.stack(own.logits) - torch.stack(out.logits)).abs().max() > 0.05, "the picture must matter"


def inserted(name, inputs):
    """Rows with INSERTED after the picture, written by hand."""
    closing = {
        "qwen2_vl": [7], "qwen2_5_vl": [7], "qwen3_vl": [7], "qwen3_5": [7], "glm4v": [7], "gemma3": [6],
        "internvl": [6], "smolvlm": [5], "idefics3": [5], "aya_vision": [7],
    }.get(name, [])  # fmt: skip
    rows = []
    for row in rows_of(inputs):
        at = max(i for i, token in enumerate(row) if token == 4) + 1
        assert row[at : at + len(closing)] == closing
        rows.append([*row[: at + len(closing)], *INSERTED, *row[at + len(closing) :]])
    return rows


def given(name, rows, inputs):
    """The inputs with other prompts, as the family's processor would make them."""
    more = padded(rows)
    for kind in ("mm_token_type_ids", "token_type_ids"):
        if kind in inputs:
            more[kind] = (more["input_ids"] == 4).long()
    return {**inputs, **more}


@pytest.mark.parametrize("way", ["with_tokens", "with_prompts"])
@pytest.mark.parametrize("name", families.NAMES)
def test_a_branch_with_other_text_is_the_models_own_generate_on_that_prompt(name, way):
    inputs, model = prompts(name, 2), families.model(name)
    rows = inserted(name, inputs)
    change = (lambda raw: raw.with_tokens(INSERTED)) if way == "with_tokens" else lambda raw: raw.with_prompts(rows)
    beside = Beside(change)
    tokenizer = None if name == "lfm2_vl" else families.processor(name)
    out = Stack([beside]).generate(model, **inputs, **OPTIONS, tokenizer=tokenizer)
    tokens = out.sequences[:, -NEW:]
    own = model.generate(**given(name, rows, inputs), **OPTIONS, logits_processor=LogitsProcessorList([Say(tokens)]))
    close(beside.seen.values(), own.logits)
    assert (torch.stack(own.logits) - torch.stack(out.logits)).abs().max() > 0.05, "the text must matter"


def reworded(rows):
    """The first prompt with more words on both sides of its picture, the second with fewer."""
    first, second = rows[0], rows[1]
    begin = 0 if second[0] == second[1] else 1  # a picture that stands first stays whole
    return [[first[0], 41, 42, 43, *first[1:], 44, 45], [*second[begin:-2], second[-1]]]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_branch_of_another_prompt_drops_the_same_visual_tokens_by_number(name):
    """Its logits are those of a generation on its prompt alone in which they were dropped."""
    inputs, model, drops = prompts(name, 2), families.model(name), (0, 2, 3)
    rows = reworded(rows_of(inputs))
    beside = Beside(lambda raw: raw.with_prompts(rows), drops)
    out = Stack([beside]).generate(model, **inputs, **OPTIONS)
    tokens = out.sequences[:, -NEW:]
    said = LogitsProcessorList([Say(tokens)])
    alone, whole = Beside(None, drops), Beside(None)
    Stack([alone]).generate(model, **given(name, rows, inputs), **OPTIONS, logits_processor=said)
    close(beside.seen.values(), alone.seen.values())
    said = LogitsProcessorList([Say(tokens)])
    Stack([whole]).generate(model, **given(name, rows, inputs), **OPTIONS, logits_processor=said)
    close([beside.seen[2]], [whole.seen[2]])
    assert (beside.seen[NEW] - whole.seen[NEW]).abs().max() > 0.01, "what was dropped must matter"


@pytest.mark.parametrize("pruning, dropped", [("mirror", True), ("none", False)])
@torch.no_grad()
def test_what_a_branch_drops_is_what_a_whole_masked_forward_hides(pruning, dropped):
    """Of every query since, by layer; on a forward written out, of one row without a cache."""
    model, inputs = plain.tiny(3)
    prompt = inputs["input_ids"][0].tolist()
    other = [*prompt[:2], 20, 21, 22, *prompt[2:], 23]
    beside = Beside(lambda raw: raw.with_prompts([other]), (1, 4, 7, 8), pruning)
    out = Stack([beside]).generate(model, **inputs, **OPTIONS)
    places = (torch.tensor(other) == model.config.image_token_id).nonzero()[:, 0]

    def hidden(i, weights, values, x):
        weights = weights.clone()
        weights[:, len(other) + 1 :, places[torch.tensor([1, 4, 7, 8]) + i]] = 0
        return weights / weights.sum(-1, keepdim=True)

    answer = model.get_input_embeddings()(out.sequences[0, -NEW:])
    start = plain.embedded(model, {**inputs, "input_ids": torch.tensor([other])})
    for m, seen in beside.seen.items():
        said = torch.cat([start, answer[: m - 1]])
        expected = plain.forward(model, said, attend=hidden if dropped else None)[2]
        torch.testing.assert_close(seen[0].double(), expected, atol=1e-4, rtol=1e-4)
        unlike = plain.forward(model, said, attend=None if dropped else hidden)[2]
        assert m < 3 or (seen[0] - unlike).abs().max() > 1e-2


def test_instructblip_has_no_prompt_without_its_picture():
    words = "cannot run without|InstructBlipForConditionalGeneration.generate asks for pixel_values"
    with pytest.raises(StackError, match=words):
        Stack([Beside(RawInputs.without_images)]).generate(
            families.model("instructblip"), **prompts("instructblip", 1), **OPTIONS
        )


def test_prompts_that_cannot_stand_in_the_place_of_others_are_refused():
    inputs, model = prompts("llava", 2), families.model("llava")
    rows = rows_of(inputs)

    def refuse(words, change, **more):
        with pytest.raises(StackError, match=words):
            Stack([Beside(change)]).generate(model, **{**inputs, **more}, **OPTIONS)

    refuse("1 prompts were given in the place of 2", lambda raw: raw.with_prompts(rows[:1]))
    refuse("prompt 1 holds 15 image tokens.* 16", lambda raw: raw.with_prompts([rows[0], rows[1][:3] + rows[1][4:]]))
    refuse("needs the tokenizer", lambda raw: raw.token_ids("w30"))
    refuse("Q-Former's tokenizer", lambda raw: raw.token_ids("w30", qformer=True))


def test_prompts_without_input_ids_or_pictures_cannot_be_changed():
    model = families.model("llava")
    text = {"input_ids": torch.tensor([[1, 30, 31]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    embedded = {"inputs_embeds": model.get_input_embeddings()(text["input_ids"])}
    with pytest.raises(StackError, match="no image tokens"):
        Stack([Beside(lambda raw: raw.with_tokens([30]))]).generate(model, **text, **OPTIONS)
    for change in (RawInputs.without_images, lambda raw: raw.with_prompts([[1]])):
        with pytest.raises(StackError, match="without input_ids"):
            Stack([Beside(change)]).generate(model, **embedded, **OPTIONS)
