"""ONLY: a plain loop of it, and what it keeps in every company."""

from types import SimpleNamespace

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import only, plain

from baselines import ONLY, FastV
from baselines.only import kept_weights
from decoders import Decoder, Requirements, Stack, StackError, hf

CASES = [
    dict(),
    dict(gamma=1.0),
    dict(gamma=1.5, alpha_neg=3.0),
    dict(gamma=1.1, layer=1, beta=0, alpha_pos=1.0),
    dict(gamma=1.3, layer=2, alpha_neg=2.0, beta=0.02),
    dict(gamma=1.0, input_norm=False, beta=0.01, alpha_neg=2.0),
]


def make():
    return ONLY(alpha_pos=2.0, alpha_neg=1.5, beta=0.02, gamma=0.8, layer=1)


def test_it_says_what_a_plain_loop_says():
    different, told = 0, []
    for seed in range(4):
        model, inputs = plain.tiny(seed)
        without = plain.plain(model, inputs, 16)
        for i, options in enumerate(CASES):
            new = 16 - 2 * i
            expected = only.oracle(model, inputs, new, report=told, **options)
            out = Stack([ONLY(**options)]).generate(model, **inputs, max_new_tokens=new, do_sample=False)
            assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected, (seed, options)
            different += expected != without[:new]
    assert different > 0.75 * 4 * len(CASES)
    agreed = sum(agree for agree, _ in told) / len(told)
    assert 0.2 < agreed < 0.8 and {gone for _, gone in told} == {1, 2, 3}


def test_weights_that_stay_by_hand():
    """Two heads; slot 0 the first, 1 to 3 text, 4 to 6 visual, 7 hidden."""
    weights = torch.tensor([[0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.2, 0.5], [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5]])
    visible, visual = torch.arange(8) < 7, (torch.arange(8) >= 4) & (torch.arange(8) < 7)
    out = kept_weights(weights[None, :, None], visible[None, None], visual[None, None])[0, :, 0]
    # of the first head 0.2 is an outlier in both groups, and both entropies are log 2; of the second they are log 3
    torch.testing.assert_close(out[0], torch.tensor([0.3, 0, 0.1, 0.1, 0.05, 0.05, 0, 0.5]))
    torch.testing.assert_close(out[1], weights[1])
    weights[1, 1:4] = torch.tensor([0.15, 0.15, 0.0])
    out = kept_weights(weights[None, :, None], visible[None, None], visual[None, None])[0, :, 0]
    assert (
        not out[1].any() and out[0].any()
    )  # log 2 / log 3 is less than log 2 / log 2: it goes, the first slot with it


def test_edges_of_the_choice():
    weights = torch.rand(1, 3, 1, 6).softmax(-1)
    every, none = torch.ones(1, 1, 6, dtype=torch.bool), torch.zeros(1, 1, 6, dtype=torch.bool)
    # no visual tokens: all heads stay, and the first slot with them
    out = kept_weights(weights, every, none)
    assert (out.sum(-1) > 0).all() and torch.equal(out[..., 0], weights[..., 0])
    # a head without any weight on the picture goes
    visual = torch.arange(6).view(1, 1, 6) >= 3
    blind = weights.clone()
    blind[:, 1, :, 3:] = 0
    out = kept_weights(blind, every, visual)
    assert not out[:, 1].any() and out[:, [0, 2]].any() and torch.isfinite(out).all()
    # where the first slot is visual, all text is looked at; hidden slots count nowhere
    first = torch.tensor([[[True, True, False, False, False, False]]])
    spiked = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.05, 0.05]).expand(1, 2, 1, 6)
    assert (kept_weights(spiked, every, first)[..., 2] == 0).all()
    assert (kept_weights(spiked, every, none & first)[..., 2] == 0).all()
    hidden = every & ~(torch.arange(6) == 2)
    assert (kept_weights(spiked, hidden, first)[..., 3] == 0).all()


class _Given(ONLY):
    """Of which the logits of the side path are given."""

    def _side_path(self, model, a, x, normed):
        return a


def test_the_distance_is_of_the_models_own_logits_and_the_sums_of_the_stacks_scores():
    """The first row agrees with its own logits, the second does not; of the scores a token is impossible."""
    own = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
    side = torch.tensor([[2.1, 1.0, 0.0], [5.0, 1.0, 0.0]])
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [4.0, 1.0, 3.0]])
    step = SimpleNamespace(logits=own, hidden=(own, own), exported={"side": side})
    state = SimpleNamespace(model=None, to_logits=lambda x: x)
    out = _Given(alpha_pos=2.0, alpha_neg=0.5, beta=0, gamma=0.2).process_logits(step, state, scores)
    torch.testing.assert_close(out, torch.tensor([[4.2, 3.0, -torch.inf], [3.5, 1.0, 4.5]]))
    out = _Given(alpha_pos=2.0, alpha_neg=0.5, beta=0.1, gamma=0.2).process_logits(step, state, scores)
    torch.testing.assert_close(out, torch.tensor([[4.2, 3.0, -torch.inf], [3.5, -torch.inf, 4.5]]))


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_settings_change_nothing(family):
    checks.assert_asks_for_nothing(ONLY(alpha_pos=0, alpha_neg=0, beta=0), family)


def test_with_both_weights_0_the_constraint_is_left():
    decoder = ONLY(alpha_pos=0, alpha_neg=0, beta=0.3)
    assert decoder.requirements(tiny.model("llava")) == Requirements()
    out, _ = checks.run("llava", [decoder], tiny.inputs("llava"))
    for before, after in zip(out.logits, out.scores, strict=True):
        p = before.softmax(-1)
        assert torch.equal(after, before.masked_fill(p < 0.3 * p.amax(), -torch.inf))


def test_the_usual_path_is_left_as_it_is():
    """The model's own logits, and the attention that others read."""
    inputs = tiny.inputs("llava", 2)
    seen = []
    for decoders in ([], [make()]):
        read = _Read()
        out, _ = checks.run("llava", [*decoders, read], inputs, new=1)
        seen.append((out.logits[0], read.attention))
    torch.testing.assert_close(*seen)


class _Read(Decoder):
    def requirements(self, model):
        return Requirements(attention=(0, 1))

    def process_logits(self, step, state, scores):
        self.attention = step.attention
        return scores


def test_hidden_slots_are_absent():
    """FastV hides half of the picture from layer 1 on, of which ONLY then reads the other half."""
    inputs = tiny.inputs("llava", 2)
    seen = {}
    for layer in (0, 1):
        stacks = ([ONLY(beta=0, layer=layer)], [FastV(layer=1, ratio=0.5), ONLY(beta=0, layer=layer)])
        seen[layer] = [_sides(decoders, inputs) for decoders in stacks]
    torch.testing.assert_close(*seen[0])
    assert not torch.allclose(*seen[1], atol=1e-2)
    assert torch.isfinite(_sides([FastV(layer=1, ratio=1.0), ONLY(beta=0, layer=1)], inputs)).all()


def _sides(decoders, inputs):
    """[n, d], what the side path takes from attention for the first token."""
    found, one = [], decoders[-1]
    taken = type(one).process_logits
    kind = type("ONLY", (ONLY,), {"process_logits": lambda self, step, *rest: _kept(found, self, step, *rest)})

    def _kept(found, self, step, *rest):
        found.append(step.exported["side"])
        return taken(self, step, *rest)

    one.__class__ = kind
    checks.run("llava", decoders, inputs, new=1)
    return found[0]


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha_pos=-1), "alpha_pos is a number >= 0, not -1; the nearest valid value is 0"),
        (dict(alpha_neg="1"), "alpha_neg is a number >= 0"),
        (dict(beta=2), r"beta is a number in \[0, 1\]"),
        (dict(gamma=2.5), r"gamma is a number in \[0, 2\], not 2.5; the nearest valid value is 2"),
        (dict(layer=-1), "layer is an integer >= 0"),
        (dict(input_norm=0), "input_norm is true or false"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=f"only: {words}"):
        ONLY(**bad)


def test_what_a_model_cannot_offer_is_refused(monkeypatch):
    model = tiny.model("llava")
    assert (
        Stack([ONLY(layer=2)]).refusals(model)["only"].endswith("one of 0 to 1, before this model's last block, not 2")
    )
    monkeypatch.setattr(hf, "norms_of", lambda block: None)
    assert "is not a norm, attention, a norm and an MLP" in Stack([ONLY()]).refusals(model)["only"]
    monkeypatch.undo()
    monkeypatch.setattr(hf, "output_projection", lambda module: None)
    with pytest.raises(StackError, match="only: LlamaAttention has no output projection of a known name"):
        checks.run("llava", [ONLY()], tiny.inputs("llava"))
