"""VISTA against the method written out, and what every decoder must keep."""

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import plain, vista

from baselines import VCD, VISTA
from decoders import Stack, StackError

FAMILIES = ["llava", "qwen25vl", "internvl"]


def acting():
    return VISTA(lam=0.3, alpha=0.4, layers=[0, 1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options, length",
    [
        (dict(), 12),
        (dict(lam=0.5), 12),
        (dict(lam=0.17, alpha=0.3, layers=(0, 2)), 20),
        (dict(lam=0, alpha=0.6), 8),
        (dict(lam=0.3, alpha=0), 8),
    ],
    ids=str,
)
def test_equals_the_method_written_out(seed, options, length):
    model, inputs = plain.tiny(seed)
    expected = vista.oracle(model, inputs, length, **options)
    out = Stack([VISTA(**options)]).generate(model, **inputs, max_new_tokens=length, do_sample=False)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected
    assert expected != plain.plain(model, inputs, length)


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_setting_changes_nothing(family):
    checks.assert_asks_for_nothing(VISTA(lam=0, alpha=0), family)


def test_each_image_has_its_own_vector():
    """The same pictures in another order: a vector of another's would show."""
    inputs = tiny.inputs("llava", 2, ragged=False)
    swapped = {k: v.flip(0) for k, v in inputs.items()}
    one, two = (checks.run("llava", [acting()], x)[0].scores[0] for x in (inputs, swapped))
    torch.testing.assert_close(one, two.flip(0), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(one[0], one[1], atol=0.1)


def test_the_branch_of_another_decoder_is_steered_with_the_same_vector():
    """A branch on the same inputs: with the same push it has the same logits, and the contrast vanishes."""
    inputs = tiny.inputs("llava", 2)
    same = VCD(alpha=1.0, beta=0, distort=lambda given: {"pixel_values": given["pixel_values"].clone()})
    vista_alone = VISTA(lam=0.4, alpha=0)
    alone, beside = (checks.run("llava", [vista_alone, *more], inputs)[0] for more in ([], [same]))
    torch.testing.assert_close(alone.scores[0], beside.scores[0], atol=1e-3, rtol=1e-4)


def test_late_blocks_are_the_same_shares_of_depth():
    assert VISTA().late(32) == range(25, 31)
    assert VISTA().late(40) == range(31, 39)
    assert [VISTA().late(count) for count in (2, 3, 4, 8)] == [range(0, 1), range(1, 2), range(2, 3), range(6, 7)]
    assert VISTA(layers=[1, 3]).late(5) == range(1, 4)


def test_impossible_tokens_stay_impossible():
    scores = torch.tensor([[2.0, -torch.inf, 1.0]])
    step = type("Step", (), {"early_logits": torch.tensor([[[0.0, 9.0, 4.0]], [[2.0, 9.0, 0.0]]])})
    for alpha, expected in ((0.5, [1.5, -torch.inf, 1.5]), (1.0, [1.0, -torch.inf, 2.0])):
        out = VISTA(alpha=alpha).process_logits(step, None, scores)
        torch.testing.assert_close(out, torch.tensor([expected]))


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(lam=-0.1), "vista: lam is a number >= 0, not -0.1; the nearest valid value is 0"),
        (dict(alpha=1.5), r"alpha is a number in \[0, 1\]"),
        (dict(layers=[3]), "layers is none, or the first and the last"),
        (dict(layers=[3, 2]), "0 <= first <= last"),
        (dict(layers=7), "layers is none, or the first and the last"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        VISTA(**bad)


def test_what_a_model_cannot_offer_is_refused():
    why = Stack([VISTA(layers=[0, 2])]).refusals(tiny.model("llava"))["vista"]
    assert why == "vista: the late blocks are among the first 2 of this model's 3, counted from 0, not 0 to 2"
    inputs, blip = tiny.inputs("instructblip"), tiny.model("instructblip")
    assert "a prompt without its picture cannot run: InstructBlip" in Stack([VISTA()]).refusals(blip)["vista"]
    assert Stack([VISTA(lam=0)]).refusals(blip) == {"vista": None}
    with pytest.raises(StackError, match="a prompt without its picture cannot run: InstructBlip"):
        checks.run("instructblip", [VISTA()], inputs)
    checks.assert_acts_the_same_in_a_batch(lambda: VISTA(lam=0), "instructblip", "greedy")
    with pytest.raises(StackError, match=r"vista runs the model on other inputs, which only stack\.generate"):
        tiny.model("llava").generate(**tiny.inputs("llava"), custom_generate=Stack([VISTA()]), max_new_tokens=2)
    tiny.model("llava").generate(**tiny.inputs("llava"), custom_generate=Stack([VISTA(lam=0)]), max_new_tokens=2)
