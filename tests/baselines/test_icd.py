"""ICD: the plain loop, and what it keeps in every company."""

import decoder_checks as checks
import pytest
import tiny
from references.oracles import icd, plain

from baselines import ICD
from decoders import Stack, StackError

IDS = (20, 21, 22, 23)


def said(model, inputs, decoder, new):
    out = Stack([decoder]).generate(model, **inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [dict(alpha=1.0), dict(alpha=3.0), dict(alpha=3.0, beta=0.0)])
@pytest.mark.parametrize("whole", [False, True])
def test_it_says_what_the_oracle_says(options, whole):
    different = 0
    for seed in range(4):
        model, inputs = plain.tiny(seed)
        prompt = icd.disturbed(inputs["input_ids"], model.config.image_token_id, list(IDS))
        theirs = dict(branch_input_ids=prompt) if whole else dict(insert_ids=IDS)
        eos = model.generation_config.eos_token_id
        expected = icd.oracle(model, inputs, 12, eos_token_id=eos, **theirs, **options)
        mine = dict(branch_input_ids=prompt.tolist()) if whole else dict(insert_ids=IDS)
        assert said(model, inputs, ICD(**mine, **options), 12) == expected
        different += expected != plain.plain(model, inputs, 12)
    assert different


class _Words:
    """A tokenizer that numbers words."""

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [20 + i for i, _ in enumerate(text.split())]}


def test_the_instruction_becomes_ids_by_the_tokenizer():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    options = dict(max_new_tokens=8, do_sample=False)
    by_text = Stack([ICD(instruction="you are so confused")]).generate(model, **inputs, **options, tokenizer=_Words())
    by_ids = Stack([ICD(insert_ids=IDS)]).generate(model, **inputs, **options)
    assert by_text.tolist() == by_ids.tolist()
    with pytest.raises(StackError, match="tokenizer"):
        Stack([ICD()]).generate(model, **inputs, **options)


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_settings_ask_for_nothing(family):
    checks.assert_asks_for_nothing(ICD(alpha=0, beta=0), family)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha=-1), "alpha is a number >= 0"),
        (dict(beta=2), "beta is a number in \\[0, 1\\]"),
        (dict(instruction=""), "instruction is a text"),
        (dict(insert_ids=[]), "insert_ids are token ids"),
        (dict(branch_input_ids=[3]), "branch_input_ids are lists of token ids"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=f"icd: {words}"):
        ICD(**bad)
