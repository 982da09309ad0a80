"""What decoders add to attention: hidden equals dropped, a factor is a factor, and nothing is nothing."""

import math
from dataclasses import dataclass

import pytest
import stacks
import tiny
import torch

from decoders import Branch, Decoder, Requirements, Stack, StackError
from decoders.attention import Tap, _to_pool


def odd(cache):
    """Visual tokens at odd places of the sequence."""
    return cache.visual & (cache.slot_positions % 2 == 1)


@dataclass
class Drop(Decoder):
    """Drops the odd visual tokens after the prefill."""

    def requirements(self, model):
        return Requirements(visual=True)

    def select_slots(self, step, state):
        if step.max_num_forwards > 1:
            return None
        kept = ~(step.visual & (step.slot_positions % 2 == 1))
        dropped.append(int((~kept).sum()))
        return kept


@dataclass
class Hide(Decoder):
    """Adds `bias` to the scores of odd visual tokens, in every layer or from the second on."""

    bias: float
    apart: bool = False

    def requirements(self, model):
        return Requirements(visual=True, attention=None)

    def init_state(self, context):
        self.layers = context.layers

    def attention_bias(self, cache, state):
        added.append(self.bias)
        there = odd(cache).expand(self.layers if self.apart else -1, -1, -1)
        out = torch.zeros(there.shape).masked_fill(there, self.bias)
        if self.apart:
            out[0] = 0
        return out

    def select_slots(self, step, state):
        seen.append(
            (step.num_forwards.clone(), step.attention.clone(), step.visual.clone(), step.slot_positions.clone())
        )


dropped: list = []
added: list = []
seen: list = []


@pytest.fixture(autouse=True)
def clean():
    for one in (dropped, added, seen):
        one.clear()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("search", stacks.SEARCHES)
@pytest.mark.parametrize(
    "names", [(), ("vcd",), ("opera",), ("dola", "vcd", "opera")], ids=lambda n: "+".join(n) or "alone"
)
def test_hidden_equals_dropped(names, search, implementation):
    """Also beside branches, candidates, returns and beams, and with rows of unequal length."""
    model = tiny.model("llava")
    model.set_attn_implementation(implementation)
    try:
        inputs = tiny.inputs("llava", 3)
        hidden, _ = stacks.run("llava", names, inputs, search, extra=(Hide(-math.inf),), seeds=[1, 2, 3])
        gone, _ = stacks.run("llava", names, inputs, search, extra=(Drop(),), seeds=[1, 2, 3])
    finally:
        model.set_attn_implementation("sdpa")
    assert max(dropped) > 0 and len(added) > 5
    assert torch.equal(hidden.sequences, gone.sequences)
    for a, b in zip(hidden.logits, gone.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("search", stacks.SEARCHES)
def test_nothing_added_is_nothing(search):
    inputs = tiny.inputs("llava", 2)
    with_zero, _ = stacks.run("llava", ("vcd",), inputs, search, extra=(Hide(0.0),), seeds=[1, 2])
    without, _ = stacks.run("llava", ("vcd",), inputs, search, seeds=[1, 2])
    assert torch.equal(with_zero.sequences, without.sequences)
    for a, b in zip(with_zero.logits, without.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_log_of_a_factor_is_a_factor_on_the_weights():
    """In the first layer, whose queries are the same whatever was attended to before; per layer it acts where it is
    asked to.
    """
    inputs = tiny.inputs("llava", 2)
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(math.log(3.0)),))
    boosted = [s for s in seen if s[0].max() == 2]
    seen.clear()
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(0.0),))
    before = [s for s in seen if s[0].max() == 2]
    (_, a, visual, origin), (_, b, _, _) = before[0], boosted[0]
    t = visual.shape[-1]
    there = (visual & (origin % 2 == 1))[0]
    factor = torch.where(there, 3.0, 1.0)
    assert there.any()
    # mean over heads of a softmax: exact only head by head, so against the direction and bounds of the change
    raised, others = (
        b[0, :, :t][there] / a[0, :, :t][there],
        b[0, :, :t][~there & (a[0, :, :t] > 0)] / a[0, :, :t][~there & (a[0, :, :t] > 0)],
    )
    assert (raised > 1).all() and (raised <= 3 + 1e-5).all() and (others < 1).all() and factor.max() == 3
    assert (raised.min() / others.max()) > 2
    seen.clear()
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(math.log(3.0), apart=True),))
    apart = next(s for s in seen if s[0].max() == 2)
    torch.testing.assert_close(apart[1][0], a[0])
    assert not torch.allclose(apart[1][1], a[1], atol=1e-4)


@dataclass
class Reader(Decoder):
    """Reads a field of what a hook is given, and asks for `asked` alone."""

    hook: str
    field: str
    asked: Requirements = Requirements()

    def requirements(self, model):
        return self.asked

    def init_state(self, context):
        self._read("init_state", context)

    def attention_bias(self, cache, state):
        self._read("attention_bias", cache)

    def process_logits(self, step, state, scores):
        self._read("process_logits", step)
        return scores

    def rescore_candidates(self, step, candidates, state, scores):
        if self.hook == "rescore_candidates":
            candidates.requested(self.field)
        return scores, None

    def _read(self, hook, given):
        if hook == self.hook:
            found.append(getattr(given, self.field))


found: list = []
ASKED = {
    ("process_logits", "attention"): ("Step", Requirements(attention=(0,))),
    ("process_logits", "hidden"): ("Step", Requirements(hidden=(0,))),
    ("process_logits", "early_logits"): ("Step", Requirements(early_logits=(0,))),
    ("process_logits", "visual"): ("Step", Requirements(visual=True)),
    ("process_logits", "branch"): ("Step", Requirements(branch=Branch(lambda given: {}))),
    ("attention_bias", "visual"): ("CacheView", Requirements(visual=True)),
    ("init_state", "visual"): ("GenerationContext", Requirements(visual=True)),
    ("init_state", "to_logits"): ("GenerationContext", Requirements(hidden=(0,))),
    ("rescore_candidates", "attention"): ("Candidates", Requirements(attention=(0,), lookahead=2)),
    ("rescore_candidates", "visual"): ("Candidates", Requirements(visual=True, lookahead=2)),
}


@pytest.mark.parametrize(("hook", "field"), ASKED)
def test_what_was_not_requested_cannot_be_read(hook, field):
    owner, asked = ASKED[hook, field]
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    without = Requirements(lookahead=asked.lookahead)
    with pytest.raises(
        StackError, match=rf"{field} of a {owner} was not requested in requirements\(\).* return Requirements\("
    ):
        Stack([Reader(hook, field, without)]).generate(model, **inputs, max_new_tokens=3, do_sample=False)
    found.clear()
    Stack([Reader(hook, field, asked)]).generate(model, **inputs, max_new_tokens=3, do_sample=False)
    assert hook == "rescore_candidates" or found and all(value is not None for value in found)


def test_a_step_with_another_field_keeps_what_was_not_requested_so():
    seen = []

    @dataclass
    class Look(Decoder):
        def requirements(self, model):
            return Requirements(attention=(0,))

        def process_logits(self, step, state, scores):
            seen.append((step, step.replace(logits=-step.logits)))
            return scores

    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    Stack([Look()]).generate(model, **inputs, max_new_tokens=2, do_sample=False)
    step, other = seen[0]
    assert torch.equal(other.logits, -step.logits) and other.attention is step.attention
    with pytest.raises(StackError, match="visual of a Step was not requested"):
        _ = other.visual
    with pytest.raises(AttributeError, match="'Step' object has no attribute 'visuals'"):
        _ = other.visuals


@pytest.mark.parametrize("name", ["position_bias", "sinks"])
def test_what_changes_attention_in_ways_unknown_here_is_refused_after_the_prompt(name):
    """Also where nobody reads attention: torch's sdpa would leave it out without a word."""
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    tap = Tap(frozenset(), masks={0: torch.zeros(1, 1, 2, 5)})
    out, weights = _to_pool(tap, 0, "sdpa", None, query, key, key, None)
    assert out.shape == (1, 2, 4, 8) and weights is None
    with pytest.raises(StackError, match=f"uses '{name}'"):
        _to_pool(tap, 0, "sdpa", None, query, key, key, None, **{name: torch.ones(1)})
