"""AvisC: a plain loop of it, its weak tokens, and properties."""

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import avisc, plain

from baselines import AvisC
from baselines.avisc import weak_tokens
from decoders import Decoder, Requirements, Stack, StackError

FAMILIES = ("llava", "qwen3vl", "internvl")
SETTINGS = [
    dict(),
    dict(alpha=2.5, beta=0.02, gamma=0.9, lam=0.0, scheme="ones"),
    dict(gamma=0.0, lam=0.5, scheme="noise"),
    dict(alpha=1.5, beta=0.0, gamma=1.0),
]


def make(scheme="zeros"):
    return AvisC(alpha=1.5, beta=0.02, scheme=scheme)


@pytest.mark.parametrize("options", SETTINGS)
def test_it_says_what_a_plain_loop_says(options):
    changed = 0
    for seed, new in ((0, 14), (1, 8), (2, 12)):
        model, inputs = plain.tiny(seed)
        out = Stack([AvisC(**options)]).generate(model, **inputs, max_new_tokens=new, do_sample=False, seeds=[seed])
        expected = avisc.oracle(model, inputs, new, **options, seed=seed, report=(weak := []))
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected
        assert 0 < len(weak) < 16
        changed += expected != plain.plain(model, inputs, new)
    assert changed >= 2


def test_weak_tokens_by_hand():
    """Of two layers, the second with 0.6 of the attention to the picture; the last place is text."""
    attention = torch.tensor([[[0.1, 0.1, 0.1, 0.1, 0.0], [0.1, 0.1, 0.1, 0.3, 0.0]]])
    visual = torch.tensor([[True, True, True, True, False]])
    only_last = [[True, True, True, False, False]]
    assert weak_tokens(attention, visual, 0.0, 0.0).tolist() == only_last
    assert weak_tokens(attention, visual, 0.5, 1.0).tolist() == only_last  # 0.15 + 0.1 < 0.3
    assert weak_tokens(attention, visual, 0.5, 1.6).tolist() == visual.tolist()  # 0.15 + 0.16 > 0.3
    assert weak_tokens(attention, visual, 0.7, 1.4).tolist() == only_last  # both: 0.125 + 0.07 < 0.2
    assert weak_tokens(attention, visual, 1.0, 1.6).tolist() == visual.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_settings_change_nothing(family):
    checks.assert_asks_for_nothing(AvisC(alpha=0, beta=0), family)
    checks.assert_changes_nothing(AvisC(beta=0, lam=-100.0), family, "greedy")  # no token is weak


@pytest.mark.parametrize("scheme", ["ones", "noise"])
def test_what_replaces_an_embedding_is_the_same_alone_and_in_a_batch(scheme):
    checks.assert_acts_the_same_in_a_batch(lambda: make(scheme), "llava", "greedy")


def test_noise_is_of_the_image_s_seed():
    inputs = tiny.inputs("llava", 1)
    one, again, other = (
        Stack([make("noise")]).generate(
            tiny.model("llava"), **inputs, max_new_tokens=4, seeds=[seed], return_dict_in_generate=True,
            output_scores=True, do_sample=False, eos_token_id=None, pad_token_id=0,
        )
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert not checks.differs(one, again) and checks.differs(one, other)


def test_a_weak_token_has_no_features_in_later_layers_either(monkeypatch):
    """With all tokens weak, a Qwen3-VL branch says what one on an empty picture says: it has nothing of the pixels."""
    inputs = tiny.inputs("qwen3vl", 1)
    other = inputs | {"pixel_values": torch.flip(inputs["pixel_values"], [0])}
    blank = AvisC(alpha=1.0, beta=0.0, lam=100.0)
    said = []

    class Heard(AvisC):
        def process_logits(self, step, state, scores):
            said.append(step.branch)
            return step.branch

    first, second = (checks.run("qwen3vl", [Heard(**vars(blank))], one, new=3)[0] for one in (inputs, other))
    checks.assert_same(first, second)
    assert checks.differs(*(checks.run("qwen3vl", [], one, new=3)[0] for one in (inputs, other)))


@pytest.mark.parametrize("left", ["blind", "none"])
def test_beside_a_pruner_that_leaves_blind_tokens_the_texts_still_differ(left, monkeypatch):
    weak, apart = [], []

    def noted(*args):
        weak.append(weak_tokens(*args))
        return weak[-1]

    class Pruner(Decoder):
        def requirements(self, model):
            return Requirements(visual=True)

        def select_slots(self, step, state):
            at = step.slot_positions.clamp(0, weak[0].shape[1] - 1)
            blind = ~weak[0][None].expand(len(at), -1, -1).gather(2, at)
            return ~step.visual | (blind if left == "blind" else False)

    class Apart(AvisC):
        def process_logits(self, step, state, scores):
            apart.append(float((step.branch - step.logits).abs().max()))
            return super().process_logits(step, state, scores)

    monkeypatch.setattr("baselines.avisc.weak_tokens", noted)
    checks.run("llava", [Pruner(), Apart(alpha=1.5, beta=0.02)], tiny.inputs("llava", 2))
    assert (weak[0].sum(-1) < 16).all() and len(apart) == checks.NEW and min(apart) > 0.05


def test_wrong_options_are_refused_by_name():
    with pytest.raises(StackError, match="avisc: alpha is a number >= 0, not -1; the nearest valid value is 0"):
        AvisC(alpha=-1)
    with pytest.raises(StackError, match=r"avisc: gamma is a number in \[0, 1\], not 2; the nearest valid value is 1"):
        AvisC(gamma=2)
    with pytest.raises(StackError, match="avisc: lam is a number, not 'a'"):
        AvisC(lam="a")
    with pytest.raises(StackError, match="avisc: Unknown scheme 'zero'. Did you mean 'zeros'"):
        AvisC(scheme="zero")
