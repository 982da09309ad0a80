"""Rows that go back beside rows that have ended, and states that can go back or not."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import stacks
import tiny
import torch

from decoders import Decoder, Requirements, Stack, StackError, hf

EOS, NEW = 40, 10
OPTIONS = dict(
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=EOS,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
    output_scores=True,
)


@dataclass
class Ends(Decoder):
    """Row i ends with its token `at[i]`, counted from 1, and nowhere else."""

    at: tuple[int, ...]

    def process_logits(self, step, state, scores):
        ends = step.num_forwards == torch.tensor(self.at)
        scores = scores.clone()
        scores[:, EOS] = torch.where(ends, 1e4, -1e4)
        return scores


class EndsOnceBack(stacks.Rewind):
    """The first row goes back once and then ends with its fifth token; the second ends with its fourth."""

    def process_logits(self, step, state, scores):
        first = torch.where(state.done[0] > 0, 5, -1)
        scores = scores.clone()
        scores[:, EOS] = torch.where(step.num_forwards == torch.stack([first, first * 0 + 4]), 1e4, -1e4)
        return scores

    def rescore_candidates(self, step, candidates, state, scores):
        scores, back = super().rescore_candidates(step, candidates, state, scores)
        return scores, back.masked_fill(torch.tensor([False, True]), -1)


def test_outputs_are_no_longer_than_the_answer_that_rows_went_back_for():
    inputs = tiny.inputs("llava", 2)
    out = Stack([EndsOnceBack(8, 2)]).generate(tiny.model("llava"), **inputs, **OPTIONS)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert answers.shape[1] == 5 and answers[0, 4] == answers[1, 3] == EOS
    assert len(out.scores) == len(out.logits) == 5


class RewindsApart(stacks.Rewind):
    """The second row goes back to one token more than the first."""

    def rescore_candidates(self, step, candidates, state, scores):
        scores, back = super().rescore_candidates(step, candidates, state, scores)
        return scores, back + (back >= 0) * torch.arange(2)


def test_stopping_criteria_are_shown_no_scores_of_steps_that_were_taken_back():
    inputs, ahead = tiny.inputs("llava", 2), []

    def note(ids, scores, **kwargs):
        ahead.append(len(scores) - (ids.shape[1] - inputs["input_ids"].shape[1]))
        return torch.zeros(len(ids), dtype=torch.bool)

    stack = Stack([Ends((-1, -1)), RewindsApart(8, 2)])
    stack.generate(tiny.model("llava"), **inputs, **OPTIONS, stopping_criteria=[note])
    assert stack.record["rewindsapart"] == [1, 1]
    assert set(ahead) == {0, 1}  # the shorter row has one token less than there are scores


class SeesPositions(Decoder):
    """Notes the last place in the sequence that it saw in a slot."""

    def __init__(self):
        self.last = 0

    def process_logits(self, step, state, scores):
        self.last = max(self.last, int(step.slot_positions.max()))
        return scores


def test_rows_that_have_ended_take_no_position_past_the_longest_answer():
    inputs, seen = tiny.inputs("llava", 2), SeesPositions()
    stack = Stack([Ends((-1, 3)), stacks.Rewind(8, 1), seen])
    stack.generate(tiny.model("llava"), **inputs, **OPTIONS)
    assert stack.record["rewind"] == [1, 0]
    assert seen.last < inputs["input_ids"].shape[1] + NEW


class LooksAhead(Decoder):
    """Runs candidates, and changes nothing."""

    def requirements(self, model):
        return Requirements(lookahead=3)


def test_rows_that_have_ended_hold_pads_in_the_cache_after_lookahead():
    inputs = tiny.inputs("llava", 2)
    ahead, plain = (
        hf.cache_of(Stack([Ends((-1, 3)), *more]).generate(tiny.model("llava"), **inputs, **OPTIONS))
        for more in ([LooksAhead()], [])
    )
    for one, other in zip(ahead.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-3, rtol=1e-4)


class GoesBackBlindly(Decoder):
    """Would go back, and has no candidates to ask for it."""

    def requirements(self, model):
        return Requirements(rollback=True)


def test_rollback_without_lookahead_is_refused():
    with pytest.raises(StackError, match="goesbackblindly requires rollback without lookahead"):
        Stack([GoesBackBlindly()]).generate(tiny.model("llava"), **tiny.inputs("llava"), **OPTIONS)


def test_inference_mode_changes_nothing_for_rows_that_go_back():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    expected = Stack([stacks.Rewind(5, 2)]).generate(model, **inputs, **OPTIONS)
    stack = Stack([stacks.Rewind(5, 2)])
    with torch.inference_mode():
        out = stack.generate(model, **inputs, **OPTIONS)
    assert stack.record["rewind"] == [1, 1] and torch.equal(out.sequences, expected.sequences)


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


class Keeps(Decoder):
    """Its state is what `make` gives, and changes by `change` in every step."""

    def __init__(self, make, change):
        self.make, self.change = make, change

    def init_state(self, context):
        return self.make(context.rows)

    def process_logits(self, step, state, scores):
        self.change(state)
        return scores


@pytest.mark.parametrize(
    "make, change, words",
    [
        (lambda n: [0], lambda s: s.__setitem__(0, s[0] + 1), "holds ints that changed"),
        (lambda n: {}, lambda s: s.update({len(s): torch.zeros(2)}), "a dict in a state changed its keys"),
        (lambda n: [], lambda s: s.append(torch.zeros(2)), "a list in a state changed its length"),
        (lambda n: Pair(torch.zeros(n), torch.zeros(n)), lambda s: None, "holds a named tuple; use a dataclass"),
    ],
    ids=["number", "keys", "length", "named_tuple"],
)
def test_states_that_cannot_go_back_are_refused_by_what_they_hold(make, change, words):
    with pytest.raises(StackError, match=words):
        Stack([Keeps(make, change), stacks.Rewind(3, 1)]).generate(
            tiny.model("llava"), **tiny.inputs("llava", 2), **OPTIONS
        )
