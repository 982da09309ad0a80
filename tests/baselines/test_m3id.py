"""M3ID: the plain loop, and what it keeps in every company."""

import decoder_checks as checks
import pytest
from references.oracles import m3id, plain

from baselines import M3ID
from decoders import Stack, StackError


def said(model, inputs, decoder, new):
    out = Stack([decoder]).generate(model, **inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [{}, dict(lam=0.5), dict(lam=0.5, beta=0.0), dict(lam=0.5, first=0), dict(lam=2.0)])
def test_it_says_what_the_oracle_says(options):
    different = 0
    for seed in range(4):
        model, inputs = plain.tiny(seed)
        without = plain.plain(model, inputs, 12)
        expected = m3id.oracle(model, inputs, 12, eos_token_id=model.generation_config.eos_token_id, **options)
        assert said(model, inputs, M3ID(**options), 12) == expected
        different += expected != without
    assert different or not options


def test_the_weight_grows_no_more_where_it_would_overflow():
    model, inputs = plain.tiny(0)
    assert len(said(model, inputs, M3ID(lam=40.0), 6)) > 0  # e^240 is no float32


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_settings_ask_for_nothing(family):
    checks.assert_asks_for_nothing(M3ID(lam=0, beta=0), family)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(lam=-1), "lam is a number >= 0"),
        (dict(beta=2), "beta is a number in \\[0, 1\\]"),
        (dict(first=0.5), "first is an integer >= 0"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=f"m3id: {words}"):
        M3ID(**bad)
