"""SID: a plain loop of it, and properties."""

from dataclasses import dataclass

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import plain, sid

from baselines import SID, FastV
from decoders import Decoder, Requirements, Stack, StackError
from decoders.kv_pool import SlotTable

FAMILIES = ("llava", "qwen25vl", "internvl")
SETTINGS = [(0.5, 0.1, 2, 4), (1.0, 0.02, 1, 2), (2.0, 0.0, 3, 0), (0.8, 0.1, 2, 10)]


@pytest.mark.parametrize("alpha, beta, layer, keep", SETTINGS)
def test_it_says_what_a_plain_loop_says(alpha, beta, layer, keep):
    changed = 0
    for seed, new in ((0, 14), (1, 8), (2, 12)):
        model, inputs = plain.tiny(seed)
        out = Stack([SID(alpha, beta, layer, keep)]).generate(model, **inputs, max_new_tokens=new, do_sample=False)
        expected = sid.oracle(model, inputs, new, alpha, beta, layer, keep)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected
        changed += expected != plain.plain(model, inputs, new)
    assert changed >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_settings_change_nothing(family):
    checks.assert_asks_for_nothing(SID(alpha=0, beta=0), family)
    checks.assert_changes_nothing(SID(beta=0, keep=16), family, "greedy")  # the branch sees all


def test_alpha_0_is_the_constraint_alone():
    inputs = tiny.inputs("llava", 1)
    plain_run, out = (checks.run("llava", decoders, inputs)[0] for decoders in ([], [SID(alpha=0, beta=0.3)]))
    assert torch.equal(plain_run.sequences, out.sequences)
    for before, after in zip(plain_run.scores, out.scores, strict=True):
        assert torch.equal(after, before.masked_fill(before.softmax(-1) < 0.3 * before.softmax(-1).amax(), -torch.inf))


class Uneven(Decoder):
    """Drops, before the first token, 2, 4 and 6 of the first visual tokens in the three layers."""

    def requirements(self, model):
        return Requirements(visual=True, reruns_last_token=True)

    def select_slots_after_prefill(self, step, state):
        visual = step.visual.expand(3, -1, -1)
        return ~visual | (visual.cumsum(-1) > torch.tensor([2, 4, 6]).view(3, 1, 1))


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_what_is_hidden_is_found_by_its_place_where_layers_hold_other_tokens_in_a_slot(search, monkeypatch):
    """A pool that is packed whenever a slot can go says what one says that never is."""

    def decoders():
        return [Uneven(), SID(1.0, 0.02, 1, 6)]

    inputs, moved, make_room = tiny.inputs("llava", 2), [], SlotTable.make_room
    never = checks.run("llava", decoders(), inputs, search)[0]
    monkeypatch.setattr(SlotTable, "_pays", lambda self, unseen: unseen > 0)
    monkeypatch.setattr(SlotTable, "make_room", lambda self, *args: moved.append(make_room(self, *args)) or moved[-1])
    always = checks.run("llava", decoders(), inputs, search)[0]
    assert any(move is not None and len(move.index) > 1 for move in moved)
    checks.assert_same(always, never)
    assert checks.differs(never, checks.run("llava", [Uneven()], inputs, search)[0])


def test_with_fastv_the_branch_chooses_among_what_is_left():
    """Of tokens that FastV keeps in the main rows; where the least attended are all gone, the rest is the text's."""
    inputs = tiny.inputs("llava", 2)
    with_both = checks.run("llava", [FastV(1, 0.5), SID(1.0, 0.02, 1, 8)], inputs)[0]
    text_alone = checks.run("llava", [FastV(1, 0.5), SID(1.0, 0.02, 1, 0)], inputs)[0]
    assert checks.differs(with_both, checks.run("llava", [FastV(1, 0.5)], inputs)[0])
    torch.testing.assert_close(with_both.scores[0], text_alone.scores[0], atol=2e-3, rtol=1e-3)


class Apart(SID):
    """Notes how far the branch's logits are from the main ones."""

    def process_logits(self, step, state, scores):
        far.append(float((step.branch - step.logits).abs().max()))
        return super().process_logits(step, state, scores)


far: list[float] = []


@dataclass
class First(Decoder):
    """Keeps the first three visual tokens once the prompt has run."""

    def requirements(self, model):
        return Requirements(visual=True)

    def select_slots(self, step, state):
        return ~step.visual | (step.visual.cumsum(-1) <= 3)


@pytest.mark.parametrize("pruner, layer, vanishes", [(FastV(1, 0.5), 2, True), (First(), 1, False)])
def test_the_contrast_vanishes_where_the_prompt_ran_with_nothing_hidden(pruner, layer, vanishes):
    """Not where no more than `keep` tokens are left afterwards: the text was computed without the others."""
    far.clear()
    checks.run("llava", [pruner, Apart(1.0, 0.02, layer, 8)], tiny.inputs("llava", 2))
    assert len(far) == checks.NEW
    assert max(far) < 1e-4 if vanishes else min(far[1:]) > 0.05


def test_wrong_options_are_refused_by_name():
    with pytest.raises(StackError, match="sid: alpha is a number >= 0, not -1; the nearest valid value is 0"):
        SID(alpha=-1)
    with pytest.raises(StackError, match=r"sid: beta is a number in \[0, 1\], not 2"):
        SID(beta=2)
    with pytest.raises(StackError, match="sid: layer is an integer >= 1, not 0"):
        SID(layer=0)
    with pytest.raises(StackError, match="sid: keep is an integer >= 0, not 0.5"):
        SID(keep=0.5)
    with pytest.raises(StackError, match="sid cannot act on .* the model has 3"):
        checks.run("llava", [SID(layer=4)], tiny.inputs("llava"))


def test_the_layer_after_the_last_is_refused_before_anything_runs():
    (why,) = Stack([SID(layer=3)]).refusals(tiny.model("llava")).values()
    assert why is not None and "after layer 2" in why and "it has 3, counted from 0 to 2" in why
    assert Stack([SID(layer=2), SID(layer=3, alpha=0)]).refusals(tiny.model("llava")) == {"sid": None, "sid_2": None}
