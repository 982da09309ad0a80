"""PAI: the oracle, and what it keeps in every company."""

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import pai, plain

from baselines import PAI
from decoders import Decoder, Requirements, Stack, StackError


def said(model, inputs, decoders, new, **options):
    out = Stack(decoders).generate(model, **inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


CASES = [
    dict(),
    dict(alpha=0.6, gamma=1.4),
    dict(alpha=0.6, gamma=1),
    dict(alpha=1.5, gamma=1, start_layer=0),
    dict(alpha=0, gamma=2),
    dict(alpha=0.5, gamma=2, beta=0),
    dict(alpha=0.5, gamma=0.5, start_layer=1, end_layer=3),
    dict(alpha=0.8, gamma=1.3, start_layer=0, skip_prefill=True),
    dict(alpha=2.0, gamma=1, start_layer=0, skip_prefill=True),
]


def test_it_says_what_the_oracle_says():
    different = 0
    for seed in range(4):
        model, inputs = plain.tiny(seed)
        without = plain.plain(model, inputs, 12)
        for i, options in enumerate(CASES):
            new = 12 - i % 3
            expected = pai.oracle(model, inputs, new, **options)
            assert said(model, inputs, [PAI(**options)], new) == expected, (seed, options)
            different += expected != without[:new]
    assert different > 0.75 * 4 * len(CASES)


@torch.no_grad()
def test_attention_is_raised_in_its_layers_for_the_newest_query_alone():
    """Logits of one forward, edited by hand, in layers 1 and 2; `skip_prefill` leaves the prompt as it is."""
    model, inputs = plain.tiny(1)
    here = plain.is_visual(model, inputs)

    def raised(i, scores):
        scores = scores.clone()
        if i in (1, 2):
            scores[:, -1, here] += 0.7 * scores[:, -1, here].abs()
        return scores

    embeds = plain.embedded(model, inputs)
    options = dict(max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    seen = []
    for skip, change in ((False, raised), (True, None)):
        decoder = PAI(alpha=0.7, gamma=1, start_layer=1, end_layer=3, skip_prefill=skip)
        seen.append(Stack([decoder]).generate(model, **inputs, **options).logits[0][0].double())
        torch.testing.assert_close(seen[-1], plain.forward(model, embeds, scores=change)[2], atol=1e-4, rtol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 0.01


class _Read(Decoder):
    """The attention that was used, and what is contrasted."""

    def requirements(self, model):
        return Requirements(attention=None, visual=True)

    def init_state(self, context):
        self.masses = []

    def process_logits(self, step, state, scores):
        self.masses.append((step.attention * step.visual).sum(-1))
        return scores


@pytest.mark.parametrize("family", ["llava", "qwen3vl"])
def test_others_read_the_attention_that_was_used(family):
    """More of it is on the picture in the layers that are edited, and as much in those before."""
    masses = []
    for decoders in ([], [PAI(alpha=0.9, gamma=1, start_layer=1)]):
        read = _Read()
        checks.run(family, [*decoders, read], tiny.inputs(family, 2), "greedy", new=1)
        masses.append(read.masses[0])
    torch.testing.assert_close(masses[0][0], masses[1][0])
    assert (masses[1][1:] > masses[0][1:] + 1e-4).all()


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_settings_ask_for_nothing(family):
    checks.assert_asks_for_nothing(PAI(alpha=0, gamma=1), family)


def test_gamma_1_has_no_constraint_and_no_branch():
    inputs = tiny.inputs("llava")
    out, _ = checks.run("llava", [PAI(alpha=0.5, gamma=1, start_layer=1)], inputs, "greedy")
    assert all(map(torch.equal, out.scores, out.logits)) and torch.isfinite(torch.stack(out.scores)).all()


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha=-1), "alpha is a number >= 0"),
        (dict(gamma=True), "gamma is a number >= 0"),
        (dict(beta=1.5), "beta is a number in \\[0, 1\\].*nearest valid value is 1"),
        (dict(start_layer=-1), "start_layer is an integer >= 0"),
        (dict(end_layer=1.5), "end_layer is an integer >= 0 or none"),
        (dict(skip_prefill=1), "skip_prefill is true or false"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=f"pai: {words}"):
        PAI(**bad)


@pytest.mark.parametrize("given, why", [(dict(start_layer=3), "3 <= i < 3"), (dict(end_layer=2), "2 <= i < 2")])
def test_layers_that_the_model_does_not_have_are_refused_before_anything_runs(given, why):
    model = tiny.model("llava")
    (found,) = Stack([PAI(**given)]).refusals(model).values()
    assert found == f"it edits layers {why}, of which the model has none; it has 3, counted from 0 to 2"
    assert Stack([PAI(start_layer=2, end_layer=9)]).refusals(model) == {"pai": None}
    assert Stack([PAI(alpha=0, **given)]).refusals(model) == {"pai": None}
