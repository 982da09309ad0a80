"""Truncation: answers of a given length."""

import pytest
import tiny
import torch

from baselines import Truncation
from decoders import Stack, StackError


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3), dict(do_sample=True)], ids=str)
def test_answers_end_after_the_given_tokens(options):
    inputs = tiny.inputs("llava", 3)
    options = dict(max_new_tokens=20, eos_token_id=[tiny.EOS], pad_token_id=0, do_sample=False) | options
    torch.manual_seed(0)
    plain = Stack([]).generate(tiny.model("llava"), **inputs, **options)
    torch.manual_seed(0)
    out = Stack([Truncation(5)]).generate(tiny.model("llava"), **inputs, **options)
    start = inputs["input_ids"].shape[1]
    ends = [row.index(tiny.EOS) for row in out[:, start:].tolist()]
    assert max(ends) == 5 and out.shape[1] == start + 6
    if "num_beams" not in options:
        assert torch.equal(out[:, start : start + 5], plain[:, start : start + 5])


def test_bad_settings_are_refused():
    with pytest.raises(StackError, match=">= 1"):
        Truncation(0)
    with pytest.raises(StackError, match="eos_token_id"):
        model = tiny.model("llava")
        before = model.generation_config.eos_token_id
        try:
            model.generation_config.eos_token_id = None
            Stack([Truncation(3)]).generate(model, **tiny.inputs("llava"), max_new_tokens=4, pad_token_id=0)
        finally:
            model.generation_config.eos_token_id = before
