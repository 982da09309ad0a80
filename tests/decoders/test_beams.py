"""The bookkeeping of finished beams: which rows they come from, and one that does not say."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from stacks import EOS

from decoders import Decoder, Requirements, Stack, StackError, hf
from decoders.beams import Hypotheses
from decoders.search import Sequences

OPTIONS = dict(
    max_new_tokens=12,
    do_sample=False,
    num_beams=3,
    eos_token_id=EOS,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
)


def hypotheses(kind, context):
    """The bookkeeping `kind` of a generation."""
    k, (images, width) = context.config.num_beams, context.input_ids.shape
    ids = context.input_ids.repeat_interleave(k, 0)
    return kind(context.config, Sequences(ids, [width] * images, width, k, 0))


class Checked(Hypotheses):
    """Checks, of every finished beam, that it is the row that it is said to come from, and a token more."""

    joined = 0

    def update(self, new):
        before, (g, k) = self.ids, self.scores.shape
        super().update(new)
        for place, source in enumerate(self.sources.flatten().tolist()):
            image, mine = place // k, self.ids[place // k, place % k]
            if source < g * k:
                of_row = new.ids[image][new.parents[image] == source]
                assert self.done[image, place % k] and (of_row == mine[: of_row.shape[1]]).all(1).any()
                self.joined += 1
            else:
                old = before[image, source % k]
                assert source // k == g + image
                assert not self.done[image, place % k] or torch.equal(mine[: len(old)], old)


class Silent(Hypotheses):
    """Keeps finished beams in another one, and does not say which rows they come from."""

    def __init__(self, config, sequences):
        self.inner = Hypotheses(config, sequences)

    def update(self, new):
        self.inner.update(new)

    def is_done(self):
        return self.inner.is_done()

    def finalize(self, count, sequences):
        return self.inner.finalize(count, sequences)


@dataclass
class Brings(Decoder):
    """Brings a bookkeeping of its own."""

    kind: type

    def requirements(self, model):
        return Requirements()

    def make_beam_hypotheses(self, context):
        self.made = hypotheses(self.kind, context)
        return self.made


def test_sources_are_the_rows_that_finished_beams_continue():
    model, inputs, decoder = tiny.model("llava"), tiny.inputs("llava", 3, seed=1), Brings(Checked)
    out = Stack([decoder]).generate(model, **inputs, **OPTIONS)
    assert decoder.made.joined and torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)


def test_hypotheses_without_sources_leave_a_cache_that_is_refused():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2, seed=1)
    out = Stack([Brings(Silent)]).generate(model, **inputs, **OPTIONS)
    expected = model.generate(**inputs, **OPTIONS)
    assert torch.equal(out.sequences, expected.sequences)
    ids = torch.cat([out.sequences, out.sequences[:, -1:]], 1)
    given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(StackError, match="not known which slots its finished beams saw"):
        Stack([]).generate(model, **hf.with_cache(given, hf.cache_of(out)), **OPTIONS)
