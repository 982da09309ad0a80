"""FastV: a plain loop of it, counted slots, and properties."""

from dataclasses import dataclass

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import fastv, plain

from baselines import FastV
from decoders import Branch, Decoder, Requirements, Stack, StackError
from prunehal import PruneHal

FAMILIES = ("llava", "qwen25vl", "qwen3vl")
SETTINGS = [(2, 0.5, False), (1, 0.9, False), (3, 1.0, False), (2, 0.5, True), (1, 0.8, True)]


def make():
    return FastV(layer=1, ratio=0.7)


def renewing():
    return FastV(layer=1, ratio=0.7, renew=True)


@pytest.mark.parametrize("layer, ratio, renew", SETTINGS)
def test_it_says_what_a_plain_loop_says(layer, ratio, renew):
    changed = 0
    for seed, new in ((0, 16), (1, 8), (2, 12)):
        model, inputs = plain.tiny(seed)
        out = Stack([FastV(layer, ratio, renew)]).generate(model, **inputs, max_new_tokens=new, do_sample=False)
        expected = fastv.oracle(model, inputs, new, k=layer, r=ratio, renew=renew)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected
        changed += expected != plain.plain(model, inputs, new)
    assert changed >= 2


class Counts(Decoder):
    """Counts the visual slots that rows see in each layer, [3, n], before every step's choice."""

    def __init__(self):
        self.found = []

    def requirements(self, model):
        return Requirements(visual=True)

    def select_slots(self, step, state):
        self.found.append(step.visual.sum(-1).expand(3, -1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_slots_are_dropped_right_after_the_prompt_in_deep_layers(family, search):
    for ratio, left in ((0.5, 8), (0.7, 5), (1.0, 0)):
        counts = Counts()
        checks.run(family, [FastV(2, ratio), counts], tiny.inputs(family, 2), search)
        assert len(counts.found) == checks.NEW - 1
        for step in counts.found:
            assert step[:2].unique().tolist() == [16] and step[2].unique().tolist() == [left]


def test_prunehal_keeps_its_share_of_what_each_layer_has_left():
    """Its unconditional prune, in the same step, counts no token that FastV has dropped."""
    _, record = checks.run("llava", [FastV(2, 0.5), PruneHal(r=0.75, t=1)], tiny.inputs("llava", 2))
    for row in record["prunehal"]:
        assert [len(kept) for kept in row["prunes"][0]["kept"]] == [12, 12, 6]


def test_where_nothing_is_renewed_no_slot_is_dropped():
    counts = Counts()
    checks.run("llava", [FastV(2, 0.5, True), counts], tiny.inputs("llava", 2))
    assert torch.stack(counts.found).unique().tolist() == [16]


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_0_changes_nothing(family):
    checks.assert_asks_for_nothing(FastV(ratio=0), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beside", [None, "prunehal", "opera", "vcd"])
def test_renewed_a_batch_equals_one_by_one(family, beside):
    checks.assert_acts_the_same_in_a_batch(renewing, family, "beam" if beside == "opera" else "greedy", beside)


def test_renewed_and_compiled_it_says_what_the_eager_step_says(monkeypatch):
    checks.assert_compiles(renewing, "llava", "greedy", monkeypatch)


@dataclass
class Beside(Decoder):
    """A branch on the same prompt, whose logits take the place of the scores."""

    pruning: str = "mirror"
    inputs: object = staticmethod(lambda given: {})

    def requirements(self, model):
        return Requirements(branch=Branch(inputs=self.inputs, pruning=self.pruning))

    def process_logits(self, step, state, scores):
        return step.branch


@pytest.mark.parametrize("how", [make, renewing])
def test_branches_lose_what_they_are_told_to(how):
    """A branch on the same prompt says what the main rows say where it mirrors them or is independent; one that keeps
    all says what the plain model says.
    """
    inputs = tiny.inputs("llava", 2)
    for pruning in ("mirror", "independent", "none"):
        out = checks.run("llava", [how(), Beside(pruning)], inputs)[0]
        alone = checks.run("llava", [] if pruning == "none" else [how()], inputs)[0]
        checks.assert_same(alone, out)


def test_a_branch_of_another_prompt_loses_the_visual_tokens_of_the_same_ordinals():
    """The branch says what its prompt alone says when it is given the main rows' choice."""
    short, longer = tiny.inputs("llava", 1, seed=3), tiny.inputs("llava", 1, seed=3)
    before, after = torch.tensor([[1, 30, 31, 32]]), torch.tensor([[60, 61, 62, 63]])
    longer["input_ids"] = torch.cat([before, longer["input_ids"][:, 1:], after], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    ordinals = []

    class Sees(Decoder):
        """Which of the main rows' visual tokens are left in the last layer, counted among them."""

        def requirements(self, model):
            return Requirements(visual=True)

        def select_slots(self, step, state):
            every, left = (step.slot_positions[0, 0][step.visual[layer, 0]].tolist() for layer in (0, -1))
            ordinals.append([every.index(position) for position in left])

    class Given(FastV):
        """Keeps these of the visual tokens."""

        def edit_attention(self, scores, view):
            kept = torch.zeros_like(view.visual)
            kept[..., view.visual[0, 0].nonzero()[ordinals[0], 0]] = True
            view.hide(view.visual & ~kept, drop=True)

    other = {name: longer[name] for name in ("input_ids", "attention_mask")}
    branch = checks.run("llava", [FastV(1, 0.7), Beside("mirror", lambda given: other), Sees()], short)[0]
    given, own = (checks.run("llava", [kind(1, 0.7)], longer)[0] for kind in (Given, FastV))
    torch.testing.assert_close(torch.stack(branch.scores), torch.stack(given.scores), atol=2e-3, rtol=1e-3)
    assert len(ordinals[0]) == 5 and checks.differs(given, own)


def test_the_last_prompt_token_run_again_meets_what_it_met():
    """Another decoder that prunes nothing, but has it run again, changes nothing."""

    class Again(Decoder):
        def requirements(self, model):
            return Requirements(reruns_last_token=True)

        def select_slots_after_prefill(self, step, state):
            return torch.ones_like(step.slot_positions, dtype=torch.bool)

    for how in (make, renewing):
        inputs = tiny.inputs("llava", 2)
        checks.assert_same(checks.run("llava", [how(), Again()], inputs)[0], checks.run("llava", [how()], inputs)[0])


def test_wrong_options_are_refused_by_name():
    with pytest.raises(StackError, match="fastv: layer is an integer >= 1, not 0; the nearest valid value is 1"):
        FastV(layer=0)
    with pytest.raises(StackError, match=r"fastv: ratio is a number in \[0, 1\], not 1.5"):
        FastV(ratio=1.5)
    with pytest.raises(StackError, match="fastv: renew is true or false, not 1"):
        FastV(renew=1)
    with pytest.raises(StackError, match="fastv cannot act on .* the model has 3"):
        checks.run("llava", [FastV(layer=4)], tiny.inputs("llava"))
    with pytest.raises(StackError, match="fastv cannot act on .* after layer 2, .* it has 3, counted from 0 to 2"):
        checks.run("llava", [FastV(layer=3)], tiny.inputs("llava"))
